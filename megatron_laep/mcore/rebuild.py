"""Takes Megatron's global state and model-parallel groups down, for a rebuild in the same process.

Stands between the pending checkpoint and the second run of the training script. The default
process group stays: the ranks never lose each other.
"""

import gc
import weakref

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router_replay import RouterReplay
from megatron.core.utils import get_model_config
from megatron.training import global_vars
from megatron.training.dist_signal_handler import DistributedSignalHandler
from megatron.training.training import destroy_global_state
from torch.distributed import distributed_c10d

from megatron_laep import events

# Set by Megatron's train(); bound methods of the optimizer and of the model chunks.
_CONFIG_CALLBACKS = (
    "grad_scale_func",
    "no_sync_func",
    "grad_sync_func",
    "param_sync_func",
    "finalize_model_grads_func",
)


def release(model: list[torch.nn.Module]) -> list[weakref.ref]:
    """Lets the memory of a model that is about to be dropped go.

    Circles of references run through C++, where Python's collector cannot see them: Megatron's
    DistributedDataParallel puts hooks on gradient accumulators that keep it alive. Accumulators are
    kept by DistributedDataParallel itself, by the graph behind tensors that token dispatchers hold
    on to, and by views of parameters in a distributed optimizer, which the model's config reaches
    through its callbacks. The old model would stay on the device beside the new one.

    Args:
        model: this rank's chunks, wrapped for data parallelism; unusable afterwards.

    Returns:
        A weak reference to each chunk, for ``warn_if_alive``.
    """
    for chunk in model:
        for module in chunk.modules():
            if isinstance(module, MoELayer):
                module.token_dispatcher = None
        if isinstance(chunk, DistributedDataParallel):
            chunk.grad_accs.clear()
            if chunk.remove_forward_pre_hook_handles:
                chunk.disable_forward_pre_hook(param_sync=False)
    config = get_model_config(model[0])
    for callback in _CONFIG_CALLBACKS:
        setattr(config, callback, None)
    return [weakref.ref(chunk) for chunk in model]


def pass_signal_on(before: DistributedSignalHandler | None) -> None:
    """A signal to end that came while the job was rebuilt ends the rebuilt job.

    Args:
        before: the handler of the job before, which heard signals until the new one took its place;
            None without --exit-signal-handler.
    """
    if before is not None and before._signal_received:
        global_vars.get_signal_handler()._signal_received = True


def warn_if_alive(references: list[weakref.ref]) -> None:
    """Says so if an old model was not collected: its memory is missing for the new one."""
    alive = [chunk for reference in references if (chunk := reference()) is not None]
    if alive:
        size = sum(p.numel() * p.element_size() for chunk in alive for p in chunk.parameters())
        events.log(
            "old_model_alive",
            parameter_bytes=size,
            advice="something outside Megatron holds the model; if memory is short, use "
            "--laep-exit-after-prune",
        )


def tear_down() -> None:
    """Forgets all of Megatron's global state and destroys every group but the default one.

    A collective: every rank has to call it, after all of them have left the training loop and
    nothing (asynchronous saves, gathers) is under way on any group.

    Megatron's own ``destroy_model_parallel`` sets its groups to None but leaves their
    communicators alive, so each rebuild would leak them.
    """
    if not torch.distributed.is_initialized():
        raise RuntimeError(
            "the training script has destroyed the default process group on its way out, so the job "
            "cannot be rebuilt in this process; leave the group alone, or add "
            "--laep-exit-after-prune. The checkpoint is complete: the same command goes on"
        )
    torch.distributed.barrier()
    # Taken before Megatron forgets them. None stands for the default group. The order of the list
    # is the order of creation, the same on all members of a group.
    groups = [g for g in parallel_state._global_process_group_list or [] if g is not None]
    destroy_global_state()
    # Routers of --moe-enable-routing-replay enter themselves here and never leave; what was recorded
    # or is to be replayed names experts by their old ids.
    RouterReplay.clear_global_router_replay_instances()
    for group in groups:
        # Megatron destroys its gloo groups itself.
        if group in distributed_c10d._world.pg_map:
            torch.distributed.destroy_process_group(group)
    # The model and its optimizer die here: whoever calls has dropped the frames of the loop.
    gc.collect()
    torch.cuda.empty_cache()
    torch.distributed.barrier()
