"""The one way to refuse a value: what is taken, and the sentence for what is not."""

import math

import numpy as np
import pytest

from megatron_laep.checks import (
    Refusal,
    named_fields,
    number_within,
    only_fields,
    whole_number,
    whole_numbers,
)


def test_what_is_taken():
    assert whole_number(np.int32(3), "n", 1) == 3 and type(whole_number(np.int32(3), "n", 1)) is int
    assert whole_number(2**63 - 1, "n", 1) == 2**63 - 1
    assert whole_numbers(np.array([0, 2]), "n", 0) == (0, 2)
    assert number_within(np.float32(0.5), "x", 0, 1) == 0.5
    assert number_within(1, "x", 0, 1) == 1.0
    assert named_fields({"a": 1, "b": 2}, ["a"], "it") == {"a": 1, "b": 2}
    assert only_fields({"a": 1}, ["a"], "it", "") == {"a": 1}


@pytest.mark.parametrize("value", [True, 1.0, "1", None, math.nan, np.float64(1), [1]])
def test_what_is_no_whole_number(value):
    with pytest.raises(Refusal, match=r"^--n must be an integer of at least 1, got "):
        whole_number(value, "--n", 1)


@pytest.mark.parametrize(
    ("check", "sentence"),
    [
        (lambda: whole_number(0, "--n", 1), "--n must be an integer of at least 1, got 0"),
        (
            lambda: whole_number(np.int64(-2), "--n", 1),
            "--n must be an integer of at least 1, got -2",
        ),
        (
            lambda: whole_number(10**60, "n", 1),
            f"n must be an integer of at most 9.22337e+18, got 1{'0' * 39}...",
        ),
        (lambda: whole_number(6, "n", 1, most=5), "n must be an integer of at most 5, got 6"),
        (
            lambda: whole_numbers([1, 0], "ids", 1),
            "ids[1] must be an integer of at least 1, got 0",
        ),
        (lambda: whole_numbers("12", "ids", 1), "ids must be a list of integers, got '12'"),
        (lambda: whole_numbers(3, "ids", 1), "ids must be a list of integers, got 3"),
        (lambda: number_within(1.5, "x", 0, 1), "x must be within 0 and 1, got 1.5"),
        (lambda: number_within(math.nan, "x", 0, 1), "x must be within 0 and 1, got nan"),
        (
            lambda: number_within(10**1000, "x", 0, 1),
            f"x must be within 0 and 1, got 1{'0' * 39}...",
        ),
        (lambda: number_within("0.5", "x", 0, 1), "x must be within 0 and 1, got '0.5'"),
        (lambda: number_within(True, "x", 0, 1), "x must be within 0 and 1, got True"),
        (
            lambda: named_fields({"a": 1}, ["a", "b"], "it"),
            "it must be an object with the fields a, b",
        ),
        (lambda: only_fields([], ["a"], "it", ""), "it must be a JSON object, got list"),
        (
            lambda: only_fields({"a": 1, "c": 2}, ["a"], "it", "Make it anew"),
            "it has unknown fields: c. Make it anew",
        ),
        (
            lambda: only_fields({}, ["b", "a"], "it", "Make it anew"),
            "it has missing fields: a, b. Make it anew",
        ),
    ],
)
def test_sentences(check, sentence):
    with pytest.raises(Refusal) as caught:
        check()
    assert str(caught.value) == sentence
