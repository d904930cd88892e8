"""Switches LAEP on in a process, and runs a training script again after each pruning.

A pruning ends the script with a ``Rebuild``; ``run`` then takes Megatron down and runs the script
again in the same process, where the next ``Start`` finds the pending map in the checkpoint exactly
as a relaunch after a crash would.
"""

import sys
import traceback
from collections.abc import Callable
from typing import Any

from megatron_laep import events
from megatron_laep.failure_points import reached
from megatron_laep.loop.loop_hooks import hooks
from megatron_laep.loop.session import Rebuild, session
from megatron_laep.mcore import symbols
from megatron_laep.mcore.hooks import Hook
from megatron_laep.mcore.rebuild import tear_down, warn_if_alive
from megatron_laep.mcore.safe_metadata import without_code
from megatron_laep.mcore.upstream_bugs import ask_megatron
from megatron_laep.pruned_checkpoint import allow_pruned_checkpoints
from megatron_laep.settings.config import LaepConfig


def install(config: LaepConfig | None = None) -> None:
    """Hooks LAEP into Megatron in this process, as ``python -m megatron_laep`` does.

    Call it before the training script parses its arguments and builds its layer specs, and run
    the training inside ``run``. While no ``--laep-*`` flag or config asks for pruning, and no pruned
    checkpoint is loaded, the hooks change nothing but what would end in an error of Megatron's
    (``mcore.upstream_bugs``: ``--help``, loading the state of fp32 parameters).

    Args:
        config: the settings; None takes them from the command line, where the ``--laep-*`` flags
            are added to Megatron's parser.

    Raises:
        RuntimeError: the hooks are installed already.
        Refusal: Megatron lacks symbols that are needed; a setting is out of range.
    """
    symbols.check_megatron()
    if config is not None:
        config.validate()
    upstream = ask_megatron()
    metadata = Hook("torch.distributed.checkpoint.filesystem:pickle", without_code)
    repairs = upstream.hooks(lambda: session.active_start is not None)
    session.hooks.apply([*hooks(), metadata, *repairs])
    session.upstream = upstream
    session.config = config
    session.expect(config)
    allow_pruned_checkpoints()
    events.show_on_console()


def install_once() -> None:
    """As ``install()``, unless the hooks are in: what a patched Megatron calls before it parses.

    Raises:
        Refusal: Megatron lacks symbols that are needed.
    """
    if not session.hooks.installed:
        install()


def uninstall() -> None:
    """Takes the hooks out again. Models that were built meanwhile keep their layers."""
    session.hooks.undo()
    allow_pruned_checkpoints(False)
    session.config = session.writer = None
    session.begin(None)


def run(main: Callable[[], Any]) -> Any:
    """Runs a training script's main function, and again after each pruning.

    Args:
        main: parses the arguments and calls ``megatron.training.pretrain``; everything that it
            needs it must make anew when it is called a second time.

    Returns:
        What ``main`` returned the last time.
    """
    session.inside_run = True
    command_line = list(sys.argv)
    try:
        while True:
            sys.argv = list(command_line)
            try:
                result = main()
            except SystemExit as leaving:
                if not leaving.code:
                    say_what_was_not_done()
                raise
            except Rebuild as rebuild:
                session.committed_hash = rebuild.expert_map_hash
                session.signal_handler = rebuild.signal_handler
                old_model = rebuild.old_model
                session.begin(None)
                # The frames of the loop hold the old model and its optimizer.
                traceback.clear_frames(rebuild.__traceback__)
                rebuild.__traceback__ = None
            else:
                say_what_was_not_done()
                return result
            with events.timed("tear_down"):
                tear_down()
            reached("torn down")
            warn_if_alive(old_model)
    finally:
        session.inside_run = False
        session.end_watch()


def say_what_was_not_done() -> None:
    """The last line of a run that was to be pruned, and was not, or not as often: why."""
    config = session.config or (session.start.config if session.start is not None else None)
    if config is None or not config.enabled:
        return
    running = session.running
    if running is None:
        events.warn(
            f"{config.prune_flag} was asked for, but the script never entered Megatron's training "
            "loop (megatron.training.pretrain): NOTHING WAS PRUNED."
        )
    elif running.still_to_come:
        events.log(
            "not_pruned",
            to_come=" ".join(map(str, running.still_to_come)),
            reason="the run ended before; the same command goes on from its last checkpoint",
        )
