"""Checks of a job's arguments, before its model is built, on every rank alike.

Reads Megatron's parsed and validated arguments and what the checkpoint says; touches nothing.
Every complaint is a ``ValueError`` with the flag, what was given, what is wanted and what to do.
"""

import math
from argparse import Namespace
from pathlib import Path

from megatron_laep import planning
from megatron_laep.checkpoint import Record
from megatron_laep.config import AlphaSpec, LaepConfig, check_multiple
from megatron_laep.expert_map import ExpertMap


def moe_layer_numbers(args: Namespace) -> list[int]:
    """Megatron's 1-based numbers of the decoder layers that have experts."""
    pattern = args.moe_layer_freq
    if isinstance(pattern, int):
        pattern = [int(index % pattern == 0) for index in range(args.num_layers)]
    return [index + 1 for index, has_experts in enumerate(pattern) if has_experts]


def check_arguments(args: Namespace, config: LaepConfig) -> None:
    """What must hold for a job that counts and prunes.

    Args:
        args: Megatron's arguments after its own validation.
        config: the LAEP settings, ``config.enabled``.

    Raises:
        ValueError: see the module.
    """
    config.validate()
    _check_supported(args)
    _check_iterations(args, config)
    _check_sizes(args, config)
    if config.plan is None:
        AlphaSpec.parse(config.alpha).check_layers(moe_layer_numbers(args), args.num_layers)
    else:
        read_plan(args, config)
    if args.cuda_graph_impl != "none" and not config.exit_after_prune:
        raise ValueError(
            f"--cuda-graph-impl {args.cuda_graph_impl}: captured graphs cannot be rebuilt inside a "
            "running job; add --laep-exit-after-prune and relaunch the same command after it exits"
        )
    if args.inprocess_restart and not config.exit_after_prune:
        raise ValueError(
            "--inprocess-restart wraps the training function and cannot be combined with a rebuild "
            "inside the job; add --laep-exit-after-prune, or drop --inprocess-restart"
        )


def _check_supported(args: Namespace) -> None:
    if args.num_experts is None:
        raise ValueError(
            "--laep-prune-iteration: the model has no MoE layer (--num-experts is not given), so "
            "there is nothing to prune; remove the --laep flags"
        )
    if args.save is None:
        raise ValueError(
            "--laep-prune-iteration needs --save: the pruning goes through a checkpoint"
        )
    if args.ckpt_format != "torch_dist":
        raise ValueError(
            f"--ckpt-format {args.ckpt_format}: LAEP prunes by loading a resharded checkpoint, which "
            "needs --ckpt-format torch_dist"
        )
    unsupported = {
        "--moe-router-load-balancing-type quantile_balancing": "quantile_balancing"
        in _as_list(args.moe_router_load_balancing_type),
        "--moe-router-num-groups (group-limited routing; its groups are consecutive expert ids)": (
            args.moe_router_num_groups is not None
        ),
        "--moe-router-force-load-balancing (the loads would say nothing)": getattr(
            args, "moe_router_force_load_balancing", False
        ),
        "--moe-enable-routing-replay (recorded expert ids would be stale)": getattr(
            args, "moe_enable_routing_replay", False
        ),
        f"--moe-token-dispatcher-type {args.moe_token_dispatcher_type} (its buffers are sized by "
        "one expert count; use alltoall or allgather)": (
            args.moe_token_dispatcher_type not in ("alltoall", "allgather")
        ),
        "--mtp-num-layers (multi-token prediction layers have experts of their own)": bool(
            args.mtp_num_layers
        ),
        "--hybrid-layer-pattern (hybrid stacks have no config for each layer)": (
            args.hybrid_layer_pattern is not None
        ),
        "--heterogeneous-layers-config-path": args.heterogeneous_layers_config_path is not None,
        "--use-megatron-fsdp": args.use_megatron_fsdp,
        "--use-torch-fsdp2": args.use_torch_fsdp2,
        "--use-layer-wise-distributed-optimizer": getattr(
            args, "use_layer_wise_distributed_optimizer", False
        ),
        "--moe-use-upcycling (upcycle first, then start a LAEP job from the result)": (
            args.moe_use_upcycling
        ),
        "--non-persistent-ckpt-type local": args.non_persistent_ckpt_type == "local",
        "--no-save-optim (the optimizer state would be lost at pruning)": args.no_save_optim,
        "--no-save-rng (the random state would be lost at pruning)": args.no_save_rng,
        f"--rerun-mode {args.rerun_mode} (tokens would be counted once for each rerun)": (
            args.rerun_mode == "report_determinism_stats"
        ),
        "--skip-train": args.skip_train,
        "--perform-rl-step": args.perform_rl_step,
        "--yaml-cfg (the --laep flags would be dropped)": args.yaml_cfg is not None,
    }
    for flag, given in unsupported.items():
        if given:
            raise ValueError(f"{flag} is not supported together with --laep-prune-iteration")


def _check_iterations(args: Namespace, config: LaepConfig) -> None:
    last = args.train_iters
    if last is None and args.rampup_batch_size is None:
        last = args.train_samples // args.global_batch_size
    if last is not None and config.prune_iteration >= last:
        raise ValueError(
            f"--laep-prune-iteration {config.prune_iteration} is not before the end of training "
            f"({last} iterations, from --train-iters or --train-samples): the pruned model would "
            "never be trained"
        )
    start = config.prune_iteration - config.resolved_window()
    for iteration, meaning in ((start, "the window begins"), (config.prune_iteration, "pruning")):
        if iteration in args.iterations_to_skip:
            raise ValueError(
                f"--iterations-to-skip skips iteration {iteration}, after which {meaning}; choose "
                "another --laep-prune-iteration or --laep-window"
            )


def _check_sizes(args: Namespace, config: LaepConfig) -> None:
    size = config.expert_model_parallel_size or args.expert_model_parallel_size
    flag = "--laep-expert-model-parallel-size"
    expert_ranks = args.expert_tensor_parallel_size * size * args.pipeline_model_parallel_size
    if args.world_size % expert_ranks:
        raise ValueError(
            f"{flag} {size}: {args.world_size} ranks do not divide by expert tensor parallel size "
            f"{args.expert_tensor_parallel_size} x expert model parallel size {size} x pipeline "
            f"parallel size {args.pipeline_model_parallel_size} = {expert_ranks}"
        )
    if args.num_experts % size:
        raise ValueError(
            f"{flag} {size} does not divide --num-experts {args.num_experts}; choose a size that "
            "divides it"
        )
    multiple = config.expert_multiple or size
    check_multiple(multiple, size)
    if args.num_experts % multiple:
        raise ValueError(
            f"--laep-expert-multiple {multiple} does not divide --num-experts {args.num_experts}, "
            "so a layer from which nothing is pruned could not be rounded up to it"
        )


def _as_list(value: object) -> list:
    return value if isinstance(value, list) else [value]


def read_plan(args: Namespace, config: LaepConfig) -> ExpertMap:
    """The map of ``--laep-plan``, checked against the job and dated to the pruning iteration."""
    path = Path(config.plan)
    try:
        expert_map = ExpertMap.from_json(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--laep-plan {path}: {error}") from error
    size = config.expert_model_parallel_size or args.expert_model_parallel_size
    try:
        planning.check_plan(
            expert_map,
            layer_numbers=moe_layer_numbers(args),
            num_experts=args.num_experts,
            top_k=args.moe_router_topk,
            expert_parallel_size=size,
        )
    except ValueError as error:
        raise ValueError(f"--laep-plan {path}: {error}") from error
    return expert_map


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
        if record.expert_map.iteration != config.prune_iteration:
            raise ValueError(
                f"{where} was pruned at iteration {record.expert_map.iteration}, but "
                f"--laep-prune-iteration is {config.prune_iteration}; a second pruning is not "
                f"supported: give --laep-prune-iteration {record.expert_map.iteration} to go on"
            )
        return
    if record.iteration >= config.prune_iteration:
        raise ValueError(
            f"{where} is at iteration {record.iteration} and was not pruned, but "
            f"--laep-prune-iteration {config.prune_iteration} is past; choose a later iteration, or "
            "start from an earlier checkpoint with --ckpt-step"
        )
    start = config.prune_iteration - config.resolved_window()
    if record.iteration > start and (record.window is None or record.window.start != start):
        held = "no counts" if record.window is None else f"counts from {record.window.start + 1} on"
        raise ValueError(
            f"the window of --laep-prune-iteration {config.prune_iteration} and --laep-window "
            f"{config.resolved_window()} begins at iteration {start + 1}, but {where} is at "
            f"iteration {record.iteration} and has {held}; use --laep-window "
            f"{config.prune_iteration - record.iteration} or less, or prune later"
        )


def check_model(record: Record, args: Namespace, where: object) -> None:
    """Whether the model that the arguments describe is the one that the record's map was made for.

    Also for jobs without ``--laep`` flags that open a pruned checkpoint.
    """
    expert_map = record.expert_map
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
            f"--moe-router-topk {args.moe_router_topk}, but layer {smallest.layer_number} of {where} "
            f"keeps {smallest.experts_after} experts; give --moe-router-topk {expert_map.top_k} or "
            f"at most {smallest.experts_after}"
        )
    size = args.expert_model_parallel_size
    for layer in expert_map.layers:
        if layer.experts_after % size:
            counts = [layer.experts_after for layer in expert_map.layers]
            raise ValueError(
                f"layer {layer.layer_number} of {where} keeps {layer.experts_after} experts, not "
                f"divisible by expert-model-parallel-size {size}: use a size that divides "
                f"{math.gcd(*counts)}"
            )
