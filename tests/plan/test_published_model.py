"""The published 1515B model from end to end: its kept counts are reachable and give 1010B.

Source of the constants: LAEP (arXiv 2601.14327) and the configuration of Yuan3.0-Ultra.
"""

import numpy as np
import pytest

from megatron_laep.plan.summary import ModelSize, summarize
from tests.support import maps
from tests.support.plans import planned

NUM_LAYERS, NUM_EXPERTS, HIDDEN, EXPERT_FFN = 103, 64, 4608, 16384
KEPT = (
    [40, 48, 24, 16, 24, 16, 16, 24, 32, 32, 24, 24, 24, 40, 40, 40]
    + [48] * 69
    + [40] * 8
    + [32] * 6
    + [24, 24, 16, 8]
)
# SwiGLU: gate, up and down projection. Everything that is no expert: about 22 B.
SIZE = ModelSize(
    parameters_per_expert=3 * HIDDEN * EXPERT_FFN,
    other_parameters=22 * 10**9,
    bytes_per_expert_parameter=2.0,
)


def loads_that_keep(num_kept: int, generator: np.random.Generator) -> np.ndarray:
    """Random loads of a layer of which Algorithm 1, rounded up to 8, keeps `num_kept` experts.

    `wanted` of 64 experts, up to 7 fewer than `num_kept`, get 800,000 to 1,200,000 tokens, so the
    mean lies between 800,000 * wanted / 64 and 1.02 times the largest load. They stay: each is
    above 0.4 * mean. The others get at most 1000 * wanted tokens, which is below 0.2 * mean >=
    2500 * wanted, and together at most 63,000 * wanted, which is below 0.1 of all >= 80,000 *
    wanted: they go.
    """
    wanted = int(generator.integers(num_kept - 7, num_kept + 1))
    busy = generator.integers(800_000, 1_200_001, wanted)
    idle = generator.integers(0, 1000 * wanted + 1, NUM_EXPERTS - wanted)
    return generator.permutation(np.concatenate([busy, idle]))


def test_constants():
    assert len(KEPT) == NUM_LAYERS
    assert sum(KEPT) == 4360
    assert NUM_LAYERS * NUM_EXPERTS == 6592
    assert SIZE.parameters_per_expert == pytest.approx(226.5e6, rel=1e-4)


def test_1515_billion_become_1010_billion():
    published = maps.from_kept(
        {number: range(kept) for number, kept in enumerate(KEPT, start=1)},
        experts_before=NUM_EXPERTS,
        expert_parallel_size=4,
        top_k=2,
    )
    total = summarize(published, SIZE, pipeline_parallel_size=104)
    assert (total.experts_before, total.experts_after) == (6592, 4360)
    assert round(total.parameters_before / 1e9) == 1515
    assert round(total.parameters_after / 1e9) == 1010
    assert round(total.parameters_removed_percent, 1) in (
        33.3,
        33.4,
    )  # 33.3 published, 22 B rounded
    experts_only = [6592 * SIZE.parameters_per_expert, 4360 * SIZE.parameters_per_expert]
    assert [round(count / 1e9, 1) for count in experts_only] == [1493.0, 987.5]
    # (6592 - 4360) / 4 experts fewer on the ranks of a replica, 104 stages, 226.5 M, 2 bytes
    assert total.memory_freed_bytes_per_rank == pytest.approx(558 / 104 * 226_492_416 * 2)


@pytest.mark.parametrize("seed", range(5))
def test_algorithm_1_keeps_the_published_counts(seed):
    generator = np.random.default_rng(seed)
    one = planned(
        [loads_that_keep(num_kept, generator) for num_kept in KEPT],
        before=4,
        after=4,
        iteration=2000,
        alpha="0.2:1-10,0.4:11-93,0.2:94-103",
        expert_multiple=8,
    )
    assert [item.experts_after for item in one.layers] == KEPT
    total = summarize(one, SIZE, pipeline_parallel_size=104)
    assert round(total.parameters_after / 1e9) == 1010
    assert all(row.tokens_rerouted_percent < 10 for row in total.rows)
