"""Takes Megatron's global state and model-parallel groups down, for a rebuild in the same process.

Stands between the pending checkpoint and the second run of the training script. The default
process group stays: the ranks never lose each other.
"""

import gc

import torch
from megatron.core import parallel_state
from megatron.training.training import destroy_global_state
from torch.distributed import distributed_c10d


def tear_down() -> int:
    """Forgets all of Megatron's global state and destroys every group but the default one.

    A collective: every rank has to call it, after all of them have left the training loop and
    nothing (asynchronous saves, gathers) is under way on any group.

    Megatron's own ``destroy_model_parallel`` sets its groups to None but leaves their
    communicators alive, so each rebuild would leak them.

    Returns:
        How many groups this rank was a member of and destroyed.
    """
    torch.distributed.barrier()
    # Taken before Megatron forgets them. None stands for the default group. The order of the list
    # is the order of creation, the same on all members of a group.
    groups = [g for g in parallel_state._global_process_group_list or [] if g is not None]
    destroy_global_state()
    for group in groups:
        # Megatron destroys its gloo groups itself.
        if group in distributed_c10d._world.pg_map:
            torch.distributed.destroy_process_group(group)
    # The model and its optimizer die here: whoever calls has dropped the frames of the loop.
    gc.collect()
    torch.cuda.empty_cache()
    torch.distributed.barrier()
    return len(groups)
