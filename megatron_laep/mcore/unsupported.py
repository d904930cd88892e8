"""What cannot go together with a pruning, a pruned model or a record: a table, one row a refusal.

``refusals`` evaluates it on a job's arguments, and writes it as ``docs/refusals.md``.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from megatron_laep.mcore import optimizer_kinds, symbols


class When(Enum):
    """The jobs that a row is for."""

    MODEL = "Jobs that prune, and jobs whose model was pruned"
    PRUNING = "Jobs that prune"
    REBUILD = "Jobs that prune and go on in the same process"
    UNEVEN = "Models whose expert-parallel ranks hold different numbers of experts"
    RECORD = "Jobs with `--laep-record-interval`"


@dataclass(frozen=True)
class Row:
    """One refusal: ``FLAG is not supported SITUATION: REASON; REMEDY``.

    Attributes:
        when: the jobs that it is for.
        flag: what is refused; ``{name}`` stands for the value of an argument.
        given: (Megatron's arguments after its validation, the iterations at which the job may be
            pruned) -> whether it is given.
        reason: why; ``{spanned}`` stands for the first pruning that a profile goes across, and
            ``{prune_flag}`` for that flag with its values.
        remedy: what to do.
        shown: the same in the page, as Markdown; None is the flag with dots for the value.
    """

    when: When
    flag: str
    given: Callable[[Namespace, Sequence[int]], Any]
    reason: str
    remedy: str
    shown: str | None = None

    @property
    def lifted(self) -> bool:
        """Whether --laep-exit-after-prune lets the job be pruned."""
        return self.when is When.REBUILD


def spanned(args: Namespace, prunings: Sequence[int]) -> int | None:
    """The first iteration with a possible pruning that the job's profile goes across."""
    profiled = range(args.profile_step_start, args.profile_step_end) if args.profile else ()
    return next((iteration for iteration in prunings if iteration in profiled), None)


def _delayed_scaling(args: Namespace, _) -> bool:
    return bool(args.fp8) and args.fp8_recipe == "delayed"


_OR_RELAUNCH = (
    "remove it, or add --laep-exit-after-prune and relaunch the same command after it exits"
)

ROWS = (
    # -- what cannot live with experts that are renumbered, or with layers of uneven counts --------
    Row(
        When.MODEL,
        "--ckpt-format {ckpt_format}",
        lambda args, _: args.save is not None and args.ckpt_format != "torch_dist",
        "experts are pruned, and pruned layers saved, as resharded checkpoints",
        "use --ckpt-format torch_dist",
        shown="`--ckpt-format`, any but `torch_dist`",
    ),
    Row(
        When.MODEL,
        "--moe-pad-expert-input-to-capacity with --moe-token-dispatcher-type flex",
        lambda args, _: (
            args.moe_pad_expert_input_to_capacity and args.moe_token_dispatcher_type == "flex"
        ),
        "its kernels size their buffers by one capacity for equally many experts on all ranks",
        "use --moe-token-dispatcher-type alltoall, or remove the padding",
    ),
    Row(
        When.MODEL,
        "--moe-ncclep-static-shape (or -zero-copy)",
        lambda args, _: (
            symbols.argument(args, "moe_ncclep_static_shape")
            or symbols.argument(args, "moe_ncclep_zero_copy")
        ),
        "its experts write into buffers that layers with different experts cannot share",
        "remove it",
        shown="`--moe-ncclep-static-shape`, `--moe-ncclep-zero-copy`",
    ),
    Row(
        When.MODEL,
        "--heterogeneous-layers-config-path (or -encoded-json)",
        lambda args, _: (
            args.heterogeneous_layers_config_path is not None
            or args.heterogeneous_layers_config_encoded_json is not None
        ),
        "it takes the place of the config of each layer that the expert counts need",
        "use plain GPT layers",
        shown="`--heterogeneous-layers-config-path`, `--heterogeneous-layers-config-encoded-json`",
    ),
    *(
        Row(
            When.MODEL,
            flag,
            given,
            "its checkpoints cannot be read through an expert map",
            "use --use-distributed-optimizer",
        )
        for flag, given in (
            ("--use-megatron-fsdp", lambda args, _: args.use_megatron_fsdp),
            ("--use-torch-fsdp2", lambda args, _: args.use_torch_fsdp2),
        )
    ),
    Row(
        When.MODEL,
        "--tensor-parallel-num-weight-shards (or --expert-tensor-parallel-num-weight-shards)",
        lambda args, _: (
            symbols.argument(args, "gtp_weight_remat_size") > 1
            or symbols.argument(args, "expert_gtp_weight_remat_size") > 1
        ),
        "weights that are split further cannot be read through an expert map",
        "leave it out",
        shown="`--tensor-parallel-num-weight-shards`, `--expert-tensor-parallel-num-weight-shards`",
    ),
    Row(
        When.MODEL,
        "--cuda-graph-impl {cuda_graph_impl}",
        lambda args, _: args.cuda_graph_impl != "none",
        "passes that warm a graph up would be counted, captured graphs cannot be rebuilt inside a "
        "running job, and layers with different experts were never captured",
        "remove it",
        shown="`--cuda-graph-impl`, any but `none`",
    ),
    Row(
        When.MODEL,
        "--flextron",
        lambda args, _: symbols.argument(args, "flextron"),
        "its sub-models are lists of numbers of experts, the same for all layers, and its masks do not find "
        "a layer of a class of its own",
        "prune in a job of its own, before or after",
    ),
    Row(
        When.MODEL,
        "--moe-use-upcycling",
        lambda args, _: args.moe_use_upcycling,
        "experts are made of a dense model while it is loaded",
        "upcycle in a job of its own, and start this one from the result",
    ),
    Row(
        When.MODEL,
        "--non-persistent-ckpt-type local",
        lambda args, _: args.non_persistent_ckpt_type == "local",
        "a local checkpoint carries no expert map",
        "use --non-persistent-ckpt-type global",
    ),
    # -- jobs in which there is no way to prune, or nothing to decide it on ---------------------------
    Row(
        When.PRUNING,
        "--moe-router-force-load-balancing",
        lambda args, _: args.moe_router_force_load_balancing,
        "random routing says nothing about the experts, so there is nothing to prune by",
        "remove it (--laep-record-interval alone records it)",
    ),
    Row(
        When.PRUNING,
        "--moe-router-force-biased {moe_router_force_biased}",
        lambda args, _: args.moe_router_force_biased is not None,
        "random biases say nothing about the experts, so there is nothing to prune by",
        "remove it (--laep-record-interval alone records it)",
    ),
    Row(
        When.PRUNING,
        "--mtp-num-layers {mtp_num_layers} with pipeline stages and tied embeddings",
        lambda args, _: (
            args.mtp_num_layers
            and args.pipeline_model_parallel_size > 1
            and not args.untie_embeddings_and_output_weights
        ),
        "Megatron cannot save such a model, whoever trains it",
        "add --untie-embeddings-and-output-weights",
        shown="`--mtp-num-layers ...` with `--pipeline-model-parallel-size` above 1, without "
        "`--untie-embeddings-and-output-weights`",
    ),
    Row(
        When.PRUNING,
        "--moe-router-load-balancing-type quantile_balancing with --num-experts {num_experts}, "
        "--micro-batch-size {micro_batch_size} and --seq-length {seq_length}",
        lambda args, _: (
            args.moe_router_load_balancing_type == "quantile_balancing"
            and args.num_experts is not None
            and args.micro_batch_size * args.seq_length < args.num_experts
        ),
        "a micro-batch has fewer tokens than experts, so a layer may keep so many that no token is left "
        "to take quantiles of",
        "use a larger --micro-batch-size",
        shown="`--moe-router-load-balancing-type quantile_balancing` with fewer tokens in a "
        "micro-batch than experts",
    ),
    Row(
        When.PRUNING,
        "--no-save-optim",
        lambda args, _: args.no_save_optim,
        "the optimizer state would be lost at pruning",
        "remove it",
    ),
    Row(
        When.PRUNING,
        "--no-save-rng",
        lambda args, _: args.no_save_rng,
        "the random state would be lost at pruning",
        "remove it",
    ),
    Row(
        When.PRUNING,
        "--override-ckpt-iteration {override_ckpt_iteration}",
        lambda args, _: symbols.argument(args, "override_ckpt_iteration") is not None,
        "a relaunch would set the iteration back each time, and count tokens twice",
        "remove it",
    ),
    Row(
        When.PRUNING,
        "--rerun-mode {rerun_mode}",
        lambda args, _: args.rerun_mode not in ("disabled", "validate_results"),
        "it runs each iteration several times, so tokens would be counted as often",
        "use disabled or validate_results",
        shown="`--rerun-mode`, any but `disabled` and `validate_results`",
    ),
    Row(
        When.PRUNING,
        "--skip-train",
        lambda args, _: args.skip_train,
        "pruning is part of training",
        "remove it",
    ),
    Row(
        When.PRUNING,
        "--perform-rl-step",
        lambda args, _: args.perform_rl_step,
        "only pre-training can be pruned",
        "remove the --laep flags",
    ),
    Row(
        When.PRUNING,
        "--distrib-optim-fully-reshardable-mem-efficient without gloo groups",
        lambda args, _: (
            args.distrib_optim_fully_reshardable_mem_efficient and not args.use_gloo_process_groups
        ),
        "the pruning writes a fully reshardable checkpoint, which needs them in that mode",
        "remove one of --distrib-optim-fully-reshardable-mem-efficient and "
        "--disable-gloo-process-groups",
        shown="`--distrib-optim-fully-reshardable-mem-efficient` with "
        "`--disable-gloo-process-groups`",
    ),
    Row(
        When.PRUNING,
        "--optimizer-cuda-graph",
        lambda args, _: args.optimizer_cuda_graph,
        "a captured graph cannot be rebuilt inside a running job",
        "remove it",
    ),
    Row(
        When.PRUNING,
        "--optimizer soap",
        lambda args, _: args.optimizer == "soap",
        "Megatron cannot write SOAP's state into a torch_dist checkpoint, and a pruning goes through "
        "one: the factors of its preconditioner have not the shape of the weight they belong to, and "
        "training itself would end at its first save",
        "use --optimizer muon or adam",
    ),
    Row(
        When.PRUNING,
        "--optimizer adaptive_muon",
        lambda args, _: (
            args.optimizer == "adaptive_muon" and not optimizer_kinds.adaptive_muon_steps()
        ),
        "with the installed package emerging-optimizers Megatron's class of that name cannot take a "
        "step (megatron-core 0.19 was written for 0.2, and sets no scale_mode, which 0.3 reads)",
        "install emerging-optimizers 0.2, or use --optimizer muon",
        shown="`--optimizer adaptive_muon` with a package emerging-optimizers that does not fit",
    ),
    # -- what cannot be made twice in a process -------------------------------------------------------
    Row(
        When.REBUILD,
        "--moe-token-dispatcher-type flex",
        lambda args, _: args.moe_token_dispatcher_type == "flex",
        "the buffers of its kernels are made once in a process",
        _OR_RELAUNCH,
    ),
    Row(
        When.REBUILD,
        "--tp-comm-overlap",
        lambda args, _: args.tp_comm_overlap,
        "TransformerEngine's communication buffers cannot be made twice",
        _OR_RELAUNCH,
    ),
    Row(
        When.REBUILD,
        "--enable-ft-package",
        lambda args, _: args.enable_ft_package,
        "its client cannot be set up twice in a process",
        _OR_RELAUNCH,
    ),
    Row(
        When.REBUILD,
        "--nccl-ub",
        lambda args, _: args.nccl_ub,
        "its memory pools would outlive the groups they are registered with",
        _OR_RELAUNCH,
    ),
    Row(
        When.REBUILD,
        "--fp8-recipe delayed",
        _delayed_scaling,
        "TransformerEngine keeps the old model's scaling history",
        _OR_RELAUNCH,
    ),
    Row(
        When.REBUILD,
        "--profile from iteration {profile_step_start} to {profile_step_end}",
        lambda args, prunings: spanned(args, prunings) is not None,
        "a profiler's window cannot span the rebuild, which may come after iteration {spanned} "
        "({prune_flag})",
        "end it before, or start it after",
        shown="`--profile` across an iteration at which the job may be pruned",
    ),
    Row(
        When.REBUILD,
        "--inprocess-restart",
        lambda args, _: args.inprocess_restart,
        "it wraps the training function, as the rebuild inside the job does",
        _OR_RELAUNCH,
    ),
    # -- ranks with different numbers of experts ------------------------------------------------------
    Row(
        When.UNEVEN,
        "--fp8-recipe delayed",
        _delayed_scaling,
        "its scaling history is reduced over ranks that must hold equally many experts",
        "use another recipe",
    ),
    # -- records --------------------------------------------------------------------------------------
    Row(
        When.RECORD,
        "--flextron",
        lambda args, _: symbols.argument(args, "flextron"),
        "its masks do not find a layer of a class of its own, one that counts",
        "remove --laep-record-interval",
    ),
)
