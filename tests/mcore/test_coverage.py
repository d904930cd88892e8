"""Every kept expert is loaded by exactly one rank of each replica, or no rank goes on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.support import maps
from tests.support.forks import on_ranks

pytestmark = pytest.mark.distributed


def checked(held: list[dict[int, list[int]]]) -> str:
    """What this rank is told if each rank holds these new ids, by layer."""
    import torch

    from megatron_laep.mcore.checkpoint import _check_coverage

    expert_map = maps.from_kept(
        {1: [3, 0], 2: [1, 2]}, experts_before=4, expert_parallel_size=2, top_k=1
    )
    layers = {
        number: SimpleNamespace(local_expert_indices=ids)
        for number, ids in held[torch.distributed.get_rank()].items()
    }
    try:
        _check_coverage(expert_map, layers)
    except ValueError as error:
        return str(error)
    return ""


def cases(held_by_case: dict[str, list[dict[int, list[int]]]]) -> dict[str, str]:
    return {name: checked(held) for name, held in held_by_case.items()}


def test_on_two_ranks():
    given = {
        "a replica over both": [{1: [0], 2: [0]}, {1: [1], 2: [1]}],
        "two replicas": [{1: [0, 1], 2: [0, 1]}] * 2,
        "a stage each": [{1: [0, 1]}, {2: [0, 1]}],
        "one is held twice": [{1: [0], 2: [0]}, {1: [0], 2: [1]}],
        "nobody has layer 2": [{1: [0]}, {1: [1]}],
    }
    for outcome in on_ranks(2, cases, given):
        found = outcome.result()
        assert [found[name] for name in list(given)[:3]] == ["", "", ""]
        # New id 0 of layer 1 is the old expert 3.
        assert found["one is held twice"].startswith(
            "layer 1: the ranks of the job would load the old experts [3], the map keeps [0, 3]"
        )
        assert found["nobody has layer 2"].startswith(
            "layer 2: the ranks of the job would load the old experts [], the map keeps [1, 2]"
        )
