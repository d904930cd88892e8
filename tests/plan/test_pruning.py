"""LAEP Algorithm 1, against hand-worked cases and a slow reading of the paper."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_laep.checks import exact_decimal
from megatron_laep.plan.loads import checked_loads
from megatron_laep.plan.pruning import experts_to_keep, experts_to_prune

# 8 experts, 200 tokens, mean 25. Expert (load), ascending by (load, id): 1 (0), 2 (5), 5 (5),
# 0 (10), 7 (10), 4 (30), 6 (40), 3 (100). Summed: 0, 5, 10, 20, 30, 60, 100, 200.
LOADS = [10, 0, 5, 100, 30, 5, 40, 10]

loads_lists = st.lists(st.integers(0, 50) | st.integers(0, 10**12), min_size=1, max_size=24).filter(
    any
)
betas = st.sampled_from([0.0, 0.05, 0.07, 0.1, 0.2, 0.29, 0.5, 1.0]) | st.floats(0, 1)
alphas = st.sampled_from([0.0, 0.2, 0.29, 0.4, 1.0, 3.0, math.inf]) | st.floats(0, 5)


def slow_prune(loads, alpha, beta):
    """Algorithm 1 word by word, with exact fractions."""
    alpha = alpha if math.isinf(alpha) else Fraction(str(alpha))
    total, mean = sum(loads), Fraction(sum(loads), len(loads))
    prefix, summed = [], 0
    for expert in sorted(range(len(loads)), key=lambda i: (loads[i], i)):
        summed += loads[expert]
        if not summed < Fraction(str(beta)) * total:
            break
        prefix.append(expert)
    return [i for i in prefix if math.isinf(alpha) or loads[i] <= alpha * mean]


def slow_keep(loads, alpha, beta, multiple, minimum):
    """Takes the busiest pruned expert back, one at a time, until the count will do."""
    pruned = slow_prune(loads, alpha, beta)
    while len(loads) - len(pruned) < minimum or (len(loads) - len(pruned)) % multiple:
        pruned.remove(max(pruned, key=lambda i: (loads[i], i)))
    return sorted(set(range(len(loads))) - set(pruned))


@pytest.mark.parametrize(
    ("alpha", "beta", "expected"),
    [
        # 0.1 * 200 = 20: sums 0, 5, 10 are below, 20 is not (strictly); all <= 0.4 * 25 = 10
        (0.4, 0.1, [1, 2, 5]),
        # 0.2 * 25 = 5: a load of exactly 5 goes
        (0.2, 0.1, [1, 2, 5]),
        # 0.19 * 25 = 4.75: only the idle expert
        (0.19, 0.1, [1]),
        # alpha 0 prunes what got nothing
        (0.0, 0.1, [1]),
        # 0.105 * 200 = 21: now the sum 20 is below, too
        (0.4, 0.105, [1, 2, 5, 0]),
        # 0.2 * 200 = 40: the cumulative rule alone would take 7 as well (sum 30); 10 <= 10
        (0.4, 0.2, [1, 2, 5, 0, 7]),
        (0.39, 0.2, [1, 2, 5]),
        # without the individual rule: 0.31 * 200 = 62, sums up to 60
        (math.inf, 0.31, [1, 2, 5, 0, 7, 4]),
        # beta 1: all but the busiest, whose sum 200 is not below 200
        (math.inf, 1.0, [1, 2, 5, 0, 7, 4, 6]),
        # beta 0 prunes nothing: 0 < 0 is false
        (math.inf, 0.0, []),
    ],
)
def test_hand_worked(alpha, beta, expected):
    assert experts_to_prune(LOADS, alpha=alpha, beta=beta).tolist() == expected


def test_boundaries_are_those_of_the_decimal():
    # 7 of 100 tokens: 0.07 * 100 is 7.000000000000001 as a float product, and 7 < 7 is false
    assert 0.07 * 100 > 7
    assert experts_to_prune([7, 93], alpha=math.inf, beta=0.07).size == 0
    # 29 against 0.29 * mean 100: 28.999999999999996 as a float product, and 29 <= 29 is true
    assert 0.29 * 100 < 29
    assert experts_to_prune([29, 171], alpha=0.29, beta=0.5).tolist() == [0]
    # 2^53 + 1 is no float: one token decides
    assert experts_to_prune([2**53 + 1, 2**53 + 1], alpha=math.inf, beta=0.5).size == 0
    assert experts_to_prune([2**53, 2**53 + 1], alpha=math.inf, beta=0.5).tolist() == [0]


def test_exact_decimal():
    assert exact_decimal(0.1) == Fraction(1, 10)
    assert exact_decimal(1e-5) == Fraction(1, 100000)
    assert exact_decimal(np.float64(0.4)) == Fraction(2, 5)
    assert exact_decimal(1) == 1


@given(loads_lists, alphas, betas)
@settings(deadline=None)
def test_same_as_the_slow_reading(loads, alpha, beta):
    pruned = experts_to_prune(loads, alpha=alpha, beta=beta)
    assert pruned.dtype == np.int64
    assert pruned.tolist() == slow_prune(loads, alpha, beta)


@given(loads_lists, alphas, betas, st.integers(1, 6), st.data())
@settings(deadline=None)
def test_keep_same_as_the_slow_reading(loads, alpha, beta, multiple, data):
    loads = loads * multiple
    minimum = data.draw(st.integers(1, len(loads)))
    kept = experts_to_keep(loads, alpha=alpha, beta=beta, multiple=multiple, minimum=minimum)
    assert kept.dtype == np.int64
    assert kept.tolist() == slow_keep(loads, alpha, beta, multiple, minimum)


@pytest.mark.parametrize(
    ("multiple", "minimum", "expected"),
    [
        # the rule prunes 1, 2, 5 and keeps 5
        (1, 1, [0, 3, 4, 6, 7]),
        # 6: expert 5 stays, being the busier one of 2 and 5 by the tie rule
        (2, 1, [0, 3, 4, 5, 6, 7]),
        # 8: nobody goes
        (4, 1, [0, 1, 2, 3, 4, 5, 6, 7]),
        (1, 7, [0, 2, 3, 4, 5, 6, 7]),
        # at least 6, rounded up to 8
        (4, 6, [0, 1, 2, 3, 4, 5, 6, 7]),
        # 5 is above the minimum already
        (1, 5, [0, 3, 4, 6, 7]),
    ],
)
def test_rounding_hand_worked(multiple, minimum, expected):
    kept = experts_to_keep(LOADS, alpha=0.4, beta=0.1, multiple=multiple, minimum=minimum)
    assert kept.tolist() == expected


@given(
    st.lists(st.integers(0, 10**6), min_size=2, max_size=16, unique=True), alphas, betas, st.data()
)
@settings(deadline=None)
def test_renumbering_the_experts_renumbers_the_answer(loads, alpha, beta, data):
    order = data.draw(st.permutations(range(len(loads))))
    pruned = experts_to_prune(loads, alpha=alpha, beta=beta)
    shuffled = experts_to_prune([loads[i] for i in order], alpha=alpha, beta=beta)
    assert [order[i] for i in shuffled] == pruned.tolist()


@given(loads_lists, alphas, betas, st.data())
@settings(deadline=None)
def test_with_ties_the_pruned_loads_do_not_depend_on_the_order(loads, alpha, beta, data):
    shuffled = data.draw(st.permutations(loads))
    assert sorted(loads[i] for i in experts_to_prune(loads, alpha=alpha, beta=beta)) == sorted(
        shuffled[i] for i in experts_to_prune(shuffled, alpha=alpha, beta=beta)
    )


@given(loads_lists, alphas, betas, alphas, betas)
@settings(deadline=None)
def test_larger_alpha_or_beta_prunes_more(loads, alpha, beta, alpha2, beta2):
    small = experts_to_prune(loads, alpha=min(alpha, alpha2), beta=min(beta, beta2)).tolist()
    large = experts_to_prune(loads, alpha=max(alpha, alpha2), beta=max(beta, beta2)).tolist()
    assert large[: len(small)] == small


@given(loads_lists, alphas, betas, st.integers(2, 1000))
@settings(deadline=None)
def test_only_shares_count(loads, alpha, beta, factor):
    scaled = [factor * load for load in loads]
    assert (
        experts_to_prune(scaled, alpha=alpha, beta=beta).tolist()
        == experts_to_prune(loads, alpha=alpha, beta=beta).tolist()
    )


BAD_LOADS = [
    ([1, float("nan")], "the load of expert 1 is NaN"),
    ([float("nan")] * 3, "the load of expert 0 is NaN"),
    ([1.0, float("inf")], "must be integer token counts, got values of type float64"),
    ([1.5, 2.0], "must be integer token counts, got values of type float64"),
    ([True, False], "must be integer token counts, got values of type bool"),
    (["3", "4"], "must be integer token counts"),
    ([None, 3], "must be integer token counts, got values of type object"),
    ([2**70, 3], "must be integer token counts, got values of type object"),
    ([5, -3, -4], "the load of expert 2 is negative: -4"),
    ([0, 0, 0], "the loads of all 3 experts are zero"),
    ([], r"shape \(0,\)"),
    (7, r"shape \(\)"),
    ([[1, 2], [3, 4]], r"shape \(2, 2\)"),
    ([[1, 2], [3]], "got lists of lists"),
    ([2**62, 2**62], "sum to 9223372036854775808, more than 64-bit"),
]


@pytest.mark.parametrize(("loads", "message"), BAD_LOADS)
def test_bad_loads_never_give_a_decision(loads, message):
    with pytest.raises(ValueError, match=message):
        checked_loads(loads)
    with pytest.raises(ValueError, match=message):
        experts_to_prune(loads, alpha=0.4, beta=0.1)
    with pytest.raises(ValueError, match=message):
        experts_to_keep(loads, alpha=0.4, beta=0.1, multiple=1, minimum=1)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint64, np.uint8])
def test_any_integer_type(dtype):
    assert checked_loads(np.array(LOADS, dtype=dtype)).dtype == np.int64
    assert experts_to_prune(np.array(LOADS, dtype=dtype), alpha=0.4, beta=0.1).tolist() == [1, 2, 5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": -0.1}, "alpha must be a number >= 0 or inf, got -0.1"),
        ({"alpha": math.nan}, "alpha must be .* got nan"),
        ({"beta": -0.1}, "beta must be within 0 and 1, got -0.1"),
        ({"beta": 1.1}, "beta must be within 0 and 1, got 1.1"),
        ({"beta": math.nan}, "beta must be within 0 and 1, got nan"),
        ({"multiple": 3}, "8 experts are not a multiple of 3.*use a divisor of 8"),
        ({"multiple": 16}, "8 experts are not a multiple of 16"),
        ({"multiple": 0}, "multiple must be at least 1, got 0"),
        ({"minimum": 9}, "at least 9 experts must stay, but there are only 8"),
        ({"minimum": 0}, "minimum must be at least 1, got 0"),
    ],
)
def test_bad_rules(changes, message):
    rules = {"alpha": 0.4, "beta": 0.1, "multiple": 1, "minimum": 1, **changes}
    with pytest.raises(ValueError, match=message):
        experts_to_keep(LOADS, **rules)
