"""Whether a job can go on from its checkpoint the way its flags say; on every rank alike.

Beside ``arguments``, which looks at the flags alone. Every complaint is a ``ValueError`` with the
flag, what was given, what is wanted and what to do.
"""

from megatron_laep.checks import Refusal
from megatron_laep.mcore.checkpoint import Record
from megatron_laep.settings.config import LaepConfig
from megatron_laep.settings.schedule import Leg, with_postponed


def remaining_legs(record: Record | None, config: LaepConfig, where: object) -> tuple[Leg, ...]:
    """The legs whose pruning is still to come; all of them for a start from scratch.

    Args:
        record: of the checkpoint that will be loaded; None for a start from scratch.
        config: the LAEP settings.
        where: the checkpoint, for messages.
    """
    legs = config.legs()
    if record is None:
        config.check_windows(legs)
        return legs
    legs = with_postponed(legs, record.postponed)
    done = _pruned_legs(record, legs, config, where)
    done |= {leg for leg in legs if leg.end in record.declined}
    remaining = tuple(leg for leg in legs if leg not in done)
    if not remaining:
        return ()
    first = remaining[0]
    if record.iteration >= first.end:
        remedy = f"leave {first.end} out" if record.pruned_at else "choose a later iteration"
        raise Refusal(
            f"{where} is at iteration {record.iteration} and was not pruned for "
            f"--laep-prune-iteration {first.end}, which is past; {remedy}, or start from an earlier "
            "checkpoint with --ckpt-step"
        )
    config.check_windows(remaining)
    _check_windows(record, first, config, where)
    return remaining


def _pruned_legs(
    record: Record, legs: tuple[Leg, ...], config: LaepConfig, where: object
) -> set[Leg]:
    """The legs in which the checkpoint's prunings were made."""
    done = [
        leg
        for iteration in record.pruned_at
        for leg in legs
        if iteration == leg.end or (leg.early and leg.start < iteration < leg.end)
    ]
    if len(set(done)) < len(record.pruned_at):
        iterations = " ".join(map(str, record.pruned_at))
        raise Refusal(
            f"{where} was pruned at iteration {iterations.replace(' ', ' and ')}, but "
            f"--laep-prune-iteration is {config.prune_flag.partition(' ')[2]}: give "
            f"--laep-prune-iteration {iterations} to go on, and later iterations behind to prune "
            "again; or --laep-prune-when-stable again, if it was pruned early by it"
        )
    return set(done)


def _check_windows(record: Record, leg: Leg, config: LaepConfig, where: object) -> None:
    """Whether the leg's windows are still to come, or in the checkpoint."""
    start, held = leg.last_window_start, record.window
    if record.iteration > start and (held is None or held.start != start):
        counts = "no counts" if held is None else f"counts from {held.start + 1} on"
        raise Refusal(
            f"the window of --laep-prune-iteration {leg.end} and --laep-window {leg.window} begins "
            f"at iteration {start + 1}, but {where} is at iteration {record.iteration} and has "
            f"{counts}; use --laep-window {leg.end - record.iteration} or less, or prune later"
        )
    if not (config.prune_when_stable or config.require_stable):
        return
    position = leg.position(record.iteration, held.start if held else None)
    ended = leg.continued([(window.start, window.end) for window in record.ended], position)
    windows = ended + (leg.end - position) // leg.window
    if windows < leg.needed:
        flag = "--laep-prune-when-stable" if config.prune_when_stable else "--laep-require-stable"
        raise Refusal(
            f"{flag} compares {leg.needed} windows, but going on from {where}, at iteration "
            f"{record.iteration}, the job has {windows} of --laep-window {leg.window} up to "
            f"--laep-prune-iteration {leg.end}; use a shorter window, or prune later"
        )
