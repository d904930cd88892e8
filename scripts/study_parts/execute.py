"""One run: its command lines, its processes, and what its directory says about how far it got.

A run has two phases, a process each: `train`, with Megatron's checkpoints to go on from, and
`evaluate`, the losses on the whole validation and test set, the same sequences for all runs.
`result.json` in its directory says that it ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from study_parts import plans
from study_parts.files import write_json
from study_parts.table import DEFAULT, ROOT, SMALL, Run, Setting

from megatron_laep.json_text import read_json

TRAIN, EVALUATE = "train", "evaluate"
LOGS = {TRAIN: "train.log", EVALUATE: "evaluate.log"}
RESULT = "result.json"
PROCESS = "process.json"
LAUNCHER = ROOT / "scripts" / "study_parts" / "train.py"
SCRIPT = ROOT / "scripts" / "pretrain_gpt.py"
# One seed for all: every run is judged on the same sequences.
EVALUATION_SEED = 1
_KILL_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG
_ITERATION = re.compile(r"iteration +(\d+)/ *(\d+) \|")


@dataclass
class Place:
    """Where the runs are.

    root: holds a directory for each run, and the data. setting: of all runs. last_in_queue: whether
    their processes get a core only when nobody else wants it.
    """

    root: Path
    setting: Setting = field(default_factory=Setting)
    last_in_queue: bool = True

    @property
    def data(self) -> Path:
        return self.root / "data"

    def folder(self, run: Run) -> Path:
        return self.root / run.name

    def done(self, run: Run) -> bool:
        return (self.folder(run) / RESULT).is_file()

    def ready(self, run: Run) -> bool:
        return run.needs is None or (self.root / run.needs / RESULT).is_file()


def iterations(run: Run, setting: Setting) -> int:
    return round(setting.iterations * run.row.longer)


def plan_flags(place: Place, run: Run) -> list[str]:
    """Of a control: makes its plan from the finished run that LAEP pruned."""
    if run.row.plan is None:
        return []
    source = plans.made_map(place.root / f"{DEFAULT}-seed{run.seed}")
    if run.row.plan == SMALL:
        return ["--num-experts", str(plans.small_model(source))]
    path = place.folder(run) / "plan.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(plans.control(source, run.row.plan, run.seed).to_json())
    return ["--laep-plan", str(path)]


def flags(place: Place, run: Run, phase: str) -> list[str]:
    """Megatron's and LAEP's flags of a phase. argparse takes the last of two equal ones."""
    setting, folder = place.setting, str(place.folder(run))
    length = str(iterations(run, setting))
    common = [
        *setting.flags,
        *("--train-iters", length, "--lr-decay-iters", length, "--load", folder),
        *("--lr-warmup-iters", str(setting.learning_warmup)),
        *(word for name in ("train", "valid", "test") for word in _data(place, name)),
        *("--data-cache-path", f"{folder}/cache"),
        *("--log-interval", str(setting.log_every)),
    ]
    if phase == EVALUATE:
        kept, skipped = [], False
        for word in (*run.row.flags, *plan_flags(place, run)):
            if word.startswith("--"):
                # A pruned checkpoint needs no flag; with one, there would be a pruning to come.
                skipped = word.startswith("--laep-")
            if not skipped:
                kept.append(word)
        return [
            *common,
            *kept,
            *("--seed", str(EVALUATION_SEED), "--eval-iters", str(setting.evaluate)),
            *("--skip-train", "--no-load-optim", "--no-load-rng"),
        ]
    return [
        *common,
        *("--seed", str(run.seed), "--save", folder, "--save-interval", str(setting.save_every)),
        *("--eval-interval", str(setting.evaluate_every)),
        *("--eval-iters", str(setting.evaluate_few)),
        *("--laep-record-interval", str(setting.window)),
        *(
            ("--laep-window", str(setting.window))
            if "--laep-prune-iteration" in run.row.flags
            else ()
        ),
        *run.row.flags,
        *plan_flags(place, run),
    ]


def _data(place: Place, name: str) -> tuple[str, str]:
    return f"--{name}-data-path", str(place.data / name)


def command(place: Place, run: Run, phase: str) -> list[str]:
    """The command line of a phase; the same to begin and to go on."""
    python = [sys.executable, "-u"]
    launch = run.row.launch if phase == TRAIN else ()
    start = [str(LAUNCHER), *launch] if launch else ["-m", "megatron_laep"]
    return [*python, *start, str(SCRIPT), *flags(place, run, phase)]


def environment() -> dict[str, str]:
    """Of one process that is a world of its own, on one core."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}",
        "PYTHONWARNINGS": "ignore",
        "MEGATRON_LAEP_PLATFORM": "cpu-force",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "OMP_NUM_THREADS": "1",
        **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    }


def _end_with_driver() -> None:
    """In the child: gone when the driver is."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_KILL_WITH_PARENT, signal.SIGKILL)


def _last_in_queue() -> None:
    """In the child: also last in the queue for a core."""
    _end_with_driver()
    os.nice(19)
    if hasattr(os, "SCHED_IDLE"):
        # Where it is not allowed, niceness alone.
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


class Process:
    """A phase of a run, as a process group of its own."""

    def __init__(self, place: Place, run: Run, phase: str) -> None:
        self.run, self.phase = run, phase
        self._folder = place.folder(run)
        self._folder.mkdir(parents=True, exist_ok=True)
        words = command(place, run, phase)
        with open(self._folder / LOGS[phase], "ab") as log:
            self._child = subprocess.Popen(
                words,
                cwd=ROOT,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_last_in_queue if place.last_in_queue else _end_with_driver,
            )
        write_json(
            self._folder / PROCESS, {"pid": self._child.pid, "started": start_time(self._child.pid)}
        )

    def ended(self) -> int | None:
        """The exit status; None while it runs."""
        status = self._child.poll()
        if status is not None:
            (self._folder / PROCESS).unlink(missing_ok=True)
        return status

    def stop(self) -> None:
        os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        self.ended()


def start_time(pid: int) -> str | None:
    """What tells a process from a later one of the same number; None if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]


def signal_all(root: Path, number: int) -> list[str]:
    """Sends a signal to the process groups of all runs; returns the runs' names."""
    reached = []
    for path in sorted(root.glob(f"*/{PROCESS}")):
        found = read_json(path, str(path))
        if found["started"] is None or start_time(found["pid"]) != found["started"]:
            continue
        os.killpg(found["pid"], number)
        reached.append(path.parent.name)
    return reached


def trained(place: Place, run: Run) -> bool:
    """Whether the last checkpoint is that of the last iteration."""
    try:
        last = (place.folder(run) / "latest_checkpointed_iteration.txt").read_text()
    except OSError:
        return False
    return last.strip() == str(iterations(run, place.setting))


def next_phase(place: Place, run: Run) -> str:
    return EVALUATE if trained(place, run) else TRAIN


def progress(place: Place, run: Run) -> float:
    """The share of its iterations that are done, from the end of its log."""
    if place.done(run):
        return 1.0
    try:
        with open(place.folder(run) / LOGS[TRAIN], "rb") as log:
            log.seek(max(0, os.path.getsize(log.name) - 20_000))
            found = _ITERATION.findall(log.read().decode(errors="replace"))
    except OSError:
        return 0.0
    return int(found[-1][0]) / int(found[-1][1]) if found else 0.0


def remove_old_checkpoints(folder: Path) -> None:
    """All but the last: some twenty megabytes each."""
    last = int((folder / "latest_checkpointed_iteration.txt").read_text())
    for path in folder.glob("iter_*"):
        if path.name != f"iter_{last:07d}":
            shutil.rmtree(path)
