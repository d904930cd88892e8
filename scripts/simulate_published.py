#!/usr/bin/env python3
"""The published model in the simulator: a band over what is not published, not one number.

    scripts/simulate_published.py [--draws N] [--hardware FILE] [--layers-per-stage 1|2|4|8]

For each spread of the kept experts' loads (scripts/generate_loads.py has the rule that they are drawn
by), each expert-parallel size and several draws: the cost model is calibrated on the published 62.14
TFLOPS per GPU of the full model, and on nothing else; then the full model with equal loads (published:
80.82, by an auxiliary loss), the pruned and the rearranged model are predicted. Prints mean and range
over the draws, beside the published figures. A draw on which no efficiency up to 100 % reaches 62.14
is counted, not used.
"""

import argparse
import dataclasses
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from tabulate import tabulate

from megatron_laep.plan.layout import ModelLayout
from megatron_laep.plan.loads import Loads
from megatron_laep.plan.make_map import make_expert_map
from megatron_laep.settings.rules import PruningRules
from megatron_laep.simulate.cost_inputs import (
    Hardware,
    ModelShape,
    Parallelism,
    balanced_placements,
    full_placements,
    pruned_placements,
)
from megatron_laep.simulate.cost_model import calibrate, estimate

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "configs" / "yuan3-ultra-103l-64e-1515b.yaml"
# Of all 64 experts, lognormal loads with a standard deviation of about 1.3 (of the logarithm) have a
# hottest expert with 500 times the load of the coldest; the kept ones, a part of them, have less.
SPREADS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
EXPERT_PARALLEL = (4, 8)
# Layers of the first stage, by those of the others; 103 in all.
FIRST_STAGE = {1: 0, 2: 1, 4: 3, 8: 7}
COLUMNS = ("balanced", "pruned", "rearranged")


def job_of(parallelism: Parallelism, ranks: int, layers_per_stage: int) -> Parallelism:
    """The file's job with another expert-parallel size, data-parallel with it, and pipeline; the
    global batch stays.
    """
    first = FIRST_STAGE[layers_per_stage]
    counts = (first, *(layers_per_stage,) * ((103 - first) // layers_per_stage))
    samples = parallelism.micro_batches * parallelism.data
    return dataclasses.replace(
        parallelism,
        expert=ranks,
        data=ranks,
        micro_batches=samples // ranks,
        pipeline=len(counts),
        layers_per_stage=counts,
    )


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One draw: busiest rank / mean of the full model; the efficiency that 62.14 needs, and TFLOPS
    per GPU, balanced, pruned, rearranged; None where 62.14 is out of reach.
    """

    imbalance: float
    efficiency: float | None
    tflops: tuple[float, float, float] | None


def predict(description: dict, hardware: Hardware, job: Parallelism, content: dict) -> Prediction:
    shape = ModelShape(**description["model"])
    window = Loads.of_window(content["tokens"], content["layer_numbers"])
    layout = ModelLayout.of(
        window.experts, top_k=shape.top_k, expert_parallel_size_before=job.expert
    )
    expert_map = make_expert_map(window, layout, PruningRules(**description["laep"]), iteration=0)
    loads = dict(zip(content["layer_numbers"], content["tokens"], strict=True))
    full = full_placements(loads, job.expert)
    imbalance = sum(item.imbalance for item in full.values()) / len(full)
    target = description["published"]["tflops_per_gpu"][0]
    try:
        calibrated = calibrate(shape, hardware, job, full, target)
    except ValueError:
        return Prediction(imbalance, None, None)
    others = (
        balanced_placements(dict(enumerate(map(len, content["tokens"]), start=1)), job.expert),
        pruned_placements(expert_map, loads, rearranged=False),
        pruned_placements(expert_map, loads, rearranged=True),
    )
    balanced, pruned, rearranged = (
        estimate(shape, calibrated, job, item).tflops_per_gpu for item in others
    )
    return Prediction(imbalance, calibrated.dense_efficiency, (balanced, pruned, rearranged))


def row_of(spread: float, ranks: int, found: Sequence[Prediction]) -> list[str]:
    """A row of the table: means, and ranges of the draws."""
    used = [item for item in found if item.tflops is not None]
    imbalance = sum(item.imbalance for item in found) / len(found)
    cells = [f"{spread:g}", str(ranks), f"{len(used)} of {len(found)}", f"{imbalance:.2f}"]
    if not used:
        return [*cells, *["-"] * (1 + len(COLUMNS))]
    cells.append(f"{100 * sum(item.efficiency for item in used) / len(used):.0f} %")
    for values in zip(*(item.tflops for item in used), strict=True):
        mean = sum(values) / len(values)
        cells.append(f"{mean:.1f} ({min(values):.1f} to {max(values):.1f})")
    return cells


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--draws", type=int, default=10, help="of the loads (default: 10)")
    parser.add_argument("--hardware", type=Path, default=ROOT / "configs" / "hardware-a800.yaml")
    parser.add_argument("--layers-per-stage", type=int, choices=FIRST_STAGE, default=1)
    arguments = parser.parse_args()
    generate = runpy.run_path(str(ROOT / "scripts" / "generate_loads.py"), run_name="library")
    description = yaml.safe_load(MODEL.read_text(encoding="utf-8"))
    given = Parallelism(**description["parallelism"])
    hardware = Hardware(**yaml.safe_load(arguments.hardware.read_text(encoding="utf-8")))
    full, *published = description["published"]["tflops_per_gpu"]
    rows = []
    for ranks in EXPERT_PARALLEL:
        job = job_of(given, ranks, arguments.layers_per_stage)
        for spread in SPREADS:
            found = [
                predict(description, hardware, job, generate["generate"](description, seed, spread))
                for seed in range(arguments.draws)
            ]
            rows.append(row_of(spread, ranks, found))
    rows.append(["published", "", "", "", "", *(f"{value:.2f}" for value in published)])
    headers = (
        "spread of\nthe kept",
        "EP",
        "draws\nused",
        "busiest\n/ mean",
        "effi-\nciency",
        *COLUMNS,
    )
    print(
        f"TFLOPS per GPU, calibrated on {full} of the full model ({hardware.name}, "
        f"{arguments.layers_per_stage} layer(s) a stage); mean (range) of the draws"
    )
    print(tabulate(rows, headers=headers, disable_numparse=True, stralign="right"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
