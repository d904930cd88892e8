"""Plans of plain lists of token counts, as most tests have them."""

from collections.abc import Mapping, Sequence

from megatron_laep.plan.expert_map import ExpertMap
from megatron_laep.plan.layout import ModelLayout
from megatron_laep.plan.loads import Loads
from megatron_laep.plan.make_map import make_expert_map
from megatron_laep.settings.rules import PruningRules


def planned(
    tokens: Sequence,
    layer_numbers: Sequence[int] | None = None,
    *,
    before: int = 2,
    after: int = 2,
    top_k: int = 2,
    iteration: int = 50,
    stages: Mapping[int, int] | None = None,
    windows: bool = False,
    **rules: object,
) -> ExpertMap:
    """The map that the rules make.

    tokens: [L][E], or [W][L][E] with `windows`. layer_numbers: of the rows; None: 1 to L.
    before, after: expert-parallel size. rules: fields of `PruningRules`.
    """
    numbers = layer_numbers or range(1, len(tokens[0] if windows else tokens) + 1)
    loads = Loads.of_windows(tokens, numbers) if windows else Loads.of_window(tokens, numbers)
    layout = ModelLayout.of(
        loads.experts,
        top_k=top_k,
        expert_parallel_size_before=before,
        expert_parallel_size_after=after,
        stages=stages,
    )
    return make_expert_map(loads, layout, PruningRules(**rules), iteration=iteration)
