"""The prunings that a model has behind it, from the original model on.

What a checkpoint carries (``checkpoint.Record``). Each pruning is an expert map of its own, in the
numbers of the model just before it; together they are one map from the original model to the
present one. Pure values, as ``expert_map``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, reduce

from megatron_laep.plan.expert_map import ExpertMap, compose


@dataclass(frozen=True)
class Lineage:
    """The maps of the prunings, oldest first; () for an original model.

    Errors: ValueError if one was not made on the model that the one before it leaves.
    """

    steps: tuple[ExpertMap, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(self.steps))
        _ = self.composed

    @cached_property
    def composed(self) -> ExpertMap | None:
        """From the original model to the present one; its old ids are the original model's."""
        return reduce(compose, self.steps) if self.steps else None

    @property
    def last(self) -> ExpertMap | None:
        """The map of the last pruning, in the numbers of the model before it."""
        return self.steps[-1] if self.steps else None

    @property
    def hashes(self) -> tuple[str, ...]:
        """Of each pruning's own map."""
        return tuple(step.hash for step in self.steps)

    @property
    def original_ids(self) -> tuple[tuple[int, ...], ...]:
        """For each layer the original model's id of each expert; () for the original model."""
        composed = self.composed
        return tuple(layer.kept for layer in composed.layers) if composed else ()

    @property
    def experts_per_rank(self) -> tuple[tuple[int, ...], ...]:
        """For each layer the experts on each rank, as the last pruning laid them out; () before one."""
        composed = self.composed
        return tuple(layer.experts_per_rank for layer in composed.layers) if composed else ()

    def then(self, step: ExpertMap) -> Lineage:
        """With one more pruning."""
        return Lineage((*self.steps, step))

    def describe(self) -> list[dict[str, object]]:
        """JSON-able, one entry for each pruning: iteration, experts of all layers, hash."""
        return [
            {
                "iteration": step.iteration,
                "experts_before": sum(layer.experts_before for layer in step.layers),
                "experts_after": sum(layer.experts_after for layer in step.layers),
                "hash": step.hash,
            }
            for step in self.steps
        ]
