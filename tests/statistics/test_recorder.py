"""What a job does where its record cannot be begun: the same on every rank, of which only one writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_laep.records.load_format import LoadLogHeader
from megatron_laep.records.load_writer import LoadLogWriter
from tests.support.forks import on_ranks


def record(folder: Path) -> list[list[int]]:
    """Records two iterations, of 3 and 5 tokens a rank."""
    import torch

    from megatron_laep import events
    from megatron_laep.plan.lineage import Lineage
    from megatron_laep.statistics.recorder import Recording
    from megatron_laep.statistics.routing_stats import RoutingStats

    events.show_on_console()
    counter = torch.zeros(4, dtype=torch.int64)
    recording = Recording(
        RoutingStats({1: counter}, stage=0),
        folder,
        interval=1,
        top_k=1,
        lineage=Lineage(),
        iteration=0,
        expert_parallel_size=2,
    )
    for iteration, tokens in ((1, 3), (2, 5)):
        counter[iteration] += tokens
        recording.end_iteration(iteration)
    recording.close()
    return counter.tolist()


@pytest.mark.distributed
def test_the_log_of_another_model_ends_every_rank(tmp_path):
    LoadLogWriter(tmp_path, LoadLogHeader((1,), (8,), 1, 1)).close()
    for rank in on_ranks(2, record, tmp_path):
        assert rank.error == "Refusal"
        assert "is of another model: its expert_counts is (8,), this job's (4,)" in rank.message


@pytest.mark.distributed
def test_a_folder_that_cannot_be_written_costs_the_record_and_not_the_job(tmp_path):
    (tmp_path / "laep").write_text("a file in its place")
    first, second = on_ranks(2, record, tmp_path / "laep")
    assert first.result() == second.result() == [0, 3, 5, 0]
    assert first.output.count("laep event=record_failed iteration=0") == 1
    assert "record_failed" not in second.output
