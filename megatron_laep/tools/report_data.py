"""Everything that the report of a run shows, gathered from the run's files as one JSON-able value.

First half of `laep report`: `gather` reads and checks; `report` puts the value into the page, whose
script draws from it and from nothing else. So a number in a figure is a number in a file, and each
block says which (`source`).

Shape suffixes: W windows, L MoE layers, E experts, R expert-parallel (EP) ranks.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from megatron_laep.config import AlphaSpec, LaepConfig
from megatron_laep.placement import rank_loads
from megatron_laep.tools.load_history import LoadHistory, find_history
from megatron_laep.tools.run_files import LOG_NAME, Pruning, read_log, read_prunings
from megatron_laep.tools.window_ranking import RankingChange, compare_windows
from megatron_laep.training_log import TrainingLog, mean_between, median_milliseconds

# Means over so many iterations on either side of a pruning, as in scripts/summarize_run.py.
MEAN_WINDOW = 20
# What keeps the page below 6 MB beside Plotly's 4.8: characters of the heat map's windows, and lines
# of the log in a curve.
MAX_WINDOW_CHARACTERS = 800_000
MAX_LOG_LINES = 3000
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
    found = find_history(run_dir, loads_path)
    if not prunings and log is None and found is None:
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
        "history": _history_data(found, prunings),
        "stability": None if found is None else _stability_data(found, prunings, log),
        "log": None if log is None else _log_data(log, log_name, prunings),
        "settings": None if log is None else _settings(log, log_name),
    }


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
    for layer, tokens_E in zip(expert_map.layers, pruning.tokens_LE, strict=True):
        ranks_before = expert_map.expert_parallel_size_before
        blocks_before = [layer.experts_before // ranks_before] * ranks_before
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
    before = [line for line in log.lines if first < line.iteration <= pruned]
    after = [line for line in log.lines if pruned < line.iteration <= last]
    end = after[-1].iteration if after else pruned
    window = min(MEAN_WINDOW, pruned - first, max(end - pruned, 1))
    around = {"before": (pruned - window, pruned), "after": (pruned, min(pruned + window, end))}
    finite = [line for line in log.lines if line.loss is not None and math.isfinite(line.loss)]
    return {
        "window": window,
        "milliseconds_before": median_milliseconds(before),
        "milliseconds_after": median_milliseconds(after),
        **{f"loss_{side}": mean_between(finite, "loss", *span) for side, span in around.items()},
        **{
            f"imbalance_{side}": mean_between(log.loads, "imbalance", *span)
            for side, span in around.items()
        },
    }


# -- loads over time -------------------------------------------------------------------------------


def _history_data(found: tuple[LoadHistory, str] | None, prunings: Sequence[Pruning]) -> dict | None:
    """Windows for the heat map, all loads in the numbering of their window, and for each stage (the
    model before the first pruning, after it, ...) the experts' ids in the original model.

    Without recorded loads, the windows that the prunings were decided on.
    """
    if found is None:
        if not prunings:
            return None
        layer_numbers = list(prunings[0].expert_map.layer_numbers)
        windows = [(p.expert_map.iteration, p.tokens_LE) for p in prunings]
        sources = [f"{pruning.folder}/loads.json: tokens" for pruning in prunings]
        recorded = len(windows)
        rows = [f"{pruning.folder}/loads.json" for pruning in prunings]
    else:
        history, name = found
        _check_same_model(history, name, prunings)
        layer_numbers = list(history.layer_numbers)
        every = list(zip(history.last_iterations, history.tokens, strict=True))
        recorded = len(every)
        shown = _shown_windows(history, [p.expert_map.iteration for p in prunings])
        windows = [every[i] for i in shown]
        sources = [f"{name}: tokens"]
        rows = [f"{name}, window {i + 1} of {recorded}" for i in shown]
    ids = _original_ids([tokens_E.size for tokens_E in windows[0][1]], prunings)
    return {
        "over_time": found is not None,
        "source": sources,
        "layer_numbers": layer_numbers,
        "original_ids": ids,
        "recorded_windows": recorded,
        "windows": [
            {
                "last_iteration": iteration,
                "stage": _stage(iteration, prunings),
                "row": row,
                "tokens": [tokens_E.tolist() for tokens_E in tokens_LE],
            }
            for (iteration, tokens_LE), row in zip(windows, rows, strict=True)
        ],
    }


def _stage(iteration: int, prunings: Sequence[Pruning]) -> int:
    """Prunings that the model had behind it in a window that ends at this iteration."""
    return sum(pruning.expert_map.iteration < iteration for pruning in prunings)


def _original_ids(counts: Sequence[int], prunings: Sequence[Pruning]) -> list[list[list[int]]]:
    """[stages][L][E of that stage]: the ids in the original model."""
    if prunings:
        counts = [layer.experts_before for layer in prunings[0].expert_map.layers]
    stages = [[list(range(count)) for count in counts]]
    for pruning in prunings:
        stages.append(
            [
                [ids[old] for old in layer.kept]
                for ids, layer in zip(stages[-1], pruning.expert_map.layers, strict=True)
            ]
        )
    return stages


def _check_same_model(history: LoadHistory, name: str, prunings: Sequence[Pruning]) -> None:
    if prunings and history.layer_numbers != prunings[0].expert_map.layer_numbers:
        raise ValueError(
            f"{name} has MoE layers {list(history.layer_numbers)}, {prunings[0].folder}/map.json "
            f"{list(prunings[0].expert_map.layer_numbers)}: they are of different models"
        )
    stages = _original_ids(history.expert_counts[0], prunings)
    for iteration, counts in zip(history.last_iterations, history.expert_counts, strict=True):
        stage = stages[_stage(iteration, prunings)]
        for number, count, ids in zip(history.layer_numbers, counts, stage, strict=True):
            if count != len(ids):
                raise ValueError(
                    f"{name}: in the window that ends at iteration {iteration}, layer {number} has "
                    f"{count} experts, by the run's maps it has {len(ids)}: these loads are of "
                    "another model or another run"
                )


def _shown_windows(history: LoadHistory, prune_iterations: Sequence[int]) -> list[int]:
    """Positions of the windows that the heat map shows: all, or evenly spread ones with the last
    before and the first after each pruning."""
    count = len(history.last_iterations)
    longest = max(
        sum(len(str(loads_E.tolist())) for loads_E in window) for window in history.tokens
    )
    most = max(2, MAX_WINDOW_CHARACTERS // longest)
    if count <= most:
        return list(range(count))
    shown = {round(i * (count - 1) / (most - 1)) for i in range(most)}
    for iteration in prune_iterations:
        behind = sum(last <= iteration for last in history.last_iterations)
        shown |= {max(behind - 1, 0), min(behind, count - 1)}
    return sorted(shown)


def _stability_data(
    found: tuple[LoadHistory, str], prunings: Sequence[Pruning], log: TrainingLog | None
) -> dict:
    """Changes of the ranking from each recorded window to the next: of all windows, not only of
    those that the heat map shows."""
    history, name = found
    alpha, beta, rules_source = _rules(prunings, log)
    alpha_spec = AlphaSpec.parse(alpha)
    stages = _original_ids(history.expert_counts[0], prunings)
    changes = []
    for index in range(1, len(history.last_iterations)):
        iterations = history.last_iterations[index - 1 : index + 1]
        one, two = (_stage(iteration, prunings) for iteration in iterations)
        layers = []
        for position, number in enumerate(history.layer_numbers):
            before_E, after_E = (history.tokens[i][position] for i in (index - 1, index))
            if one != two:
                # The experts of both windows, in the order of the later one.
                place_of = {expert: i for i, expert in enumerate(stages[one][position])}
                before_E = before_E[[place_of[expert] for expert in stages[two][position]]]
                if not before_E.any() or not after_E.any():
                    layers.append(None)
                    continue
            change = compare_windows(
                before_E,
                after_E,
                alpha=alpha_spec.for_layer(number),
                beta=beta,
                same_model=one == two,
            )
            layers.append(change)
        changes.append(
            {
                "from": iterations[0],
                "to": iterations[1],
                "row": f"{name}, windows {index} and {index + 1}",
                **_over_layers(layers, history.layer_numbers),
            }
        )
    return {"source": f"{name}: tokens", "rules": [alpha, beta, rules_source], "changes": changes}


def _over_layers(layers: Sequence[RankingChange | None], layer_numbers: Sequence[int]) -> dict:
    """For each measure the median of the layers, the worst one and which it is."""
    result = {}
    for measure, worst in (("rank_correlation", min), ("churn", max), ("tokens_moved", max)):
        values = [
            (getattr(change, measure), number)
            for change, number in zip(layers, layer_numbers, strict=True)
            if change is not None and getattr(change, measure) is not None
        ]
        result[measure] = None
        if values:
            value, number = worst(values, key=lambda pair: pair[0])
            middle = statistics.median(pair[0] for pair in values)
            result[measure] = {"median": middle, "worst": value, "worst_layer": number}
    return result


def _rules(prunings: Sequence[Pruning], log: TrainingLog | None) -> tuple[str, float, str]:
    """alpha and beta of the run, and where they are from."""
    for pruning in prunings:
        if pruning.expert_map.beta:  # a map that was given by hand carries no rule
            expert_map = pruning.expert_map
            return expert_map.alpha, expert_map.beta, f"{pruning.folder}/map.json"
    arguments = {} if log is None else log.arguments
    if "laep_alpha" in arguments and "laep_beta" in arguments:
        alpha, beta = (arguments[name][0] for name in ("laep_alpha", "laep_beta"))
        return alpha, float(beta), "the arguments in the training log"
    default = LaepConfig()
    return default.alpha, default.beta, "the defaults of --laep-alpha and --laep-beta"


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
        "validation": log.validation,
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
            by_loss = sorted(with_loss, key=lambda i: log.lines[i].loss)
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
