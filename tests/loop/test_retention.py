"""The checkpoint of a pruning outlives those after it, in a job whose older checkpoints Megatron deletes."""

from pathlib import Path

from tests.support.runs import LAEP, run_megatron, tiny_arguments

PRUNE = 2


def run(folder: Path, until: int) -> list[int]:
    """Iterations of the checkpoints that are there at the end."""
    flags = {
        "train_iters": 7,
        "exit_interval": until,
        "save": folder,
        "load": folder,
        "save_interval": 1,
        "save_retain_interval": 100,
        "laep_prune_iteration": PRUNE,
        "laep_window": 2,
        "laep_keep_pruning_checkpoint": 3,
        "expert_model_parallel_size": 2,
    }
    run_megatron(tiny_arguments(**flags), 2, launcher=LAEP)
    return sorted(int(path.name.removeprefix("iter_")) for path in folder.glob("iter_*"))


def test_a_pruning_is_kept_for_a_while(tmp_path) -> None:
    # 3 and 4 are the first and second ordinary checkpoint after it; the third one takes it along, in a relaunch, too.
    assert run(tmp_path, until=4) == [PRUNE, 4]
    assert run(tmp_path, until=5) == [5]
