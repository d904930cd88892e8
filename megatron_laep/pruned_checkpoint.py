"""What is pickled into the checkpoints of pruned models. This file never moves.

Megatron unpickles the common state of a checkpoint before it reads any tensor. The record of a
pruned model is in there as a ``PrunedCheckpoint``, and a pickle names what it needs by module and
name: ``megatron_laep.pruned_checkpoint.relaunch_with_python_m_megatron_laep``. A run that was begun
under one version of this package must resume under every later one, so neither the path of this
module nor the name of the function may ever change. ``tests/data/checkpoint_before_layout`` holds a
record of the time before this file; ``megatron_laep/checkpoint.py`` stands where it looks.

Nothing but the standard library is needed here, so that the refusal below reaches also a process in
which nothing else of this package works.
"""

from __future__ import annotations

from megatron_laep.checks import Refusal


class PrunedCheckpoint:
    """Holds the record of a pruned model, so that only this package can open the checkpoint.

    The value comes back through ``relaunch_with_python_m_megatron_laep``, which refuses in a process
    that has not called ``allow_pruned_checkpoints``. A process without this package stops at the
    missing module, one that unpickles with ``weights_only`` at the function's name.
    """

    def __init__(self, record: dict) -> None:
        self.record = record

    def __reduce__(self):
        return relaunch_with_python_m_megatron_laep, (self.record,)

    def __eq__(self, other: object) -> bool:
        # Megatron checks that the common state is the same on all ranks.
        return type(other) is type(self) and other.record == self.record

    __hash__ = None  # type: ignore[assignment]  # Python's own way to say so


_allowed = False


def relaunch_with_python_m_megatron_laep(record: dict) -> PrunedCheckpoint:
    """Unpickles a ``PrunedCheckpoint``; a person who lacks this package reads the name.

    Raises:
        ValueError: the process may not open checkpoints of pruned models.
    """
    if not _allowed:
        raise Refusal(
            "this checkpoint was pruned by LAEP: its layers have other numbers of experts than "
            "--num-experts says, and only megatron_laep knows which. Start the same command with "
            "'-m megatron_laep' before the script (or call megatron_laep.install() in it)"
        )
    return PrunedCheckpoint(record)


def allow_pruned_checkpoints(allowed: bool = True) -> None:
    """Whether this process may open checkpoints of pruned models."""
    global _allowed
    _allowed = allowed
    if allowed:
        import torch  # not at the top: see the module

        function = relaunch_with_python_m_megatron_laep
        # By both names: that of this module, and that of the time before it.
        before = f"megatron_laep.checkpoint.{function.__name__}"
        torch.serialization.add_safe_globals([function, (function, before)])
