"""``laep verify``: whether a checkpoint is whole, and what it says of itself is true."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_laep.checks import printable
from megatron_laep.tools import options
from megatron_laep.tools.inspect import TRACKER, checkpoint_name

_SAMPLE = 200
_SHOWN = 5
_MEANINGS = {
    "tracker": "the tracker file names a complete checkpoint",
    "files": "every file is there, and holds what is described",
    "record": "the record and its maps are sound, and of this iteration",
    "shapes": "experts in the weights, and in the optimizer's state, are those of the maps",
    "values": "values are finite, and have their checksums",
}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "verify",
        help="whether a checkpoint is whole and sound",
        description="Checks a checkpoint without a GPU and without processes: exit code 0 if nothing "
        "is wrong with it, 1 if something is. Runs nothing that is in it. Needs torch and "
        "Megatron-Core.",
    )
    parser.add_argument(
        "path",
        metavar="CKPT",
        help="a checkpoint (SAVE/iter_NNNNNNN), or SAVE for its latest checkpoint",
    )
    parser.add_argument(
        "--sample",
        type=int,
        default=_SAMPLE,
        metavar="N",
        help=f"read the values of N stored tensors (default: {_SAMPLE})",
    )
    parser.add_argument("--all", action="store_true", help="read all values: the whole checkpoint")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Makes all checks, prints them, and returns 0 or 1."""
    if args.sample < 0:
        raise ValueError(f"--sample must be at least 0, got {args.sample}")
    found = verify(Path(args.path), -1 if args.all else args.sample)
    if args.json:
        options.print_json(found)
    else:
        print(printable(format_checks(found)))
    return int(any(problems is None or problems for problems in found["checks"].values()))


def verify(path: Path, sample: int) -> dict[str, Any]:
    """JSON-able; ``checks`` has for each check its problems, None where it could not be made.

    Errors: ValueError if there is no checkpoint to look at.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: there is no such folder")
    folder = path if (path / TRACKER).exists() else path.parent
    tracker, tracked = _tracker_problems(folder)
    if folder == path:
        if tracked is None:
            return {"path": str(path), "checks": {"tracker": tracker}}
        path = tracked
    elif not any((path / name).exists() for name in ("metadata.json", ".metadata")):
        raise ValueError(
            f"{path} holds no checkpoint of format torch_dist (metadata.json, .metadata) and no "
            f"{TRACKER}"
        )
    with options.importing_megatron(
        "to look into a checkpoint, torch and Megatron-Core are needed ({missing} is missing): run it "
        "where the job runs"
    ):
        from megatron_laep.mcore.checkpoint_checks import check_checkpoint
    found: dict[str, Any] = check_checkpoint(path, sample)
    if tracker is not None:
        found["checks"] = {"tracker": tracker, **found["checks"]}
    return found


def _tracker_problems(folder: Path) -> tuple[list[str] | None, Path | None]:
    """What is wrong with a folder's tracker file, None without one; and the checkpoint it names."""
    tracker = folder / TRACKER
    if not tracker.is_file():
        return None, None
    try:
        named = folder / checkpoint_name(tracker)
    except ValueError as error:
        return [str(error)], None
    if not (named / "metadata.json").is_file():
        return [f"{tracker} names {named.name}, which is no complete checkpoint"], None
    return [], named


def format_checks(found: dict[str, Any]) -> str:
    """For people: a line for each check, its problems below it."""
    lines = [str(found["path"])]
    for name, problems in found["checks"].items():
        word = "not made" if problems is None else "WRONG" if problems else "ok"
        note = "" if problems else _MEANINGS[name]
        if name == "values" and "read" in found:
            read = found["read"]
            note = f"{read['tensors']} tensors read, {read['checksums']} of them with a checksum"
        lines.append(f"  {word:8}  {name:7}  {note if problems is not None else ''}".rstrip())
        lines += [f"            {problem}" for problem in (problems or ())[:_SHOWN]]
        if problems and len(problems) > _SHOWN:
            lines.append(f"            and {len(problems) - _SHOWN} more")
    return "\n".join(lines)
