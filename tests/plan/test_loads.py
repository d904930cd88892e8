"""Loads: one window or several, by the name of the constructor; checked once."""

import numpy as np
import pytest

from megatron_laep.plan.loads import Loads


def test_windows_by_layer():
    loads = Loads.of_windows([[[1, 2, 3], [4, 5]], [[10, 20, 30], [40, 50]]], [7, 3])
    assert loads.layer_numbers == (7, 3)
    assert (loads.num_windows, loads.experts) == (2, {7: 3, 3: 2})
    assert loads.tokens[7].tolist() == [[1, 2, 3], [10, 20, 30]]
    assert loads.tokens[3].dtype == np.int64
    assert loads.total(3).tolist() == [44, 55]
    assert loads.windows(1, 2).tokens[3].tolist() == [[40, 50]]


@pytest.mark.parametrize("kind", [list, np.array])
def test_one_window(kind):
    loads = Loads.of_window(kind([[1, 2], [3, 4]]), range(1, 3))
    assert loads.num_windows == 1
    assert {number: rows.tolist() for number, rows in loads.tokens.items()} == {
        1: [[1, 2]],
        2: [[3, 4]],
    }


def test_one_is_never_taken_for_the_other():
    """[L, E] as windows, [W, L, E] as one window: a guess would have planned on both."""
    with pytest.raises(ValueError, match=r"layer 1: loads must be one token count .* shape \(\)"):
        Loads.of_windows([[1, 2], [3, 4]], [1, 2])
    with pytest.raises(
        ValueError, match=r"layer 1: loads must be one token count .* shape \(1, 2\)"
    ):
        Loads.of_window([[[1, 2]], [[3, 4]]], [1, 2])


def test_windows_may_be_without_tokens():
    assert not Loads.of_window([[0, 0]], [1]).total(1).any()


@pytest.mark.parametrize(
    ("tokens", "numbers", "message"),
    [
        ([[]], [], "loads of no layer"),
        ([], [6], "layer 6: there is no window to decide on"),
        ([[[1], [2]]], [6], "loads of 2 layers for 1 layer numbers"),
        ([[[1], [2]]], [6, 6], r"a layer occurs more than once in \[6, 6\]"),
        ([[[1, 2]], [[1, 2, 3]]], [6], "layer 6: the windows have loads of 2 and 3 experts"),
        ([[[1, -2]]], [6], "layer 6: the load of expert 1 is negative: -2"),
        ([[[1, float("nan")]]], [6], "layer 6: the load of expert 1 is NaN"),
        ([[[1, 2.0]]], [6], "layer 6: loads must be integer token counts, got .* float64"),
        ([[[]]], [6], r"layer 6: loads must be one token count .* shape \(0,\)"),
        (
            [[[2**62]], [[2**62]]],
            [6],
            "layer 6: the loads sum to 9223372036854775808, more than 64",
        ),
    ],
)
def test_what_is_no_loads(tokens, numbers, message):
    with pytest.raises(ValueError, match=message):
        Loads.of_windows(tokens, numbers)
