"""`scripts/test.sh --megatron`: which folder Python is to look into first, and what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import REPOSITORY

USE = f"""set -euo pipefail
source {REPOSITORY}/scripts/setup_env.sh
VENV_PYTHON={sys.executable}
use_megatron "$1"
echo "$PYTHONPATH"
"""


def use(wanted: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-c", USE, "_", str(wanted)],
        env=os.environ | {"PYTHONPATH": "/before"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_source_tree_comes_first(tmp_path: Path):
    for package in ("core", "training"):
        (tmp_path / "megatron" / package).mkdir(parents=True)
    done = use(tmp_path)
    assert done.returncode == 1
    assert f"make -C {tmp_path}/megatron/core/datasets" in done.stderr
    (tmp_path / "megatron/core/datasets").mkdir()
    (tmp_path / "megatron/core/datasets/helpers_cpp.cpython-312.so").touch()
    done = use(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{tmp_path}:/before"


@pytest.mark.parametrize("wanted", ["/no/such/folder", "0.18; rm -rf /", "newest", ""])
def test_what_is_neither_a_version_nor_a_folder(wanted):
    done = use(wanted)
    assert done.returncode == 1
    assert "is neither a folder nor a version of megatron-core such as 0.18.2" in done.stderr


def test_a_folder_without_megatron(tmp_path: Path):
    done = use(tmp_path)
    assert done.returncode == 1
    assert f"{tmp_path} has no megatron/core and megatron/training" in done.stderr
