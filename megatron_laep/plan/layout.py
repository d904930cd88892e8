"""What a plan must know of a model: `ModelLayout`.

Beside `loads` at the beginning of the plan: a job makes it of its counters and arguments, a tool of
a recorded run. What is left out is filled in here, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from megatron_laep.checks import Refusal, whole_number
from megatron_laep.plan.expert_map import ExpertMap
from megatron_laep.plan.groups import RouterGroups


@dataclass(frozen=True)
class LayerLayout:
    """One MoE layer as it is before the plan.

    layer_number: Megatron's 1-based number.
    experts: how many it has.
    stage: the pipeline stage that holds it.
    """

    layer_number: int
    experts: int
    stage: int = 0


@dataclass(frozen=True)
class ModelLayout:
    """The MoE layers of a model, and the ranks that hold them before and after a pruning.

    layers: ascending by number, each once, at least one.
    top_k: experts that the router picks for a token.
    expert_parallel_size_before, expert_parallel_size_after: expert-parallel (EP) ranks.
    groups: of consecutive experts, to which the router limits itself; None: it does not.

    Errors: ValueError for numbers that cannot be.
    """

    layers: tuple[LayerLayout, ...]
    top_k: int
    expert_parallel_size_before: int
    expert_parallel_size_after: int
    groups: RouterGroups | None = None

    def __post_init__(self) -> None:
        numbers = [layer.layer_number for layer in self.layers]
        if not numbers or numbers != sorted(set(numbers)):
            raise Refusal(f"the MoE layers must be ascending, each one once, got {numbers}")
        for layer in self.layers:
            whole_number(layer.layer_number, "a layer's number", 1)
            whole_number(layer.experts, f"layer {layer.layer_number}: the experts", 1)
        for name in ("top_k", "expert_parallel_size_before", "expert_parallel_size_after"):
            whole_number(getattr(self, name), name, 1)
        for layer in self.layers:
            if self.groups is not None and layer.experts % self.groups.num_groups:
                raise Refusal(
                    f"layer {layer.layer_number} has {layer.experts} experts, which are not "
                    f"{self.groups.num_groups} equal groups (--moe-router-num-groups)"
                )

    @staticmethod
    def of(
        experts: Mapping[int, int],
        *,
        top_k: int,
        expert_parallel_size_before: int,
        expert_parallel_size_after: int | None = None,
        stages: Mapping[int, int] | None = None,
        groups: RouterGroups | None = None,
    ) -> ModelLayout:
        """From the experts of each layer number, in any order.

        expert_parallel_size_after: None: as before.
        stages: the pipeline stage of each layer number; None: all are in one, or it is not known.
        Errors: ValueError as of the class, or for stages of other layers.
        """
        if stages is None:
            stages = dict.fromkeys(experts, 0)
        if set(stages) != set(experts):
            raise Refusal(
                f"there are pipeline stages of layers {sorted(stages)} for {sorted(experts)}"
            )
        return ModelLayout(
            tuple(
                LayerLayout(number, experts[number], stages[number]) for number in sorted(experts)
            ),
            top_k,
            expert_parallel_size_before,
            expert_parallel_size_after or expert_parallel_size_before,
            groups,
        )

    @staticmethod
    def before(expert_map: ExpertMap, stages: Mapping[int, int] | None = None) -> ModelLayout:
        """Of the model that a map was made for; stages and errors as in `of`."""
        return ModelLayout.of(
            {layer.layer_number: layer.experts_before for layer in expert_map.layers},
            top_k=expert_map.top_k,
            expert_parallel_size_before=expert_map.expert_parallel_size_before,
            expert_parallel_size_after=expert_map.expert_parallel_size_after,
            stages=stages,
        )

    @property
    def layer_numbers(self) -> tuple[int, ...]:
        return tuple(layer.layer_number for layer in self.layers)

    @property
    def num_groups(self) -> int | None:
        """Groups of each layer; None where the router does not limit itself to groups."""
        return self.groups.num_groups if self.groups is not None else None

    @property
    def experts(self) -> dict[int, int]:
        """Experts of each layer number."""
        return {layer.layer_number: layer.experts for layer in self.layers}

    @property
    def stages(self) -> dict[int, int]:
        """Pipeline stage of each layer number."""
        return {layer.layer_number: layer.stage for layer in self.layers}

    @cached_property
    def by_stage(self) -> dict[int, tuple[LayerLayout, ...]]:
        """The layers of each pipeline stage that has any, ascending."""
        return {
            stage: tuple(layer for layer in self.layers if layer.stage == stage)
            for stage in sorted({layer.stage for layer in self.layers})
        }
