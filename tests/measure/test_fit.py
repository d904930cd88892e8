"""The fits behind a hardware file: coefficients by hand, and what cannot be fitted."""

import pytest

from megatron_laep.measure.fit import fit, fit_experts, fit_transfer


def test_a_straight_line_is_found_exactly():
    # 2 s a call and 3 s a byte
    found = fit_transfer([(1.0, 5.0), (2.0, 8.0), (10.0, 32.0)])
    assert found.coefficients == pytest.approx({"call": 2.0, "byte": 3.0})
    assert found.fitted == pytest.approx(found.measured)
    assert found.worst < 1e-12


def test_the_fixed_cost_of_an_expert_is_told_from_its_size_and_its_tokens():
    # 1e-3 s an expert, 1e-9 s a parameter of each, 1e-12 s a FLOP (6 for a token and a parameter)
    samples = [
        (count, tokens, size, count * (1e-3 + size * 1e-9) + 6 * tokens * size * 1e-12)
        for count in (2, 4, 8)
        for tokens in (100, 200)
        for size in (10**5, 10**6)
    ]
    found = fit_experts(samples)
    assert found.coefficients == pytest.approx({"expert": 1e-3, "weight": 1e-9, "flop": 1e-12})


def test_what_would_be_negative_costs_nothing():
    """Falling with the calls: they get no share, and the bytes carry it all."""
    found = fit({"call": [1.0, 1.0], "byte": [1.0, 2.0]}, [1.0, 3.0])
    # The line through both has call = -1. Of the bytes alone: relative errors b - 1 and 2b / 3 - 1 are
    # least, in squares, at b = (1 + 2 / 3) / (1 + 4 / 9) = 15 / 13.
    assert found.coefficients == pytest.approx({"call": 0.0, "byte": 15 / 13})
    assert found.worst == pytest.approx(1 - 2 / 3 * 15 / 13)


def test_nothing_that_fits_is_refused():
    with pytest.raises(ValueError, match="no costs of at least 0 fit 2 times of 1 to 1 s"):
        fit({"byte": [-1.0, -1.0]}, [1.0, 1.0])
