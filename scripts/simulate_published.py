#!/usr/bin/env python3
"""How far the simulator's prediction for the published model depends on what is not published.

    scripts/simulate_published.py [--seeds N] [--hardware FILE]

For several draws of the synthetic loads (scripts/generate_loads.py) and several pipelines: the
model is calibrated on the published 62.14 TFLOPS per GPU of the full model, and nothing else; then
the pruned and the rearranged model are predicted. Prints mean and range over the draws, beside the
published figures. A draw on which no efficiency up to 100 % reaches 62.14 is counted, not used.
"""

import argparse
import dataclasses
import runpy
import sys
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
    full_placements,
    pruned_placements,
)
from megatron_laep.simulate.cost_model import calibrate, estimate

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "configs" / "yuan3-ultra-103l-64e-1515b.yaml"
# Layers in the first stage and in each of the others; 103 in all.
PIPELINES = ((0, 1), (1, 2), (3, 4), (7, 8))


def with_pipeline(parallelism: Parallelism, first: int, others: int) -> Parallelism:
    counts = (first, *(others,) * ((103 - first) // others))
    return dataclasses.replace(parallelism, pipeline=len(counts), layers_per_stage=counts)


def predict(shape, hardware, parallelism, loads, expert_map, target) -> tuple[float, ...] | None:
    """Efficiency, TFLOPS of the pruned, TFLOPS of the rearranged model; None if the target is out
    of reach.
    """
    full = full_placements(loads, parallelism.expert)
    try:
        calibrated = calibrate(shape, hardware, parallelism, full, target)
    except ValueError:
        return None
    after = (
        pruned_placements(expert_map, loads, rearranged=rearranged) for rearranged in (False, True)
    )
    return (
        calibrated.dense_efficiency,
        *(estimate(shape, calibrated, parallelism, item).tflops_per_gpu for item in after),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--seeds", type=int, default=10, help="draws of the loads (default: 10)")
    parser.add_argument("--hardware", type=Path, default=ROOT / "configs" / "hardware-h100.yaml")
    arguments = parser.parse_args()
    generate = runpy.run_path(str(ROOT / "scripts" / "generate_loads.py"), run_name="library")
    description = yaml.safe_load(MODEL.read_text(encoding="utf-8"))
    model, job = description["model"], description["parallelism"]
    shape, parallelism = ModelShape(**model), Parallelism(**job)
    hardware = Hardware(**yaml.safe_load(arguments.hardware.read_text(encoding="utf-8")))
    published = description["published"]["tflops_per_gpu"]
    rules = PruningRules(**description["laep"])
    draws = []
    for seed in range(arguments.seeds):
        content = generate["generate"](description, seed)
        window = Loads.of_window(content["tokens"], content["layer_numbers"])
        layout = ModelLayout.of(
            window.experts, top_k=shape.top_k, expert_parallel_size_before=parallelism.expert
        )
        expert_map = make_expert_map(window, layout, rules, iteration=0)
        loads = dict(zip(content["layer_numbers"], content["tokens"], strict=True))
        draws.append((loads, expert_map))
    rows = []
    for first, others in PIPELINES:
        spread = with_pipeline(parallelism, first, others)
        found = [predict(shape, hardware, spread, *draw, published[0]) for draw in draws]
        used = [values for values in found if values is not None]
        cells = [
            f"{sum(column) / len(column):.2f} ({min(column):.2f} to {max(column):.2f})"
            for column in zip(*used, strict=True)
        ]
        rows.append((others, f"{len(used)} of {len(found)}", *(cells or ["-"] * 3)))
    headers = ("layers a stage", "draws used", "efficiency", "pruned", "pruned and rearranged")
    print(f"{hardware.name}, calibrated on {published[0]}; mean (range) over the draws")
    print(tabulate(rows, headers=headers, disable_numparse=True))
    print(f"published: {published[1]} pruned, {published[2]} pruned and rearranged")
    return 0


if __name__ == "__main__":
    sys.exit(main())
