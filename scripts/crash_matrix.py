#!/usr/bin/env python3
"""Lets small jobs fail at every step, in every way, starts them again, and says what became of them.

    python scripts/crash_matrix.py                          # all, some hours on two cores
    python scripts/crash_matrix.py plain --only "tracker"   # one configuration, points with the word
    python scripts/crash_matrix.py --table                  # what was found so far, as Markdown

Each cell is a job that goes on from a checkpoint shortly before its pruning, fails, and is started
again with the same command. It is kept what was promised where the losses after that are those of the
job that never failed, to the last bit; no checkpoint that Megatron takes for complete is half, or of
another map; and the last one has each pruning once (``tests/support/lives.py``).

Results lie in runs/crash-matrix/COMMIT, one line a cell: a run that was stopped goes on where it was.
Exit code 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from tests.support.lives import CONFIGURATIONS, Broken, Life, cells  # noqa: E402


def folder_of_this_commit() -> Path:
    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=REPOSITORY, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    changed = "-changed" if git("status", "--porcelain", "--untracked-files=no") else ""
    return REPOSITORY / "runs" / "crash-matrix" / (git("rev-parse", "--short=12", "HEAD") + changed)


def run(name: str, results: Path, only: str, seconds: float) -> None:
    """The cells of a configuration that have no result yet, until the time is over."""
    done = {line["cell"] for line in read(results)}
    order = cells(name)
    random.Random(0).shuffle(order)  # what is run in a part of the time is of all points
    wanted = {str(cell): cell for cell in order if only in str(cell) and str(cell) not in done}
    if not wanted:
        return
    until = time.monotonic() + seconds
    scratch = Path(tempfile.mkdtemp(prefix="crash-matrix-"))
    try:
        life = Life(name, scratch)
        for number, (text, cell) in enumerate(wanted.items()):
            if time.monotonic() > until:
                print(f"{name}: {len(wanted) - number} cells are left", flush=True)
                return
            started, folder = time.monotonic(), scratch / f"cell{number}"
            line: dict = {"cell": text}
            try:
                fate = life.fail(folder, cell)
                line |= {"kept": True, "ends": fate.ends, "resumed_after": fate.resumed_after}
            except Broken as broken:
                line |= {"kept": False, "why": str(broken)[:4000]}
            line["seconds"] = round(time.monotonic() - started, 1)
            with open(results, "a") as file:
                file.write(json.dumps(line) + "\n")
            said = "kept" if line["kept"] else f"BROKEN: {line['why'].splitlines()[0]}"
            print(f"{name}: {text}: {said} ({line['seconds']} s)", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def read(results: Path) -> list[dict]:
    return (
        [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    )


def table(folder: Path) -> str:
    """A row for each configuration and point: what of the cells there was kept."""
    rows = ["| configuration | point | cells | kept | went on from iteration |"]
    rows.append("| --- | --- | --- | --- | --- |")
    for name in CONFIGURATIONS:
        found = {line["cell"]: line for line in read(folder / f"{name}.jsonl")}
        points: dict[str, list[str]] = {}
        for cell in cells(name):
            points.setdefault(cell.where, []).append(str(cell))
        for point, texts in points.items():
            lines = [found[text] for text in texts if text in found]
            if not lines:
                continue
            kept = [line for line in lines if line["kept"]]
            after = Counter(line["resumed_after"] for line in kept)
            resumed = ", ".join(str(iteration) for iteration in sorted(after))
            number = f"{len(lines)} of {len(texts)}" if len(lines) < len(texts) else str(len(texts))
            mark = str(len(kept)) if len(kept) == len(lines) else f"**{len(kept)}**"
            rows.append(f"| {name} | {point} | {number} | {mark} | {resumed} |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configurations", nargs="*", metavar="CONFIGURATION", default=[])
    parser.add_argument("--only", default="", metavar="WORD", help="cells whose name has the word")
    parser.add_argument("--table", action="store_true", help="print what was found, run nothing")
    parser.add_argument(
        "--minutes", type=float, default=1e6, metavar="M", help="begin no cell after M minutes"
    )
    options = parser.parse_args()
    names = options.configurations or list(CONFIGURATIONS)
    for name in names:
        if name not in CONFIGURATIONS:
            parser.error(f"got {name}, wanted some of: {', '.join(CONFIGURATIONS)}")
    folder = folder_of_this_commit()
    folder.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * options.minutes
    if not options.table:
        for name in names:
            run(name, folder / f"{name}.jsonl", options.only, until - time.monotonic())
    print(table(folder))
    lines = [line for name in names for line in read(folder / f"{name}.jsonl")]
    broken = sum(not line["kept"] for line in lines)
    print(f"\n{len(lines)} cells, {broken} of them broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
