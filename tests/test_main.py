"""The end of a job that is refused, on real processes: one sentence, no traceback, one exit code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_laep.entry import REFUSED
from tests.support.jobs import job
from tests.support.runs import LAEP, PRETRAIN_GPT, REPOSITORY, run_megatron

pytestmark = pytest.mark.distributed

ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(REPOSITORY),
    "MEGATRON_LAEP_PLATFORM": "cpu",
    "OMP_NUM_THREADS": "1",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
}


def torchrun(tmp_path: Path, *words: object) -> tuple[subprocess.CompletedProcess, list[str]]:
    """Two ranks under torchrun. What it printed itself, and what each rank wrote to stderr."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    command += ["--log-dir", tmp_path / "ranks", "--redirects", 3, *words]
    done = subprocess.run(
        list(map(str, command)),
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    paths = sorted((tmp_path / "ranks").rglob("stderr.log"))
    assert [path.parent.name for path in paths] == ["0", "1"], done.stderr
    return done, [path.read_text(encoding="utf-8") for path in paths]


def exit_codes(summary: str) -> list[int]:
    """Of the ranks that failed, as torchrun's summary has them; the one that failed first comes last."""
    return [int(code) for code in re.findall(r"^ +exitcode +: (-?\d+)", summary, re.MULTILINE)]


def test_refused_under_torchrun(tmp_path):
    words = job(tmp_path, expert_model_parallel_size=2, laep_expert_multiple=3)
    done, errors = torchrun(tmp_path, *LAEP, PRETRAIN_GPT, *words)
    last = errors[0].splitlines()[-1]
    assert last.startswith("megatron_laep: --laep-expert-multiple 3"), errors[0][-3000:]
    assert "--num-experts 8" in last
    assert "megatron_laep: " not in errors[1]
    for text in errors:
        assert "Traceback" not in text
    assert exit_codes(done.stderr) == [REFUSED, REFUSED]
    # torchrun's own code is that of any failure: a script has to look at what it prints.
    assert done.returncode == 1
    assert not (tmp_path / "save").exists()


def test_refused_without_torchrun(tmp_path):
    # Each rank is started by itself, as by srun: rank 0 is where they meet.
    words = job(tmp_path, expert_model_parallel_size=2, laep_beta=1.5)
    run = run_megatron(words, 2, launcher=LAEP, check=False)
    assert run.returncodes == [REFUSED, REFUSED], run.tail()
    last = run.logs[0].splitlines()[-1]
    assert last.startswith("megatron_laep: --laep-beta must be within 0 and 1, got 1.5"), last
    assert "megatron_laep: " not in run.logs[1]
    assert "Traceback" not in run.logs[0] + run.logs[1]


SCRIPT = """
import os, time
import torch.distributed as dist
from megatron_laep.entry import end_refused
rank = int(os.environ["RANK"])
"""


def write_script(tmp_path: Path, body: str) -> Path:
    path = tmp_path / "ranks.py"
    path.write_text(SCRIPT + body, encoding="utf-8")
    return path


@pytest.mark.parametrize("late", [0, 1])
def test_the_first_rank_waits_for_the_other(tmp_path, late):
    # torchrun stops all ranks when the first one ends: seconds apart, both still end alike.
    body = f"time.sleep(4 * (rank == {late}))\nend_refused('no')\n"
    done, errors = torchrun(tmp_path, write_script(tmp_path, body))
    assert [text.strip() for text in errors] == ["megatron_laep: no", ""]
    assert exit_codes(done.stderr) == [REFUSED, REFUSED]


def test_refused_with_process_groups(tmp_path):
    body = "dist.init_process_group('gloo')\ndist.barrier()\nend_refused('no')\n"
    done, errors = torchrun(tmp_path, write_script(tmp_path, body))
    assert errors[0].splitlines()[-1] == "megatron_laep: no"
    assert "megatron_laep" not in errors[1]
    assert exit_codes(done.stderr) == [REFUSED, REFUSED]


def test_a_rank_that_is_refused_alone_says_so(tmp_path):
    body = "end_refused('no', patience=1) if rank else time.sleep(60)\n"
    done, errors = torchrun(tmp_path, write_script(tmp_path, body))
    assert errors[1].splitlines()[-1] == "megatron_laep: rank 1, alone: no"
    assert exit_codes(done.stderr)[-1] == REFUSED  # the first that failed


def test_a_defect_keeps_its_traceback(tmp_path):
    script = tmp_path / "defect.py"
    script.write_text("import numpy\nnumpy.zeros(2) + numpy.zeros(3)\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, *LAEP, str(script)],
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    # A ValueError, but nobody's refusal.
    assert done.stderr.splitlines()[-1].startswith("ValueError: operands could not be broadcast")
