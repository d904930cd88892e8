#!/usr/bin/env python3
"""What a pruning does to the model: trains the table of runs in `study_parts/table.py`.

    scripts/study.py                           # all that is still to be done, two at a time
    scripts/study.py --only 'base*' --dry-run  # what would be done
    scripts/study.py --pause                   # from elsewhere: frees the cores ...
    scripts/study.py --continue                # ... and goes on
    scripts/study.py --collect results.json    # one file with what has been found so far

Each run has a directory in the root and is one process, last in the queue for a core. A driver that
was stopped goes on with the same command: a run that ended has a result and is not repeated, another
one goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import fnmatch
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from study_parts import collect, corpus, execute  # noqa: E402
from study_parts.execute import Place, Process  # noqa: E402
from study_parts.files import write_json  # noqa: E402
from study_parts.table import Run, Setting, rows, runs  # noqa: E402

PAUSE = "PAUSE"
LOCK = "driver.lock"
ATTEMPTS = 3
LOOK_EVERY = 2.0  # seconds
SAY_EVERY = 60.0


class Driver:
    """Carries out runs, `jobs` at a time, in their order."""

    def __init__(self, place: Place, queue: tuple[Run, ...], jobs: int) -> None:
        self._place, self._queue, self._jobs = place, queue, jobs
        self._active: list[Process] = []
        self._failures: dict[str, int] = {}
        self._began = time.monotonic()
        self._done_at_start = self._amount()

    def _amount(self) -> float:
        """Runs that are done, with the shares of those that are not."""
        return sum(execute.progress(self._place, run) for run in self._queue)

    def _startable(self) -> Run | None:
        busy = {process.run.name for process in self._active}
        for run in self._queue:
            if (
                run.name not in busy
                and not self._place.done(run)
                and self._failures.get(run.name, 0) < ATTEMPTS
                and self._place.ready(run)
            ):
                return run
        return None

    def _start(self, run: Run) -> None:
        phase = execute.next_phase(self._place, run)
        say(f"{run.name}: {phase}")
        self._active.append(Process(self._place, run, phase))

    def _finish(self, process: Process, status: int) -> None:
        """Goes on with the next phase, or takes down the result."""
        run, place = process.run, self._place
        self._active.remove(process)
        problem = f"exit status {status}" if status else None
        if problem is None and process.phase == execute.TRAIN:
            if execute.trained(place, run):
                self._start(run)
                return
            problem = "it ended before its last iteration"
        if problem is None:
            try:
                found = collect.result(place, run)
            except ValueError as error:
                problem = str(error)
        if problem is not None:
            self._failures[run.name] = self._failures.get(run.name, 0) + 1
            log = place.folder(run) / execute.LOGS[process.phase]
            say(f"{run.name}: {process.phase} FAILED ({problem}), see {log}")
            return
        write_json(place.folder(run) / execute.RESULT, found)
        execute.remove_old_checkpoints(place.folder(run))
        say(f"{run.name}: done, test loss {found['test_loss']:.4f}")

    def _say_progress(self) -> None:
        amount, total = self._amount(), len(self._queue)
        spent = time.monotonic() - self._began
        gained = amount - self._done_at_start
        left = f"{spent / gained * (total - amount) / 3600:.1f} h" if gained > 0 else "unknown"
        now = ", ".join(
            f"{p.run.name} {execute.progress(self._place, p.run):.0%}" for p in self._active
        )
        say(f"{amount:.1f} of {total} runs, time left {left}; now {now or 'nothing'}")

    def work(self) -> int:
        """Returns the number of runs that failed or could not start."""
        said = -SAY_EVERY
        try:
            while True:
                for process in list(self._active):
                    status = process.ended()
                    if status is not None:
                        self._finish(process, status)
                paused = (self._place.root / PAUSE).exists()
                while not paused and len(self._active) < self._jobs and (run := self._startable()):
                    self._start(run)
                if not self._active and not paused:
                    break
                if time.monotonic() - said > SAY_EVERY:
                    said = time.monotonic()
                    self._say_progress()
                time.sleep(LOOK_EVERY)
        finally:
            for process in self._active:
                process.stop()
        return sum(not self._place.done(run) for run in self._queue)


def say(text: str) -> None:
    print(time.strftime("%F %T"), text, flush=True)


def show(place: Place, queue: tuple[Run, ...]) -> None:
    for run in queue:
        state = f"{execute.progress(place, run):.0%}" if not place.done(run) else "done"
        wants = f" (after {run.needs})" if not place.ready(run) else ""
        print(f"{state:>5}  {run.name}{wants}  {' '.join((*run.row.launch, *run.row.flags))}")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--root", type=Path, default=ROOT / "runs" / "study", help="default: runs/study"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument(
        "--only", nargs="+", metavar="PATTERN", default=["*"], help="runs with such a name"
    )
    parser.add_argument(
        "--iterations",
        type=int,
        metavar="N",
        help="of a run, for a trial: the study's moments and intervals shrink with it",
    )
    parser.add_argument(
        "--normal-priority",
        action="store_true",
        help="do not leave the cores to everybody else's processes first",
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--dry-run", action="store_true", help="list the runs and their state")
    action.add_argument("--pause", action="store_true", help="stop all processes where they are")
    action.add_argument("--continue", action="store_true", dest="go_on", help="let them go on")
    action.add_argument("--collect", type=Path, metavar="FILE", help="write the results")
    parsed = parser.parse_args(arguments)
    if parsed.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {parsed.jobs}")
    return parsed


def trial(iterations: int) -> Setting:
    """The study's setting in small, to try the driver. Errors: ValueError below 20 iterations."""
    if iterations < 20:
        raise ValueError(
            f"--iterations {iterations}: the moments of pruning would coincide, give at least 20"
        )
    full = Setting()

    def share(number: int) -> int:
        return max(1, number * iterations // full.iterations)

    return dataclasses.replace(
        full,
        iterations=iterations,
        prune_at=share(full.prune_at),
        warmup=share(full.warmup),
        learning_warmup=share(full.learning_warmup),
        window=1,
        evaluate=2,
        evaluate_every=share(full.evaluate_every),
        evaluate_few=1,
        save_every=share(full.save_every),
        log_every=1,
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 1 if runs are left over, 2 for a mistake."""
    args = parse_arguments(arguments)
    try:
        setting = trial(args.iterations) if args.iterations is not None else Setting()
    except ValueError as error:
        print(f"study.py: {error}", file=sys.stderr)
        return 2
    place = Place(args.root.resolve(), setting, last_in_queue=not args.normal_priority)
    every = runs(rows(setting))
    queue = tuple(run for run in every if any(fnmatch.fnmatchcase(run.name, p) for p in args.only))
    if not queue:
        print(
            f"study.py: --only {' '.join(args.only)}: no run has such a name; --dry-run lists them",
            file=sys.stderr,
        )
        return 2
    place.root.mkdir(parents=True, exist_ok=True)
    if args.dry_run:
        show(place, queue)
        return 0
    if args.pause or args.go_on:
        if args.pause:
            (place.root / PAUSE).touch()
        else:
            (place.root / PAUSE).unlink(missing_ok=True)
        reached = execute.signal_all(place.root, signal.SIGSTOP if args.pause else signal.SIGCONT)
        print(f"{'paused' if args.pause else 'going on'}: {', '.join(reached) or 'nothing runs'}")
        return 0
    text = corpus.prepare(place.data)
    if args.collect:
        found = collect.collect(place, queue, text)
        write_json(args.collect, found)
        print(f"{args.collect}: {len(found['runs'])} of {len(queue)} runs")
        return 0
    with open(place.root / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"study.py: another driver works in {place.root}: wait for it", file=sys.stderr)
            return 2
        # A terminated driver must take its processes along.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        left = Driver(place, queue, args.jobs).work()
        if left:
            say(f"{left} of {len(queue)} runs have no result")
        return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
