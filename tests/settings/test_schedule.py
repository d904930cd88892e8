"""The windows before a pruning: where they lie, which are counted, and what a resumed job has of them."""

import pytest

from megatron_laep.settings.schedule import Leg, Verdict, judge, with_postponed


def leg(start: int = 0, end: int = 10, *, window: int = 2, needed: int = 3, early: bool = True):
    return Leg(start, end, window, needed, early)


@pytest.mark.parametrize(
    ("given", "starts", "possible"),
    [
        (leg(), [0, 2, 4, 6, 8], [6, 8, 10]),
        (leg(early=False), [4, 6, 8], [10]),
        (leg(window=3), [1, 4, 7], [10]),
        (leg(window=3, needed=2), [1, 4, 7], [7, 10]),
        (leg(7, 20, window=5, needed=2), [10, 15], [20]),
        # Too few to tell: the job prunes at the end all the same.
        (leg(window=6, early=False), [4], [10]),
    ],
)
def test_windows(given, starts, possible):
    assert list(given.window_starts) == starts
    assert list(given.possible_ends) == possible
    assert given.last_window_start == starts[-1]


@pytest.mark.parametrize("window", [1, 2, 3, 5])
@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("start", [0, 4])
def test_a_job_that_is_resumed_anywhere_has_the_windows_of_one_that_was_not(start, window, early):
    """By spans (start, end): what the checkpoint carries, and what the resumed job goes on with."""
    given = Leg(start, start + 12, window, 3, early)

    def run(iteration: int, ended: list, begun: int | None, last: int) -> tuple[list, int | None]:
        """What a job has after iteration `last` that goes on from `iteration`."""
        position = given.position(iteration, begun)
        count = given.continued(ended, position)
        ended = ended[len(ended) - count :]
        for now in range(iteration + 1, last + 1):
            if now == position + window:
                ended, position = [*ended, (position, now)][-given.needed :], now
        return ended, position if position <= last else None

    for last in range(start, given.end + 1):
        whole = run(start, [], None, last)
        for stop in range(start, last + 1):
            assert run(stop, *run(start, [], None, stop), last) == whole, (stop, last)
    ended, _ = run(start, [], None, given.end)
    assert ended[-1] == (given.last_window_start, given.end)
    assert len(ended) == min(12 // window, 3)


def test_windows_of_other_settings_are_left_out():
    ended = [(0, 2), (2, 4)]
    assert leg().continued(ended, 4) == 2
    assert leg(2).continued(ended, 4) == 1  # the first of them was before the leg
    assert leg(window=4).continued(ended, 4) == 0
    assert leg(end=11).continued(ended, 5) == 0
    assert leg().continued(ended, 6) == 0  # (4, 6) is missing
    assert leg().position(5, begun=4) == 4
    assert leg().position(5, begun=None) == 6
    assert leg().position(5, begun=3) == 6
    assert leg().position(9, begun=None) == 10
    assert leg(window=1).position(6, begun=4) == 6  # counts of two iterations


@pytest.mark.parametrize(
    ("stable", "when_stable", "require", "before", "at_the_end"),
    [
        (True, True, False, Verdict.PRUNE, Verdict.PRUNE),
        (True, True, True, Verdict.PRUNE, Verdict.PRUNE),
        (True, False, False, Verdict.WAIT, Verdict.PRUNE),
        (True, False, True, Verdict.WAIT, Verdict.PRUNE),
        (False, True, False, Verdict.WAIT, Verdict.PRUNE_UNSTABLE),
        (False, True, True, Verdict.WAIT, Verdict.DECLINE),
        (False, False, False, Verdict.WAIT, Verdict.PRUNE_UNSTABLE),
        (False, False, True, Verdict.WAIT, Verdict.DECLINE),
    ],
)
def test_verdicts(stable, when_stable, require, before, at_the_end):
    flags = {"stable": stable, "when_stable": when_stable, "require": require}
    assert judge(leg(), 8, **flags) is before
    assert judge(leg(), 10, **flags) is at_the_end


def test_which_verdicts_prune():
    assert [verdict for verdict in Verdict if verdict.prunes] == [
        Verdict.PRUNE,
        Verdict.PRUNE_UNSTABLE,
    ]


def test_postponed_prunings_move_the_legs():
    legs = (leg(0, 10), leg(10, 30))
    assert with_postponed(legs, ()) == legs
    assert with_postponed(legs, [(10, 12)]) == (leg(0, 12), leg(12, 30))
    # Postponed again, and the second one once; one that was early moves nothing.
    pairs = [(4, 6), (10, 12), (12, 14), (30, 32)]
    assert with_postponed(legs, pairs) == (leg(0, 14), leg(14, 32))


def test_whether_a_leg_still_has_its_windows():
    given = leg(10, 30, window=5, needed=3)
    assert given.fits_after(25, judged=False) and not given.fits_after(26, judged=False)
    assert given.fits_after(15, judged=True) and not given.fits_after(16, judged=True)
