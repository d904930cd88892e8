"""Jobs that would never be pruned: loops that are not Megatron's, and runs that end before their pruning."""

import pytest

from megatron_laep import LaepConfig
from tests.statistics.test_routing_stats import build_block, forward_backward, prepare
from tests.support.exact_job import exact_job
from tests.support.forks import in_megatron, on_ranks
from tests.support.runs import tiny_arguments


def train_in_a_loop_of_its_own(config: LaepConfig | None, words: list[str] | None) -> list:
    """Layers from Megatron's specs, trained without ``pretrain``; what each pass says."""
    import sys

    import megatron_laep

    batches = prepare()
    megatron_laep.uninstall()
    megatron_laep.install(config)
    if words is not None:
        from megatron.training.arguments import parse_args

        sys.argv = ["script.py", *words]
        parse_args()
    block, _ = build_block()
    said: list = []
    block.eval()
    forward_backward(block, batches[:1])
    block.train()
    try:
        forward_backward(block, batches[:1])
        said.append("trained")
    except ValueError as error:
        said.append(str(error))
    megatron_laep.uninstall()
    forward_backward(block, batches[:1])
    return said


@pytest.mark.parametrize(
    ("config", "words", "asked"),
    [
        (LaepConfig(prune_iteration=7), None, "--laep-prune-iteration 7"),
        (LaepConfig(record_interval=5), None, "--laep-record-interval 5"),
        (None, ["--laep-prune-iteration", "7", "9"], "--laep-prune-iteration 7 9"),
        (None, [], None),
        (None, None, None),
    ],
)
def test_a_loop_that_is_not_megatrons(config, words, asked):
    [said] = in_megatron(train_in_a_loop_of_its_own, config, words).result()
    if asked is None:
        assert said == "trained"
    else:
        assert said.startswith(f"{asked} was asked for, but this model is trained by a loop")
        assert "Train with a script that calls megatron.training.pretrain" in said


def test_a_run_that_ends_before_its_pruning(tmp_path):
    flags = {"save": tmp_path, "save_interval": 1000, "exit_interval": 2, "train_iters": 10}
    arguments = tiny_arguments(**flags, laep_prune_iteration=5, laep_window=2)
    [outcome] = on_ranks(1, exact_job, arguments)
    outcome.result()
    last_line = outcome.output.rstrip().splitlines()[-1]
    assert "event=not_pruned to_come=5 reason=" in last_line


def leave_without_training() -> None:
    import megatron_laep

    megatron_laep.install(LaepConfig(prune_iteration=7))
    megatron_laep.run(lambda: None)


def test_a_script_without_a_loop():
    outcome = in_megatron(leave_without_training)
    outcome.result()
    assert "never entered Megatron's training loop" in outcome.output
    assert "NOTHING WAS PRUNED" in outcome.output
