"""The scripts that start a job on several nodes, against stand-ins of Slurm's commands, torchrun and the job.

Slurm is not here. The stand-ins write down how they were called; `srun` starts as many processes as Slurm would, with its
variables. What the scripts read of the job (exit codes, torchrun's summary, `laep check --json`) is as the real ones have it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import REPOSITORY

CONFIGS = REPOSITORY / "configs"
SCRIPTS = sorted(CONFIGS.glob("*.sh"))
MIXTRAL, DEEPSEEK = "mixtral-like-12l-64e-8gpu", "deepseek-v3-like-61l-256e-1024gpu"

# Answers `laep check` from check.json, and is the job otherwise: writes its rank down, ends with the code in job.code, and
# has the model pruned where there is a file `prunes`.
PYTHON = """#!{python}
import json, os, pathlib, sys
state = pathlib.Path({state!r})
words = sys.argv[1:]
if words[0] == "-c":
    os.execv(sys.executable, [sys.executable, *words])
if words[:2] == ["-m", "megatron_laep.tools"]:
    (state / "checked").write_text(json.dumps(words))
    print((state / "check.json").read_text())
    sys.exit(int((state / "check.code").read_text()))
assert words[:2] == ["-m", "megatron_laep"], words
seen = {{name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")}}
(state / f"rank{{seen['RANK'] or ''}}").write_text(json.dumps([seen, words]))
if (state / "prunes").exists():
    (state / "prunes").unlink()
    (state / "check.json").write_text(json.dumps({{"pruned_at": [10]}}))
sys.exit(int((state / "job.code").read_text()))
"""
TORCHRUN = """#!/usr/bin/env bash
echo "torchrun $*" >> {state}/calls
while [ "$1" != -m ]; do shift; done
code=0
"$PYTHON" "$@" || code=$?
[ $code -eq 0 ] && exit 0
printf 'Root Cause (first observed failure):\\n  exitcode  : %s (pid: 28470)\\n' $code >&2
exit 1
"""
SRUN = """#!/usr/bin/env bash
echo "srun $1" >> {state}/calls
while [[ $1 == --* ]]; do shift; done
highest=0
for ((rank = 0; rank < SLURM_NTASKS; rank++)); do
    code=0
    SLURM_PROCID=$rank SLURM_LOCALID=$((rank % 2)) "$@" || code=$?
    ((code <= highest)) || highest=$code
done
exit $highest
"""
CALLED = """#!/usr/bin/env bash
echo "{name} $*" >> {state}/calls
[ "$2" = hostnames ] && printf 'first\\nsecond\\n' || true
"""


class Cluster:
    """Runs scripts with the stand-ins in front of PATH."""

    def __init__(self, folder: Path) -> None:
        self.state = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        texts = {"python": PYTHON, "torchrun": TORCHRUN, "srun": SRUN}
        for name in ("python", "torchrun", "srun", "sbatch", "scontrol"):
            path = self.bin / name
            text = texts.get(name, CALLED)
            path.write_text(text.format(python=sys.executable, state=str(folder), name=name))
            path.chmod(0o755)
        self.set(check={"pruned_at": []}, check_code=0, job_code=0)

    def set(self, *, check=None, check_code=None, job_code=None, prunes=False) -> None:
        if check is not None:
            (self.state / "check.json").write_text(json.dumps(check))
        for name, code in (("check.code", check_code), ("job.code", job_code)):
            if code is not None:
                (self.state / name).write_text(str(code))
        if prunes:
            (self.state / "prunes").touch()

    def run(self, script: str, job: str = DEEPSEEK, *more: str, **variables: str):
        self.run_folder = self.state / "run"
        slurm = {} if "SLURM" not in script.upper() else SLURM
        return subprocess.run(
            [str(CONFIGS / script), job, str(self.run_folder), *more],
            cwd=REPOSITORY,
            env={
                "PATH": f"{self.bin}:{os.environ['PATH']}",
                "PYTHON": str(self.bin / "python"),
                **slurm,
                **variables,
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def calls(self, name: str) -> list[str]:
        path = self.state / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if line.startswith(f"{name} ") and "hostnames" not in line]


SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_SUBMIT_DIR": str(REPOSITORY),
}
BATCH = ["slurm-torchrun.sh", "slurm-srun.sh"]


@pytest.fixture
def cluster(tmp_path) -> Cluster:
    return Cluster(tmp_path)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_bash_takes_the_script(path):
    result = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("script", BATCH)
@pytest.mark.parametrize("job", [MIXTRAL, DEEPSEEK])
def test_a_job_that_ends_is_not_queued_again(cluster, script, job):
    result = cluster.run(script, job, "--data-path", "tokens and more")
    assert result.returncode == 0, result.stderr
    assert len(cluster.calls("srun")) == 1
    assert cluster.calls("scontrol") + cluster.calls("sbatch") == []
    words = json.loads((cluster.state / "checked").read_text())
    assert words[2:6] == ["check", "--ranks", "16", "--json"]
    assert words[-2:] == ["--data-path", "tokens and more"]
    assert words[words.index("--save") + 1] == words[words.index("--load") + 1]
    assert "--num-experts" in words and "--laep-prune-iteration" in words


@pytest.mark.parametrize("script", BATCH)
def test_a_crash_is_queued_again_and_not_for_ever(cluster, script):
    cluster.set(job_code=9)
    result = cluster.run(script)
    assert result.returncode == (1 if "torchrun" in script else 9)
    assert cluster.calls("scontrol") == ["scontrol requeue 77"]
    cluster.run(script, SLURM_RESTART_COUNT="10")
    assert len(cluster.calls("scontrol")) == 1
    assert cluster.calls("sbatch") == []


@pytest.mark.parametrize("script", [*BATCH, "torchrun-elastic.sh"])
def test_a_refusal_is_not_queued_again(cluster, script):
    elastic = {"RDZV": "first:29500", "NNODES": "2"}
    cluster.set(job_code=78)
    result = cluster.run(script, **elastic)
    assert result.returncode == 78
    assert cluster.calls("scontrol") + cluster.calls("sbatch") == []
    # And where the check says so, nothing is started at all.
    started = len(cluster.calls("srun")) + len(cluster.calls("torchrun"))
    cluster.set(check_code=2)
    result = cluster.run(script, **elastic)
    assert result.returncode == 78
    assert "laep check: exit code 2, so the job is not started" in result.stderr
    assert len(cluster.calls("srun")) + len(cluster.calls("torchrun")) == started


@pytest.mark.parametrize("script", BATCH)
def test_after_a_pruning_the_job_goes_on_with_fewer_nodes(cluster, script):
    cluster.set(prunes=True)
    result = cluster.run(script, DEEPSEEK, "--seed", "7", NODES_AFTER="1")
    assert result.returncode == 0, result.stderr
    again = f"sbatch --nodes=1 configs/{script} {DEEPSEEK} {cluster.run_folder} --seed 7"
    assert cluster.calls("sbatch") == [again]
    # Killed before that, and queued again with the nodes of before: moves on without starting.
    started = len(cluster.calls("srun"))
    assert cluster.run(script, DEEPSEEK, "--seed", "7", NODES_AFTER="1").returncode == 0
    assert cluster.calls("sbatch") == [again, again]
    assert len(cluster.calls("srun")) == started
    # On those nodes it runs, and its end is the end.
    assert cluster.run(script, NODES_AFTER="1", SLURM_JOB_NUM_NODES="1").returncode == 0
    assert len(cluster.calls("srun")) == started + 1
    assert len(cluster.calls("sbatch")) == 2


def test_ranks_come_from_slurms_variables(cluster):
    assert cluster.run("slurm-srun.sh", SLURM_NTASKS="4").returncode == 0
    for rank in range(4):
        seen, words = json.loads((cluster.state / f"rank{rank}").read_text())
        assert seen == {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % 2),
            "WORLD_SIZE": "4",
            "MASTER_ADDR": "first",
        }
        assert words[2] == "scripts/pretrain_gpt.py"


def test_torchrun_gets_the_nodes(cluster):
    assert cluster.run("slurm-torchrun.sh").returncode == 0
    assert (cluster.run_folder / "attempt-77-0.log").exists()
    (line,) = cluster.calls("torchrun")[:1]
    assert "--nnodes 2 --nproc-per-node 8" in line and "--rdzv-endpoint first:29500" in line


def test_elastic_goes_on_after_the_pruning(cluster):
    cluster.set(prunes=True)
    variables = {"RDZV": "first:29500", "NNODES": "2", "NNODES_AFTER": "1:2"}
    assert cluster.run("torchrun-elastic.sh", **variables).returncode == 0
    first, second = cluster.calls("torchrun")
    assert "--nnodes 2 " in first and "--nnodes 1:2 " in second
    # A crash that torchrun did not get over.
    cluster.set(job_code=9)
    assert cluster.run("torchrun-elastic.sh", **variables).returncode == 1
    # A node that is not needed any more.
    count = len(cluster.calls("torchrun"))
    assert cluster.run("torchrun-elastic.sh", **variables, LEAVE_AFTER_PRUNE="1").returncode == 0
    assert len(cluster.calls("torchrun")) == count


def test_a_job_that_is_not_there(cluster):
    result = cluster.run("slurm-srun.sh", "no-such-job")
    assert result.returncode == 2
    assert "there is no configs/no-such-job.args" in result.stderr
