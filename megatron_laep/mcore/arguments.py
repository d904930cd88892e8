"""Checks of a job's arguments, before its model is built, on every rank alike.

Reads Megatron's parsed and validated arguments and what the checkpoint says; touches nothing.
Every complaint is a ``ValueError`` with the flag, what was given, what is wanted and what to do.
"""

import dataclasses
import math
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

from megatron_laep.checks import Refusal
from megatron_laep.json_text import read_text
from megatron_laep.mcore import refusals, symbols
from megatron_laep.mcore.checkpoint import Record
from megatron_laep.mcore.described_model import model_layout, ranks_of_a_model, router_groups
from megatron_laep.mcore.layer_numbers import moe_layer_numbers, mtp_names, total_layers
from megatron_laep.mcore.refusals import Complaint
from megatron_laep.mcore.unsupported import When
from megatron_laep.plan import make_map
from megatron_laep.plan.expert_map import ExpertMap
from megatron_laep.plan.groups import check_kept_groups
from megatron_laep.plan.layout import ModelLayout
from megatron_laep.settings import flags
from megatron_laep.settings.config import LaepConfig
from megatron_laep.settings.rules import AlphaSpec
from megatron_laep.settings.schedule import Leg


def check_yaml(args: Namespace, words: Sequence[str], *, from_python: bool) -> None:
    """Whether a YAML file takes the place of flags.

    Args:
        args: Megatron's arguments as parsed.
        words: of the command line.
        from_python: the settings come from ``install(config)``.

    Raises:
        Refusal: it does.
    """
    yaml = symbols.argument(args, "yaml_cfg")
    given = flags.given(words)
    if yaml is not None and (given or from_python):
        raise Refusal(
            f"--yaml-cfg {yaml} replaces the command line, and with it "
            f"{given[0] if given else '--laep-prune-iteration'}; give all arguments as flags"
        )


def complaints_of_pruning(
    args: Namespace, config: LaepConfig, legs: Sequence[Leg], present: ExpertMap | None
) -> list[Complaint]:
    """Everything that is in the way of a job that counts and prunes.

    Args:
        args: Megatron's arguments after its own validation.
        config: the LAEP settings, ``config.enabled`` and validated.
        legs: the prunings that are still to come.
        present: the map that the model follows that is to be pruned; None for the full model.
    """
    hits = refusals.hits_of_pruning(args, config, legs)
    checks = [lambda: _check_experts(args, config), lambda: _check_save(args, config)]
    if args.num_experts is not None and moe_layer_numbers(args):
        experts = present_experts(args, present)
        checks += [
            lambda: _check_iterations(args, legs),
            lambda: _check_sizes(args, config, experts if legs else {}),
        ]
        if config.plan is None:
            checks += [lambda: _check_alpha(args, config)]
    return [Complaint(hit.sentence, hit.row.lifted) for hit in hits] + complaints(*checks)


def complaints_of_recording(args: Namespace, config: LaepConfig) -> list[Complaint]:
    """Everything that is in the way of a job that records its loads, whether it prunes or not."""
    flag = config.recorded
    assert flag is not None, "nothing is to be recorded"
    hits = refusals.hits(args, {When.RECORD: f"together with {flag}"})
    return [Complaint(hit.sentence) for hit in hits] + complaints(
        lambda: _check_recording(args, flag)
    )


def complaints(*checks: Callable[[], object]) -> list[Complaint]:
    """The refusals of several checks, of each at most one."""
    found = []
    for check in checks:
        try:
            check()
        except Refusal as refusal:
            found.append(Complaint(str(refusal)))
    return found


def _check_recording(args: Namespace, flag: str) -> None:
    if args.save is None:
        raise Refusal(f"{flag} needs --save: the record goes to SAVE/laep; give --save FOLDER")
    if args.num_experts is None or not moe_layer_numbers(args):
        raise Refusal(
            f"{flag}: the model has no MoE layer, so there is nothing to record; remove the flag"
        )


def _refuse(args: Namespace, when: When, situation: str) -> None:
    refusals.refuse([hit.sentence for hit in refusals.hits(args, {when: situation})])


def _check_alpha(args: Namespace, config: LaepConfig) -> None:
    """Whether ``--laep-alpha`` names all MoE layers, and no others."""
    try:
        spec = AlphaSpec.parse(config.alpha)
        spec.check_layers(moe_layer_numbers(args), total_layers(args))
    except Refusal as refusal:
        named = ", ".join(f"{number} is {name}" for number, name in mtp_names(args).items())
        if not named:
            raise
        raise Refusal(f"{refusal} (multi-token prediction: layer {named})") from None


def _check_experts(args: Namespace, config: LaepConfig) -> None:
    if args.num_experts is None or not moe_layer_numbers(args):
        why = "--num-experts is not given"
        if args.num_experts is not None:
            hybrid = args.hybrid_layer_pattern is not None
            why = "see --hybrid-layer-pattern" if hybrid else "see --moe-layer-freq"
        raise Refusal(
            f"{config.prune_flag}: the model has no MoE layer ({why}), "
            "so there is nothing to prune; remove the --laep flags"
        )


def _check_save(args: Namespace, config: LaepConfig) -> None:
    if args.save is None:
        raise Refusal(
            f"{config.prune_flag} needs --save: the pruning goes "
            "through a checkpoint; give --save FOLDER"
        )


def _check_iterations(args: Namespace, legs: Sequence[Leg]) -> None:
    last, flag = _training_iterations(args)
    for leg in legs:
        if leg.end >= last:
            raise Refusal(
                f"--laep-prune-iteration {leg.end} is not before the end of training ({last} "
                f"iterations, from {flag}): the pruned model would never be trained; prune at "
                f"{last - 1} or before, or train longer"
            )
        boundaries = [(start, "a window begins") for start in leg.window_starts]
        for iteration, meaning in (*boundaries, (leg.end, "pruning")):
            if iteration in args.iterations_to_skip:
                raise Refusal(
                    f"--iterations-to-skip skips iteration {iteration}, after which comes {meaning}; "
                    "choose another --laep-prune-iteration or --laep-window"
                )


def _training_iterations(args: Namespace) -> tuple[int, str]:
    """How many iterations the job will have, and the flags that say so; as Megatron's
    ``update_train_iters`` finds out, but that runs only after the arguments were validated."""
    if args.train_iters:
        return args.train_iters, f"--train-iters {args.train_iters}"
    if not args.train_samples:
        raise Refusal(
            "--laep-prune-iteration needs --train-iters or --train-samples, to tell whether the "
            "job gets there"
        )
    flag = f"--train-samples {args.train_samples}"
    if args.step_batch_size_schedule is None:
        iterations = args.train_samples // args.global_batch_size
        return iterations, f"{flag} and --global-batch-size {args.global_batch_size}"
    schedule = StepBatchsizeNumMicroBatchesCalculator(
        micro_batch_size=args.micro_batch_size,
        data_parallel_size=args.data_parallel_size
        * symbols.argument(args, "gtp_weight_remat_size"),
        decrease_batch_size_if_needed=False,
        rank=-1,  # not the one that logs
        schedule=args.step_batch_size_schedule,
        seq_length=args.seq_length,
    ).schedule
    iterations = samples = 0
    ends = [threshold for threshold, _ in schedule[1:]] + [args.train_samples]
    for end, (_, batch_size) in zip(ends, schedule, strict=True):
        steps = max(0, math.ceil((min(end, args.train_samples) - samples) / batch_size))
        iterations, samples = iterations + steps, samples + steps * batch_size
    return iterations, f"{flag} and --step-batch-size-schedule {args.step_batch_size_schedule}"


def present_experts(args: Namespace, present: ExpertMap | None) -> dict[int, int]:
    """How many experts each layer has now.

    Args:
        present: the map that the model follows; None for the full model.
    """
    if present is not None:
        return {layer.layer_number: layer.experts_after for layer in present.layers}
    return dict.fromkeys(moe_layer_numbers(args), args.num_experts)


def working_sizes(args: Namespace, config: LaepConfig, experts: Mapping[int, int]) -> list[int]:
    """The expert-parallel sizes that the job could have after its next pruning, ascending.

    Args:
        experts: how many each layer has now.
    """
    found = []
    for size in range(1, args.num_experts + 1):
        there = dataclasses.replace(config, expert_model_parallel_size=size)
        if not complaints(partial(_check_sizes, args, there, experts)):
            found.append(size)
    return found


def _check_sizes(args: Namespace, config: LaepConfig, experts: Mapping[int, int]) -> None:
    """Whether the ranks after a pruning, and the multiple, fit the job and what its layers have now.

    Args:
        experts: how many each layer has now; empty if nothing is to be pruned any more.
    """
    before = args.expert_model_parallel_size
    size, flag = before, "--expert-model-parallel-size"
    if config.expert_model_parallel_size is not None:
        size, flag = config.expert_model_parallel_size, "--laep-expert-model-parallel-size"
    if args.num_experts % size:
        raise Refusal(
            f"{flag} {size} does not divide --num-experts {args.num_experts}; choose a size that "
            "divides it"
        )
    ranks = ranks_of_a_model(args, size)
    if args.world_size % ranks:
        raise Refusal(
            f"{flag} {size}: {args.world_size} ranks do not divide by expert tensor parallel size "
            f"{args.expert_tensor_parallel_size} x expert model parallel size {size} x pipeline "
            f"parallel size {args.pipeline_model_parallel_size} = {ranks}; choose a "
            "smaller size"
        )
    multiple = config.expert_multiple or size
    if multiple % size:
        _refuse_with_uneven(args, f"--laep-expert-multiple {multiple}")
    if args.num_experts % multiple:
        raise Refusal(
            f"--laep-expert-multiple {multiple} does not divide --num-experts {args.num_experts}, "
            "so a layer from which nothing is pruned could not be rounded up to it; choose a "
            "multiple that divides it"
        )
    if size != before:
        _check_new_size(args, size, args.world_size // ranks)
    if experts and config.plan is None:
        make_map.check_counts(model_layout(args, config, experts), config.rules)


def _check_new_size(args: Namespace, size: int, replicas: int) -> None:
    """What Megatron would complain about only in the rebuild, with the pruning behind it."""
    flag = f"--laep-expert-model-parallel-size {size}"
    if replicas % args.num_distributed_optimizer_instances:
        raise Refusal(
            f"{flag} leaves {replicas} replicas of each expert, which "
            "--num-distributed-optimizer-instances "
            f"{args.num_distributed_optimizer_instances} does not divide; choose another size, or "
            "one instance"
        )
    if (
        args.use_tp_pp_dp_mapping
        and args.pipeline_model_parallel_size > 1
        and replicas != args.data_parallel_size
    ):
        raise Refusal(
            f"{flag} leaves {replicas} replicas of each expert and {args.data_parallel_size} of "
            "the other weights, which --use-tp-pp-dp-mapping wants to be equal; remove it, or keep "
            "the size"
        )
    if args.overlap_moe_expert_parallel_comm and size == 1:
        raise Refusal(
            f"{flag} leaves nothing for --overlap-moe-expert-parallel-comm to overlap, which "
            "Megatron refuses; remove it, or choose a size of at least 2"
        )


def read_plan(
    args: Namespace, config: LaepConfig, prunings: Sequence[int], present: ExpertMap | None
) -> ExpertMap:
    """The map of ``--laep-plan``, checked against the job; it says when *it* was made.

    Args:
        prunings: the iterations of those that are still to come.
        present: the map that the model follows that is to be pruned; None for the full model.
    """
    assert config.plan is not None, "there is no --laep-plan to read"
    path = Path(config.plan)
    if len(prunings) > 1:
        raise Refusal(
            f"--laep-plan {path} is the map of one pruning, and {len(prunings)} are still to come "
            f"(--laep-prune-iteration {' '.join(map(str, prunings))}): give one iteration, and "
            "relaunch with the next iteration and its plan after it, or leave out --laep-plan"
        )
    experts = present_experts(args, present)
    try:
        expert_map = ExpertMap.from_json(read_text(path))
    except (OSError, ValueError) as error:
        raise Refusal(f"--laep-plan {path}: {error}") from error
    check_plan(expert_map, model_layout(args, config, experts), config)
    _check_uneven(expert_map, args, f"--laep-plan {path}")
    return expert_map


def check_plan(expert_map: ExpertMap, layout: ModelLayout, config: LaepConfig) -> None:
    """Whether the map of ``--laep-plan`` fits the model and its ranks."""
    try:
        make_map.check_plan(expert_map, layout, allow_empty_ranks=config.allow_empty_ranks)
    except ValueError as error:
        raise Refusal(f"--laep-plan {config.plan}: {error}") from error


def complaints_of_model(record: Record, args: Namespace, where: object) -> list[Complaint]:
    """Everything for which the model that the arguments describe is not the one that the record's map
    was made for.

    Also for jobs without ``--laep`` flags that open a pruned checkpoint."""
    hits = refusals.hits(args, {When.MODEL: f"in a model that was pruned ({where})"})
    found = [Complaint(hit.sentence) for hit in hits]
    return found + complaints(lambda: _check_model(record, args, where))


def _check_model(record: Record, args: Namespace, where: object) -> None:
    expert_map = record.lineage.composed
    assert expert_map is not None, "the record is of a model that was not pruned"
    numbers = tuple(moe_layer_numbers(args)) if args.num_experts else ()
    if expert_map.layer_numbers != numbers:
        raise Refusal(
            f"{where} was pruned with MoE layers {list(expert_map.layer_numbers)}, the arguments "
            f"describe MoE layers {list(numbers)}; give the arguments of the job that saved it"
        )
    before = {layer.experts_before for layer in expert_map.layers}
    if before != {args.num_experts}:
        raise Refusal(
            f"{where} was pruned from --num-experts {'/'.join(map(str, sorted(before)))}, got "
            f"--num-experts {args.num_experts}; give the number from before pruning, the map says "
            "how many each layer has now"
        )
    if args.moe_router_topk > min(layer.experts_after for layer in expert_map.layers):
        smallest = min(expert_map.layers, key=lambda layer: layer.experts_after)
        raise Refusal(
            f"--moe-router-topk {args.moe_router_topk}, but layer {smallest.layer_number} of "
            f"{where} keeps {smallest.experts_after} experts; give --moe-router-topk "
            f"{expert_map.top_k} or at most {smallest.experts_after}"
        )
    groups = router_groups(args)
    for layer in expert_map.layers:
        if groups is None:
            break
        try:
            check_kept_groups(layer.kept, layer.experts_before, layer.experts_per_rank, groups)
        except ValueError as error:
            raise Refusal(
                f"--moe-router-num-groups {groups.num_groups}, but layer {layer.layer_number} of {where} "
                f"{error}; give the groups that it was pruned with, or none"
            ) from None
    try:
        layout = expert_map.laid_out_for(args.expert_model_parallel_size)
    except ValueError as error:
        raise Refusal(f"{where}: {error}") from error
    _check_uneven(layout, args, where)


def _check_uneven(layout: ExpertMap, args: Namespace, where: object) -> None:
    """Whether the job can run a model that is laid out so; ``where`` is for messages."""
    for layer in layout.layers:
        # The flex dispatcher has empty slots also where only the layers differ.
        if len(set(layer.experts_per_rank)) > 1 or args.moe_token_dispatcher_type == "flex":
            counts = f"layer {layer.layer_number} has {list(layer.experts_per_rank)} on its ranks"
            _refuse_with_uneven(args, f"{where}: {counts}")


def _refuse_with_uneven(args: Namespace, where: str) -> None:
    ranks = "with different numbers of experts on the expert-parallel ranks"
    _refuse(args, When.UNEVEN, f"{ranks} ({where})")
