"""Load imbalance: goldens worked by hand, and what the writers get."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_laep.metrics import LoadMetrics, load_metrics, write_scalars

TOKENS = {
    # ranks 10+30 = 40 and 20+0 = 20, mean 30: 40/30; one dead expert
    2: np.array([10, 30, 20, 0]),
    # ranks 15 and 15: even
    3: np.array([15, 0, 0, 15]),
    # ranks 0 and 60, mean 30: 2, the worst that two ranks can have
    5: np.array([0, 0, 60, 0]),
}


def test_golden():
    metrics = load_metrics(TOKENS, expert_parallel_size=2)
    assert metrics.imbalance == {2: pytest.approx(4 / 3), 3: 1.0, 5: 2.0}
    assert (metrics.dead_experts, metrics.experts) == (1 + 2 + 3, 12)
    assert metrics.worst_layer == 5
    assert metrics.mean_imbalance == pytest.approx((4 / 3 + 1 + 2) / 3)
    assert metrics.scalars() == {
        "laep/imbalance-mean": pytest.approx(13 / 9),
        "laep/imbalance-max": 2.0,
        "laep/dead-expert-share": 0.5,
    }


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, 1.0),  # all on one rank: 60 / 60
        (2, 4 / 3),
        (4, 2.0),  # one expert a rank: 30 / 15
    ],
)
def test_ranks_hold_consecutive_blocks(size, expected):
    assert load_metrics({1: TOKENS[2]}, size).imbalance == {1: pytest.approx(expected)}


def test_layers_may_have_different_expert_counts():
    # After a pruning: 60 / 40 for the six experts, 2 / 1.5 for the two.
    metrics = load_metrics({1: np.array([20, 20, 20, 10, 5, 5]), 2: np.array([1, 2])}, 2)
    assert metrics.imbalance == {1: 1.5, 2: pytest.approx(4 / 3)}
    assert (metrics.dead_experts, metrics.experts) == (0, 8)


def test_layer_without_tokens_is_even():
    metrics = load_metrics({1: np.zeros(4, dtype=np.int64)}, 2)
    assert metrics.imbalance == {1: 1.0}
    assert metrics.scalars()["laep/dead-expert-share"] == 1.0


def test_worst_layer_is_the_lowest_of_equals():
    assert LoadMetrics({4: 1.5, 2: 1.5, 3: 1.2}, dead_experts=0, experts=1).worst_layer == 2


def test_counts_beyond_32_bits():
    tokens = np.array([3 * 2**40, 2**40])
    assert load_metrics({1: tokens}, 2).imbalance == {1: 1.5}


class TensorBoard:
    """Takes down what Megatron's SummaryWriter would get."""

    def __init__(self) -> None:
        self.written: list[tuple] = []

    def add_scalar(self, name, value, iteration) -> None:
        self.written.append((name, value, iteration))


class WandB:
    def __init__(self) -> None:
        self.written: list[tuple] = []

    def log(self, values, iteration) -> None:
        self.written.extend((name, value, iteration) for name, value in values.items())


def test_writers_get_every_scalar_at_the_iteration():
    metrics = load_metrics(TOKENS, 2)
    tensorboard, wandb = TensorBoard(), WandB()
    write_scalars(metrics, 70, tensorboard, wandb)
    expected = [(name, value, 70) for name, value in metrics.scalars().items()]
    assert tensorboard.written == wandb.written == expected


def test_absent_writers_are_left_alone():
    tensorboard = TensorBoard()
    write_scalars(load_metrics(TOKENS, 2), 70, tensorboard, None)
    assert len(tensorboard.written) == 3
    write_scalars(load_metrics(TOKENS, 2), 70, None, None)
