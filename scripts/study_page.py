#!/usr/bin/env python3
"""The page of the study, from its file of results: docs/study.md and docs/study.svg.

scripts/study.py --collect docs/study.json
scripts/study_page.py docs/study.json docs/study.md
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from study_parts import compare  # noqa: E402
from study_parts.collect import FORMAT, VERSION  # noqa: E402
from study_parts.compare import Difference, Result  # noqa: E402
from study_parts.table import BASE, DEFAULT, Setting, rows  # noqa: E402
from tabulate import tabulate  # noqa: E402

from megatron_laep.json_text import read_json  # noqa: E402

# Rows of these groups are compared with the run that LAEP pruned as well, which they are controls of.
CONTROLS = ("which experts", "moment", "resume", "equal compute")


def interval(difference: Difference) -> str:
    if difference.low is None:
        return "one seed"
    return f"{difference.low:+.4f} to {difference.high:+.4f}"


def pruned_share(run: Result) -> float:
    return 1 - run["parameters_after"] / run["parameters_before"]


def row_table(runs: list[Result], reference: str, groups: tuple[str, ...] | None) -> str:
    """A Markdown table: each row's test loss, and the difference from a reference."""
    table = compare.losses(runs)
    lines = []
    for row in rows(Setting()):
        if row.name not in table or (groups and row.group not in groups and row.name != reference):
            continue
        own = [run for run in runs if run["row"] == row.name]
        smaller = statistics.mean(map(pruned_share, own))
        seeds = table[row.name]
        cells = [row.name, row.group, f"{smaller:.1%}" if smaller else "", len(seeds)]
        cells.append(f"{statistics.mean(seeds.values()):.4f}")
        if row.name != reference and set(seeds) & set(table.get(reference, {})):
            difference = compare.difference(table, row.name, reference)
            cells += [f"{difference.mean:+.4f}", interval(difference)]
        lines.append(cells)
    head = ["row", "question", "parameters less", "seeds", "test loss"]
    return tabulate(lines, [*head, f"minus {reference}", "95 % interval"], tablefmt="github",
                    disable_numparse=True)  # fmt: skip


def ordering_table(runs: list[Result]) -> str:
    lines = [
        [
            f"{ordering.better} below {ordering.worse}",
            f"{ordering.published:+.3f}",
            f"{ordering.here.mean:+.4f}",
            interval(ordering.here),
            ordering.verdict,
        ]
        for ordering in compare.orderings(compare.losses(runs))
    ]
    head = ["the paper's order", "there", "here", "95 % interval", "verdict"]
    return tabulate(lines, head, tablefmt="github", disable_numparse=True)


def setting_text(found: Result) -> str:
    runs = found["runs"]
    base = [run for run in runs if run["row"] == BASE]
    machines = sorted({f"{run['machine']['processor']}" for run in runs})
    commits = sorted({run["machine"]["commit"][:12] for run in runs})
    missing = sorted(set(found["wanted"]) - {run["name"] for run in runs})
    sets = found["corpus"]["sets"]
    lines = [
        f"* Text: {found['corpus']['text']}; "
        + ", ".join(f"{name} {part['tokens']:,} bytes" for name, part in sets.items())
        + ". The sets are held apart by whole files.",
        f"* Model: `configs/{found['setting']['config']}`, "
        f"{base[0]['parameters_before']:,} parameters, {base[0]['tokens']:,} tokens a run, "
        f"{base[0]['tokens'] / base[0]['parameters_before']:.1f} tokens a parameter.",
        f"* At the end of {BASE} the training loss still changed by "
        f"{statistics.mean(run['tail_slope'] for run in base):+.4f} in 100 iterations.",
        f"* Seeds of {BASE} differ: standard deviation of the test loss "
        + (
            f"{statistics.stdev(run['test_loss'] for run in base):.4f}."
            if len(base) > 1
            else "unknown, there is one."
        ),
        f"* Commit {', '.join(commits)}; {', '.join(machines)}.",
        f"* {len(runs)} of {len(found['wanted'])} runs have ended."
        + (f" Missing: {', '.join(missing)}." if missing else ""),
    ]
    return "\n".join(lines)


def draw(runs: list[Result], path: Path) -> None:
    """Each row's difference from BASE: a dot for a seed, a bar for the interval."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "study"
    from matplotlib import pyplot

    table = compare.losses(runs)
    names = [row.name for row in rows(Setting()) if row.name in table and row.name != BASE]
    names = [name for name in names if set(table[name]) & set(table[BASE])]
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.32 * len(names)))
    for height, name in enumerate(reversed(names)):
        difference = compare.difference(table, name, BASE)
        if difference.low is not None:
            axes.plot([difference.low, difference.high], [height, height], color="tab:blue")
        axes.plot(list(difference.by_seed.values()), [height] * len(difference.by_seed), "k.")
    axes.axvline(0, color="gray", linewidth=0.8)
    axes.set_yticks(range(len(names)), list(reversed(names)))
    axes.set_xlabel(f"test loss minus that of {BASE} with the same seed (left is better)")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def page(found: Result, figure: str) -> str:
    runs = found["runs"]
    return f"""# The study: what a pruning does to the model

Written by `scripts/study_page.py` from the results of `scripts/study.py`; do not edit. One command repeats
it: `scripts/study.py`, which says how long it takes.

{setting_text(found)}

## Every row against the full model

Differences are paired by seed. An interval that leaves out 0 says that the difference is more than seeds
make; of so many rows, one in twenty does so by chance.

{row_table(runs, BASE, None)}

![differences from {BASE}]({figure})

## Controls against the pruned model

{row_table(runs, DEFAULT, CONTROLS)}

## The paper's orderings

Test losses of the paper's 10B model (arXiv 2601.14327), and whether this model of another size says the same.

{ordering_table(runs)}
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="from scripts/study.py --collect")
    parser.add_argument("page", type=Path, help="Markdown; the figure goes beside it, as .svg")
    args = parser.parse_args(arguments)
    found = read_json(args.results, str(args.results))
    if (found.get("format"), found.get("version")) != (FORMAT, VERSION):
        parser.error(f"{args.results}: wanted results of scripts/study.py --collect")
    if not any(run["row"] == BASE for run in found["runs"]):
        parser.error(f"{args.results}: no run of {BASE} has ended yet, and all is compared with it")
    figure = args.page.with_suffix(".svg")
    draw(found["runs"], figure)
    args.page.write_text(page(found, figure.name))
    print(args.page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
