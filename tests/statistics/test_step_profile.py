"""Where a layer's time goes: what is timed, on two ranks, and that nothing stays behind."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from megatron_laep.records import profile_log
from tests.support.forks import on_ranks

pytestmark = pytest.mark.distributed


def timed(folder: str) -> list[int]:
    """Two layers on two ranks, three iterations of two micro-batches; the hooks that are left."""
    import torch

    from megatron_laep.statistics.step_profile import StepProfile

    rank = torch.distributed.get_rank()

    class Sleeper(torch.nn.Module):
        def __init__(self, seconds: float) -> None:
            super().__init__()
            self.seconds = seconds

        def forward(self, x):
            time.sleep(self.seconds)
            return x

    class Layer(torch.nn.Module):
        def __init__(self, seconds: float) -> None:
            super().__init__()
            self.router, self.experts = Sleeper(0.01), Sleeper(seconds)

        def forward(self, x):
            return self.experts(self.router(x))

    # The experts of layer 3 take longer on rank 1; layer 5 is on rank 0 alone.
    layers = {3: Layer(0.02 + 0.06 * rank)} | ({} if rank else {5: Layer(0.0)})
    x = torch.zeros(1)
    profile = StepProfile(layers, [3, 5], Path(folder), interval=2, iteration=0)
    for iteration in (1, 2, 3):
        for layer in layers.values():
            for _ in range(2):
                layer(x)
            # As when the router and the experts are recomputed in the backward pass.
            layer.experts(layer.router(x))
        profile.end_iteration(iteration)
    return [
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for layer in layers.values()
        for module in layer.modules()
    ]


def test_on_two_ranks(tmp_path):
    for outcome in on_ranks(2, timed, str(tmp_path)):
        # Iteration 4 is due: its hooks are there already. 2 + 1 + 2 on a layer, its router, its experts.
        assert set(outcome.result()) == {2, 1}
    (found,) = profile_log.read(tmp_path / profile_log.NAME)
    assert found["iteration"] == 2
    third, fifth = found["layers"]
    # Two micro-batches; 2 * 20 and 2 * 80 ms: 100 in the mean, and rank 0 waits 60 of these, 30 on average.
    # Sleeping takes longer on a busy machine, never shorter.
    assert third["layer"] == 3 and third["router"] >= 20 and third["experts"] >= 100
    assert third["waiting"] > 0
    assert fifth["layer"] == 5 and fifth["router"] >= 20 and fifth["waiting"] == 0
    assert third["dispatch"] >= 0 and third["combine"] >= 0


def test_what_is_no_profile_is_refused(tmp_path):
    path = tmp_path / profile_log.NAME
    good = {"layer": 1, "router": 1, "dispatch": 1.0, "experts": 1, "combine": 1, "waiting": 0}
    profile_log.append(path, 2, [good])
    profile_log.append(path, 4, [good])
    profile_log.resume(path, 2)
    assert [item["iteration"] for item in profile_log.read(path)] == [2]
    profile_log.append(path, 6, [{**good, "router": None}])
    with pytest.raises(
        ValueError, match=r"profile.jsonl, row 4: layers must have a number and mill"
    ):
        profile_log.read(path)
