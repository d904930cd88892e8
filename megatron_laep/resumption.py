"""Whether a job can go on from its checkpoint the way its flags say; on every rank alike.

Beside ``validation``, which looks at the flags alone. Every complaint is a ``ValueError`` with the
flag, what was given, what is wanted and what to do.
"""

from megatron_laep.checkpoint import Record
from megatron_laep.config import LaepConfig
from megatron_laep.schedule import Leg


def check_start(record: Record | None, config: LaepConfig, where: object) -> None:
    """Whether the job can go on from its checkpoint the way its flags say.

    Args:
        record: of the checkpoint that will be loaded; None for a start from scratch.
        config: the LAEP settings, ``config.enabled``.
        where: the checkpoint, for messages.
    """
    if record is None:
        return
    if record.expert_map is not None:
        pruned_at, given = record.expert_map.iteration, config.prune_iteration
        if pruned_at != given and not (config.prune_when_stable and pruned_at < given):
            raise ValueError(
                f"{where} was pruned at iteration {record.expert_map.iteration}, but "
                f"--laep-prune-iteration is {config.prune_iteration}; a second pruning is not "
                f"supported: give --laep-prune-iteration {record.expert_map.iteration} to go on"
            )
        return
    if config.prune_iteration in record.declined:
        return
    if record.iteration >= config.prune_iteration:
        raise ValueError(
            f"{where} is at iteration {record.iteration} and was not pruned, but "
            f"--laep-prune-iteration {config.prune_iteration} is past; choose a later iteration, "
            "or start from an earlier checkpoint with --ckpt-step"
        )
    _check_windows(record, config.leg(), config, where)


def _check_windows(record: Record, leg: Leg, config: LaepConfig, where: object) -> None:
    """Whether the windows of the leg that are still to come, and those of the checkpoint, do."""
    start, held = leg.last_window_start, record.window
    if record.iteration > start and (held is None or held.start != start):
        counts = "no counts" if held is None else f"counts from {held.start + 1} on"
        raise ValueError(
            f"the window of --laep-prune-iteration {leg.end} and --laep-window {leg.window} begins "
            f"at iteration {start + 1}, but {where} is at iteration {record.iteration} and has "
            f"{counts}; use --laep-window {leg.end - record.iteration} or less, or prune later"
        )
    if not (config.prune_when_stable or config.require_stable):
        return
    position = leg.position(record.iteration, held and held.start)
    ended = leg.continued([(window.start, window.end) for window in record.ended], position)
    windows = ended + (leg.end - position) // leg.window
    if windows < leg.needed:
        flag = "--laep-prune-when-stable" if config.prune_when_stable else "--laep-require-stable"
        raise ValueError(
            f"{flag} compares {leg.needed} windows, but going on from {where}, at iteration "
            f"{record.iteration}, the job has {windows} of --laep-window {leg.window} up to "
            f"--laep-prune-iteration {leg.end}; use a shorter window, or prune later"
        )
