"""What a run left in its directory, as one small value; and those of all runs, as one file."""

from __future__ import annotations

import platform
import re
import statistics
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

from study_parts.execute import EVALUATE, LOGS, RESULT, TRAIN, Place, command, iterations
from study_parts.table import CONFIG, ROOT, Run

from megatron_laep.json_text import read_json
from megatron_laep.records import load_log

FORMAT, VERSION = "megatron_laep study", 1
# The slope at the end, over this share of the iterations.
TAIL = 0.2
_TRAINED = re.compile(r"iteration +(\d+)/ *\d+ \|.*lm loss: ([0-9.E+-]+|nan|inf) \|")
_VALIDATED = re.compile(r"loss at iteration (\d+)(?: on (\w+) set)? \| lm loss value: (\S+) \|")
_PARAMETERS = re.compile(r"number of parameters on .*: (\d+)")
_STABILITY = re.compile(r"event=stability ([^\n]*)")


@cache
def machine() -> dict[str, object]:
    """What computes: commit, processor, versions."""
    names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return {
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": _git("status", "--porcelain", "--untracked-files=no").splitlines(),
        "processor": names[0] if names else platform.processor(),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "megatron_core": metadata.version("megatron-core"),
    }


def _git(*words: str) -> str:
    return subprocess.run(
        ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
    ).stdout.strip()


def losses(text: str) -> tuple[list[list[float]], dict[str, list[list[float]]]]:
    """From a log: [iteration, training loss] and, for each set, [iteration, loss], ascending.

    A run that was continued repeats iterations; the later line counts.
    """
    training = {int(i): float(loss) for i, loss in _TRAINED.findall(text)}
    evaluated: dict[str, dict[int, float]] = {}
    for iteration, name, loss in _VALIDATED.findall(text):
        evaluated.setdefault(name or "validation", {})[int(iteration)] = float(loss)
    curves = {name: [[i, found[i]] for i in sorted(found)] for name, found in evaluated.items()}
    return [[i, training[i]] for i in sorted(training)], curves


def slope(curve: list[list[float]], last: int) -> float | None:
    """Change of the loss in 100 iterations, a straight line through the last TAIL of the curve."""
    tail = [(i, loss) for i, loss in curve if i > last * (1 - TAIL)]
    if len(tail) < 3:
        return None
    return 100 * statistics.linear_regression(*zip(*tail, strict=True)).slope


def result(place: Place, run: Run) -> dict[str, object]:
    """Of a run that has ended.

    Errors: ValueError if a loss is missing.
    """
    folder, setting = place.folder(run), place.setting
    text = (folder / LOGS[TRAIN]).read_text(errors="replace")
    training, curves = losses(text)
    _, final = losses((folder / LOGS[EVALUATE]).read_text(errors="replace"))
    last = iterations(run, setting)
    missing = [name for name in ("validation", "test") if name not in final]
    if missing or not training or training[-1][0] != last:
        raise ValueError(
            f"{folder}: the logs lack {', '.join(missing) or f'iteration {last}'}: see "
            f"{LOGS[TRAIN]} and {LOGS[EVALUATE]}; remove the folder to repeat the run"
        )
    tables = [
        read_json(path, str(path)) for path in sorted((folder / "laep").glob("iter_*/table.json"))
    ]
    tokens = last * setting.flag("--global-batch-size") * setting.flag("--seq-length")
    sizes = [int(number) for number in _PARAMETERS.findall(text)]
    return {
        "name": run.name,
        "row": run.row.name,
        "group": run.row.group,
        "seed": run.seed,
        "command": [word.replace(str(place.root), "ROOT") for word in command(place, run, TRAIN)][
            1:
        ],
        "iterations": last,
        "tokens": tokens,
        "test_loss": final["test"][-1][1],
        "validation_loss": final["validation"][-1][1],
        "validation": curves.get("validation", []),
        "training": training,
        "tail_slope": slope(training, last),
        "parameters_before": tables[0]["parameters_before"] if tables else sizes[0],
        "parameters_after": tables[-1]["parameters_after"] if tables else sizes[0],
        "prunings": [
            {
                "iteration": table["iteration"],
                "experts_before": [row["experts_before"] for row in table["rows"]],
                "experts_after": [row["experts_after"] for row in table["rows"]],
            }
            for table in tables
        ],
        "stability": _stability(text),
        "last_loads": _last_loads(folder / "laep"),
        "machine": machine(),
    }


def _last_loads(folder: Path) -> list[list[int]]:
    """Tokens of each layer's experts in the last window that was recorded."""
    log = load_log.read(load_log.find_logs(folder)[-1])
    return [row.tolist() for row in log.window(log.num_windows - 1)]


def _stability(text: str) -> list[str]:
    """What the job said about it at each of its prunings; of a repeated one, twice."""
    return _STABILITY.findall(text)


def collect(place: Place, runs: tuple[Run, ...], corpus: dict) -> dict[str, object]:
    """All runs that have ended, and what they have in common."""
    setting = place.setting
    found = [read_json(place.folder(run) / RESULT, run.name) for run in runs if place.done(run)]
    return {
        "format": FORMAT,
        "version": VERSION,
        "setting": {**vars(setting), "config": CONFIG.name},
        "corpus": corpus,
        "wanted": [run.name for run in runs],
        "runs": found,
    }
