"""The detector: its three measures, the recorded run, and loads that nothing can rest on."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_laep.plan.loads import Loads
from megatron_laep.plan.pruning import experts_to_prune
from megatron_laep.plan.stability import churn, compare, decide, load_change, rank_correlation
from megatron_laep.records import load_log
from megatron_laep.settings.rules import PruningRules
from megatron_laep.settings.thresholds import StabilityThresholds

LOG = load_log.read(Path(__file__).parents[1] / "data" / "expert_loads_tiny.json")
WINDOWS = [LOG.window(index) for index in range(LOG.num_windows)]
RULES = PruningRules(alpha="0.4", beta=0.1)
LOADS = st.lists(st.integers(0, 50), min_size=2, max_size=12)


def run(windows, thresholds=StabilityThresholds(), interval=25, numbers=LOG.layer_numbers):
    """What the detector says at the end of each window."""
    return [
        decide(
            Loads.of_windows(windows[:end], numbers),
            iteration=interval * end,
            thresholds=thresholds,
            rules=RULES,
        )
        for end in range(1, len(windows) + 1)
    ]


def fires(windows, thresholds=StabilityThresholds(), interval=25) -> int | None:
    found = run(windows, thresholds, interval)
    return next((decision.iteration for decision in found if decision.stable), None)


def merged(windows, size: int):
    tokens = np.array(windows)
    return tokens.reshape(len(tokens) // size, size, *tokens.shape[1:]).sum(axis=1)


class TestRankCorrelation:
    def test_hand_worked(self):
        """Ranks 1, 2, 3, 4 and 2, 1, 4, 3: squared differences sum to 4, 1 - 6 * 4 / (4 * 15)."""
        assert rank_correlation([10, 20, 30, 40], [7, 5, 900, 8]) == pytest.approx(1 - 24 / 60)
        assert rank_correlation([1, 2, 3], [10, 20, 1000]) == 1.0
        assert rank_correlation([1, 2, 3], [3, 2, 1]) == -1.0

    def test_ties_are_averaged(self):
        """Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4, centred: products 4.5, squares 4.5 and 5."""
        expected = 4.5 / np.sqrt(4.5 * 5)
        assert rank_correlation([0, 7, 7, 9], [1, 2, 3, 4]) == pytest.approx(expected)

    def test_no_order_to_compare(self):
        assert rank_correlation([5, 5, 5], [2, 2, 2]) == 1.0
        assert rank_correlation([5, 5, 5], [1, 2, 3]) == 0.0
        assert rank_correlation([4], [9]) == 1.0

    @pytest.mark.filterwarnings("ignore:An input array is constant")
    @given(st.data())
    @settings(deadline=None)
    def test_as_scipy(self, data):
        stats = pytest.importorskip("scipy.stats")
        before = data.draw(LOADS)
        now = data.draw(st.lists(st.integers(0, 50), min_size=len(before), max_size=len(before)))
        expected = stats.spearmanr(before, now)[0]
        found = rank_correlation(before, now)
        assert -1 <= found <= 1
        if np.isnan(expected):
            assert found in (0.0, 1.0)
        else:
            assert found == pytest.approx(expected, abs=1e-12)

    def test_recorded_loads_as_scipy(self):
        stats = pytest.importorskip("scipy.stats")
        for before, now in zip(WINDOWS, WINDOWS[1:], strict=False):
            for row in range(4):
                expected = stats.spearmanr(before[row], now[row])[0]
                assert rank_correlation(before[row], now[row]) == pytest.approx(expected, abs=1e-12)

    def test_different_lengths(self):
        with pytest.raises(ValueError, match=r"loads of shape \(2,\) and \(3,\)"):
            rank_correlation([1, 2], [1, 2, 3])


def test_churn():
    assert churn([1, 2, 3], [3, 4]) == pytest.approx(3 / 4)  # one common, four in all
    assert churn([], []) == 0.0
    assert churn([1], []) == 1.0


def test_load_change():
    """Shares 0.1, 0.4, 0.5 and 0.3, 0.4, 0.3: a fifth of the tokens went elsewhere."""
    assert load_change([1, 4, 5], [30, 40, 30]) == pytest.approx(0.2)
    assert load_change([1, 2], [10, 20]) == 0.0
    assert load_change([1, 0], [0, 1]) == 1.0


@given(st.data())
@settings(deadline=None)
def test_renumbering_and_scaling_change_nothing(data):
    before = data.draw(LOADS.filter(any))
    # different loads, so that no tie is broken by number
    now = data.draw(st.permutations(range(len(before))))
    before = [len(before) * load + i for i, load in enumerate(before)]
    order = data.draw(st.permutations(range(len(before))))
    rule = {"alpha": 0.4, "beta": 0.1, "thresholds": StabilityThresholds()}
    one = compare(before, now, **rule)
    two = compare([7 * before[i] for i in order], [3 * now[i] for i in order], **rule)
    assert two.rank_correlation == pytest.approx(one.rank_correlation)
    assert two.churn == one.churn
    assert two.load_change == pytest.approx(one.load_change)
    again = compare(before, before, **rule)
    assert (again.rank_correlation, again.churn, again.load_change) == (1.0, 0.0, 0.0)


class TestRecordedRun:
    def test_it_fires_after_the_transition_and_not_in_it(self):
        stable = [decision.stable for decision in run(WINDOWS)]
        assert stable[:5] == [False] * 5
        assert fires(WINDOWS) == 150

    def test_the_figures_of_the_docstring(self):
        worst = {"rank_correlation": [], "churn": [], "load_change": []}
        for decision in run(WINDOWS)[1:]:
            latest = [layer.comparisons[-1] for layer in decision.layers]
            worst["rank_correlation"].append(min(item.rank_correlation for item in latest))
            worst["churn"].append(max(item.churn for item in latest))
            worst["load_change"].append(max(item.load_change for item in latest))
        rounded = {name: np.round(values, 3).tolist() for name, values in worst.items()}
        assert rounded["rank_correlation"][:7] == [0.118, 0.594, 0.724, 0.794, 0.66, 0.69, 0.776]
        assert np.round(worst["churn"], 2)[:7].tolist() == [
            0.47,
            0.22,
            0.14,
            0.14,
            0.27,
            0.12,
            0.07,
        ]
        assert rounded["load_change"][:7] == [0.576, 0.284, 0.199, 0.199, 0.212, 0.226, 0.139]
        rest = [(min(values[7:]), max(values[7:])) for values in rounded.values()]
        assert rest == [(0.794, 0.937), (0.0, 0.438), (0.067, 0.141)]

    def test_what_pruning_too_early_would_cost(self):
        """Percent of the last five windows' tokens that would have lost their experts."""
        later = np.array(WINDOWS[-5:]).sum(axis=0)
        costs = []
        for window in WINDOWS[:11]:
            lost = [
                later[row][experts_to_prune(window[row], alpha=0.4, beta=0.1)].sum()
                / later[row].sum()
                for row in range(4)
            ]
            costs.append(round(100 * max(lost), 1))
        assert [round(cost) for cost in costs[:5]] == [45, 24, 24, 19, 19]
        assert costs[5:9] == [7.8, 7.8, 6.8, 4.6]
        assert [round(cost) for cost in costs[9:]] == [13, 15]

    def test_longer_windows(self):
        assert fires(merged(WINDOWS, 2), interval=50) == 300
        # four comparisons, of which the last two pass: the run is too short for a patience of 3
        assert fires(merged(WINDOWS, 4), interval=100) is None
        assert run(merged(WINDOWS, 4))[-1].layers[2].streak == 2
        assert fires(merged(WINDOWS, 4), StabilityThresholds(patience=2), interval=100) == 500

    @pytest.mark.parametrize("patience", [1, 2, 3])
    def test_a_shorter_patience_fires_earlier(self, patience):
        thresholds = StabilityThresholds(patience=patience)
        # the comparisons with windows 4, 5 and 6 pass: fires at the patience-th of them
        assert fires(WINDOWS, thresholds) == 25 * (3 + patience)

    def test_margins(self):
        """Not on the edge: thresholds 5 % stricter or laxer than the defaults fire there, too."""
        for factor in (0.95, 1.05):
            moved = StabilityThresholds(
                rank_correlation=0.6 / factor, churn=0.3 * factor, load_change=0.25 * factor
            )
            assert fires(WINDOWS, moved) == 150

    def test_share_of_the_layers(self):
        # in window 5 three of four layers are stable, and not layer 3
        decision = run(WINDOWS)[4]
        assert decision.stable_layers == 3
        assert [layer.stable for layer in decision.layers] == [True, True, False, True]
        assert fires(WINDOWS, StabilityThresholds(share=0.75)) == 125
        assert fires(WINDOWS, StabilityThresholds(share=0.76)) == 150

    def test_reasons(self):
        decision = run(WINDOWS)[2]
        lines = decision.format().splitlines()
        assert lines[0] == ("iteration 75: loads are not stable, 0 of 4 layers are (4 needed)")
        assert lines[1] == (
            "  layer 1: not stable yet: 1 of 3 comparisons in a row passed; rank correlation "
            "0.867, churn 0.125, load change 0.219"
        )
        assert lines[3] == (
            "  layer 3: not stable: rank correlation 0.594 < 0.6; load change 0.284 > 0.25"
        )
        assert "churn 0.438 > 0.3" in run(WINDOWS)[9].layers[0].reason
        assert run(WINDOWS)[5].headline() == (
            "iteration 150: loads are stable, 4 of 4 layers are (4 needed)"
        )
        assert "only one window" in run(WINDOWS)[0].layers[0].reason

    def test_json(self):
        for decision in run(WINDOWS):
            text = json.dumps(decision.to_dict(), allow_nan=False)
            data = json.loads(text)
            assert data["stable"] == decision.stable
            assert len(data["layers"]) == 4
            assert data["thresholds"] == dataclasses.asdict(StabilityThresholds())

    def test_only_the_last_windows_are_looked_at(self):
        loads, last = LOG.loads(), LOG.num_windows
        whole = decide(loads, iteration=500, rules=RULES)
        assert decide(loads.windows(last - 4, last), iteration=500, rules=RULES) == whole
        assert decide(loads.windows(last - 3, last), iteration=500, rules=RULES) != whole


def test_a_failure_begins_the_count_anew():
    steady, other = [[0, 1, 50, 60]], [[60, 50, 1, 0]]
    found = run([steady] * 3 + [other] + [steady] * 4, numbers=[1])
    assert [item.layers[0].streak for item in found] == [0, 1, 2, 0, 0, 1, 2, 3]
    assert [item.stable for item in found] == [False] * 7 + [True]


def test_a_window_without_tokens_is_never_stable():
    idle = [[0, 0, 0, 0]]
    found = run([idle] * 6, numbers=[7])
    assert not any(item.stable for item in found)
    assert found[-1].layers[0].reason == "not stable: no token was counted in a window"
    json.dumps(found[-1].to_dict(), allow_nan=False)


def test_even_loads_are_stable():
    # a run with a strong auxiliary loss: nothing to prune, and nothing moves
    assert run([[[5, 5, 5, 5]]] * 4, numbers=[1])[-1].stable


@pytest.mark.parametrize(("share", "needed"), [(1.0, 103), (0.9, 93), (0.1, 11), (0.0001, 1)])
def test_layers_needed(share, needed):
    assert StabilityThresholds(share=share).layers_needed(103) == needed
    # as written, not as the nearest binary float: 0.7 of 10 layers are 7
    assert StabilityThresholds(share=0.7).layers_needed(10) == 7


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"rank_correlation": 1.1}, "rank_correlation must be within -1 and 1, got 1.1"),
        ({"churn": -0.1}, "churn must be within 0 and 1, got -0.1"),
        ({"load_change": float("nan")}, "load_change must be within 0 and 1, got nan"),
        ({"churn": "0.3"}, "churn must be within 0 and 1, got '0.3'"),
        ({"share": 0}, "share of stable layers must be above 0"),
        ({"patience": 0}, "patience must be an integer of at least 1, got 0"),
        ({"patience": 1.5}, "patience must be an integer of at least 1, got 1.5"),
    ],
)
def test_thresholds_out_of_range(settings_, message):
    with pytest.raises(ValueError, match=message):
        StabilityThresholds(**settings_)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1, 2, -3, 4]], "layer 6: the load of expert 2 is negative: -3"),
        ([[1, 2, float("nan"), 4]], "layer 6: the load of expert 2 is NaN"),
        ([[1, 2, 3]], "layer 6: the windows have loads of 3 and 4 experts"),
        ([[1, 2, 3, 4], [1, 2, 3, 4]], "there are loads of 2 layers for 1 layer numbers"),
    ],
)
def test_loads_that_no_decision_can_rest_on(rows, message):
    with pytest.raises(ValueError, match=message):
        run([[[1, 2, 3, 4]], rows], numbers=[6])


def test_rules_must_be_there():
    loads = Loads.of_windows([[[1, 2]], [[1, 2]]], [6])
    with pytest.raises(ValueError, match="layer 6: --laep-alpha has no range for MoE layer 6"):
        decide(loads, iteration=2, rules=PruningRules("0.4:1-5"))
