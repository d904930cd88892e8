"""The arguments of Megatron that this package reads or sets: every one, once, with why.

Data only; ``symbol_table`` says who uses it. The keys are the names in the parsed namespace, the texts
complete "needed to".
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Optional:
    """An argument that only some supported Megatron have.

    Attributes:
        default: what it means for a job that Megatron lacks it; ``symbols.argument`` returns it.
        why: completes "needed to".
    """

    default: Any
    why: str


# Named by Megatron's parser: attributes of the namespace before it validates them.
PARSED = {
    "async_save": "write the checkpoint with the map synchronously",
    "bf16": "tell whether an upstream bug is at stake",
    "ckpt_assume_constant_structure": "write the checkpoint with the map without a cached plan",
    "ckpt_format": "refuse formats that cannot be read through a map",
    "ckpt_load_validate_sharding_integrity": "leave pruned experts unread",
    "ckpt_step": "find the checkpoint that Megatron would load",
    "cuda_graph_impl": "refuse captured graphs",
    "dist_ckpt_optim_fully_reshardable": "write optimizer state that another model can read",
    "dist_ckpt_strictness": "leave pruned experts unread",
    "distrib_optim_fully_reshardable_mem_efficient": "refuse it without gloo groups",
    "enable_ft_package": "refuse it where the model is rebuilt in the job",
    "exp_avg_dtype": "tell the memory that is freed",
    "exp_avg_sq_dtype": "tell the memory that is freed",
    "expert_model_parallel_size": "place experts on ranks",
    "expert_tensor_parallel_size": "tell how many ranks share an expert",
    "finetune": "tell whether iterations count from 0 again",
    "fp16": "tell whether an upstream bug is at stake",
    "fp8": "refuse delayed scaling where its history would be stale",
    "fp8_recipe": "refuse delayed scaling where its history would be stale",
    "global_batch_size": "tell how many iterations there will be",
    "heterogeneous_layers_config_encoded_json": "refuse a config for each layer",
    "heterogeneous_layers_config_path": "refuse a config for each layer",
    "hybrid_layer_pattern": "tell which layers have experts",
    "inprocess_restart": "refuse it where the model is rebuilt in the job",
    "iterations_to_skip": "refuse to skip an iteration in which something is to happen",
    "load": "find the checkpoint that Megatron would load",
    "log_interval": "log the loads when Megatron logs",
    "main_params_dtype": "tell the memory that is freed",
    "micro_batch_size": "tell how many iterations a batch size schedule has",
    "moe_layer_freq": "tell which layers have experts",
    "moe_pad_expert_input_to_capacity": "refuse it with the flex dispatcher",
    "moe_router_force_biased": "refuse random routing",
    "moe_router_force_load_balancing": "refuse random routing",
    "moe_router_load_balancing_type": "see to it that quantiles can be taken",
    "moe_router_group_topk": "keep groups of experts equal and together",
    "moe_router_num_groups": "keep groups of experts equal and together",
    "moe_router_topk": "keep at least so many experts",
    "moe_token_dispatcher_type": "tell whether layers share buffers",
    "moe_use_upcycling": "refuse upcycling",
    "mtp_num_layers": "tell which layers have experts",
    "mtp_use_repeated_layer": "tell which layers have experts",
    "nccl_ub": "refuse it where the model is rebuilt in the job",
    "no_load_optim": "go on from the job's own checkpoint",
    "no_load_rng": "go on from the job's own checkpoint",
    "muon_scalar_optimizer": "tell the memory that is freed",
    "no_save_optim": "refuse checkpoints that lack the optimizer",
    "no_save_rng": "refuse checkpoints that lack the random state",
    "non_persistent_ckpt_type": "find the checkpoint that Megatron would load",
    "non_persistent_global_ckpt_dir": "find the checkpoint that Megatron would load",
    "non_persistent_save_interval": "write the checkpoint with the map to stay",
    "num_distributed_optimizer_instances": "tell how many ranks share optimizer state",
    "num_experts": "know the experts of the full model",
    "num_layers": "tell which layers have experts",
    "optimizer": "refuse optimizers whose state cannot be saved, and tell the memory that is freed",
    "optimizer_cuda_graph": "refuse captured graphs",
    "overlap_moe_expert_parallel_comm": "refuse it where nothing is left to overlap",
    "perform_rl_step": "refuse what is not pre-training",
    "pipeline_model_parallel_size": "tell how many ranks hold a layer",
    "pretrained_checkpoint": "find the checkpoint that Megatron would load",
    "profile": "refuse a profile across the rebuild",
    "profile_step_end": "refuse a profile across the rebuild",
    "profile_step_start": "refuse a profile across the rebuild",
    "rerun_mode": "refuse to count an iteration twice",
    "save": "write the checkpoint with the map",
    "seq_length": "tell how many iterations a batch size schedule has",
    "sgd_momentum": "tell the memory that is freed",
    "skip_train": "refuse what is not training",
    "step_batch_size_schedule": "tell how many iterations there will be",
    "tensor_model_parallel_size": "count parameters",
    "tp_comm_overlap": "refuse it where the model is rebuilt in the job",
    "train_iters": "tell how many iterations there will be",
    "train_samples": "tell how many iterations there will be",
    "untie_embeddings_and_output_weights": "refuse a model that Megatron cannot save",
    "use_distributed_optimizer": "tell the memory that is freed",
    "use_gloo_process_groups": "refuse what needs them",
    "use_megatron_fsdp": "refuse checkpoints that cannot be read through a map",
    "use_precision_aware_optimizer": "tell the memory that is freed",
    "use_torch_fsdp2": "refuse checkpoints that cannot be read through a map",
    "use_tp_pp_dp_mapping": "refuse sizes that it does not allow",
    "world_size": "tell how many ranks there are",
}

# Worked out by Megatron when it validates them.
VALIDATED = {
    "data_parallel_size": "tell how many iterations a batch size schedule has",
    "use_layer_wise_distributed_optimizer": "tell the memory that is freed",
}

# Set by Megatron while it sets the model up.
RUNNING = {"iteration": "know where the job goes on"}

# Not in every supported Megatron.
OPTIONAL = {
    "expert_gtp_weight_remat_size": Optional(1, "refuse weights that are split further"),
    "gtp_weight_remat_size": Optional(1, "refuse weights that are split further"),
    "moe_ncclep_static_shape": Optional(False, "refuse buffers that layers share"),
    "moe_ncclep_zero_copy": Optional(False, "refuse buffers that layers share"),
    "override_ckpt_iteration": Optional(None, "refuse to set the iteration back"),
    "yaml_cfg": Optional(None, "refuse flags that a YAML file would drop"),
}

# Added to the parser by scripts that come with Megatron-LM.
OF_SCRIPTS = {
    "flextron": Optional(False, "refuse masks that do not find a layer that counts"),
}
