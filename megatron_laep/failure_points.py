"""The steps at which a run can fail, by name: where this rank is, and where tests let it fail.

``reached`` notes a step; ``stall_watch`` names it when nothing moves any more. In production it does
nothing else. Tests set ``MEGATRON_LAEP_FAILURE_HOOK=package.module:function`` to a function that is
called with the step and the iteration (``tests/support/failures.py``), and may do what it likes.
"""

import importlib
import os

HOOK_VARIABLE = "MEGATRON_LAEP_FAILURE_HOOK"

STEPS = {
    "window reduced": "a window of loads has ended, its counts are those of all ranks",
    "plan decided": "rank 0 has made the map, nobody else knows it",
    "plan broadcast": "every rank has the map",
    "before save": "the next to come is the checkpoint with the pending map",
    "during save": "what a checkpoint will hold is described, nothing of it is written",
    "committed": "the checkpoint with the pending map is complete",
    "torn down": "the old model and its groups are gone",
    "groups rebuilt": "Megatron is initialized, the model is about to be built",
    "model built": "the model and its optimizer are built, nothing is loaded",
    "during load": "the checkpoint is about to be read",
    "loaded": "the checkpoint is loaded",
    "step done": "an iteration is trained",
    "iteration closed": "an iteration is logged, and saved if it was to be",
}
"""Name of each step, in the order of a pruning, and what holds when it is reached."""


class Position:
    """Where this rank is. One for the process, written by its main thread.

    Attributes:
        step: the last that was reached; empty before the first.
        iteration: the last that was trained; None before the first.
        count: of steps reached so far; grows as long as the rank gets on.
    """

    def __init__(self) -> None:
        self.step, self.count = "", 0
        self.iteration: int | None = None


position = Position()


def reached(step: str, iteration: int | None = None) -> None:
    """Notes that this rank has reached a step. Local, and cheap enough for every iteration.

    Args:
        step: a key of ``STEPS``.
        iteration: that is being trained or was; None where it is the one of the last call.
    """
    if iteration is not None:
        position.iteration = iteration
    position.step = step
    position.count += 1
    hook = os.environ.get(HOOK_VARIABLE)
    if hook:
        module, _, function = hook.partition(":")
        getattr(importlib.import_module(module), function)(step, position.iteration)
