"""What becomes of a Megatron of another version: too old, known, newer than any that was tried."""

from __future__ import annotations

import pytest

from tests.support.forks import in_megatron
from tests.support.jobs import assert_complaint, job, parsed
from tests.support.runs import tiny_arguments


def parsed_in(version: str, words: list[str]) -> dict:
    """As ``parsed``, in a Megatron that says it is of that version."""
    import megatron.core

    megatron.core.__version__ = version
    return parsed(words)


@pytest.mark.parametrize("version", ["0.17.1", "0.9", "0.17.0+1a2b3c4"])
def test_an_old_one_is_refused_by_name_whatever_the_job(version):
    outcome = in_megatron(parsed_in, version, tiny_arguments())
    assert_complaint(
        outcome,
        f"megatron-core {version.partition('+')[0]} is too old for megatron_laep: ",
        "supported is megatron-core >=0.18.2,<0.20 with megatron.training: install such a version",
    )


@pytest.mark.parametrize("version", ["0.18.2", "0.19.0", "0.19.2+1a2b3c4", "0.20.0", "0.20.0rc1"])
def test_known_ones(tmp_path, version):
    outcome = in_megatron(parsed_in, version, job(tmp_path))
    assert outcome.result()["laep_prune_iteration"] == [10]
    assert "is tried because of" not in outcome.output


@pytest.mark.parametrize("version", ["0.20.1", "0.21.0rc0", "1.0.0", "unknown"])
def test_a_newer_one_is_refused_in_a_sentence(tmp_path, version):
    outcome = in_megatron(parsed_in, version, job(tmp_path))
    assert_complaint(
        outcome,
        f"megatron-core {version} is newer than every one that megatron_laep was shown to work with "
        "(0.18.2, 0.19.0, 0.19.2 and ",
        "install megatron-core >=0.18.2,<0.20, or add --laep-try-any-megatron to try it",
    )


def test_a_recording_is_refused_as_well(tmp_path):
    words = job(tmp_path, laep_prune_iteration=None, laep_record_interval=5)
    assert_complaint(in_megatron(parsed_in, "0.21.0", words), "add --laep-try-any-megatron")
    tried = in_megatron(parsed_in, "0.21.0", [*words, "--laep-try-any-megatron"])
    assert tried.result()["laep_record_interval"] == 5


def test_a_newer_one_can_be_tried(tmp_path):
    outcome = in_megatron(parsed_in, "0.21.0", job(tmp_path, laep_try_any_megatron=True))
    assert outcome.result()["laep_prune_iteration"] == [10]
    assert "megatron-core 0.21.0 is tried because of --laep-try-any-megatron" in outcome.output


def test_a_job_without_laep_runs_on_any(tmp_path):
    outcome = in_megatron(parsed_in, "0.21.0", tiny_arguments())
    assert outcome.result()["num_experts"] == 8
