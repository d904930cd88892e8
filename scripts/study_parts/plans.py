"""The controls' plans: as many experts as LAEP prunes, but others.

Made from the map of the run that LAEP's own rules pruned, of the same seed: the same number of
experts of each layer goes at the same iteration, so that only the choice differs.
"""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

from study_parts.table import BUSIEST, RANDOM

from megatron_laep.plan.expert_map import ExpertMap, LayerMap


def made_map(run_dir: Path) -> ExpertMap:
    """The map of a run that was pruned once. Errors: ValueError if it was not."""
    found = sorted((run_dir / "laep").glob("iter_*/map.json"))
    if len(found) != 1:
        raise ValueError(
            f"{run_dir}: {len(found)} maps in laep/iter_*, wanted that of one pruning: remove the "
            "folder, and the study repeats the run"
        )
    return ExpertMap.from_json(found[0].read_text())


def control(source: ExpertMap, kind: str, seed: int) -> ExpertMap:
    """A map that keeps as many experts of each layer of `source`: drawn at random (RANDOM), or the
    least busy ones, so that the busiest go (BUSIEST).
    """
    layers = []
    for layer in source.layers:
        if kind == RANDOM:
            # Not the seed alone: each layer draws for itself.
            draw = random.Random(f"{seed} {layer.layer_number}")
            kept = draw.sample(range(layer.experts_before), layer.experts_after)
        elif kind == BUSIEST:
            order = sorted(range(layer.experts_before), key=lambda i: (layer.loads[i], i))
            kept = order[: layer.experts_after]
        else:
            raise ValueError(f"no control plan of the name {kind!r}: {RANDOM} or {BUSIEST}")
        layers.append(_keeping(layer, kept))
    return dataclasses.replace(source, layers=tuple(layers), placement="given")


def _keeping(layer: LayerMap, kept: list[int]) -> LayerMap:
    return dataclasses.replace(layer, kept=tuple(sorted(kept)))


def small_model(source: ExpertMap) -> int:
    """The number of experts, the same in each layer, with the size nearest to the pruned model's;
    never fewer than a token is routed to.
    """
    kept = [layer.experts_after for layer in source.layers]
    return max(source.top_k, round(sum(kept) / len(kept)))
