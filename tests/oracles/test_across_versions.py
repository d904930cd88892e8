"""A job that began under an older Megatron-Core goes on under a newer one: stock, pruned, with a pruning pending.

The other version lies in ``.megatron``, where ``scripts/test.sh --megatron`` puts it, too; it is installed where it is
not there yet.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.oracles.test_pruning_run import ITERATIONS, PRUNE, SAVE_INTERVAL, flags, stock_flags
from tests.support.runs import LAEP, ON_CPU, REPOSITORY, RunResult, run_megatron

pytestmark = [pytest.mark.long, pytest.mark.equality, pytest.mark.timeout(600)]

OLDEST = "0.18.2"
SAVED = (2 * SAVE_INTERVAL, PRUNE)


@pytest.fixture(scope="module")
def paths() -> dict[str, str]:
    """For each version the folder that Python is to look into first; the newest is the environment's own."""
    source = 'set -euo pipefail; source "$1"; VENV_PYTHON=$2; use_megatron "$3"'
    script = REPOSITORY / "scripts" / "setup_env.sh"
    subprocess.run(["bash", "-c", source, "_", script, sys.executable, OLDEST], check=True)
    return {"newest": "", "oldest": str(REPOSITORY / ".megatron" / OLDEST)}


@pytest.fixture(scope="module")
def whole(paths, tmp_path_factory) -> dict[str, tuple[Path, RunResult, RunResult]]:
    """For each version a job that prunes, and one on stock Megatron, from the first to the last iteration."""
    found = {}
    for version, path in paths.items():
        folder = tmp_path_factory.mktemp(version)
        found[version] = (
            folder,
            run_megatron(flags(folder / "laep"), 2, launcher=LAEP, path=path),
            run_megatron(stock_flags(folder / "stock"), 2, launcher=ON_CPU, path=path),
        )
        assert f"megatron={OLDEST}" in found[version][1].output or not path
    return found


def as_of(iteration: int, source: Path, folder: Path) -> Path:
    """A copy of the checkpoint folder, as if the job had been killed right after that checkpoint."""
    name = f"iter_{iteration:07d}"
    shutil.copytree(source / name, folder / name)
    (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return folder


SAVES = pytest.mark.parametrize("saved", SAVED, ids=["pruned", "pending"])


@SAVES
def test_a_pruned_job_goes_on_under_a_newer_one(paths, whole, tmp_path, saved) -> None:
    written, wanted, _ = whole["oldest"]
    folder = as_of(saved, written / "laep", tmp_path / "copy")
    result = run_megatron(flags(folder), 2, launcher=LAEP, path=paths["newest"])
    assert set(result.exact) == set(range(saved + 1, ITERATIONS + 1))
    assert result.exact == {i: wanted.exact[i] for i in result.exact}


def test_a_stock_job_goes_on_under_a_newer_one(paths, whole, tmp_path) -> None:
    """As far as Megatron allows it by itself."""
    written, _, wanted = whole["oldest"]
    folder = as_of(SAVE_INTERVAL, written / "stock", tmp_path / "copy")
    result = run_megatron(stock_flags(folder), 2, launcher=ON_CPU, path=paths["newest"])
    assert result.exact == {i: wanted.exact[i] for i in range(SAVE_INTERVAL + 1, ITERATIONS + 1)}


def assert_unreadable(result: RunResult) -> None:
    """0.19 puts into the metadata what 0.18 looks for in a file of its own; stock Megatron does not get further."""
    assert not result.ok and not result.exact
    assert "common.pt does not exist" in result.output


@SAVES
def test_a_pruned_job_does_not_start_over_under_an_older_one(paths, whole, tmp_path, saved) -> None:
    written, _, _ = whole["newest"]
    folder = as_of(saved, written / "laep", tmp_path / "copy")
    assert_unreadable(
        run_megatron(flags(folder), 2, launcher=LAEP, path=paths["oldest"], check=False)
    )


def test_nor_does_a_stock_job_go_on(paths, whole, tmp_path) -> None:
    written, _, _ = whole["newest"]
    folder = as_of(SAVE_INTERVAL, written / "stock", tmp_path / "copy")
    assert_unreadable(
        run_megatron(stock_flags(folder), 2, launcher=ON_CPU, path=paths["oldest"], check=False)
    )
