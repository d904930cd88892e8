"""Optimizer state that comes from another model or other ranks: what Megatron gets wrong on the way.

**Nesting.** With expert parallelism Megatron chains two optimizers (dense and expert parameters) and saves
``{0: state, 1: state}``; without it there is one, saved as ``state``. Where matrices have another
kind of optimizer than the rest (Muon and Adam), it is one for each kind, dense and expert, or for
each kind (the layer-wise distributed optimizer). A job whose expert-parallel size changes to or from
1 meets other optimizers, or other parameter groups in them. The tensors need no care, since their
keys speak of parameters, not of optimizers; this module adapts what is not a tensor: parameter
groups and scalars.

**Ranks without a parameter.** Rank 0 writes groups and scalars for everybody, also for an optimizer of
which it has no parameter itself: a pipeline stage without experts, a rank that holds none.

**Padding.** The fully reshardable format, in which the checkpoint with a pending map is written, cuts
parameters out of the wrong places where there is padding between gradient buckets.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

from megatron.core.optimizer.optimizer import param_group_identifier_keys

from megatron_laep.checks import Refusal

# Dense and expert parameters differ by this flag only; with expert parallelism 1 all are dense.
_EXPERT_FLAG = "is_expert_parallel"
# Names the optimizer of a group that is not of the job's main kind.
_KIND = "optimizer"


def adapt_common_state(saved: dict, wanted: dict) -> dict:
    """The saved non-tensor optimizer state, in the nesting of ``wanted``.

    Args:
        saved: ``optimizer`` entry of the checkpoint's common state.
        wanted: ``optimizer`` entry of the sharded state dict that is about to be loaded; tells
            how many optimizers there are and which parameter groups each has.

    Returns:
        ``saved`` itself where it has the same optimizers with the same parameter groups; else a new
        value.

    Raises:
        ValueError: the checkpoint's format cannot be renested; a parameter group of the job has no
            counterpart in the checkpoint, or two that disagree.
    """
    saved_parts, wanted_parts = _parts(saved), _parts(wanted)
    by_buffers = not all(isinstance(_holder(part), dict) for part in saved_parts)
    if len(saved_parts) == len(wanted_parts) and (
        by_buffers or all(map(_same_groups, saved_parts, wanted_parts))
    ):
        return saved
    if by_buffers:
        raise Refusal(
            "the optimizer state of the checkpoint is laid out by buffers (dp_reshardable) and "
            "cannot change between expert parallelism and none; save it with "
            "--dist-ckpt-optim-fully-reshardable, or keep --expert-model-parallel-size"
        )
    saved_groups = [group for part in saved_parts for group in _holder(part)["param_groups"]]
    adapted = []
    for wanted_part in wanted_parts:
        # Scalars (gradient scaler, format) are the same in all chained optimizers.
        part = copy.deepcopy(saved_parts[0])
        _holder(part)["param_groups"] = [
            _matching_group(group, saved_groups) for group in _holder(wanted_part)["param_groups"]
        ]
        adapted.append(part)
    return dict(enumerate(adapted)) if _is_chained(wanted) else adapted[0]


def complete_common_state(saved: dict) -> None:
    """Fills in, in place, what rank 0 could not know when it wrote ``saved``.

    Args:
        saved: ``optimizer`` entry of the checkpoint's common state.

    The optimizer of a rank counts no step for groups in which it has no parameter (TransformerEngine's
    FusedAdam), and its list of fp32 masters is empty: all groups get the step of the others, and the
    list is left out, so that each rank takes its own.
    """
    holders = [_holder(part) for part in _parts(saved)]
    groups = [
        group
        for holder in holders
        if isinstance(holder, dict)
        for group in holder.get("param_groups", ())
    ]
    for kind in {group.get(_KIND) for group in groups}:
        # Muon's groups, beside Adam's, have no step at all.
        of_kind = [group for group in groups if group.get(_KIND) == kind]
        steps = [group["step"] for group in of_kind if "step" in group]
        for group in of_kind:
            if steps:
                group["step"] = max(steps)
    for part in _parts(saved):
        masters = part.get("fp32_from_fp16_params")
        # The layer-wise optimizer has a dict of these lists in the place of the list.
        lists = list(masters.values()) if isinstance(masters, dict) else masters
        if lists is not None and not any(lists):
            del part["fp32_from_fp16_params"]


def complete_loaded_state(loaded: dict) -> None:
    """Gives an optimizer without a parameter on this rank its empty state, in place.

    Args:
        loaded: ``optimizer`` entry of the loaded state dict. Loading leaves empty entries out.
    """
    for part in _parts(loaded):
        holder = _holder(part)
        if isinstance(holder, dict):
            holder.setdefault("state", {})
            if part is not holder:
                part.setdefault("fp32_from_fp16_params", [])


@contextlib.contextmanager
def ranges_without_padding(buffers: Sequence[Any]) -> Iterator[None]:
    """While open, gradient buffers say where parameters lie if there is no padding between buckets.

    ``DistributedOptimizer.sharded_param_state_fully_reshardable`` joins the buckets without their
    padding, and then cuts parameters out at offsets that count it: every one behind the first
    padding gets a part of another's moments and fp32 master. A TODO there ("this assert shouldn't
    hold and indicates a bug, see issue #504") is about the end of the last one. Only for a Megatron
    on which ``upstream_bugs`` has shown this: another one would have the padding subtracted twice.

    Args:
        buffers: of a distributed optimizer (``_ParamAndGradBuffer``).

    Raises:
        ValueError: the offsets of a buffer do not count the padding, so there is none to take off.
    """
    padded = [buffer.param_index_map for buffer in buffers]
    try:
        for buffer in buffers:
            start, shifts = 0, []
            for bucket in buffer.buckets:
                shifts.append(bucket.offset - start)
                start += bucket.numel_unpadded
            for begin, end, bucket_id in buffer.param_index_map.values():
                bucket = buffer.buckets[bucket_id]
                if begin < bucket.offset or end > bucket.offset + bucket.numel_unpadded:
                    raise Refusal(
                        f"gradient buffer: a parameter lies at {begin} to {end}, its bucket "
                        f"{bucket_id} has {bucket.numel_unpadded} elements from {bucket.offset} on; "
                        "this megatron-core lays its buffers out in a way that megatron_laep cannot "
                        "save: train without --use-distributed-optimizer"
                    )
            buffer.param_index_map = {
                parameter: (begin - shifts[bucket_id], end - shifts[bucket_id], bucket_id)
                for parameter, (begin, end, bucket_id) in buffer.param_index_map.items()
            }
        yield
    finally:
        for buffer, index_map in zip(buffers, padded, strict=True):
            buffer.param_index_map = index_map


def _is_chained(state: dict) -> bool:
    return bool(state) and all(isinstance(key, int) for key in state)


def _parts(state: dict) -> list[dict]:
    return [state[index] for index in sorted(state)] if _is_chained(state) else [state]


def _holder(part: dict) -> Any:
    """The dict that has ``param_groups``: one level down, except in the plain fp32 optimizer. Something
    else in a format without one."""
    return part if "param_groups" in part else part.get("optimizer")


def _identity(group: dict, keys: Sequence[str]) -> tuple:
    return tuple(group.get(key, group.get(f"pre_{key}")) for key in keys)


def _same_groups(saved: dict, wanted: dict) -> bool:
    """Whether a saved optimizer has the groups that are wanted and no others, as Megatron tells them apart."""
    saved_groups, wanted_groups = (_holder(part)["param_groups"] for part in (saved, wanted))
    keys = param_group_identifier_keys
    there, asked = (
        {_identity(group, keys) for group in groups} for groups in (saved_groups, wanted_groups)
    )
    return len(saved_groups) == len(wanted_groups) and there == asked


def _matching_group(wanted: dict, saved_groups: list[dict]) -> dict:
    keys = [key for key in param_group_identifier_keys if key != _EXPERT_FLAG]

    def values(group: dict) -> dict:
        return {k: v for k, v in group.items() if k not in ("params", _EXPERT_FLAG)}

    candidates = [
        group for group in saved_groups if _identity(group, keys) == _identity(wanted, keys)
    ]
    if not candidates:
        raise Refusal(
            "optimizer state of the checkpoint: no parameter group with "
            f"{dict(zip(keys, _identity(wanted, keys), strict=True))}, got "
            f"{[_identity(group, keys) for group in saved_groups]}; resume with the same optimizer "
            "flags (weight decay, learning-rate multipliers) as the job that saved it"
        )
    first = candidates[0]
    if any(values(group) != values(first) for group in candidates[1:]):
        raise Refusal(
            "optimizer state of the checkpoint: the parameter groups "
            f"{[values(group) for group in candidates]} would have to become one, but differ; keep "
            "the expert-parallel size, or do not set different learning rates for experts"
        )
    group = copy.deepcopy(values(first))
    if _EXPERT_FLAG in wanted:
        group[_EXPERT_FLAG] = wanted[_EXPERT_FLAG]
    return group
