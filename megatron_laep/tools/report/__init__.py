"""`laep report RUNDIR`: one HTML file that shows what happened to a run, and needs no network.

Second half of the report: `data.gather` reads the run's files, this module puts its value,
the page's script and Plotly's bundle into one file. Offline; needs neither torch nor Megatron, but
the extra `report` (Jinja2 and Plotly), both imported when a report is made.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from megatron_laep import __version__
from megatron_laep.plan.summary import binary, scaled
from megatron_laep.records.training_log import LOG_NAME
from megatron_laep.tools.options import write_text
from megatron_laep.tools.report.data import gather

PAGE = Path(__file__).resolve().parent / "page"
OUTPUT_NAME = "laep_report.html"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "report",
        help="one HTML file on a run: loads, stability, pruning, loss and time",
        description="Makes one self-contained HTML file on a run: loads by layer and expert over "
        "time, stability of their ranking, experts kept, load per rank, loss and iteration time, "
        "the table and the settings. Every figure says which file it was drawn from.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUNDIR", help="the job's --save folder")
    parser.add_argument(
        "-o", "--output", type=Path, help=f"the file to write (default: RUNDIR/laep/{OUTPUT_NAME})"
    )
    parser.add_argument("--log", type=Path, help="the job's output, if it is not RUNDIR/train.log")
    parser.add_argument(
        "--loads", type=Path, help="the recorded loads, if they are not in RUNDIR/laep/"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes the page and prints its path. Errors: ValueError as `build_report`."""
    path = build_report(args.run_dir, args.output, log_path=args.log, loads_path=args.loads)
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB): open it in a browser")
    return 0


def build_report(
    run_dir: Path,
    output: Path | None = None,
    *,
    log_path: Path | None = None,
    loads_path: Path | None = None,
) -> Path:
    """Writes the report of a run and returns its path.

    The same files give the same bytes, with the same version of Plotly.
    output: None for `run_dir/laep/laep_report.html`. log_path, loads_path: as in
    `data.gather`.
    Errors: ValueError for a run that cannot be read, a missing library, or an output that cannot be
    written.
    """
    run_dir = Path(run_dir)
    data = gather(run_dir, log_path=log_path, loads_path=loads_path)
    page = render(data)
    path = run_dir / "laep" / OUTPUT_NAME if output is None else Path(output)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from None
    given = [item for item in (log_path, loads_path) if item is not None]
    files = [*run_dir.glob("laep/loads-*"), *run_dir.glob("laep/*/*"), run_dir / LOG_NAME, *given]
    write_text(path, page, inputs=files)
    return path


def render(data: dict) -> str:
    """The page as text. Errors: ValueError if Jinja2 or Plotly is not installed."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ValueError(
            f"the report needs {error.name}, which is not installed: pip install jinja2 plotly"
        ) from None
    environment = Environment(
        loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"scaled": scaled, "binary": binary, "mean_of": mean_of}
    # "<" as an escape: no text of a run can end the block that it stands in.
    data_json = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return environment.get_template("page.html.j2").render(
        **data,
        version=__version__,
        css=(PAGE / "page.css").read_text(encoding="utf-8"),
        js=(PAGE / "page.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
        data_json=data_json,
    )


def mean_of(rows: Sequence[dict], name: str) -> float | None:
    """Mean of a field over the rows that have it; None without any."""
    known = [row[name] for row in rows if row[name] is not None]
    return statistics.fmean(known) if known else None
