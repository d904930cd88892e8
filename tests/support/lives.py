"""The life of a job that fails on the way and is started again: is it the life of one that never failed?

``Life("plain", folder)`` runs the job that never fails; its ``fail`` runs one that does, from a
checkpoint shortly before the pruning, and the same command again. `cells` lists all failures of the
matrix, which ``scripts/crash_matrix.py`` runs in full.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

from tests.oracles.test_pruning_run import flags as pruning_job
from tests.support.exact_job import Losses, exact_job, exact_losses
from tests.support.failures import POINTS, Failure
from tests.support.forks import Outcome, in_megatron, on_ranks

GRACE = 3.0
"""Seconds that the other ranks have to end by themselves before they are killed, as by torchrun."""

TRACKER = "latest_checkpointed_iteration.txt"


class Broken(AssertionError):
    """The promise was not kept."""


# -- what fails ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Configuration:
    """A small job that prunes.

    Attributes:
        ranks: processes.
        flags: on top of `BASE`.
        start: iteration of the checkpoint that failing jobs go on from.
        prune, save: iterations of the pruning, and of the first ordinary save after it, at which it
            fails.
        handles: it saves and ends when it is terminated (--exit-signal-handler).
    """

    ranks: int
    flags: dict[str, Any]
    start: int = 4
    prune: int = 6
    save: int = 8
    handles: bool = False


BASE = {
    "train_iters": 10,
    "save_interval": 4,
    "laep_record_interval": None,
    "laep_prune_iteration": 6,
    "laep_window": 4,
}
_FOUR = {"expert_model_parallel_size": 4}
_TWICE = {"laep_prune_iteration": (3, 9), "laep_window": 2, "train_iters": 13}
_ASYNC = {"async_save": True, "async_strategy": "mcore"}
CONFIGURATIONS = {
    "plain": Configuration(2, {}),
    "async": Configuration(2, _ASYNC),
    "twice": Configuration(2, _TWICE, start=8, prune=9, save=12),
    "handler": Configuration(2, {"exit_signal_handler": True}, handles=True),
    "fp32": Configuration(2, {"bf16": None, "moe_router_dtype": None}),
    "plain-4": Configuration(4, _FOUR),
    "async-4": Configuration(4, _FOUR | _ASYNC),
    "twice-4": Configuration(4, _FOUR | _TWICE, start=8, prune=9, save=12),
}
_ON_RANK_0 = ("plan decided", "tracker emptied")
_WRITING = ("before save", "first bytes", "saved but not committed", "tracker emptied")
_ON_DISK = ("disk full", "io error", "slow disk")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One failure of the matrix.

    Attributes:
        where: the point, for people.
    """

    where: str
    failure: Failure

    def __str__(self) -> str:
        rank = self.failure.rank
        return f"{self.where}: {self.failure.action}, {'all' if rank is None else f'rank {rank}'}"


def cells(name: str) -> list[Cell]:
    """Every point x {one rank, all ranks} x action; a bad disk where something is written next."""
    job = CONFIGURATIONS[name]
    points = [
        (point, point, job.prune)
        for point in POINTS
        if point not in ("step done", "iteration closed")
    ]
    points += [("first step", "step done", job.prune + 1)]
    points += [(f"ordinary save, {point}", point, job.save) for point in _WRITING[1:]]
    points += [("first ordinary save", "iteration closed", job.save)]
    found = []
    for where, point, iteration in points:
        if job.handles and point == "first bytes":
            continue  # in a thread, where no signal is handled
        actions = ("terminate",) if job.handles else ("kill", "raise", "terminate")
        if point in _WRITING and not job.handles:
            actions += _ON_DISK
        one = 0 if point in _ON_RANK_0 else job.ranks - 1
        for action in actions:
            for rank in (one,) if point in _ON_RANK_0 else (one, None):
                found.append(Cell(where, Failure(point, action, rank, iteration)))
    return found


# -- what becomes of it ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fate:
    """How a failed start of a job ended, and from where the next one went on.

    Attributes:
        ends: of each rank: "done", an exit code, or the name of an exception.
        resumed_after: the iteration of the checkpoint that the next start went on from.
        failed, again: console of each rank, of the failed start and of the next one.
    """

    ends: tuple[str, ...]
    resumed_after: int
    failed: tuple[str, ...]
    again: tuple[str, ...]


def checkpoint_states(folder: str) -> dict[int, tuple[tuple[str, ...], str]]:
    """Lineage and map state of each checkpoint that Megatron takes for complete. Where Megatron is.

    Raises whatever a checkpoint raises that is not.
    """
    from megatron.core import dist_checkpointing

    from megatron_laep.mcore.checkpoint_facts import describe_checkpoint

    found = {}
    for path in sorted(Path(folder).glob("iter_*")):
        if dist_checkpointing.check_is_distributed_checkpoint(str(path)):
            facts = describe_checkpoint(path)
            found[facts["iteration"]] = (tuple(facts["lineage"]), facts["map_state"])
    return found


class Life:
    """The job that never fails, and comparisons with it.

    Args:
        name: of its configuration.
        folder: for its checkpoints.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.job = CONFIGURATIONS[name]
        self._base = folder / "start"
        first = self.command(self._base, exit_interval=self.job.start)
        self.losses = exact_losses(on_ranks(self.job.ranks, exact_job, first))
        self.whole = folder / "whole"
        shutil.copytree(self._base, self.whole)
        self.losses |= exact_losses(on_ranks(self.job.ranks, exact_job, self.command(self.whole)))
        self.checkpoints = in_megatron(checkpoint_states, str(self.whole)).result()
        self.last = max(self.losses)

    def command(self, folder: Path, **more: Any) -> list[str]:
        """Of the job with its checkpoints in a folder; always the same."""
        return pruning_job(folder, **(BASE | self.job.flags | more))

    def fail(self, folder: Path, *cells: Cell) -> Fate:
        """A job that fails, once for each cell, and is started again with the same command.

        Raises:
            Broken: the job did not go on as the one that never failed.
        """
        shutil.copytree(self._base, folder)
        for cell in cells:
            failed = on_ranks(
                self.job.ranks, exact_job, self.command(folder), failure=cell.failure, grace=GRACE
            )
            self._check_failed(cell, failed)
            self._check_folder(folder)
        again = on_ranks(self.job.ranks, exact_job, self.command(folder), grace=GRACE)
        if any(outcome.error for outcome in again):
            said = ", ".join(f"{_end(outcome)} {outcome.message}" for outcome in again)
            raise Broken(f"started again: {said}\n{_tail(again)}")
        losses = exact_losses(again)
        resumed_after = min(losses) - 1 if losses else self.last
        if cells[-1].failure.action != "slow disk" and list(losses) != list(
            range(resumed_after + 1, self.last + 1)
        ):
            raise Broken(f"started again: trained {list(losses)}, wanted up to {self.last}")
        wrong = [iteration for iteration, loss in losses.items() if loss != self.losses[iteration]]
        if wrong:
            raise Broken(f"started again: other losses at {wrong}")
        states = self._check_folder(folder)
        if states.get(self.last) != self.checkpoints[self.last]:
            raise Broken(f"ended with {states}, not {self.checkpoints[self.last]}")
        return Fate(
            tuple(map(_end, failed)),
            resumed_after,
            tuple(outcome.output for outcome in failed),
            tuple(outcome.output for outcome in again),
        )

    def _check_failed(self, cell: Cell, outcomes: list[Outcome]) -> None:
        """It did not reach its end; but on a slow disk, which is no failure."""
        slow = cell.failure.action == "slow disk"
        trained: Losses = {}
        for outcome in outcomes:
            trained |= outcome.value or {}
        if (self.last in trained) != slow:
            said = "did not reach its end" if slow else "did not fail"
            raise Broken(f"{said}: trained {list(trained)}\n{_tail(outcomes)}")

    def _check_folder(self, folder: Path) -> dict[int, tuple[tuple[str, ...], str]]:
        """What Megatron takes for a complete checkpoint is one, of the right maps."""
        outcome = in_megatron(checkpoint_states, str(folder))
        if outcome.error is not None:
            raise Broken(f"a checkpoint is half: {outcome.message}\n{outcome.output[-2000:]}")
        # A job that is terminated and handles it saves at other iterations, too.
        known = {i: state for i, state in outcome.value.items() if i in self.checkpoints}
        for iteration, state in known.items():
            if state != self.checkpoints[iteration]:
                raise Broken(f"iter_{iteration:07d} is {state}, not {self.checkpoints[iteration]}")
        tracked = (folder / TRACKER).read_text()
        if tracked and int(tracked) not in outcome.value:
            raise Broken(f"{TRACKER} names {tracked}, which is not complete")
        return outcome.value


def _end(outcome: Outcome) -> str:
    if outcome.error is None:
        return "done"
    code = re.search(r"exit code (-?\d+)", outcome.message)
    return code.group(0) if outcome.error == "Died" and code else outcome.error


def _tail(outcomes: list[Outcome], characters: int = 2000) -> str:
    return "\n".join(
        f"----- rank {rank} -----\n{outcome.output[-characters:]}"
        for rank, outcome in enumerate(outcomes)
    )
