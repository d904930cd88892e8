"""loads.json: what a job writes is what a tool reads, also from jobs that named no version."""

import json
from pathlib import Path

import pytest

from megatron_laep.plan.layout import ModelLayout
from megatron_laep.plan.windows import OpenWindow
from megatron_laep.records.pruning_loads import PruningLoads

OLD = json.loads(
    (Path(__file__).parents[1] / "data" / "job_pruned_at_6" / "loads.json").read_text()
)


def test_there_and_back():
    """Two parts, 3 and 5 tokens of the first expert; layers of 2 and 1 experts on two ranks."""
    window = OpenWindow(4, 8, ((8, 6), (9,)), ((6, ((3, 2), (4,))),))
    layout = ModelLayout.of(
        {2: 2, 5: 1}, top_k=1, expert_parallel_size_before=2, stages={2: 0, 5: 1}
    )
    written = PruningLoads.of(window, layout, [(1, 1), (1, 0)])
    data = json.loads(json.dumps(written.to_dict()))
    assert data == {
        "format": "megatron_laep pruning loads",
        "version": 1,
        "iteration": 8,
        "window": 4,
        "top_k": 1,
        "expert_parallel_size": 2,
        "layer_numbers": [2, 5],
        "stages": [0, 1],
        "experts_per_rank": [[1, 1], [1, 0]],
        "tokens": [[8, 6], [9]],
        "parts": [
            {"last_iteration": 6, "tokens": [[3, 2], [4]]},
            {"last_iteration": 8, "tokens": [[5, 4], [5]]},
        ],
    }
    read = PruningLoads.from_dict(data)
    assert read.to_dict() == written.to_dict()
    assert (read.ends, read.window, read.loads.total(2).tolist()) == ((6, 8), 4, [8, 6])


def test_a_file_from_before_the_format_had_a_name():
    assert "format" not in OLD
    read = PruningLoads.from_dict(OLD)
    assert (read.iteration, read.window, read.ends) == (6, 4, (3, 4, 5, 6))
    written = read.to_dict()
    assert {name: written[name] for name in OLD} == OLD


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "megatron_laep loads"}, "reads 'megatron_laep pruning loads' and 1: use the"),
        ({"version": 2}, "it has format None and version 2, this megatron_laep reads"),
        ({"iteration": 0}, "iteration must be an integer of at least 1, got 0"),
        ({"window": 7}, "window must be an integer of at most 6, got 7"),
        ({"iteration": 7}, "the last of the parts must end at iteration 7"),
        ({"tokens": 5}, "tokens must be a list"),
        ({"tokens": OLD["tokens"][:2]}, "it has tokens of 2 layers for 4: the file is incomplete"),
        ({"layer_numbers": [1, 2, 3, 3]}, r"a layer occurs more than once in \[1, 2, 3, 3\]"),
        ({"experts_per_rank": [[4, 4]] * 3}, "experts_per_rank must have a list for each of 4"),
    ],
)
def test_damage(changes, message):
    with pytest.raises(ValueError, match=message):
        PruningLoads.from_dict({**OLD, **changes})


def test_fields_that_must_be_there():
    with pytest.raises(
        ValueError,
        match="it must be an object with the fields iteration, window, layer_numbers, tokens",
    ):
        PruningLoads.from_dict({name: OLD[name] for name in OLD if name != "window"})
