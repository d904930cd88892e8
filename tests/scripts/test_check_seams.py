"""check_seams.py on the installed Megatron, and on trees in which something was moved."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import REPOSITORY

SCRIPT = REPOSITORY / "scripts" / "check_seams.py"
# A namespace package may lie in several folders; the first is the one that is imported.
MEGATRON, *_ = importlib.util.find_spec("megatron").submodule_search_locations


def check(tree: Path) -> tuple[int, str]:
    """Exit code and console of the script; Megatron and torch cannot be imported there."""
    blocked = "import sys, runpy; sys.modules.update(torch=None, megatron=None); "
    run = "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", blocked + run, str(SCRIPT), str(tree)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def tree(tmp_path) -> Path:
    """A tree of links to the installed Megatron's sources."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.cpp", "*.cu")
    shutil.copytree(MEGATRON, tmp_path / "megatron", copy_function=os.symlink, ignore=ignore)
    return tmp_path


def change(tree: Path, file: str, pattern: str, replacement: str) -> None:
    path = tree / "megatron" / file
    text, found = re.subn(pattern, replacement, path.read_text())
    assert found, f"{file}: no {pattern}"
    path.unlink()  # the link
    path.write_text(text)


def test_the_installed_megatron_lacks_nothing():
    code, output = check(Path(MEGATRON).parent)
    assert code == 0, output
    assert "0 missing or different, 0 that a job can do without" in output


def test_everything_that_was_moved_is_named(tree):
    change(tree, "training/training.py", r"\bcheckpoint_and_decide_exit\b", "end_iteration")
    change(
        tree, "training/training.py", r"def training_log\(\s*loss_dict,", "def training_log(step,"
    )
    change(tree, "training/config/training_config.py", r"\bckpt_step:", "step_of_checkpoint:")
    change(
        tree,
        "core/dist_checkpointing/serialization.py",
        r"= load_common_state_dict\(checkpoint_dir\)",
        "= read(checkpoint_dir)",
    )
    change(
        tree, "core/distributed/distributed_data_parallel.py", r"self\.grad_accs\b", "self.hooked"
    )
    change(
        tree, "core/transformer/moe/token_dispatcher.py", r"(def preprocess\(self, )", r"\1name, "
    )
    code, output = check(tree)
    assert code == 1
    wrong = [line for line in output.splitlines() if line.startswith("  wrong: ")]
    wanted = [
        "megatron.training.training:checkpoint_and_decide_exit is missing (needed to act at the end",
        "megatron.training.training:training_log takes no loss_dict",
        "megatron.training.training:train does not look up checkpoint_and_decide_exit",
        "dist_checkpointing.serialization:load does not look up load_common_state_dict or load_common",
        "megatron.core.distributed:DistributedDataParallel.grad_accs is missing",
        "MoEAlltoAllTokenDispatcher.preprocess takes (self, name, routing_map), wanted (self, routing",
        "argument --ckpt-step is missing (needed to find the checkpoint",
    ]
    missing = [text for text in wanted if not any(text in line for line in wrong)]
    assert missing == [], output
    assert len(wrong) == len(wanted), output


def test_what_a_job_can_do_without_is_no_error(tree):
    change(tree, "core/transformer/transformer_config.py", r"\bmoe_ncclep_static_shape\b", "static")
    code, output = check(tree)
    assert code == 0, output
    assert "without: argument --moe-ncclep-static-shape is missing, taken as False" in output


def test_a_folder_without_megatron_is_refused(tmp_path):
    code, output = check(tmp_path)
    assert code == 2
    assert str(tmp_path) in output and "megatron/core" in output
