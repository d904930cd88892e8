"""Rank 0 decides, every rank follows: so that no two ranks ever go different ways."""

from collections.abc import Callable
from typing import TypeVar

import torch

from megatron_laep import events

_T = TypeVar("_T")


def on_rank_0(decide: Callable[[], _T]) -> _T:
    """The value that ``decide`` returns on rank 0, on every rank; it can be pickled. A collective.

    Raises:
        ValueError: on all ranks, if ``decide`` raised one.
    """
    outcome: list = [None, None]
    if events.is_rank_0():
        try:
            outcome[0] = decide()
        except ValueError as error:
            outcome[1] = str(error)
    torch.distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise ValueError(outcome[1])
    return outcome[0]
