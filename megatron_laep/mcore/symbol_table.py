"""What this package reads, wraps or replaces of Megatron: every symbol, once, with why.

Data only, and nothing of Megatron is imported here: ``symbols`` probes the table in a running process,
``scripts/check_seams.py`` in a source tree. ``tests/mcore/test_symbols.py`` holds it equal to what the
sources of this package use. ``argument_table`` is the same for arguments.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Symbol:
    """One attribute of one of Megatron's modules or classes.

    Attributes:
        target: ``"package.module:attribute"`` or ``"package.module:Class.attribute"``. What a method
            of the class sets on its objects is an attribute of the class here.
        why: what it is needed for; completes "needed to".
        takes: of a function or class: the parameters that this package gives it, or that the
            replacement of it expects, as in a ``def``: the leading ones in their order, behind a
            ``*`` those that are given by name.
        exactly: there must be no parameter beside those.
        looks_up: of a function or method: names that its body must look up, or texts that it must
            contain, each time it runs; a hook on one of them would never be called otherwise. Names
            with a ``|`` between them are those of different versions: ``symbols.looked_up`` tells
            which it is. One with a ``?`` behind it may be missing in the module.
        optional: some supported Megatron lack it, with the feature that it belongs to; a hook on it
            is left out there.
        probed_by: the module that asks for it itself, since not every job needs it: ``cpu.platform``
            when it is enabled, ``mcore.optimizer_kinds`` of jobs with that optimizer,
            ``mcore.upstream_bugs``, which then cannot tell whether there is
            something to repair. Empty: every job needs it.
    """

    target: str
    why: str
    takes: str = ""
    exactly: bool = False
    looks_up: str = ""
    optional: bool = False
    probed_by: str = ""


def _members(owner: str, members: dict[str, str]) -> tuple[Symbol, ...]:
    return tuple(Symbol(f"{owner}.{name}", why) for name, why in members.items())


_CORE = "megatron.core"
_CPU = "cpu.platform"
_LOOP = "megatron.training.training"
_SAVES = "megatron.training.checkpointing"
_MAPPING = f"{_CORE}.dist_checkpointing.mapping"
_HYBRID = f"{_CORE}.models.hybrid.hybrid_block"
_MTP = f"{_CORE}.transformer.multi_token_prediction"
_MOE_LAYER = f"{_CORE}.transformer.moe.moe_layer"
_DISPATCHER = f"{_CORE}.transformer.moe.token_dispatcher"
_DISPATCHERS = (
    "MoEAllGatherTokenDispatcher",
    "MoEAlltoAllTokenDispatcher",
    "MoEFlexTokenDispatcher",
)
_CONFIG = f"{_CORE}.transformer.transformer_config:TransformerConfig"
_BUFFER = f"{_CORE}.distributed.param_and_grad_buffer"
_DISTRIBUTED_OPTIMIZER = f"{_CORE}.optimizer.distrib_optimizer:DistributedOptimizer"

_SAVED_STEP = (
    "iteration, model, optimizer, opt_param_scheduler, num_floating_point_operations_so_far, "
    "checkpointing_context"
)

# -- replaced in the training loop: loop_hooks says by what -------------------------------------------

HOOKED = (
    Symbol(
        "megatron.training.arguments:add_megatron_arguments",
        "show the --laep flags; scripts own their extra_args_provider",
        takes="parser",
    ),
    Symbol(
        "megatron.training.arguments:parse_args",
        "refuse --laep flags that a YAML file would drop",
        looks_up="add_megatron_arguments",
    ),
    Symbol(
        "megatron.training.arguments:validate_args",
        "find the checkpoint's map before the groups and the model are built",
        takes="args",
    ),
    Symbol(
        f"{_CORE}.models.gpt.moe_module_specs:MoELayer",
        "put the counting layer into every GPT layer spec",
    ),
    Symbol(
        f"{_CORE}.transformer.transformer_block:TransformerBlock._build_layers",
        "give each layer its own experts, whoever made the config",
        takes="self",
        exactly=True,
        looks_up="heterogeneous_block_specs, get_config_for_layer",
    ),
    Symbol(
        f"{_HYBRID}:HybridStack.__init__",
        "put the counting layer into hybrid stacks, whose spec is made at import",
        takes="self, config, submodules",
        looks_up="moe_layer",
    ),
    Symbol(
        f"{_CORE}.transformer.transformer_layer:TransformerLayer.__init__",
        "give each layer of a hybrid stack its own experts: the stack asks for no config by layer",
        takes="self, config, submodules, layer_number, *, add_layer_offset",
    ),
    Symbol(
        f"{_MTP}:MultiTokenPredictionLayer.__init__",
        "tell the layers of multi-token prediction from the decoder's, and give them their experts",
        takes="self, config, submodules, layer_number, vp_stage, *, mtp_layer_pattern",
    ),
    Symbol(
        f"{_LOOP}:load_checkpoint",
        "load through the map",
        takes="ddp_model, optimizer, opt_param_scheduler",
    ),
    Symbol(
        f"{_SAVES}:generate_state_dict", "put the map into the checkpoint", takes="*, iteration"
    ),
    Symbol(
        f"{_SAVES}:_build_sharded_state_dict_metadata",
        "write the checkpoint with the map with one key for each layer",
    ),
    Symbol(
        f"{_LOOP}:setup_model_and_optimizer",
        "agree on the map before the model is built, and start counting after",
        looks_up="load_checkpoint",
    ),
    Symbol(
        f"{_LOOP}:training_log",
        "log the loads at the log interval",
        takes="loss_dict, total_loss_dict, learning_rate, iteration",
        looks_up="report_theoretical_memory",
    ),
    Symbol(
        f"{_LOOP}:report_theoretical_memory",
        "not print a memory estimate that is wrong for uneven layers",
    ),
    Symbol(
        f"{_LOOP}:checkpoint_and_decide_exit",
        "act at the end of an iteration, where Megatron saves",
        takes="model, optimizer, opt_param_scheduler, iteration, "
        "num_floating_point_operations_so_far, checkpointing_context, train_data_iterator",
        exactly=True,
    ),
    Symbol(
        f"{_CORE}.distributed.finalize_model_grads:_update_router_expert_bias",
        "update expert biases of layers with different expert counts",
        takes="model",
    ),
    Symbol(
        f"{_CORE}.distributed.finalize_model_grads:_update_router_qb_beta",
        "update quantile balancing's biases of layers with different expert counts",
        takes="model",
        optional=True,
    ),
    Symbol(
        f"{_CORE}.transformer.moe.router:qb_dual_update",
        "take quantiles in layers whose experts do not divide the tokens",
        takes="scores, k, beta, update_beta",
        exactly=True,
        optional=True,
    ),
    Symbol(
        f"{_CORE}.transformer.moe.router:apply_router_token_dropping",
        "count what the router chose, and not what a capacity factor leaves of it",
        takes="routing_probs, routing_map",
    ),
)

# -- whoever calls what is replaced: a hook is only called where its name is looked up ---------------

CALLERS = (
    Symbol(
        "megatron.training.arguments:parse_and_validate_args",
        "have the hooked functions called for every script",
        looks_up="parse_args, validate_args",
    ),
    Symbol(
        f"{_CORE}.models.gpt.moe_module_specs:get_moe_module_spec_for_backend",
        "have the counting layer in the spec",
        looks_up="MoELayer",
    ),
    Symbol(
        f"{_CORE}.transformer.transformer_block:TransformerBlock.__init__",
        "have each layer built with its own experts",
        looks_up="_build_layers",
    ),
    Symbol(
        f"{_CORE}.transformer.transformer_block:TransformerBlock.sharded_state_dict",
        "have layers of different experts saved with one key each",
        looks_up="non_homogeneous_layers, heterogeneous_block_specs",
    ),
    Symbol(
        f"{_LOOP}:pretrain", "have the model agreed on", looks_up="setup_model_and_optimizer, train"
    ),
    Symbol(
        f"{_LOOP}:train",
        "have every iteration end in the hook",
        looks_up="training_log, checkpoint_and_decide_exit",
    ),
    Symbol(
        f"{_SAVES}:save_checkpoint",
        "have the map in every checkpoint",
        looks_up="generate_state_dict, _build_sharded_state_dict_metadata",
    ),
    Symbol(
        f"{_SAVES}:_load_global_dist_base_checkpoint",
        "adapt optimizer state while it is loaded",
        looks_up="dist_checkpointing, load",
    ),
    Symbol(
        f"{_CORE}.dist_checkpointing.serialization:load",
        "adapt groups and scalars of the optimizer before they are used",
        looks_up="load_common_state_dict | load_common",
    ),
    Symbol(
        f"{_CORE}.dist_checkpointing.strategies.torch:mcore_to_pyt_state_dict",
        "leave pruned experts unread where there is one rank",
        looks_up="sharded_tensor_to_torch_sharded_tensor",
    ),
    Symbol(
        f"{_CORE}.distributed.finalize_model_grads:finalize_model_grads",
        "have expert biases updated by the hooks",
        looks_up="_update_router_expert_bias, _update_router_qb_beta?",
    ),
    Symbol(
        f"{_CORE}.transformer.moe.router:TopKRouter.routing",
        "have the router's choice noted before tokens are dropped",
        looks_up="apply_router_token_dropping",
    ),
    Symbol(
        f"{_CORE}.transformer.moe.router:TopKRouter.quantile_balancing",
        "have quantiles taken by the hook",
        looks_up="qb_dual_update",
        optional=True,
    ),
    # Whoever sets on parameters what is read of them.
    Symbol(
        f"{_CORE}.tensor_parallel.layers:set_tensor_model_parallel_attributes",
        "count parameters that are split over ranks",
        looks_up="tensor_model_parallel",
    ),
    Symbol(
        f"{_CORE}.models.common.language_module.language_module"
        ":LanguageModule.setup_embeddings_and_output_layer",
        "count the embeddings of the last stage once",
        looks_up="shared",
    ),
    Symbol(
        f"{_BUFFER}:_ParamAndGradBuffer.__init__",
        "tell the memory of gradients",
        looks_up="main_grad",
    ),
)

# -- called and read ---------------------------------------------------------------------------------

USED = (
    Symbol("megatron.training:get_args", "read the job's arguments inside the loop"),
    Symbol("megatron.training.global_vars:get_tensorboard_writer", "write the loads' metrics"),
    Symbol("megatron.training.global_vars:get_wandb_writer", "write the loads' metrics"),
    Symbol(
        f"{_LOOP}:save_checkpoint_and_time",
        "write the checkpoint with the map in an iteration in which Megatron saves none",
        takes=f"{_SAVED_STEP}, *, train_data_iterator",
    ),
    Symbol(f"{_LOOP}:destroy_global_state", "run the script again in the same process"),
    Symbol(
        "megatron.training.async_utils:maybe_finalize_async_save",
        "complete earlier checkpoints before the one with the map",
        takes="*, blocking",
    ),
    Symbol(f"{_SAVES}:checkpoint_exists", "find the checkpoint that Megatron would load"),
    Symbol(
        f"{_SAVES}:get_checkpoint_name",
        "find the checkpoint that Megatron would load",
        takes="checkpoints_path, iteration, release, *, return_base_dir",
    ),
    Symbol(f"{_SAVES}:get_checkpoint_tracker_filename", "refuse an empty tracker file"),
    Symbol(f"{_SAVES}:_NON_PERSISTENT_CKPT_SUBDIR", "find non-persistent checkpoints"),
    Symbol(
        f"{_CORE}.dist_checkpointing:load",
        "adapt optimizer state while it is loaded",
        takes="sharded_state_dict, checkpoint_dir",
    ),
    Symbol(
        f"{_CORE}.dist_checkpointing:check_is_distributed_checkpoint",
        "read the map before the model is built",
    ),
    Symbol(
        f"{_CORE}.dist_checkpointing:load_common_state_dict",
        "read the map before the model is built",
    ),
    Symbol(
        f"{_CORE}.dist_checkpointing.dict_utils:dict_list_map_inplace",
        "place the parts of a factory's tensors",
    ),
    Symbol(
        f"{_CORE}.dist_checkpointing.strategies.torch:sharded_tensor_to_torch_sharded_tensor",
        "leave pruned experts unread where there is one rank",
    ),
    Symbol(
        f"{_MAPPING}:ShardedObject",
        "place extra states",
        takes="*, key, global_shape, global_offset",
    ),
    Symbol(
        f"{_MAPPING}:ShardedTensor",
        "place expert weights",
        takes="*, key, data, local_shape, global_shape, global_offset, axis_fragmentations, "
        "replica_id",
    ),
    Symbol(
        f"{_MAPPING}:ShardedTensor.from_rank_offsets",
        "read the router's rows one by one",
        takes="key, data, *, replica_id",
    ),
    Symbol(
        f"{_MAPPING}:ShardedTensorFactory",
        "place gated weights, and read the router's rows one by one",
        takes="*, key, data, build_fn, merge_fn, replica_id",
    ),
    Symbol(
        f"{_CORE}.optimizer.optimizer:param_group_identifier_keys", "tell parameter groups apart"
    ),
    Symbol(f"{_DISTRIBUTED_OPTIMIZER}.buffers", "take the padding off"),
    *_members(
        f"{_BUFFER}:_ParamAndGradBuffer",
        {"buckets": "take the padding off", "param_index_map": "take the padding off"},
    ),
    *_members(
        f"{_BUFFER}:_ParamAndGradBucket",
        {"offset": "take the padding off", "numel_unpadded": "take the padding off"},
    ),
    Symbol(
        f"{_CORE}.num_microbatches_calculator:StepBatchsizeNumMicroBatchesCalculator",
        "tell how many iterations a batch size schedule has",
        takes="*, micro_batch_size, data_parallel_size, decrease_batch_size_if_needed, rank, "
        "schedule, seq_length",
    ),
    Symbol(
        f"{_CORE}.parallel_state:get_expert_model_parallel_world_size",
        "lay the map out for the ranks that the job has",
    ),
    Symbol(f"{_CORE}.parallel_state:get_pipeline_model_parallel_group", "add the stages up"),
    Symbol(f"{_CORE}.parallel_state:get_pipeline_model_parallel_rank", "tell a layer's stage"),
    Symbol(f"{_CORE}.parallel_state:_global_process_group_list", "destroy the old job's groups"),
    Symbol("torch.distributed.distributed_c10d:_world.pg_map", "destroy the old job's groups"),
    Symbol(f"{_CORE}.process_groups_config:ProcessGroupCollection.ep", "know a rank's experts"),
    Symbol(f"{_CORE}.utils:get_model_config", "let go of the old model"),
    Symbol(
        f"{_CORE}.distributed:DistributedDataParallel.disable_forward_pre_hook",
        "let go of the old model",
        takes="self, *, param_sync",
    ),
    *_members(
        f"{_CORE}.distributed:DistributedDataParallel",
        {
            "grad_accs": "let go of the old model",
            "remove_forward_pre_hook_handles": "let go of the old model",
        },
    ),
    *_members(
        _CONFIG,
        {
            "num_moe_experts": "give each layer its own experts",
            "moe_router_topk": "count the tokens that a rank sends",
            "moe_token_dispatcher_type": "build the dispatcher for unequal counts",
            "moe_pad_expert_input_to_capacity": "pad unequal counts to capacity",
            "moe_flex_dispatcher_backend": "mark empty slots for each of its back ends",
            "heterogeneous_block_specs": "give each layer its own experts",
            "grad_scale_func": "let go of the old model",
            "no_sync_func": "let go of the old model",
            "grad_sync_func": "let go of the old model",
            "param_sync_func": "let go of the old model",
            "finalize_model_grads_func": "let go of the old model",
        },
    ),
    Symbol(
        f"{_CONFIG}.num_layers", "number the layers of multi-token prediction after the decoder's"
    ),
    Symbol(
        f"{_HYBRID}:HybridStackSubmodules",
        "put the counting layer into hybrid stacks",
        takes="*, moe_layer",
    ),
    Symbol(
        f"{_MTP}:get_mtp_layer_offset",
        "number the layers of multi-token prediction after the decoder's",
        takes="config, vp_stage",
    ),
    Symbol(f"{_CORE}.transformer.module:MegatronModule", "stand for a rank without experts"),
    Symbol(f"{_CORE}.transformer.moe.moe_utils:get_default_pg_collection", "know a rank's experts"),
    Symbol(
        f"{_MOE_LAYER}:MoELayer.__init__",
        "hold unequal counts",
        takes="self, config, submodules, layer_number, pg_collection",
        looks_up="router, experts, token_dispatcher",
    ),
    Symbol(f"{_MOE_LAYER}:MoELayer.route", "count each layer's tokens"),
    Symbol(
        f"{_MOE_LAYER}:MoELayer.sharded_state_dict",
        "place a layer's tensors",
        takes="self, prefix, sharded_offsets, metadata",
        exactly=True,
    ),
    *_members(
        f"{_MOE_LAYER}:MoELayer",
        {
            "config": "give the layer its own number of experts",
            "submodules": "give the layer its own number of experts",
            "layer_number": "name the layer",
            "ep_group": "know a rank's experts",
            "router": "count parameters",
            "experts": "count parameters",
            "num_local_experts": "hold unequal counts",
            "local_expert_indices": "hold unequal counts",
            "token_dispatcher": "hold unequal counts, and let go of the old model",
            "shared_experts": "give them to the dispatcher",
            "shared_expert_overlap": "give shared experts to the dispatcher",
        },
    ),
    Symbol(
        f"{_MOE_LAYER}:MoESubmodules",
        "give the router and the experts the layer's own counts",
        takes="*, router, experts",
    ),
    *(
        Symbol(
            f"{_DISPATCHER}:{name}.__init__",
            "send tokens to unequal counts",
            takes="self, num_local_experts, local_expert_indices, *, config, pg_collection",
        )
        for name in _DISPATCHERS
    ),
    *(
        Symbol(f"{_DISPATCHER}:{name}.set_shared_experts", "overlap shared experts")
        for name in _DISPATCHERS
    ),
    Symbol(
        f"{_DISPATCHER}:MoEAlltoAllTokenDispatcher.preprocess",
        "send tokens to unequal counts",
        takes="self, routing_map",
        exactly=True,
    ),
    Symbol(
        f"{_DISPATCHER}:MoEAlltoAllTokenDispatcher.num_out_tokens",
        "count the tokens that a rank sends",
    ),
    *(
        Symbol(f"{_DISPATCHER}:MoEAlltoAllTokenDispatcher.{name}", "pad unequal counts to capacity")
        for name in "drop_and_pad capacity num_experts num_local_experts input_splits".split()
        + "output_splits tp_size ep_size".split()
    ),
    Symbol(
        f"{_DISPATCHER}:MoEAllGatherTokenDispatcher.dispatch_postprocess",
        "take part without experts",
        takes="self, hidden_states, probs",
        exactly=True,
    ),
    Symbol(f"{_DISPATCHER}:MoEAllGatherTokenDispatcher.routing_map", "take part without experts"),
    Symbol(
        f"{_DISPATCHER}:MoEFlexTokenDispatcher._initialize_metadata",
        "send tokens to unequal counts",
        takes="self, routing_map, probs",
        exactly=True,
    ),
    Symbol(
        f"{_DISPATCHER}:MoEFlexTokenDispatcher.dispatch_postprocess",
        "send tokens to unequal counts",
        takes="self, hidden_states, probs",
        exactly=True,
    ),
    Symbol(
        f"{_CORE}.transformer.moe.router:TopKRouter.expert_bias",
        "update expert biases of layers with different expert counts",
    ),
    Symbol(
        f"{_CORE}.transformer.moe.router:TopKRouter.qb_beta",
        "update quantile balancing's biases of layers with different expert counts",
        optional=True,
    ),
    Symbol(
        f"{_CORE}.transformer.moe.router_replay:RouterReplay.clear_global_router_replay_instances",
        "forget the old model's routers",
    ),
    Symbol(
        f"{_CORE}.optimizer.emerging_optimizers:TensorParallelAdaptiveMuon",
        "refuse one that cannot take a step",
        probed_by="mcore.optimizer_kinds",
    ),
)

# -- repaired where it is wrong: upstream_bugs says how that is found out ------------------------------

REPAIRED = (
    Symbol(
        f"{_DISTRIBUTED_OPTIMIZER}.sharded_param_state_fully_reshardable",
        "cut optimizer state out of the right places of padded gradient buffers",
        probed_by="mcore.upstream_bugs",
    ),
    Symbol(
        f"{_DISTRIBUTED_OPTIMIZER}.sharded_state_dict",
        "have the padding taken off",
        looks_up="sharded_param_state_fully_reshardable",
        probed_by="mcore.upstream_bugs",
    ),
    Symbol(
        f"{_DISTRIBUTED_OPTIMIZER}.load_parameter_state_from_dp_reshardable",
        "load the state of fp32 parameters",
        probed_by="mcore.upstream_bugs",
    ),
    Symbol(
        f"{_CORE}.optimizer:_get_megatron_optimizer_based_on_param_groups",
        "load the momentum of SGD",
        takes="config",
        probed_by="mcore.upstream_bugs",
    ),
    Symbol(
        f"{_CORE}.optimizer.optimizer:MegatronOptimizer.init_state_fn",
        "load the momentum of SGD",
        probed_by="mcore.upstream_bugs",
    ),
)

# -- the CPU platform ---------------------------------------------------------------------------------

ON_CPU = (
    Symbol(f"{_CORE}.datasets.utils:compile_helpers", "do without make", probed_by=_CPU),
    Symbol(f"{_CORE}.optimizer:Adam", "count steps in groups", probed_by=_CPU),
    Symbol(f"{_CORE}.optimizer:USING_PYTORCH_OPTIMIZER", "count steps in groups", probed_by=_CPU),
    Symbol(f"{_CORE}.optimizer.distrib_optimizer:Adam", "count steps in groups", probed_by=_CPU),
    Symbol(f"{_CORE}.optimizer.distrib_optimizer:HAVE_APEX_OR_TE", "count steps", probed_by=_CPU),
    Symbol(
        f"{_CORE}.optimizer.distrib_optimizer:USING_TE_OPTIMIZER", "count steps", probed_by=_CPU
    ),
    Symbol(
        f"{_CORE}.tensor_parallel.random:CudaRNGStatesTracker.fork",
        "drop a warning about the generator",
        looks_up="CPU RNG state changed within GPU RNG context",
        probed_by=_CPU,
    ),
    Symbol(
        f"{_CORE}.transformer.torch_norm:WrappedTorchNorm.__new__",
        "have norms under sequence parallelism",
        takes="cls, config, hidden_size, eps",
        probed_by=_CPU,
    ),
    *(
        Symbol(f"{_CONFIG}.{name}", "have norms under sequence parallelism", probed_by=_CPU)
        for name in "sequence_parallel layernorm_zero_centered_gamma persist_layer_norm normalization".split()
    ),
)

SYMBOLS: tuple[Symbol, ...] = HOOKED + CALLERS + USED + REPAIRED + ON_CPU
