"""A pruning whose checkpoint would not fit on the disk: postponed, by a relaunch too; or the job stops.

``statvfs`` of the folder is what is injected, in real jobs: what the file system says is free follows a plan by iteration.
"""

import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.support.forks import in_megatron
from tests.support.runs import RunResult, run_megatron, tiny_arguments

ITERATIONS, PRUNE, WINDOW, AGAIN = 9, 4, 2, 6
NO_SPACE = (__file__,)


def flags(folder: Path, **more) -> list[str]:
    return tiny_arguments(
        **{
            "expert_model_parallel_size": 2,
            "bf16": True,
            "moe_router_dtype": "fp32",
            "use_distributed_optimizer": True,
            "train_iters": ITERATIONS,
            "clip_grad": 100.0,
            "save": folder,
            "load": folder,
            "save_interval": 5,
            "laep_prune_iteration": PRUNE,
            "laep_window": WINDOW,
            "laep_alpha": 1.0,
            "laep_beta": 0.5,
            **more,
        }
    )


def run(folder: Path, until: int, check: bool = True, **more) -> RunResult:
    """A job that finds its disk full up to and at iteration `until`."""
    return run_megatron(
        flags(folder, **more), 2, launcher=NO_SPACE, env={"FULL_UNTIL": str(until)}, check=check
    )


@pytest.fixture(scope="module")
def postponed(tmp_path_factory) -> tuple[Path, RunResult]:
    folder = tmp_path_factory.mktemp("postponed")
    return folder, run(folder, until=PRUNE)


def test_the_pruning_is_postponed_and_said(postponed) -> None:
    folder, result = postponed
    assert sorted(path.name for path in (folder / "laep").glob("iter_*")) == [f"iter_{AGAIN:07d}"]
    assert sorted(path.name for path in folder.glob("iter_*")) == [
        f"iter_{n:07d}" for n in (5, AGAIN, 9)
    ]
    log = result.logs[0]
    assert f"laep event=postponed iteration={PRUNE} again_at={AGAIN}" in log
    assert re.search(
        rf"LAEP WARNING\nThe checkpoint of the pruning at iteration {PRUNE} takes ", log
    )
    assert f"The pruning is POSTPONED to iteration {AGAIN}" in log
    assert list(result.exact) == list(range(1, ITERATIONS + 1))


def test_what_is_counted_is_what_is_written(postponed) -> None:
    """Byte for byte, the margin aside: what PyTorch says of the tensors that are stored."""
    folder, result = postponed
    needed = {int(n) for n in re.findall(r"event=space .*needed_bytes=(\d+)", result.logs[0])}
    stored = in_megatron(bytes_of_tensors, str(folder / f"iter_{AGAIN:07d}")).result()
    assert needed == {int(stored * 1.1) + 64 * 2**20}


def bytes_of_tensors(checkpoint: str) -> int:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    entries = FileSystemReader(checkpoint).read_metadata().state_dict_metadata.values()
    return sum(
        entry.size.numel() * entry.properties.dtype.itemsize
        for entry in entries
        if isinstance(entry, TensorStorageMetadata)
    )


def test_a_relaunch_decides_the_same(postponed, tmp_path) -> None:
    """From a checkpoint between the iteration at which it was due and the one it was postponed to; also after it."""
    folder, result = postponed
    for start, others in ((5, (AGAIN, 9)), (AGAIN, (9,))):
        again = shutil.copytree(folder, tmp_path / str(start))
        for other in others:
            shutil.rmtree(again / f"iter_{other:07d}")
        (again / "latest_checkpointed_iteration.txt").write_text(str(start))
        resumed = run(again, until=0)
        assert resumed.exact == {i: result.exact[i] for i in range(start + 1, ITERATIONS + 1)}
        assert f"postponed={PRUNE}->{AGAIN}" in resumed.logs[0]


def test_the_job_stops_if_it_must_prune(tmp_path) -> None:
    result = run(tmp_path, until=PRUNE, check=False, laep_require_prune=True, save_interval=3)
    assert result.returncodes == [78, 78]
    assert "Nothing was written (--laep-require-prune): make room" in result.logs[0]
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000003"]


def test_a_pruning_that_would_come_too_late_is_declined(tmp_path) -> None:
    result = run(tmp_path, until=ITERATIONS, train_iters=AGAIN)
    assert f"laep event=postponed iteration={PRUNE} again_at=never" in result.logs[0]
    assert "The model is NOT PRUNED" in result.logs[0] and list(result.exact)[-1] == AGAIN
    assert not (tmp_path / "laep").exists() or not list((tmp_path / "laep").glob("iter_*"))


if __name__ == "__main__":
    from megatron_laep import cpu

    cpu.enable()
    import os

    from megatron_laep.__main__ import main
    from megatron_laep.loop import commit

    has_room, usage = commit.has_room, shutil.disk_usage

    def with_a_full_disk(running, iteration, *more):
        full = iteration <= int(os.environ["FULL_UNTIL"])
        # One rank alone sees it: all must follow.
        if full and os.environ["RANK"] == "1":
            shutil.disk_usage = lambda path: usage(path)._replace(free=64 * 2**20)
        try:
            return has_room(running, iteration, *more)
        finally:
            shutil.disk_usage = usage

    commit.has_room = with_a_full_disk
    sys.argv[0] = "megatron_laep"
    main()
