"""What happens on rank 0 reaches every rank, whatever it is: nobody is left waiting in a broadcast."""

from __future__ import annotations

import pytest

from megatron_laep.checks import Refusal
from megatron_laep.events import on_rank_0
from tests.support.forks import on_ranks

RANKS = 2


def decided_on_rank_0(kind: str) -> tuple[object, object]:
    """What `on_rank_0` gave this rank, or the exception; then what it gives for the next decision."""

    def decide():
        if kind == "value":
            return {"experts": (3, 1)}
        if kind == "value that cannot be pickled":
            return lambda: None
        if kind == "refusal":
            raise Refusal("--flag 3: got 3, wanted 4")
        if kind == "interrupt":
            raise KeyboardInterrupt("by hand")
        return {}["missing key"]

    try:
        first = on_rank_0(decide)
    except BaseException as error:
        first = (type(error).__name__, str(error))
    # Both ranks must be at the same place of the conversation afterwards.
    return first, on_rank_0(lambda: "next")


def outcomes(kind: str) -> list[object]:
    found = [outcome.result() for outcome in on_ranks(RANKS, decided_on_rank_0, kind)]
    assert [following for _, following in found] == ["next"] * RANKS
    return [first for first, _ in found]


@pytest.mark.distributed
def test_a_value_reaches_every_rank():
    assert outcomes("value") == [{"experts": (3, 1)}] * RANKS


@pytest.mark.distributed
def test_a_refusal_stays_a_refusal_on_every_rank():
    assert outcomes("refusal") == [("Refusal", "--flag 3: got 3, wanted 4")] * RANKS


@pytest.mark.distributed
@pytest.mark.parametrize(
    "kind, wanted",
    [("defect", "KeyError: 'missing key'"), ("value that cannot be pickled", "lambda")],
)
def test_a_defect_carries_the_traceback_of_rank_0_to_every_rank(kind, wanted):
    for name, message in outcomes(kind):
        assert name == "RuntimeError"
        assert "Traceback (most recent call last)" in message and "on_rank_0" in message
        assert wanted in message


@pytest.mark.distributed
def test_an_interrupt_of_rank_0_ends_the_others_too():
    first, second = outcomes("interrupt")
    assert first == ("KeyboardInterrupt", "by hand")
    assert second[0] == "RuntimeError" and "KeyboardInterrupt: by hand" in second[1]
