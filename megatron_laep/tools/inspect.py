"""``laep inspect``: what an expert map, a job's ``laep`` folder, a log or a checkpoint holds."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from megatron_laep.checks import printable
from megatron_laep.json_text import read_json, read_text
from megatron_laep.plan.expert_map import ExpertMap
from megatron_laep.records import load_log
from megatron_laep.records.load_format import FORMAT
from megatron_laep.records.load_log import LoadLog
from megatron_laep.tools import options

TRACKER = "latest_checkpointed_iteration.txt"  # Megatron's, in the folder of --save


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "inspect",
        help="experts per layer, map state, lineage and sizes",
        description="Tells what a file or folder holds. Only a checkpoint needs torch and "
        "Megatron-Core; the rest needs numpy.",
    )
    parser.add_argument(
        "path",
        metavar="PATH",
        help="an expert map (JSON), a folder SAVE/laep, recorded loads, a checkpoint "
        "(SAVE/iter_NNNNNNN), or SAVE for its latest checkpoint",
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Finds out what PATH is, and prints it."""
    found = describe(Path(args.path))
    if args.json:
        options.print_json(found)
    else:
        print(printable(format_description(found)))
    return 0


def describe(path: Path) -> dict[str, object]:
    """A JSON-able description of what is at ``path``; its ``kind`` says what it is.

    Errors: ValueError if it is nothing of ours, or damaged.
    """
    if not path.exists():
        raise ValueError(f"{path}: there is no such file or folder")
    if path.is_dir():
        return _describe_folder(path)
    if path.suffix == ".bin":
        return describe_log(load_log.read(path))
    data = read_json(path, str(path))  # once: it may be a pipe
    if isinstance(data, dict) and (data.get("format") == FORMAT or "tokens" in data):
        return describe_log(load_log.read(path, data))
    try:
        return {"path": str(path), **describe_map(ExpertMap.from_dict(data))}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _describe_folder(path: Path) -> dict[str, object]:
    if (path / "metadata.json").exists():
        return _describe_checkpoint(path)
    tracker = path / TRACKER
    if tracker.exists():
        return _describe_checkpoint(path / checkpoint_name(tracker))
    folder = path / "laep" if (path / "laep").is_dir() else path
    maps = sorted([*folder.glob("iter_*/map.json"), *folder.glob("map.json")])
    logs = load_log.find_logs(folder)
    if not maps and not logs:
        raise ValueError(
            f"{path} holds no checkpoint ({TRACKER} or metadata.json), no recorded loads "
            "(loads-*.bin) and no expert maps (iter_*/map.json)"
        )
    return {
        "kind": "folder",
        "path": str(folder),
        "logs": [describe_log(load_log.read(log)) for log in logs],
        "maps": [{"path": str(item), **describe_map(read_map(item))} for item in maps],
    }


def checkpoint_name(tracker: Path) -> str:
    iteration = read_text(tracker, most=4096, errors="replace").strip()
    if iteration == "release":
        return iteration
    if not re.fullmatch("[0-9]{1,18}", iteration):
        raise ValueError(
            f"{tracker} names no iteration, but {iteration[:40]!r}: name a checkpoint folder"
        )
    return f"iter_{int(iteration):07d}"


def _describe_checkpoint(path: Path) -> dict[str, object]:
    with options.importing_megatron(
        f"{path} is a checkpoint, and to read one torch and Megatron-Core are needed "
        "({missing} is missing): run it where the job runs, or look at the maps "
        f"in {path.parent / 'laep'}, which needs neither"
    ):
        from megatron_laep.mcore.checkpoint_facts import describe_checkpoint
    return describe_checkpoint(path)


def read_map(path: Path) -> ExpertMap:
    """An expert map from its file. Errors: ValueError that names the file."""
    try:
        return ExpertMap.from_json(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def describe_map(expert_map: ExpertMap) -> dict[str, object]:
    """The facts of a map; ``lineage`` of a layer: the ids before, in their new order."""
    return {
        "kind": "expert map",
        "hash": expert_map.hash,
        "iteration": expert_map.iteration,
        "rules": {
            name: getattr(expert_map, name)
            for name in ("alpha", "beta", "expert_multiple", "placement", "top_k")
        },
        "expert_parallel_size_before": expert_map.expert_parallel_size_before,
        "expert_parallel_size_after": expert_map.expert_parallel_size_after,
        "layers": [
            {
                "layer_number": layer.layer_number,
                "experts_before": layer.experts_before,
                "experts_after": layer.experts_after,
                "experts_per_rank": list(layer.experts_per_rank),
                "lineage": list(layer.kept),
            }
            for layer in expert_map.layers
        ],
    }


def describe_log(log: LoadLog) -> dict[str, object]:
    """The facts of recorded loads, over all of their windows."""
    totals_LE = log.rows(log.tokens_WLE.sum(axis=0))
    return {
        "kind": "recorded loads",
        "path": log.source,
        "windows": log.num_windows,
        "first_iteration": int(log.first_iterations[0]),
        "last_iteration": int(log.last_iterations[-1]),
        "top_k": log.top_k,
        "expert_parallel_size": log.expert_parallel_size,
        "lineage": list(log.lineage),
        "layers": [
            {
                "layer_number": number,
                "experts": tokens_E.size,
                "tokens": int(tokens_E.sum()),
                "busiest_expert_over_mean": _over_mean(tokens_E),
                "experts_without_token": int((tokens_E == 0).sum()),
            }
            for number, tokens_E in zip(log.layer_numbers, totals_LE, strict=True)
        ],
    }


def _over_mean(tokens_E: np.ndarray) -> float | None:
    return float(tokens_E.max() / tokens_E.mean()) if tokens_E.any() else None


def format_description(found: dict[str, Any]) -> str:
    """The same for people."""
    if found["kind"] == "folder":
        parts = [format_description(item) for item in [*found["logs"], *found["maps"]]]
        return "\n\n".join(parts)
    facts = []
    for name, value in found.items():
        if name == "layers":
            continue
        if isinstance(value, dict):
            value = _words(value)
        elif isinstance(value, list):
            words = [_words(item) if isinstance(item, dict) else item for item in value]
            value = "\n".join(words) or "none, this is the original model"
        elif isinstance(value, int):
            value = f"{value:,}" if value >= 10**6 else value
        facts.append((name.replace("_", " "), "not recorded" if value is None else value))
    head = tabulate(facts, tablefmt="plain", disable_numparse=True)
    layers = [
        {name.replace("_", " "): _cell(value) for name, value in layer.items()}
        for layer in found["layers"]
    ]
    table = tabulate(layers, headers="keys", disable_numparse=True, stralign="right")
    return f"{head}\n\n{table}"


def _words(facts: dict[str, object]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items())


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.2f}"
    if isinstance(value, list):
        # Long lists in full are for --json.
        head = " ".join(map(str, value[:8]))
        return head if len(value) <= 8 else f"{head} ... ({len(value)})"
    return str(value)
