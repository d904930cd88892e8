"""A training job in the forks of `in_megatron`, its losses exactly; killed on the way if asked to.

    losses = exact_losses(on_ranks(2, exact_job, tiny_arguments(...)))

Faster than `run_megatron`: Python, torch and Megatron are there already.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
from collections.abc import Sequence
from multiprocessing.managers import SyncManager
from pathlib import Path

from tests.support.counted_job import run_script
from tests.support.failures import Failure
from tests.support.forks import Outcome

Losses = dict[int, tuple[str, str]]
"""Iteration -> (loss, gradient norm), as `float.hex()`."""


def exact_job(
    arguments: list[str],
    masks: Sequence[str] = (),
    failure: Failure | None = None,
) -> Losses:
    """Runs the GPT script under megatron_laep on this rank, to its end; the losses that it knows.

    failure: what is to happen on the way.
    masks: files of maps whose pruned experts are masked (`masked.py`); without LAEP, then.
    """
    from megatron.training import training

    import megatron_laep
    from tests.support import exact_log, fixed_order, masked

    path = Path(os.environ["IN_MEGATRON_SCRATCH"]) / f"exact{os.environ['RANK']}.jsonl"
    os.environ["EXACT_LOG"] = str(path)
    exact_log.wrap(training)
    fixed_order.install()
    if failure is not None:
        os.environ.update(failure.environment())
        _own_write_results()
    if masks:
        masked.mask_routers(*masks)
    else:
        megatron_laep.install()
    run_script(arguments)
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return {line["iteration"]: (line["losses"]["lm loss"], line["grad_norm"]) for line in lines}


def _own_write_results() -> None:
    """A rank that fails may leave results of its writers, which the next job of these forks would take for its own."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    global _manager
    _manager = SyncManager(ctx=multiprocessing.get_context("fork"))
    _manager.start(_end_with_parent)
    filesystem_async._results_queue = _manager.Queue()


_manager: SyncManager | None = None


def _end_with_parent() -> None:
    set_parent_death_signal = 1  # of linux/prctl.h
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def exact_losses(outcomes: list[Outcome]) -> Losses:
    """Of all ranks together."""
    return {i: loss for outcome in outcomes for i, loss in outcome.result().items()}
