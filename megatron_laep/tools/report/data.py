"""Everything that the report of a run shows, gathered from the run's files as one JSON-able value.

First half of `laep report`: `gather` reads and checks; `report` puts the value into the page, whose
script draws from it and from nothing else. So a number in a figure is a number in a file, and each
block says which (`source`).

Shape suffixes: W windows, L MoE layers, E experts, R expert-parallel (EP) ranks.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_laep.plan.placement import rank_loads
from megatron_laep.plan.stability import Comparison, compare
from megatron_laep.records import decision_log, profile_log
from megatron_laep.records.training_log import (
    LOG_NAME,
    TrainingLog,
    mean_between,
    median_milliseconds,
)
from megatron_laep.settings.rules import PruningRules
from megatron_laep.settings.thresholds import StabilityThresholds
from megatron_laep.tools.report.load_history import LoadHistory, Window, original_ids, read_history
from megatron_laep.tools.report.run_files import (
    Pruning,
    read_decisions,
    read_log,
    read_profile,
    read_prunings,
)

# Means over so many iterations on either side of a pruning, as in `laep summary`.
MEAN_WINDOW = 20
# What keeps the page below 6 MB beside Plotly's 4.8: characters of the heat map's windows, and lines
# of the log in a curve.
MAX_WINDOW_CHARACTERS = 800_000
MAX_LOG_LINES = 3000
# Measures of the stability, and which of two layers is the worse one.
MEASURES = {"rank_correlation": min, "churn": max, "load_change": max}
# Arguments of the job that the page lists, beside all that start with laep_ or moe_.
ARGUMENTS = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads seq_length num_experts "
    "micro_batch_size global_batch_size train_iters lr min_lr lr_decay_style clip_grad seed "
    "world_size data_parallel_size tensor_model_parallel_size pipeline_model_parallel_size "
    "context_parallel_size expert_model_parallel_size expert_tensor_parallel_size bf16 fp16 "
    "use_distributed_optimizer transformer_impl ckpt_format log_interval save_interval"
).split()


def gather(run_dir: Path, *, log_path: Path | None = None, loads_path: Path | None = None) -> dict:
    """The report's data.

    log_path, loads_path: the training log and the recorded loads, if they lie elsewhere than in
    `run_dir/train.log` and `run_dir/laep/`.
    Errors: ValueError, a sentence that names the file, for a folder with nothing to report on, and
    for files that are damaged or do not belong together.
    """
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir} is no folder: give the folder of a run (--save)")
    prunings = read_prunings(run_dir)
    log = read_log(run_dir, log_path)
    decisions = read_decisions(run_dir)
    maps = [pruning.expert_map for pruning in prunings]
    history = read_history(run_dir, maps, loads_path)
    if not prunings and log is None and history is None:
        raise ValueError(
            f"{run_dir} has no laep/iter_* folder, no recorded loads and no {LOG_NAME}: give the "
            "folder that the job got as --save"
        )
    log_name = LOG_NAME if log_path is None else log_path.name
    return {
        "run": run_dir.resolve().name,
        "prunings": [
            _pruning_data(pruning, position, prunings, log)
            for position, pruning in enumerate(prunings)
        ],
        "history": _history_data(history, prunings),
        "stability": None
        if history is None
        else _stability_data(history, prunings, log, _thresholds(decisions, log)),
        "decisions": [
            {
                "iteration": decision["iteration"],
                "verdict": decision["verdict"],
                "stable_layers": decision["stable_layers"],
                "layers_needed": decision["layers_needed"],
                "layers": len(decision["layers"]),
                "row": f"laep/{decision_log.NAME}, row {decision['row']}",
            }
            for decision in decisions
        ],
        "profile": _profile_data(read_profile(run_dir), prunings),
        "log": None if log is None else _log_data(log, log_name, prunings),
        "settings": None if log is None else _settings(log, log_name),
    }


def _profile_data(timed: Sequence[dict], prunings: Sequence[Pruning]) -> list[dict]:
    """Means of the timed iterations of each model that the run had, the full one first."""
    ends = [*(pruning.expert_map.iteration for pruning in prunings), math.inf]
    found: list[dict] = []
    after = 0.0
    for end in ends:
        here = [item for item in timed if after < item["iteration"] <= end]
        after = end
        if not here:
            continue
        by_layer: dict[int, list[dict]] = {}
        for item in here:
            for layer in item["layers"]:
                by_layer.setdefault(layer["layer"], []).append(layer)
        layers = [
            {"layer": number}
            | {part: statistics.fmean(row[part] for row in rows) for part in profile_log.PARTS}
            for number, rows in sorted(by_layer.items())
        ]
        found.append(
            {
                "first": here[0]["iteration"],
                "last": here[-1]["iteration"],
                "timed": len(here),
                "layers": layers,
                "total": {part: sum(row[part] for row in layers) for part in profile_log.PARTS},
            }
        )
    return found


# -- prunings --------------------------------------------------------------------------------------


def _pruning_data(
    pruning: Pruning, position: int, prunings: Sequence[Pruning], log: TrainingLog | None
) -> dict:
    expert_map = pruning.expert_map
    first = prunings[position - 1].expert_map.iteration if position else 0
    last = math.inf
    if position + 1 < len(prunings):
        last = prunings[position + 1].expert_map.iteration
    layers = []
    for layer, tokens_E, blocks_before in zip(
        expert_map.layers, pruning.tokens_LE, pruning.blocks_before, strict=True
    ):
        layers.append(
            {
                "layer_number": layer.layer_number,
                "kept": list(layer.kept),
                "pruned": list(layer.pruned),
                "rank_tokens_before": rank_loads(tokens_E, blocks_before).tolist(),
                "rank_tokens_after": rank_loads(
                    tokens_E[list(layer.kept)], layer.experts_per_rank
                ).tolist(),
            }
        )
    rules = (
        ("iteration", expert_map.iteration),
        ("alpha", expert_map.alpha),
        ("beta", expert_map.beta),
        ("expert_multiple", expert_map.expert_multiple),
        ("placement", expert_map.placement),
        ("expert_parallel_size_before", expert_map.expert_parallel_size_before),
        ("expert_parallel_size_after", expert_map.expert_parallel_size_after),
        ("top_k", expert_map.top_k),
        ("hash", expert_map.hash),
    )
    return {
        "iteration": expert_map.iteration,
        "folder": pruning.folder,
        "window": pruning.window,
        "rules": [[name, value, f"{pruning.folder}/map.json: {name}"] for name, value in rules]
        + [["window", pruning.window, f"{pruning.folder}/loads.json: window"]],
        "layers": layers,
        "table": pruning.table,
        "measured": None if log is None else _measured(log, first, expert_map.iteration, last),
    }


def _measured(log: TrainingLog, first: int, pruned: int, last: float) -> dict:
    """Iteration time and loss on both sides of a pruning, between the prunings around it.

    Not over lines with a loss that is no finite number: the page lists these.
    """
    timed = [line for line in log.lines if math.isfinite(line.milliseconds)]
    before = [line for line in timed if first < line.iteration <= pruned]
    after = [line for line in timed if pruned < line.iteration <= last]
    end = after[-1].iteration if after else pruned
    window = min(MEAN_WINDOW, pruned - first, max(end - pruned, 1))
    around = {"before": (pruned - window, pruned), "after": (pruned, min(pruned + window, end))}
    finite = [line for line in log.lines if line.loss is not None and math.isfinite(line.loss)]
    loads = [line for line in log.loads if math.isfinite(line.imbalance)]
    return {
        "window": window,
        "milliseconds_before": median_milliseconds(before),
        "milliseconds_after": median_milliseconds(after),
        **{f"loss_{side}": mean_between(finite, "loss", *span) for side, span in around.items()},
        **{
            f"imbalance_{side}": mean_between(loads, "imbalance", *span)
            for side, span in around.items()
        },
    }


# -- loads over time -------------------------------------------------------------------------------


def _history_data(history: LoadHistory | None, prunings: Sequence[Pruning]) -> dict | None:
    """Windows for the heat map, all loads in the numbering of their stage, and for each stage the
    experts' ids in the original model.

    Without recorded loads, the windows that the prunings were decided on.
    """
    over_time = history is not None
    if history is None:
        if not prunings:
            return None
        history = LoadHistory(
            sources=tuple(f"{pruning.folder}/loads.json" for pruning in prunings),
            layer_numbers=prunings[0].expert_map.layer_numbers,
            windows=tuple(
                Window(
                    first_iteration=max(1, p.expert_map.iteration - p.window + 1),
                    last_iteration=p.expert_map.iteration,
                    stage=stage,
                    tokens_LE=p.tokens_LE,
                    row=f"{p.folder}/loads.json",
                )
                for stage, p in enumerate(prunings)
            ),
            original_ids=original_ids([p.expert_map for p in prunings], ()),
        )
    return {
        "over_time": over_time,
        "source": [f"{source}: tokens" for source in history.sources],
        "layer_numbers": list(history.layer_numbers),
        "original_ids": [[list(ids) for ids in stage] for stage in history.original_ids],
        "recorded_windows": len(history.windows),
        "left_out": history.left_out,
        "windows": [
            {
                "first_iteration": window.first_iteration,
                "last_iteration": window.last_iteration,
                "stage": window.stage,
                "row": window.row,
                "tokens": [tokens_E.tolist() for tokens_E in window.tokens_LE],
            }
            for window in _shown_windows(history)
        ],
    }


def _shown_windows(history: LoadHistory) -> list[Window]:
    """The windows that the heat map shows: all, or evenly spread ones with the last before and the
    first after each pruning."""
    windows = history.windows
    longest = max(sum(len(str(e.tolist())) for e in window.tokens_LE) for window in windows)
    most = max(2, MAX_WINDOW_CHARACTERS // longest)
    if len(windows) <= most:
        return list(windows)
    shown = {round(i * (len(windows) - 1) / (most - 1)) for i in range(most)}
    for i, (one, two) in enumerate(pairwise(windows)):
        if one.stage != two.stage:
            shown |= {i, i + 1}
    return [windows[i] for i in sorted(shown)]


def _stability_data(
    history: LoadHistory,
    prunings: Sequence[Pruning],
    log: TrainingLog | None,
    thresholds_and_source: tuple[StabilityThresholds, str],
) -> dict:
    """Each recorded window against the one before it: of all windows, not only of those that the
    heat map shows."""
    rules, rules_source = _rules(prunings, log)
    thresholds, thresholds_source = thresholds_and_source
    changes = []
    pairs = list(pairwise(history.windows))
    for before, now in tqdm(pairs, desc="stability", delay=2, disable=None, file=sys.stderr):
        layers = []
        for position, number in enumerate(history.layer_numbers):
            before_E, now_E = before.tokens_LE[position], now.tokens_LE[position]
            if before.stage != now.stage:
                # The experts of both windows, in the order of the later one.
                old_ids, new_ids = (history.original_ids[w.stage][position] for w in (before, now))
                place_of = {expert: i for i, expert in enumerate(old_ids)}
                before_E = before_E[[place_of[expert] for expert in new_ids]]
            rule = {"alpha": rules.alpha_spec.for_layer(number), "beta": rules.beta}
            layers.append(compare(before_E, now_E, **rule, thresholds=thresholds))
        changes.append(
            {
                "from": before.last_iteration,
                "to": now.last_iteration,
                "row": f"{before.row} and {now.row}",
                **_over_layers(layers, history.layer_numbers, same_model=before.stage == now.stage),
            }
        )
    return {
        "source": "; ".join(f"{source}: tokens" for source in history.sources),
        "rules": [rules.alpha, rules.beta, rules_source],
        "thresholds": asdict(thresholds),
        "thresholds_source": thresholds_source,
        "changes": changes,
    }


def _over_layers(
    layers: Sequence[Comparison], layer_numbers: Sequence[int], *, same_model: bool
) -> dict:
    """For each measure the median of the layers, the worst one and which it is. No churn across a
    pruning: the rule then looks at another layer."""
    result: dict[str, Any] = {}
    for measure, worst in MEASURES.items():
        values = [getattr(comparison, measure) for comparison in layers]
        value = worst(values)
        result[measure] = {
            "median": statistics.median(values),
            "worst": value,
            "worst_layer": layer_numbers[values.index(value)],
        }
    if not same_model:
        result["churn"] = None
    result["layers_within"] = sum(x.passed for x in layers) if same_model else None
    result["layers"] = len(layers)
    return result


def _thresholds(
    decisions: Sequence[dict], log: TrainingLog | None
) -> tuple[StabilityThresholds, str]:
    """The run's own thresholds, and where they are from."""
    if decisions:
        row = decisions[-1]["row"]
        return (
            StabilityThresholds(**decisions[-1]["thresholds"]),
            f"laep/{decision_log.NAME}, row {row}",
        )
    arguments = {} if log is None else log.arguments
    flags: dict[str, Any] = {
        f"laep_stability_{field.name}": field for field in fields(StabilityThresholds)
    }
    if set(flags) <= set(arguments):
        try:
            thresholds = StabilityThresholds(
                **{
                    field.name: type(field.default)(arguments[flag][0])
                    for flag, field in flags.items()
                }
            )
        except ValueError as error:
            raise ValueError(
                f"row {arguments[next(iter(flags))][1]} of the training log and the rows after it: no "
                f"thresholds can be read from laep_stability_...: {error}"
            ) from None
        return thresholds, "the arguments in the training log"
    return StabilityThresholds(), "the defaults of --laep-stability-..."


def _rules(prunings: Sequence[Pruning], log: TrainingLog | None) -> tuple[PruningRules, str]:
    """alpha and beta of the run, and where they are from."""
    for pruning in prunings:
        if pruning.expert_map.beta:  # a map that was given by hand carries no rule
            expert_map = pruning.expert_map
            rules = PruningRules(expert_map.alpha, expert_map.beta)
            return rules, f"{pruning.folder}/map.json"
    arguments = {} if log is None else log.arguments
    if "laep_alpha" in arguments and "laep_beta" in arguments:
        (alpha, row), (beta, _) = arguments["laep_alpha"], arguments["laep_beta"]
        try:
            rules = PruningRules(alpha, float(beta))
            rules.validate()
        except ValueError as error:
            raise ValueError(
                f"row {row} of the training log: no rule can be read from laep_alpha {alpha!r} and "
                f"laep_beta {beta!r}: {error}"
            ) from None
        return rules, "the arguments in the training log"
    return PruningRules(), "the defaults of --laep-alpha and --laep-beta"


# -- the log ---------------------------------------------------------------------------------------


def _log_data(log: TrainingLog, name: str, prunings: Sequence[Pruning]) -> dict:
    keep = _shown_lines(log, [pruning.expert_map.iteration for pruning in prunings])
    not_finite = [
        [line.iteration, line.row]
        for line in log.lines
        if not math.isfinite(line.milliseconds)
        or (line.loss is not None and not math.isfinite(line.loss))
    ]
    return {
        "source": name,
        "train_iterations": log.train_iterations,
        "last_iteration": log.lines[-1].iteration,
        "lines": [
            [line.iteration, _finite(line.loss), _finite(line.milliseconds), line.row]
            for line in (log.lines[i] for i in keep)
        ],
        "lines_in_file": len(log.lines),
        "not_finite": not_finite[:20],
        "not_finite_count": len(not_finite),
        "loads": [
            [line.iteration, _finite(line.imbalance), line.dead_experts, line.row]
            for line in log.loads[:: -(-len(log.loads) // MAX_LOG_LINES) or 1]
        ],
        "loads_in_file": len(log.loads),
        "validation": log.validation and [log.validation[0], *map(_finite, log.validation[1:])],
        "events": [[event.name, dict(event.fields), event.row] for event in log.events[:60]],
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _shown_lines(log: TrainingLog, prune_iterations: Sequence[int]) -> list[int]:
    """Positions of the lines that the curves show: all, or of each of equal stretches the first
    and those with the lowest and highest loss and the longest time, so that no spike is lost."""
    count = len(log.lines)
    if count <= MAX_LOG_LINES:
        return list(range(count))
    shown = {count - 1}
    stretch = -(-count * 4 // MAX_LOG_LINES)
    for start in range(0, count, stretch):
        part = range(start, min(start + stretch, count))
        with_loss = [i for i in part if _finite(log.lines[i].loss) is not None]
        shown |= {start, max(part, key=lambda i: log.lines[i].milliseconds)}
        if with_loss:
            by_loss = sorted(with_loss, key=lambda i: log.lines[i].loss or 0.0)
            shown |= {by_loss[0], by_loss[-1]}
    for iteration in prune_iterations:
        behind = sum(line.iteration <= iteration for line in log.lines)
        shown |= {max(behind - 1, 0), min(behind, count - 1)}
    return sorted(shown)


def _settings(log: TrainingLog, name: str) -> list[list[str]]:
    """Rows of name, value, place in the log."""
    return [
        [key, value, f"{name}, row {row}"]
        for key, (value, row) in log.arguments.items()
        if key in ARGUMENTS or key.startswith(("laep_", "moe_"))
    ]
