"""The table at pruning: rows, totals, text and JSON, worked by hand."""

import dataclasses
import json

import pytest

from megatron_laep.plan.expert_map import ExpertMap, LayerMap
from megatron_laep.plan.summary import ModelSize, PruningSummary, summarize
from tests.support import maps

SIZE = ModelSize(parameters_per_expert=1000, other_parameters=4000, bytes_per_expert_parameter=18.0)
# Layer 2 before: ranks 0 (experts 0, 1) and 1 (2, 3) hold 10 + 50 = 60 and 0 + 40 = 40: 60 / 50.
# Experts 0 and 2 go, with 10 of 100 tokens. After: 40 and 50, mean 45.
MAP = ExpertMap(
    iteration=50,
    layers=(
        LayerMap(2, 4, (3, 1), (1, 1), (10, 50, 0, 40)),
        LayerMap(5, 4, (0, 1, 2, 3), (2, 2), (100, 100, 50, 50)),
    ),
    alpha="0.4",
    beta=0.2,
    expert_multiple=2,
    placement="greedy",
    expert_parallel_size_before=2,
    expert_parallel_size_after=2,
    top_k=2,
)


def test_rows():
    first, second = summarize(MAP, SIZE).rows
    assert (first.layer_number, first.experts_before, first.experts_after) == (2, 4, 2)
    assert first.tokens_rerouted_percent == 10.0
    assert first.imbalance_before == pytest.approx(60 / 50)
    assert first.imbalance_after == pytest.approx(50 / 45)
    assert second.tokens_rerouted_percent == 0.0
    assert second.imbalance_before == second.imbalance_after == pytest.approx(200 / 150)


def test_totals():
    total = summarize(MAP, SIZE)
    assert (total.experts_before, total.experts_after) == (8, 6)
    assert total.tokens_rerouted_percent == 100 * 10 / 400
    # 4000 + 8 * 1000 and 4000 + 6 * 1000: 2000 of 12000 go
    assert (total.parameters_before, total.parameters_after) == (12000, 10000)
    assert total.parameters_removed_percent == pytest.approx(100 / 6)
    # 4 experts a rank before, 3 after: 1 * 1000 parameters * 18 bytes
    assert total.memory_freed_bytes_per_rank == 18000.0
    assert (total.iteration, total.expert_map_hash) == (50, MAP.hash)


def test_memory_by_pipeline_stage_and_expert_parallel_size():
    assert summarize(MAP, SIZE, pipeline_parallel_size=4).memory_freed_bytes_per_rank == 4500.0
    # EP 2 -> 1: 4 experts a rank before, 6 after: a rank holds 2 more
    one_rank = MAP.laid_out_for(1)
    assert summarize(one_rank, SIZE).memory_freed_bytes_per_rank == -36000.0
    # and with the optimizer state spread over twice as many ranks: 4 * 18 - 6 * 12 = 0
    shared = dataclasses.replace(SIZE, bytes_per_expert_parameter_after=12.0)
    assert summarize(one_rank, shared).memory_freed_bytes_per_rank == 0.0
    with pytest.raises(ValueError, match="pipeline_parallel_size must be at least 1, got 0"):
        summarize(MAP, SIZE, pipeline_parallel_size=0)


def test_uneven_ranks_after():
    # ranks with experts (0, 1, 2) and (3): 250 and 50, mean 150
    uneven = dataclasses.replace(MAP.layer(5), experts_per_rank=(3, 1))
    row = summarize(dataclasses.replace(MAP, layers=(uneven,)), SIZE).rows[0]
    assert row.imbalance_after == pytest.approx(250 / 150)


@pytest.mark.parametrize("loads", [(), (0, 0, 0, 0)])
def test_unknown_loads(loads):
    quiet = dataclasses.replace(MAP.layer(2), loads=loads)
    total = summarize(dataclasses.replace(MAP, layers=(quiet,)), SIZE)
    row = total.rows[0]
    assert row.tokens_rerouted_percent is row.imbalance_before is row.imbalance_after is None
    assert total.tokens_rerouted_percent is None
    assert total.parameters_after == 6000
    line = next(line for line in total.format_table().splitlines() if line.split()[:1] == ["2"])
    assert line.split() == ["2", "4", "2", "-", "-", "-", "-", "-"]
    assert total.stages[0].load_percent_per_rank is None


def test_experts_that_did_not_lie_in_equal_blocks_before():
    odd = dataclasses.replace(MAP, expert_parallel_size_before=3)
    assert [row.imbalance_before for row in summarize(odd, SIZE).rows] == [None, None]


def test_json():
    total = summarize(MAP, SIZE)
    data = json.loads(json.dumps(total.to_dict(), allow_nan=False))
    assert set(data) == {field.name for field in dataclasses.fields(PruningSummary)}
    assert data["rows"][0] == {
        "layer_number": 2,
        "experts_before": 4,
        "experts_after": 2,
        "tokens_rerouted_percent": 10.0,
        "imbalance_before": pytest.approx(1.2),
        "imbalance_after": pytest.approx(1.111, abs=1e-3),
        "imbalance_bound": pytest.approx(1.111, abs=1e-3),
        "distance_from_bound": 1.0,
        "hottest_expert": 1,
    }
    # ranks hold 40 + 200 and 50 + 100 tokens
    assert data["stages"] == [
        {
            "stage": 0,
            "layer_numbers": [2, 5],
            "experts_per_rank": [3, 3],
            "spread": 0,
            "load_percent_per_rank": pytest.approx([100 * 240 / 390, 100 * 150 / 390]),
        }
    ]


def test_imbalance_counts_the_kept_experts_own_tokens():
    """Experts 0 and 2 go with 10 of 100 tokens; 40 and 50 are left on two ranks: 50 / 45.

    Shared out in proportion, the ranks would have 44.4 and 55.6 of 100, the same 50 / 45. If they
    were counted where they were before, it would be 50 / 40 * 2 / ... : no rank of the new model.
    """
    row = summarize(MAP, SIZE).rows[0]
    assert row.imbalance_after == pytest.approx(50 / 45)
    shared = [tokens * 100 / 90 for tokens in (40, 50)]
    assert row.imbalance_after == pytest.approx(max(shared) / (sum(shared) / 2))


def test_the_bound():
    """Kept loads 100, 100, 50, 50 on (0, 1), (2, 3) make 200 / 150; the bound is 1: no expert has more
    than 150. On four ranks of 75 the hottest has 100 alone."""
    row = summarize(MAP, SIZE).rows[1]
    assert (row.imbalance_bound, row.hottest_expert) == (1.0, 0)
    assert row.distance_from_bound == row.imbalance_after == pytest.approx(4 / 3)
    alone = dataclasses.replace(MAP, layers=(MAP.layer(5),)).laid_out_for(4)
    row = summarize(alone, SIZE).rows[0]
    assert row.imbalance_bound == row.imbalance_after == pytest.approx(4 / 3)
    text = summarize(alone, SIZE).format_table()
    assert (
        "1.333*" in text and "* one expert alone has more tokens than a rank's fair share" in text
    )
    assert "one expert alone" in summarize(MAP, SIZE).format_table()  # layer 2: 50 of 90
    even = dataclasses.replace(MAP, layers=(MAP.layer(5),))
    assert "one expert alone" not in summarize(even, SIZE).format_table()


def test_stages():
    first, second = summarize(MAP, SIZE, stages={2: 1, 5: 3}).stages
    assert (first.stage, first.layer_numbers, first.experts_per_rank) == (1, (2,), (1, 1))
    assert (second.stage, second.load_percent_per_rank) == (3, pytest.approx((200 / 3, 100 / 3)))
    uneven = dataclasses.replace(MAP.layer(5), experts_per_rank=(3, 1))
    total = summarize(dataclasses.replace(MAP, layers=(uneven,)), SIZE)
    assert (total.stages[0].experts_per_rank, total.stages[0].spread) == ((3, 1), 2)


def test_many_ranks_fit_into_the_table():
    wide = maps.identity(range(1, 4), 128, expert_parallel_size=32, top_k=1)
    loads = tuple(range(1, 129))
    layers = tuple(dataclasses.replace(layer, loads=loads) for layer in wide.layers)
    text = summarize(dataclasses.replace(wide, layers=layers), SIZE).format_table()
    assert max(map(len, text.splitlines())) <= 100
    # 1 + 2 + 3 + 4 and 125 + ... + 128 of 8256
    assert "12 to 12" in text and "0.1 to 6.1" in text


def test_table():
    lines = summarize(MAP, SIZE).format_table().splitlines()
    assert lines[0].split() == [
        *("layer", "experts", "experts", "tokens", "busiest", "rank", "busiest", "rank"),
        *("bound", "after"),
    ]
    assert lines[3].split() == ["2", "4", "2", "10.00", "1.200", "1.111", "1.111*", "1.000"]
    assert lines[4].split() == ["5", "4", "4", "0.00", "1.333", "1.333", "1.000", "1.333"]
    assert max(map(len, lines)) <= 100
    assert [" ".join(line.split()) for line in lines[6:]] == [
        "",
        "stage layers experts on the ranks spread tokens on the ranks, %",
        "------- -------- ---------------------- -------- ------------------------",
        "0 2 3 3 0 61.5 38.5",
        "",
        "experts 8 -> 6 (-25.0 %)",
        "tokens re-routed 2.50 %",
        "parameters 12.0 k -> 10.0 k (-16.7 %)",
        "memory freed per rank 17.58 KiB (mean over the ranks)",
    ]


def test_table_prints_every_layer():
    many = maps.identity(range(1, 121), 4, expert_parallel_size=2, top_k=1)
    lines = summarize(many, SIZE).format_table().splitlines()
    assert [int(line.split()[0]) for line in lines[3:123]] == list(range(1, 121))
