"""Checks of a job's arguments, before its model is built, on every rank alike.

Reads Megatron's parsed and validated arguments and what the checkpoint says; touches nothing.
Every complaint is a ``ValueError`` with the flag, what was given, what is wanted and what to do.
"""

import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

from megatron_laep.mcore import optimizer_kinds
from megatron_laep.mcore.checkpoint import Record
from megatron_laep.plan import make_map
from megatron_laep.plan.expert_map import ExpertMap
from megatron_laep.plan.layout import ModelLayout
from megatron_laep.settings.config import LaepConfig
from megatron_laep.settings.rules import AlphaSpec
from megatron_laep.settings.schedule import Leg


def moe_layer_numbers(args: Namespace) -> list[int]:
    """Megatron's 1-based numbers of the decoder layers that have experts."""
    pattern = args.moe_layer_freq
    if isinstance(pattern, int):
        pattern = [int(index % pattern == 0) for index in range(args.num_layers)]
    return [index + 1 for index, has_experts in enumerate(pattern) if has_experts]


def check_arguments(args: Namespace, config: LaepConfig, legs: Sequence[Leg]) -> None:
    """What must hold for a job that counts and prunes.

    Args:
        args: Megatron's arguments after its own validation.
        config: the LAEP settings, ``config.enabled``.
        legs: the prunings that are still to come.

    Raises:
        ValueError: see the module.
    """
    config.validate()
    _check_model_supported(args, "together with --laep-prune-iteration")
    _check_job_supported(args, config, legs)
    _check_iterations(args, legs)
    _check_sizes(args, config)
    if config.plan is None:
        AlphaSpec.parse(config.alpha).check_layers(moe_layer_numbers(args), args.num_layers)


def check_recording(args: Namespace, config: LaepConfig) -> None:
    """What must hold for a job that records its loads, whether it prunes or not."""
    flag = f"--laep-record-interval {config.record_interval}"
    if args.save is None:
        raise ValueError(f"{flag} needs --save: the record goes to SAVE/laep; give --save FOLDER")
    if args.num_experts is None or not moe_layer_numbers(args):
        raise ValueError(
            f"{flag}: the model has no MoE layer, so there are no loads to record; remove the flag"
        )
    if args.hybrid_layer_pattern is not None or args.mtp_num_layers:
        raise ValueError(
            f"{flag} is not supported with --hybrid-layer-pattern or --mtp-num-layers: their layers "
            "would not be told apart; remove the flag"
        )


def _check_model_supported(args: Namespace, situation: str) -> None:
    """Refuses what cannot live with experts that are renumbered, or with layers of uneven counts.

    Args:
        situation: completes "FLAG is not supported ...".
    """
    balancing = args.moe_router_load_balancing_type
    unsupported = [
        (
            args.save is not None and args.ckpt_format != "torch_dist",
            f"--ckpt-format {args.ckpt_format}",
            "experts are pruned, and pruned layers saved, as resharded checkpoints; use "
            "--ckpt-format torch_dist",
        ),
        (
            "quantile_balancing" in (balancing if isinstance(balancing, list) else [balancing]),
            "--moe-router-load-balancing-type quantile_balancing",
            "it wants one expert count for all layers; use another type, or none",
        ),
        (
            args.moe_router_num_groups is not None,
            f"--moe-router-num-groups {args.moe_router_num_groups}",
            "group-limited routing makes its groups of consecutive expert ids, which a renumbering "
            "would mix; route without --moe-router-num-groups and --moe-router-group-topk",
        ),
        (
            args.moe_ncclep_static_shape or args.moe_ncclep_zero_copy,
            "--moe-ncclep-static-shape (or -zero-copy)",
            "its experts write into buffers that layers with different experts cannot share; remove it",
        ),
        (
            bool(args.mtp_num_layers),
            f"--mtp-num-layers {args.mtp_num_layers}",
            "multi-token prediction layers have experts of their own, which would be neither "
            "counted nor pruned; train without them",
        ),
        (
            args.hybrid_layer_pattern is not None,
            f"--hybrid-layer-pattern {args.hybrid_layer_pattern}",
            "a hybrid stack gives all its layers one config; only GPT models can be pruned",
        ),
        (
            args.heterogeneous_layers_config_path is not None
            or args.heterogeneous_layers_config_encoded_json is not None,
            "--heterogeneous-layers-config-path (or -encoded-json)",
            "it takes the place of the config of each layer that the expert counts need; use plain "
            "GPT layers",
        ),
        (
            args.use_megatron_fsdp or args.use_torch_fsdp2,
            "--use-megatron-fsdp" if args.use_megatron_fsdp else "--use-torch-fsdp2",
            "its checkpoints cannot be read through an expert map; use --use-distributed-optimizer",
        ),
        (
            args.gtp_weight_remat_size > 1 or args.expert_gtp_weight_remat_size > 1,
            "--tensor-parallel-num-weight-shards (or --expert-tensor-parallel-num-weight-shards)",
            "weights that are split further cannot be read through an expert map; leave it out",
        ),
        (
            args.cuda_graph_impl != "none",
            f"--cuda-graph-impl {args.cuda_graph_impl}",
            "passes that warm a graph up would be counted, captured graphs cannot be rebuilt inside a "
            "running job, and layers with different experts were never captured; remove it",
        ),
        (
            args.moe_use_upcycling,
            "--moe-use-upcycling",
            "upcycle in a job of its own, and start this one from the result",
        ),
        (
            args.non_persistent_ckpt_type == "local",
            "--non-persistent-ckpt-type local",
            "a local checkpoint carries no expert map; use --non-persistent-ckpt-type global",
        ),
    ]
    _refuse(unsupported, situation)


def _check_job_supported(args: Namespace, config: LaepConfig, legs: Sequence[Leg]) -> None:
    """Refuses jobs in which there is nothing to prune, no way to, or nothing to decide it on."""
    if args.num_experts is None or not moe_layer_numbers(args):
        why = "--num-experts is not given" if args.num_experts is None else "see --moe-layer-freq"
        raise ValueError(
            f"{config.prune_flag}: the model has no MoE layer ({why}), "
            "so there is nothing to prune; remove the --laep flags"
        )
    if args.save is None:
        raise ValueError(
            f"{config.prune_flag} needs --save: the pruning goes "
            "through a checkpoint; give --save FOLDER"
        )
    in_job = not config.exit_after_prune
    prunings = [iteration for leg in legs for iteration in leg.possible_ends]
    profiled = range(args.profile_step_start, args.profile_step_end) if args.profile else ()
    spanned = next((iteration for iteration in prunings if iteration in profiled), None)
    or_relaunch = (
        "remove it, or add --laep-exit-after-prune and relaunch the same command after it exits"
    )
    unsupported = [
        (
            args.moe_router_force_load_balancing,
            "--moe-router-force-load-balancing",
            "random routing says nothing about the experts; remove it",
        ),
        (
            args.moe_router_force_biased is not None,
            f"--moe-router-force-biased {args.moe_router_force_biased}",
            "random biases say nothing about the experts; remove it",
        ),
        (
            args.moe_expert_capacity_factor is not None,
            f"--moe-expert-capacity-factor {args.moe_expert_capacity_factor}",
            "tokens beyond the capacity are dropped before they are counted, so busy experts would "
            "look less busy; remove it",
        ),
        (
            args.moe_enable_routing_replay,
            "--moe-enable-routing-replay",
            "recorded expert ids would be stale after pruning; remove it",
        ),
        (
            bool(args.no_save_optim),
            "--no-save-optim",
            "the optimizer state would be lost at pruning; remove it",
        ),
        (
            bool(args.no_save_rng),
            "--no-save-rng",
            "the random state would be lost at pruning; remove it",
        ),
        (
            args.override_ckpt_iteration is not None,
            f"--override-ckpt-iteration {args.override_ckpt_iteration}",
            "a relaunch would set the iteration back each time, and count tokens twice; remove it",
        ),
        (
            args.rerun_mode not in ("disabled", "validate_results"),
            f"--rerun-mode {args.rerun_mode}",
            "it runs each iteration several times, so tokens would be counted as often; use "
            "disabled or validate_results",
        ),
        (args.skip_train, "--skip-train", "pruning is part of training; remove it"),
        (
            args.perform_rl_step,
            "--perform-rl-step",
            "only pre-training can be pruned; remove the --laep flags",
        ),
        (
            args.distrib_optim_fully_reshardable_mem_efficient and not args.use_gloo_process_groups,
            "--distrib-optim-fully-reshardable-mem-efficient without gloo groups",
            "the pruning writes a fully reshardable checkpoint, which needs them in that mode; "
            "remove one of --distrib-optim-fully-reshardable-mem-efficient and "
            "--disable-gloo-process-groups",
        ),
        (
            args.optimizer_cuda_graph,
            "--optimizer-cuda-graph",
            "a captured graph cannot be rebuilt inside a running job; remove it",
        ),
        *optimizer_kinds.unsupported(args),
        (
            args.moe_token_dispatcher_type == "flex" and in_job,
            "--moe-token-dispatcher-type flex",
            f"the buffers of its kernels are made once in a process; {or_relaunch}",
        ),
        (
            args.tp_comm_overlap and in_job,
            "--tp-comm-overlap",
            f"TransformerEngine's communication buffers cannot be made twice; {or_relaunch}",
        ),
        (
            args.enable_ft_package and in_job,
            "--enable-ft-package",
            f"its client cannot be set up twice in a process; {or_relaunch}",
        ),
        (
            args.nccl_ub and in_job,
            "--nccl-ub",
            f"its memory pools would outlive the groups they are registered with; {or_relaunch}",
        ),
        (
            bool(args.fp8) and args.fp8_recipe == "delayed" and in_job,
            "--fp8-recipe delayed",
            f"TransformerEngine keeps the old model's scaling history; {or_relaunch}",
        ),
        (
            spanned is not None and in_job,
            f"--profile from iteration {args.profile_step_start} to {args.profile_step_end}",
            "a profiler's window cannot span the rebuild, which may come after iteration "
            f"{spanned} ({config.prune_flag}); end it before, or start it after",
        ),
        (
            args.inprocess_restart and in_job,
            "--inprocess-restart",
            f"it wraps the training function, as the rebuild inside the job does; {or_relaunch}",
        ),
    ]
    _refuse(unsupported, "together with --laep-prune-iteration")


def _refuse(unsupported: list[tuple[bool, str, str]], situation: str) -> None:
    """Complains about the first of (is given, flag, reason and remedy) that is given."""
    for given, flag, reason in unsupported:
        if given:
            raise ValueError(f"{flag} is not supported {situation}: {reason}")


def _check_iterations(args: Namespace, legs: Sequence[Leg]) -> None:
    last, flag = _training_iterations(args)
    for leg in legs:
        if leg.end >= last:
            raise ValueError(
                f"--laep-prune-iteration {leg.end} is not before the end of training ({last} "
                f"iterations, from {flag}): the pruned model would never be trained; prune at "
                f"{last - 1} or before, or train longer"
            )
        boundaries = [(start, "a window begins") for start in leg.window_starts]
        for iteration, meaning in (*boundaries, (leg.end, "pruning")):
            if iteration in args.iterations_to_skip:
                raise ValueError(
                    f"--iterations-to-skip skips iteration {iteration}, after which comes {meaning}; "
                    "choose another --laep-prune-iteration or --laep-window"
                )


def _training_iterations(args: Namespace) -> tuple[int, str]:
    """How many iterations the job will have, and the flags that say so; as Megatron's
    ``update_train_iters`` finds out, but that runs only after the arguments were validated."""
    if args.train_iters:
        return args.train_iters, f"--train-iters {args.train_iters}"
    if not args.train_samples:
        raise ValueError(
            "--laep-prune-iteration needs --train-iters or --train-samples, to tell whether the "
            "job gets there"
        )
    flag = f"--train-samples {args.train_samples}"
    if args.step_batch_size_schedule is None:
        iterations = args.train_samples // args.global_batch_size
        return iterations, f"{flag} and --global-batch-size {args.global_batch_size}"
    schedule = StepBatchsizeNumMicroBatchesCalculator(
        micro_batch_size=args.micro_batch_size,
        data_parallel_size=args.data_parallel_size * args.gtp_weight_remat_size,
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


def _check_sizes(args: Namespace, config: LaepConfig) -> None:
    before = args.expert_model_parallel_size
    size, flag = before, "--expert-model-parallel-size"
    if config.expert_model_parallel_size is not None:
        size, flag = config.expert_model_parallel_size, "--laep-expert-model-parallel-size"
    if args.num_experts % size:
        raise ValueError(
            f"{flag} {size} does not divide --num-experts {args.num_experts}; choose a size that "
            "divides it"
        )
    ranks_of_a_model = args.expert_tensor_parallel_size * size * args.pipeline_model_parallel_size
    if args.world_size % ranks_of_a_model:
        raise ValueError(
            f"{flag} {size}: {args.world_size} ranks do not divide by expert tensor parallel size "
            f"{args.expert_tensor_parallel_size} x expert model parallel size {size} x pipeline "
            f"parallel size {args.pipeline_model_parallel_size} = {ranks_of_a_model}; choose a "
            "smaller size"
        )
    multiple = config.expert_multiple or size
    if multiple % size:
        _refuse_with_uneven(args, f"--laep-expert-multiple {multiple}")
    if args.num_experts % multiple:
        raise ValueError(
            f"--laep-expert-multiple {multiple} does not divide --num-experts {args.num_experts}, "
            "so a layer from which nothing is pruned could not be rounded up to it; choose a "
            "multiple that divides it"
        )
    if size != before:
        _check_new_size(args, size, args.world_size // ranks_of_a_model)


def _check_new_size(args: Namespace, size: int, replicas: int) -> None:
    """What Megatron would complain about only in the rebuild, with the pruning behind it."""
    flag = f"--laep-expert-model-parallel-size {size}"
    if replicas % args.num_distributed_optimizer_instances:
        raise ValueError(
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
        raise ValueError(
            f"{flag} leaves {replicas} replicas of each expert and {args.data_parallel_size} of "
            "the other weights, which --use-tp-pp-dp-mapping wants to be equal; remove it, or keep "
            "the size"
        )
    if args.overlap_moe_expert_parallel_comm and size == 1:
        raise ValueError(
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
    path = Path(config.plan)
    if len(prunings) > 1:
        raise ValueError(
            f"--laep-plan {path} is the map of one pruning, and {len(prunings)} are still to come "
            f"(--laep-prune-iteration {' '.join(map(str, prunings))}): give one iteration, and "
            "relaunch with the next iteration and its plan after it, or leave out --laep-plan"
        )
    experts = dict.fromkeys(moe_layer_numbers(args), args.num_experts)
    if present is not None:
        experts = {layer.layer_number: layer.experts_after for layer in present.layers}
    try:
        expert_map = ExpertMap.from_json(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--laep-plan {path}: {error}") from error
    check_plan(expert_map, model_layout(args, config, experts), config)
    _check_uneven(expert_map, args, f"--laep-plan {path}")
    return expert_map


def model_layout(
    args: Namespace,
    config: LaepConfig,
    experts: Mapping[int, int],
    stages: Mapping[int, int] | None = None,
) -> ModelLayout:
    """The model with so many experts in each layer now, and the ranks before and after a pruning."""
    return ModelLayout.of(
        experts,
        top_k=args.moe_router_topk,
        expert_parallel_size_before=args.expert_model_parallel_size,
        expert_parallel_size_after=config.expert_model_parallel_size,
        stages=stages,
    )


def check_plan(expert_map: ExpertMap, layout: ModelLayout, config: LaepConfig) -> None:
    """Whether the map of ``--laep-plan`` fits the model and its ranks."""
    try:
        make_map.check_plan(expert_map, layout, allow_empty_ranks=config.allow_empty_ranks)
    except ValueError as error:
        raise ValueError(f"--laep-plan {config.plan}: {error}") from error


def check_model(record: Record, args: Namespace, where: object) -> None:
    """Whether the model that the arguments describe is the one that the record's map was made for.

    Also for jobs without ``--laep`` flags that open a pruned checkpoint."""
    _check_model_supported(args, f"in a model that was pruned ({where})")
    expert_map = record.lineage.composed
    numbers = tuple(moe_layer_numbers(args)) if args.num_experts else ()
    if expert_map.layer_numbers != numbers:
        raise ValueError(
            f"{where} was pruned with MoE layers {list(expert_map.layer_numbers)}, the arguments "
            f"describe MoE layers {list(numbers)}; give the arguments of the job that saved it"
        )
    before = {layer.experts_before for layer in expert_map.layers}
    if before != {args.num_experts}:
        raise ValueError(
            f"{where} was pruned from --num-experts {'/'.join(map(str, sorted(before)))}, got "
            f"--num-experts {args.num_experts}; give the number from before pruning, the map says "
            "how many each layer has now"
        )
    if args.moe_router_topk > min(layer.experts_after for layer in expert_map.layers):
        smallest = min(expert_map.layers, key=lambda layer: layer.experts_after)
        raise ValueError(
            f"--moe-router-topk {args.moe_router_topk}, but layer {smallest.layer_number} of "
            f"{where} keeps {smallest.experts_after} experts; give --moe-router-topk "
            f"{expert_map.top_k} or at most {smallest.experts_after}"
        )
    try:
        layout = expert_map.laid_out_for(args.expert_model_parallel_size)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    _check_uneven(layout, args, where)


def _check_uneven(layout: ExpertMap, args: Namespace, where: object) -> None:
    """Whether the job can run a model that is laid out so; ``where`` is for messages."""
    for layer in layout.layers:
        # The flex dispatcher has empty slots also where only the layers differ.
        if len(set(layer.experts_per_rank)) > 1 or args.moe_token_dispatcher_type == "flex":
            counts = f"layer {layer.layer_number} has {list(layer.experts_per_rank)} on its ranks"
            _refuse_with_uneven(args, f"{where}: {counts}")


def _refuse_with_uneven(args: Namespace, where: str) -> None:
    _refuse(
        [
            (
                args.moe_pad_expert_input_to_capacity,
                "--moe-pad-expert-input-to-capacity",
                "it sends each rank equally many tokens; remove it",
            ),
            (
                bool(args.fp8) and args.fp8_recipe == "delayed",
                "--fp8-recipe delayed",
                "its scaling history is reduced over ranks that must hold equally many experts; use "
                "another recipe",
            ),
        ],
        f"with different numbers of experts on the expert-parallel ranks ({where})",
    )
