"""One pruning: the plan, and the checkpoint with the pending map, which is its commit point.

Before that checkpoint is complete, nothing has happened; after it, whoever goes on from it goes on
with the smaller model, this process or a relaunch.
"""

import dataclasses
from argparse import Namespace
from collections.abc import Callable

import torch

from megatron_laep import events
from megatron_laep.checks import Refusal
from megatron_laep.events import on_rank_0
from megatron_laep.failure_points import reached
from megatron_laep.loop.job import Running
from megatron_laep.mcore import checkpoint, model_size, space
from megatron_laep.mcore.layer_numbers import mtp_names
from megatron_laep.mcore.moe_layer import find_layers
from megatron_laep.plan import make_map
from megatron_laep.plan.expert_map import ExpertMap
from megatron_laep.plan.layout import ModelLayout
from megatron_laep.plan.summary import summarize
from megatron_laep.plan.windows import OpenWindow
from megatron_laep.records.pruning_files import write_pruning
from megatron_laep.records.pruning_loads import PruningLoads
from megatron_laep.settings.rules import PruningRules


@dataclasses.dataclass(frozen=True)
class Committed:
    """A complete checkpoint with a pending map.

    Attributes:
        expert_map: the map.
        should_exit: what Megatron's own end of the iteration said.
    """

    expert_map: ExpertMap
    should_exit: bool


def has_room(
    running: Running, iteration: int, model: list[torch.nn.Module], args: Namespace
) -> bool:
    """Whether the checkpoint of the pruning that is due will fit on the disk; else it is postponed.

    A collective; the same on all ranks.

    Raises:
        Refusal: it will not, and --laep-require-prune is given.
    """
    room = space.room(model, args)
    events.log("space", iteration=iteration, needed_bytes=room.needed, free_bytes=room.free)
    if room.is_enough:
        return True
    what = (
        f"The checkpoint of the pruning at iteration {iteration} takes {room.needed / 1e9:.3f} GB "
        f"(with a margin), and in --save {args.save} {room.free / 1e9:.3f} GB are free."
    )
    if running.config.require_prune:
        raise Refusal(
            f"{what} Nothing was written (--laep-require-prune): make room, and start the same "
            "command again, which goes on from the last checkpoint; without the flag, the pruning "
            "would be postponed"
        )
    again = running.postpone(iteration, args)
    if again is None:
        then = (
            "The model is NOT PRUNED, and the training goes on as before: a pruning one "
            "--laep-window later would be too late for the next one, or for the end of training."
        )
    else:
        then = (
            f"The pruning is POSTPONED to iteration {again}, and the training goes on as before. "
            "Make room until then."
        )
    events.log("postponed", iteration=iteration, again_at=again or "never")
    events.warn(f"{what}\n{then}\nWith --laep-require-prune, the job would stop now.")
    return False


def commit(
    running: Running,
    iteration: int,
    model: list[torch.nn.Module],
    args: Namespace,
    *,
    step: Callable[[], bool],
    save: Callable[[], None],
) -> Committed:
    """Plans, reports, and writes the checkpoint with the pending map. A collective.

    Args:
        running: the run, at the end of the iteration.
        step: Megatron's own end of an iteration: saves if the job's intervals say so, and tells
            whether the job is to exit.
        save: writes a checkpoint of this iteration.

    Raises:
        ValueError: on all ranks, if no plan can rest on the loads. An ordinary checkpoint of the
            iteration has been written then.
    """
    window = running.last_window
    try:
        with events.timed("planned", iteration=iteration):
            expert_map = agree_on_plan(
                window, iteration, running.layout, running.config.rules, running.plan
            )
            lineage = running.lineage.then(expert_map)
    except ValueError as error:
        # Synchronous: nobody would be left to complete an asynchronous save.
        with checkpoint.overridden(args, async_save=False):
            save()
        raise Refusal(
            f"{error}. Iteration {iteration} is saved in {args.save} as it was before this "
            f"pruning: go on with a later iteration in the place of {iteration}, or without it"
        ) from error
    reached("plan broadcast")
    _report(running, expert_map, window, model, args)
    events.log(
        "commit_format",
        ckpt_format="torch_dist",
        optimizer="fully_reshardable",
        non_homogeneous_layers=True,
    )
    reached("before save")
    with (
        running.writing(lineage),
        events.timed("committed", iteration=iteration, map=expert_map.short_hash),
        checkpoint.commit_point_arguments(args),
    ):
        should_exit = step()
        if not running.committed:
            save()
    reached("committed")
    return Committed(expert_map, should_exit)


def agree_on_plan(
    window: OpenWindow,
    iteration: int,
    layout: ModelLayout,
    rules: PruningRules,
    plan: ExpertMap | None,
) -> ExpertMap:
    """Rank 0 decides; every rank gets its map, or its complaint. A collective."""

    def decide() -> str:
        if plan is None:
            loads = window.loads(layout.layer_numbers)
            made = make_map.make_expert_map(loads, layout, rules, iteration=iteration)
        else:
            # The experts are the file's; the loads, sizes and date are this job's.
            layers = tuple(
                dataclasses.replace(layer, loads=tokens_E)
                for layer, tokens_E in zip(plan.layers, window.tokens_LE, strict=True)
            )
            made = dataclasses.replace(
                plan,
                iteration=iteration,
                layers=layers,
                expert_parallel_size_before=layout.expert_parallel_size_before,
            )
        reached("plan decided")
        return made.to_json()

    try:
        return ExpertMap.from_json(on_rank_0(decide))
    except ValueError as error:
        raise Refusal(f"pruning at iteration {iteration}: {error}") from None


def _report(
    running: Running,
    expert_map: ExpertMap,
    window: OpenWindow,
    model: list[torch.nn.Module],
    args: Namespace,
) -> None:
    """Prints the table and writes it beside the checkpoint, for people and tools. A collective."""
    size = model_size.measure(model, find_layers(model), expert_map, args)
    blocks_before = running.experts_per_rank(args)
    summary = summarize(
        expert_map,
        size,
        pipeline_parallel_size=args.pipeline_model_parallel_size,
        stages=running.layout.stages,
        blocks_before=blocks_before,
    )
    events.log_text(summary.format_table(running.layout.num_groups, mtp_names(args)))
    if events.is_rank_0():
        # For the job they are in the checkpoint.
        with events.failure_is_logged(iteration=expert_map.iteration):
            loads = PruningLoads.of(window, running.layout, blocks_before)
            write_pruning(running.folder, expert_map, summary, loads)
