"""The launcher, with a kill -9 of this rank at a chosen point: python tests/support/faults.py SCRIPT ARGS.

CRASH_AT names the point; every rank kills itself when it gets there, and `run_megatron` kills whoever is left.
"""

from __future__ import annotations

import os
import signal
import sys

from megatron_laep import cpu


def _die(*_args, **_kwargs):
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def _after(function):
    def then_die(*args, **kwargs):
        function(*args, **kwargs)
        _die()

    return then_die


def arrange(point: str, iteration: int | None = None) -> None:
    """Lets this process die at the point; where Megatron is.

    iteration: of the save, or of the pruning; None is the first pruning.
    """
    from megatron.core import dist_checkpointing
    from megatron.training import training as loop

    from megatron_laep.loop import commit, loop_hooks

    prune, save = commit.commit, dist_checkpointing.save
    if point == "before the checkpoint is complete":
        # Every tensor is written; the tracker file still names the checkpoint before.
        def prune_and_die_in_save(running, now, *args, **kwargs):
            if iteration in (None, now):
                dist_checkpointing.save = _after(save)
            return prune(running, now, *args, **kwargs)

        commit.commit = prune_and_die_in_save
    elif point == "after the checkpoint is complete":

        def prune_and_die(running, now, *args, **kwargs):
            should_exit = prune(running, now, *args, **kwargs)
            if iteration in (None, now):
                _die()
            return should_exit

        commit.commit = prune_and_die
    elif point == "during the rebuild":
        # The groups are new, the smaller model is about to be built.
        loop_hooks.set_layer_counts = _die
    elif point == "after the first ordinary save":
        # Looked up by name in Megatron's module, so the save that the commit asks for passes by here as well.
        save_and_time = loop.save_checkpoint_and_time

        def save_and_die(now, *args, **kwargs):
            save_and_time(now, *args, **kwargs)
            if now == iteration:
                _die()

        loop.save_checkpoint_and_time = save_and_die
    else:
        raise ValueError(f"CRASH_AT {point!r}: no such point")


if __name__ == "__main__":
    cpu.enable()
    from megatron_laep.__main__ import main

    point = os.environ["CRASH_AT"]
    save = point == "after the first ordinary save"
    arrange(point, int(os.environ["CRASH_ITERATION"]) if save else None)
    sys.argv[0] = "megatron_laep"
    main()
