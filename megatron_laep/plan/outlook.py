"""What can be said of a job before it counts a token: values that `laep check` shows.

Beside the plan, which needs loads: `outlook` bounds what any plan may do. `mcore` and `loop` make the
values of a command line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from megatron_laep.plan import make_map
from megatron_laep.plan.expert_map import ExpertMap
from megatron_laep.plan.layout import LayerLayout, ModelLayout
from megatron_laep.plan.loads import Loads
from megatron_laep.settings.config import LaepConfig
from megatron_laep.settings.rules import PruningRules

_MANY_TOKENS = 10**6


@dataclass(frozen=True)
class LikeLayers:
    """MoE layers for which the same can be said.

    layers: their numbers, ascending.
    experts: of each now.
    fewest, most: experts that each keeps, whatever is counted.
    """

    layers: tuple[int, ...]
    experts: int
    fewest: int
    most: int


@dataclass(frozen=True)
class Outlook:
    """What a pruning may do to a job.

    layers: all MoE layers, those together that are alike.
    named: what layers beside the decoder's are called, by number.
    top_k: experts of a token.
    groups: of a layer, that its router limits itself to; None without.
    ranks: of the whole job.
    replicas: how often each expert is there after the pruning.
    expert_parallel_size, expert_parallel_size_after: ranks that share the experts of a layer.
    multiple: each layer keeps a multiple of so many.
    sizes: the expert-parallel sizes that the job could go on with, on as many ranks.
    prunings: for each that is to come, the first and the last iteration after which it may be, and
        the iterations of the window that it is decided on.
    """

    layers: tuple[LikeLayers, ...]
    named: Mapping[int, str]
    top_k: int
    groups: int | None
    ranks: int
    replicas: int
    expert_parallel_size: int
    expert_parallel_size_after: int
    multiple: int
    sizes: tuple[int, ...]
    prunings: tuple[tuple[int, int, int], ...]

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Examination:
    """What would become of a job.

    config: the LAEP settings that were looked at.
    assumed: the command line has none, so a pruning half-way was assumed.
    refused: what the job would be refused for, whatever else is added to its flags.
    lifted: what --laep-exit-after-prune lifts, or has lifted.
    recording: what is in the way of a job that only records, with --laep-record-interval; None where
        Megatron did not get that far.
    unknown: words that Megatron's parser does not know.
    source: the checkpoint that the job would go on from.
    done: iterations at which the model of that checkpoint was pruned.
    outlook: what would change; None if nothing is to be pruned, or something is in the way.
    """

    config: LaepConfig = field(default_factory=LaepConfig)
    assumed: bool = False
    refused: tuple[str, ...] = ()
    lifted: tuple[str, ...] = ()
    recording: tuple[str, ...] | None = None
    unknown: tuple[str, ...] = ()
    source: str | None = None
    done: tuple[int, ...] = ()
    outlook: Outlook | None = None

    @property
    def accepted(self) -> bool:
        """Whether the command line is, as it is."""
        return not self.refused and (not self.lifted or self.config.exit_after_prune)


def bounds(
    layout: ModelLayout, rules: PruningRules, plan: ExpertMap | None = None
) -> tuple[LikeLayers, ...]:
    """How many experts the layers may keep, whatever is counted.

    layout: the model as it is, and the ranks after the pruning.
    plan: a given map, which leaves nothing open.

    Errors: ValueError, if the rules cannot be fulfilled.
    """
    kept: Sequence[tuple[int, int, int]]
    if plan is not None:
        kept = [(item.layer_number, item.experts_after, item.experts_after) for item in plan.layers]
    else:
        kept = [
            (layer.layer_number, _fewest(layer, layout, rules), layer.experts)
            for layer in layout.layers
        ]
    alike: dict[tuple[int, int, int], list[int]] = {}
    for number, fewest, most in kept:
        alike.setdefault((layout.experts[number], fewest, most), []).append(number)
    return tuple(LikeLayers(tuple(numbers), *said) for said, numbers in alike.items())


def _fewest(layer: LayerLayout, layout: ModelLayout, rules: PruningRules) -> int:
    """The fewest experts that a layer keeps: so many as where one of them got all tokens."""
    tokens_WE = np.zeros((1, layer.experts), dtype=np.int64)
    tokens_WE[0, 0] = _MANY_TOKENS
    loads = Loads({layer.layer_number: tokens_WE})
    return len(make_map.kept_experts(loads, layer, layout, rules))
