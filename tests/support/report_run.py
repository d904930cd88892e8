"""A run's folder for the tests of the report, composed from recorded loads and real log formats.

The loads are those of tests/data/expert_loads_tiny.json, the map, the table and the JSON files are
the package's own work on them. Composed, not recorded: the curve of the loss, the times, and the
windows after the pruning, which are the recorded ones with the pruned experts' columns left out and
the others in their new order.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from megatron_laep.plan.expert_map import ExpertMap
from megatron_laep.plan.loads import Loads
from megatron_laep.plan.stability import decide
from megatron_laep.plan.summary import ModelSize, summarize
from megatron_laep.records import decision_log, pruning_files
from megatron_laep.records.load_format import LoadLogHeader
from megatron_laep.records.load_writer import LoadLogWriter
from megatron_laep.records.pruning_loads import PruningLoads
from megatron_laep.settings.rules import PruningRules
from megatron_laep.settings.schedule import Verdict
from megatron_laep.settings.thresholds import StabilityThresholds
from tests.support.plans import planned

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "tests" / "data" / "expert_loads_tiny.json"
PRUNE_ITERATION = 375
LAST_ITERATION = 500
LOG_INTERVAL = 5
THRESHOLDS = StabilityThresholds(rank_correlation=0.5, patience=2)
# 4 layers, hidden 128, experts of 128 with SwiGLU: 3 * 128 * 128; 16 bytes a parameter and rank.
SIZE = ModelSize(49_152, 428_672, 16.0)


def recorded() -> dict:
    return json.loads(RECORDED.read_text(encoding="utf-8"))


def log_line(iteration: int, milliseconds: float, loss: float | str) -> str:
    """A line as Megatron-Core 0.19 prints it."""
    loss_text = loss if isinstance(loss, str) else f"{loss:.6E}"
    return (
        f" [2026-11-22 00:10:04.256241] iteration {iteration:8d}/{LAST_ITERATION:8d} | consumed "
        f"samples: {iteration * 8:12d} | elapsed time per iteration (ms): {milliseconds:.1f} | "
        f"learning rate: 1.000000E-03 | global batch size:     8 | lm loss: {loss_text} | "
        "load_balancing_loss: 0.000000E+00 | loss scale: 1.0 | grad norm: 0.806 | number of "
        "skipped iterations:   0 | number of nan iterations:   0 |"
    )


def make_log() -> str:
    """Iterations 5 to 500; the first line and the one after the rebuild are slow."""
    arguments = {
        "hidden_size": "128",
        "laep_alpha": "0.4",
        "laep_beta": "0.1",
        "laep_prune_iteration": str(PRUNE_ITERATION),
        "moe_router_topk": "2",
        "num_experts": "32",
        "num_layers": "4",
        "tokenizer_type": "NullTokenizer",
    }
    lines = [
        "------------------------ arguments ------------------------",
        *(f"  {name} {'.' * (48 - len(name))} {value}" for name, value in arguments.items()),
        "-------------------- end of arguments ---------------------",
        "[2026-11-22 00:09:50,254] laep event=build experts=all map_state=None seconds=0.521",
    ]
    noise = np.random.default_rng(seed=7).normal(size=(LAST_ITERATION, 3))
    for iteration in range(LOG_INTERVAL, LAST_ITERATION + 1, LOG_INTERVAL):
        wobble = noise[iteration - 1]
        pruned = iteration > PRUNE_ITERATION
        milliseconds = (610 if pruned else 800) * (1 + 0.04 * wobble[0])
        if iteration in (LOG_INTERVAL, PRUNE_ITERATION + LOG_INTERVAL):
            milliseconds *= 6
        loss = 1.9 + 3.6 * math.exp(-iteration / 90) + 0.03 * wobble[1]
        loss += 0.12 * math.exp(-(iteration - PRUNE_ITERATION) / 15) if pruned else 0
        ratio = (1.12 if pruned else 1.45) + 0.03 * wobble[2]
        lines.append(
            f"[2026-11-22 00:10:04,256] laep event=load iteration={iteration} imbalance_mean="
            f"{ratio:.4g} imbalance_max={ratio + 0.2:.4g} imbalance_max_layer=2 "
            f"dead_experts={0 if pruned else 20}/{80 if pruned else 128}"
        )
        lines.append(log_line(iteration, milliseconds, loss))
        if iteration == PRUNE_ITERATION:
            lines += [
                f"[2026-11-22 00:14:29,771] laep event=window_closed iteration={iteration} "
                "window=100 seconds=0.003",
                f"[2026-11-22 00:14:43,626] laep event=committed iteration={iteration} "
                "map=9f25500fd13a seconds=13.81",
                "[2026-11-22 00:14:47,410] laep event=theoretical_memory_skipped "
                'reason="Megatron\'s estimate assumes one expert count for all layers"',
            ]
    lines.append(
        " validation loss at iteration 500 on validation set | lm loss value: 1.930000E+00 | lm "
        "loss PPL: 6.889510E+00 | "
    )
    return "\n".join(lines) + "\n"


def write_pruning(
    folder: Path, expert_map: ExpertMap, tokens_LE: list[list[int]], window: int = 100
) -> None:
    """The three files that a job writes when it prunes, on a window of one part."""
    loads = Loads.of_window(tokens_LE, expert_map.layer_numbers)
    decided_on = PruningLoads(window, (expert_map.iteration,), loads)
    table = summarize(expert_map, SIZE)
    pruning_files.write_pruning(folder / "laep", expert_map, table, decided_on)


def write_logs(
    folder: Path, expert_map: ExpertMap, ends: list[int], windows: list[np.ndarray]
) -> None:
    """The two logs that a job records: of the full model and of the pruned one."""
    layers = expert_map.layers
    full = LoadLogHeader(expert_map.layer_numbers, (32,) * len(layers), 2, ends[0])
    pruned = LoadLogHeader(
        expert_map.layer_numbers,
        tuple(layer.experts_after for layer in layers),
        2,
        ends[0],
        lineage=(expert_map.hash,),
        original_ids=tuple(layer.kept for layer in layers),
    )
    with (
        LoadLogWriter(folder / "laep", full) as before,
        LoadLogWriter(folder / "laep", pruned) as after,
    ):
        for end, window in zip(ends, windows, strict=True):
            writer, rows = before, window
            if end > expert_map.iteration:
                writer = after
                rows = [row[list(x.kept)] for row, x in zip(window, layers, strict=True)]
            writer.append(end - ends[0] + 1, end, rows, expert_parallel_size=2)


def write_decision(folder: Path, ends: list[int], windows: list[np.ndarray], alpha: str) -> None:
    """What the job decides at its pruning, on four windows of 100 iterations."""
    last = ends.index(PRUNE_ITERATION) + 1
    hundreds = [sum(windows[end - 4 : end]) for end in range(last - 12, last + 1, 4) if end >= 4]
    decision = decide(
        Loads.of_windows(hundreds, (1, 2, 3, 4)),
        iteration=PRUNE_ITERATION,
        rules=PruningRules(alpha, 0.1),
        thresholds=THRESHOLDS,
    )
    verdict = Verdict.PRUNE if decision.stable else Verdict.PRUNE_UNSTABLE
    decision_log.append(
        folder / "laep" / decision_log.NAME, {**decision.to_dict(), "verdict": verdict}
    )


def make_run(folder: Path, *, history: bool = True, log: bool = True) -> Path:
    """A run that was pruned after iteration 375 of 500, on the four windows before."""
    data = recorded()
    ends = data["last_iteration_of_window"]
    windows = [np.array(window) for window in data["tokens"]]
    decided = ends.index(PRUNE_ITERATION)
    tokens_LE = sum(windows[decided - 3 : decided + 1]).tolist()
    expert_map = planned(tokens_LE, data["layer_numbers"], iteration=PRUNE_ITERATION)
    write_pruning(folder, expert_map, tokens_LE)
    if history:
        write_decision(folder, ends, windows, expert_map.alpha)
    if history:
        write_logs(folder, expert_map, ends, windows)
    if log:
        (folder / "train.log").write_text(make_log(), encoding="utf-8")
    return folder
