"""The way back: the checkpoint of a pruning, which still holds all experts, outlives its successors.

With ``--save-retain-interval`` Megatron deletes each checkpoint when the next one is complete. Of a pruning that would
be the last one with the experts that were pruned, gone before anybody has seen how the smaller model trains.
"""

import os

from megatron.training import get_args

from megatron_laep.loop.session import session
from megatron_laep.mcore import symbols


def keep_prunings(original):
    """A hook on Megatron's deletion of one checkpoint; it runs on rank 0, in a thread or a fork of its own."""

    def delete(save_path, iteration_to_delete, *more, **named):
        start, args = session.active_start, get_args()
        retained = symbols.argument(args, "save_retain_interval")
        if start is None or start.record is None or not args.save_interval or not retained:
            return original(save_path, iteration_to_delete, *more, **named)
        due = {iteration_to_delete}
        for pruned in start.record.pruned_at:
            # The checkpoint that has just been saved follows on the one that is to be deleted.
            saved = iteration_to_delete // args.save_interval - pruned // args.save_interval + 1
            if saved < start.config.keep_pruning_checkpoint:
                due.discard(pruned)
            elif pruned % retained:
                due.add(pruned)
        for iteration in sorted(due):
            folder = os.path.join(save_path, f"iter_{iteration:07d}")
            if os.path.isdir(folder) and not os.path.islink(folder):
                original(save_path, iteration, *more, **named)
        return None

    return delete
