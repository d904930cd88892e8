"""Bad command lines give one clear error before the model is built, good ones none."""

import json
import shlex
import sys
from pathlib import Path

import pytest

from tests.support.forks import in_megatron
from tests.support.jobs import UNSUPPORTED, assert_complaint, job, parsed, ranks
from tests.support.runs import REPOSITORY, tiny_arguments

CONFIGS = sorted((REPOSITORY / "configs").glob("*.args"))


# -- what is asked of the flags --------------------------------------------------------------------

BAD_FLAGS = {
    "alpha negative": ({"laep_alpha": -0.4}, ["--laep-alpha -0.4", ">= 0", "got -0.4"]),
    "alpha NaN": ({"laep_alpha": "nan"}, ["--laep-alpha nan", "got nan"]),
    "alpha NaN in a range": ({"laep_alpha": "nan:1-4"}, ["--laep-alpha nan:1-4", "got nan"]),
    "alpha junk": ({"laep_alpha": "much"}, ["--laep-alpha 'much'", "not a number"]),
    "alpha layer beyond": ({"laep_alpha": "0.4:1-5"}, ["--laep-alpha", "layer 5", "4 layers"]),
    "alpha layer missing": (
        {"laep_alpha": "0.4:1-3"},
        ["--laep-alpha has no range for MoE layer 4", "0.4:1-3"],
    ),
    "alpha MTP layer missing": (
        {"mtp_num_layers": 2, "laep_alpha": "0.4:1-5"},
        ["--laep-alpha has no range for MoE layer 6", "layer 5 is mtp 1, 6 is mtp 2"],
    ),
    "alpha layer beyond MTP": (
        {"mtp_num_layers": 1, "laep_alpha": "0.4:1-6"},
        ["--laep-alpha", "layer 6", "5 layers", "layer 5 is mtp 1"],
    ),
    "alpha layer twice": ({"laep_alpha": "0.4:1-3,0.2:3-4"}, ["--laep-alpha", "layer 3"]),
    "alpha layer 0": ({"laep_alpha": "0.4:0-4"}, ["--laep-alpha", "count from 1"]),
    "beta above": ({"laep_beta": 1.5}, ["--laep-beta", "within 0 and 1", "got 1.5"]),
    "beta below": ({"laep_beta": -0.1}, ["--laep-beta", "within 0 and 1", "got -0.1"]),
    "beta NaN": ({"laep_beta": "nan"}, ["--laep-beta", "within 0 and 1", "got nan"]),
    "iteration 0": ({"laep_prune_iteration": 0}, ["--laep-prune-iteration", "at least 1", "got 0"]),
    "iteration negative": (
        {"laep_prune_iteration": -5},
        ["--laep-prune-iteration", "at least 1", "got -5"],
    ),
    "iteration at the end": (
        {"laep_prune_iteration": 20},
        ["--laep-prune-iteration 20", "20 iterations", "--train-iters 20", "prune at 19"],
    ),
    "iteration beyond the end": (
        {"laep_prune_iteration": 21},
        ["--laep-prune-iteration 21", "20 iterations", "--train-iters 20"],
    ),
    "iteration beyond the samples": (
        {"train_iters": None, "train_samples": 87},
        ["--laep-prune-iteration 10", "10 iterations", "--train-samples 87", "-size 8"],
    ),
    # a flag that Megatron 0.19 still takes, and does not use
    "iteration beyond the samples, ramp-up": (
        {"train_iters": None, "train_samples": 87, "rampup_batch_size": [8, 8, 100]},
        ["--laep-prune-iteration 10", "10 iterations", "--train-samples 87"],
    ),
    # 2 iterations of 8, then 5 of 16: 96 of 95 samples
    "iteration beyond a batch size schedule": (
        {
            "train_iters": None,
            "train_samples": 95,
            "global_batch_size": None,
            "step_batch_size_schedule": "0:8 1024:16",
            "laep_prune_iteration": 7,
        },
        ["--laep-prune-iteration 7", "7 iterations", "--step-batch-size-schedule 0:8 1024:16"],
    ),
    "no end": ({"train_iters": None}, ["--train-iters or --train-samples"]),
    "iteration skipped": (
        {"iterations_to_skip": [4, 10]},
        ["--iterations-to-skip", "iteration 10", "pruning"],
    ),
    "window's start skipped": (
        {"laep_window": 6, "iterations_to_skip": 4},
        ["--iterations-to-skip", "iteration 4", "window"],
    ),
    "window 0": ({"laep_window": 0}, ["--laep-window", "at least 1", "got 0"]),
    "window too long": (
        {"laep_window": 11},
        ["--laep-window 11", "10 iterations", "--laep-prune-iteration"],
    ),
    "no save": ({"save": None}, ["--laep-prune-iteration 10", "--save"]),
    "format": ({"ckpt_format": "torch"}, ["--ckpt-format torch ", "--ckpt-format torch_dist"]),
    "no experts": (
        {"num_experts": None, "moe_ffn_hidden_size": None},
        ["no MoE layer", "--num-experts"],
    ),
    "only dense layers": ({"moe_layer_freq": "([0]*4)"}, ["no MoE layer", "--moe-layer-freq"]),
    "EP size and experts": (
        {"laep_expert_model_parallel_size": 3},
        ["--laep-expert-model-parallel-size 3", "--num-experts 8"],
    ),
    "EP size and ranks": (
        {"laep_expert_model_parallel_size": 4},
        ["--laep-expert-model-parallel-size 4", "1 ranks", "= 4"],
    ),
    "multiple and experts": (
        {"laep_expert_multiple": 3},
        ["--laep-expert-multiple 3", "--num-experts 8"],
    ),
    "multiple too large": (
        {"laep_expert_multiple": 16},
        ["--laep-expert-multiple 16", "--num-experts 8"],
    ),
}


@pytest.mark.parametrize("flags, wanted", BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_a_bad_flag_is_named_with_both_values(tmp_path, flags, wanted):
    assert_complaint(in_megatron(parsed, job(tmp_path, **flags)), *wanted)
    assert not (tmp_path / "save").exists()


MORE_RANKS = {
    "EP size and ranks": (
        2,
        {"laep_expert_model_parallel_size": 4},
        ["--laep-expert-model-parallel-size 4", "2 ranks", "= 4"],
    ),
    "EP size, pipeline and ranks": (
        4,
        {"laep_expert_model_parallel_size": 4, "pipeline_model_parallel_size": 2},
        ["--laep-expert-model-parallel-size 4", "4 ranks", "pipeline parallel size 2 = 8"],
    ),
    "optimizer instances": (
        4,
        {
            "expert_model_parallel_size": 2,
            "laep_expert_model_parallel_size": 4,
            "use_distributed_optimizer": True,
            "num_distributed_optimizer_instances": 2,
        },
        [
            "--laep-expert-model-parallel-size 4",
            "1 replicas",
            "--num-distributed-optimizer-instances 2",
        ],
    ),
    "mapping": (
        4,
        {
            "pipeline_model_parallel_size": 2,
            "use_tp_pp_dp_mapping": True,
            "laep_expert_model_parallel_size": 2,
        },
        ["--laep-expert-model-parallel-size 2", "1 replicas", "2 of", "--use-tp-pp-dp-mapping"],
    ),
    "overlap without expert parallelism": (
        2,
        {
            "expert_model_parallel_size": 2,
            "laep_expert_model_parallel_size": 1,
            "overlap_moe_expert_parallel_comm": True,
        },
        ["--laep-expert-model-parallel-size 1", "--overlap-moe-expert-parallel-comm"],
    ),
}


@pytest.mark.parametrize("world_size, flags, wanted", MORE_RANKS.values(), ids=MORE_RANKS)
def test_sizes_that_do_not_go_together(tmp_path, world_size, flags, wanted):
    assert_complaint(in_megatron(parsed, job(tmp_path, **flags), env=ranks(world_size)), *wanted)


# -- what cannot be pruned -------------------------------------------------------------------------

NOT_WHILE_PRUNING = {
    "forced balance": (
        {"moe_router_force_load_balancing": True},
        ["--moe-router-force-load-balancing"],
    ),
    "forced bias": ({"moe_router_force_biased": -0.5}, ["--moe-router-force-biased -0.5"]),
    "quantiles of too few tokens": (
        {
            "moe_router_load_balancing_type": "quantile_balancing",
            "micro_batch_size": 1,
            "seq_length": 4,
        },
        ["--num-experts 8, --micro-batch-size 1 and --seq-length 4"],
    ),
    "no optimizer state": ({"no_save_optim": True}, ["--no-save-optim"]),
    "no random state": ({"no_save_rng": True}, ["--no-save-rng"]),
    "iteration set back": ({"override_ckpt_iteration": 4}, ["--override-ckpt-iteration 4"]),
    "reruns": ({"rerun_mode": "report_stats"}, ["--rerun-mode report_stats"]),
    "no training": ({"skip_train": True}, ["--skip-train"]),
    "reinforcement learning": (
        {"perform_rl_step": True, "save_interval": 1024, "eval_interval": 1024},
        ["--perform-rl-step"],
    ),
    "no gloo groups": (
        {
            "use_distributed_optimizer": True,
            "disable_gloo_process_groups": True,
            "distrib_optim_fully_reshardable_mem_efficient": True,
        },
        ["--distrib-optim-fully-reshardable-mem-efficient", "--disable-gloo-process-groups"],
    ),
    "CUDA graphs": ({"cuda_graph_impl": "local"}, ["--cuda-graph-impl local"]),
    "CUDA graphs, old name": ({"enable_cuda_graph": True}, ["--cuda-graph-impl local"]),
    "CUDA graph of the optimizer": ({"optimizer_cuda_graph": True}, ["--optimizer-cuda-graph"]),
    "SOAP": ({"optimizer": "soap"}, ["--optimizer soap", "torch_dist", "use --optimizer muon"]),
    "a profile across the pruning": (
        {"profile": True, "profile_step_start": 4, "profile_step_end": 12},
        ["--profile from iteration 4 to 12", "--laep-prune-iteration 10"],
    ),
}

ONLY_WITH_EQUAL_COUNTS = {
    "fp8 history": (
        {"fp8_format": "hybrid", "fp8_recipe": "delayed", "laep_exit_after_prune": True},
        ["--fp8-recipe delayed"],
    ),
}

ONLY_IN_A_RELAUNCH = {
    "flex": ({"moe_token_dispatcher_type": "flex"}, ["--moe-token-dispatcher-type flex"]),
    "in-process restart": ({"inprocess_restart": True}, ["--inprocess-restart"]),
    "fault tolerance": ({"enable_ft_package": True}, ["--enable-ft-package"]),
}

REFUSED = UNSUPPORTED | NOT_WHILE_PRUNING | ONLY_IN_A_RELAUNCH


@pytest.mark.parametrize("flags, wanted", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_pruned_is_refused(tmp_path, flags, wanted):
    outcome = in_megatron(parsed, job(tmp_path, **flags))
    assert_complaint(outcome, *wanted, "is not supported together with --laep-prune-iteration: ")


ANY_ROUTING = {
    "dropping": {"moe_expert_capacity_factor": 1.0},
    "padding": {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True},
    "quantiles": {"moe_router_load_balancing_type": "quantile_balancing"},
    # Megatron balances no quantiles then.
    "quantiles in a list": {
        "moe_router_load_balancing_type": ["seq_aux_loss", "quantile_balancing"],
        "moe_aux_loss_coeff": [1e-3, 1e-3],
    },
    "replay": {"moe_enable_routing_replay": True},
}


@pytest.mark.parametrize("flags", ANY_ROUTING.values(), ids=ANY_ROUTING)
def test_how_tokens_are_routed_does_not_matter(tmp_path, flags):
    """`tests/oracles/test_routing.py` runs such jobs."""
    uneven = {"expert_model_parallel_size": 2, "laep_expert_multiple": 1}
    in_megatron(parsed, job(tmp_path, **flags, **uneven), env=ranks(2)).result()


HYBRID = {
    "its name": {"hybrid_layer_pattern": "*E-E/*E/*E"},
    "its older names": {
        "hybrid_override_pattern": "*E-E",
        "mtp_hybrid_override_pattern": "*E",
        "mtp_num_layers": 2,
    },
}


@pytest.mark.parametrize("flags", HYBRID.values(), ids=HYBRID)
def test_hybrid_stacks_are_pruned_under_their_own_numbers(tmp_path, flags):
    """`tests/oracles/test_hybrid.py` runs such jobs."""
    named = {"laep_alpha": "0.4:1-4,0.2:5-8"}
    args = in_megatron(parsed, job(tmp_path, **flags, **named)).result()
    assert args["hybrid_layer_pattern"] == "*E-E/*E/*E" and args["num_layers"] == 4
    outcome = in_megatron(parsed, job(tmp_path, **flags, laep_alpha="0.4:1-4"))
    assert_complaint(outcome, "--laep-alpha", "layer 6 is mtp 1.2, 8 is mtp 2.2")


def test_a_hybrid_stack_without_experts_has_nothing_to_prune(tmp_path):
    outcome = in_megatron(parsed, job(tmp_path, hybrid_layer_pattern="*-*-"))
    assert_complaint(outcome, "the model has no MoE layer (see --hybrid-layer-pattern)")


FORCED = [{"moe_router_force_load_balancing": True}, {"moe_router_force_biased": -0.5}]


@pytest.mark.parametrize("flags", FORCED, ids=["balance", "bias"])
def test_forced_routing_is_recorded_all_the_same(tmp_path, flags):
    recording = job(tmp_path, laep_prune_iteration=None, laep_record_interval=5, **flags)
    in_megatron(parsed, recording).result()


@pytest.mark.parametrize(
    "flags, wanted", ONLY_WITH_EQUAL_COUNTS.values(), ids=ONLY_WITH_EQUAL_COUNTS
)
def test_some_jobs_need_equal_counts(tmp_path, flags, wanted):
    in_megatron(parsed, job(tmp_path, **flags)).result()
    uneven = {"expert_model_parallel_size": 2, "laep_expert_multiple": 1}
    outcome = in_megatron(parsed, job(tmp_path, **flags, **uneven), env=ranks(2))
    assert_complaint(outcome, *wanted, "different numbers of experts on the expert-parallel ranks")


@pytest.mark.parametrize("flags, _", ONLY_IN_A_RELAUNCH.values(), ids=ONLY_IN_A_RELAUNCH)
def test_some_jobs_can_be_pruned_if_they_are_relaunched(tmp_path, flags, _):
    in_megatron(parsed, job(tmp_path, **flags, laep_exit_after_prune=True)).result()


def test_fsdp_is_refused(tmp_path):
    flags = {
        "use_torch_fsdp2": True,
        "untie_embeddings_and_output_weights": True,
    }
    # Megatron wants this variable to differ where FSDP is on.
    outcome = in_megatron(parsed, job(tmp_path, **flags), env={"CUDA_DEVICE_MAX_CONNECTIONS": "8"})
    assert_complaint(outcome, "--use-torch-fsdp2 is not supported")


def test_finely_split_weights_are_refused(tmp_path):
    flags = {"tensor_parallel_num_weight_shards": 2}
    outcome = in_megatron(parsed, job(tmp_path, **flags), env=ranks(2))
    assert_complaint(outcome, "--tensor-parallel-num-weight-shards", "is not supported")


def test_mtp_with_tied_embeddings_and_a_pipeline_is_refused(tmp_path):
    flags = {"mtp_num_layers": 1, "pipeline_model_parallel_size": 2}
    outcome = in_megatron(parsed, job(tmp_path, **flags), env=ranks(2))
    assert_complaint(outcome, "--mtp-num-layers 1", "tied", "--untie-embeddings-and-output-weights")
    flags |= {"untie_embeddings_and_output_weights": True}
    in_megatron(parsed, job(tmp_path, **flags), env=ranks(2)).result()


def parsed_from_yaml(words: list[str], path: str, more: list[str]) -> None:
    """The same job from a YAML file, which makes Megatron forget the command line."""
    import dataclasses

    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.training.arguments import parse_and_validate_args, parse_args

    import megatron_laep

    sys.argv = ["pretrain_gpt.py", *words]
    plain = (str, int, bool, float, list, type(None))
    values = {k: v for k, v in vars(parse_args()).items() if type(v) in plain}
    # Megatron's YAML keeps the fields of these two classes in sections of their own.
    parallel = {field.name for field in dataclasses.fields(ModelParallelConfig)}
    model = {field.name for field in dataclasses.fields(TransformerConfig)} - parallel
    model -= {name for name in model if name.startswith("account_for_")}
    content = {k: v for k, v in values.items() if k not in parallel | model}
    content |= {
        "model_parallel": {k: v for k, v in values.items() if k in parallel}
        | {"variable_seq_lengths": False, "params_dtype": "float32", "gtp_weight_remat_size": 1},
        "language_model": {k: v for k, v in values.items() if k in model}
        | {"num_moe_experts": 8, "activation_func": "swiglu"},
    }
    Path(path).write_text(json.dumps(content))  # which is YAML, too
    megatron_laep.install()
    sys.argv = ["pretrain_gpt.py", "--yaml-cfg", path, *more]
    megatron_laep.run(parse_and_validate_args)


def test_a_yaml_file_does_not_drop_the_flags(tmp_path):
    words, path = job(tmp_path, laep_prune_iteration=None), str(tmp_path / "job.yaml")
    in_megatron(parsed_from_yaml, words, path, []).result()
    outcome = in_megatron(parsed_from_yaml, words, path, ["--laep-prune-iteration", "10"])
    assert_complaint(outcome, "--yaml-cfg", "--laep-prune-iteration")


def test_settings_without_a_prune_iteration_are_not_ignored(tmp_path):
    outcome = in_megatron(parsed, job(tmp_path, laep_prune_iteration=None, laep_beta=0.2))
    assert_complaint(outcome, "--laep-beta", "without --laep-prune-iteration")


def test_a_rebuild_needs_run(tmp_path):
    outcome = in_megatron(parsed, job(tmp_path), inside_run=False)
    assert_complaint(outcome, "--laep-exit-after-prune", "megatron_laep.run(main)")
    in_megatron(parsed, job(tmp_path, laep_exit_after_prune=True), inside_run=False).result()


# -- how many iterations there will be -------------------------------------------------------------


def iterations_by_both(words: list[str]) -> tuple[int, int]:
    """What the checks think, and what Megatron finds later."""
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.training import update_train_iters

    from megatron_laep.mcore.arguments import _training_iterations

    sys.argv = ["pretrain_gpt.py", *words]
    args = parse_and_validate_args()
    ours, _ = _training_iterations(args)
    update_train_iters(args)
    return ours, args.train_iters


@pytest.mark.parametrize("samples", [8, 16, 17, 32, 95, 96, 97, 400, 401])
def test_the_end_of_a_batch_size_schedule(tmp_path, samples):
    schedule = "0:8 1024:16 2048:24 20K:8"
    words = tiny_arguments(
        train_iters=None,
        train_samples=samples,
        global_batch_size=None,
        step_batch_size_schedule=schedule,
    )
    ours, megatrons = in_megatron(iterations_by_both, words).result()
    assert ours == megatrons


# -- jobs that are fine ----------------------------------------------------------------------------

# DeepSeek's shape, smaller: the first layers dense, latent attention, shared experts, biases.
DEEPSEEK = {
    "num_layers": 8,
    "moe_layer_freq": "([0]*3+[1]*5)",
    "num_experts": 64,
    "moe_router_topk": 8,
    "moe_shared_expert_intermediate_size": 64,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_router_dtype": "fp32",
    "moe_router_load_balancing_type": "seq_aux_loss",
    "moe_aux_loss_coeff": 1e-4,
    "multi_latent_attention": True,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "expert_model_parallel_size": 4,
    "pipeline_model_parallel_size": 2,
    "use_distributed_optimizer": True,
    "global_batch_size": 32,
    "recompute_granularity": "selective",
    "laep_alpha": "0.2:4-5,0.4:6-8",
    "laep_expert_model_parallel_size": 2,
}

FINE = {
    "the defaults": (1, {}),
    "no LAEP": (1, {"laep_prune_iteration": None, "save": None, "ckpt_format": "torch"}),
    "last iteration but one": (1, {"laep_prune_iteration": 19, "laep_window": 19}),
    "samples": (1, {"train_iters": None, "train_samples": 88}),
    # 2 iterations of 8, then 6 of 16: 112 of 97 samples
    "batch size schedule": (
        1,
        {
            "train_iters": None,
            "train_samples": 97,
            "global_batch_size": None,
            "step_batch_size_schedule": "0:8 1024:16",
            "laep_prune_iteration": 7,
        },
    ),
    "schedule by iterations": (
        1,
        {"global_batch_size": None, "step_batch_size_schedule": "0:8 1024:16"},
    ),
    "alpha of layers, dense ones left out": (
        1,
        {"moe_layer_freq": "([0,1]*2)", "laep_alpha": "inf:2,0:4"},
    ),
    "multi-token prediction": (1, {"mtp_num_layers": 2, "laep_alpha": "0.4:1-4,0:5-6"}),
    "every second layer": (1, {"moe_layer_freq": 2, "laep_alpha": "0.4:1,0.4:3-4"}),
    "several losses": (
        1,
        {
            "moe_router_load_balancing_type": ["seq_aux_loss", "global_aux_loss"],
            "moe_aux_loss_coeff": [1e-3, 1e-4],
        },
    ),
    "allgather": (1, {"moe_token_dispatcher_type": "allgather"}),
    "skipping elsewhere": (1, {"laep_window": 5, "iterations_to_skip": [4, 6, 11]}),
    "EP 2 to 1": (2, {"expert_model_parallel_size": 2, "laep_expert_model_parallel_size": 1}),
    "EP 1 to 2": (2, {"laep_expert_model_parallel_size": 2}),
    "global temporary checkpoints": (
        1,
        {"non_persistent_ckpt_type": "global", "non_persistent_save_interval": 2},
    ),
    "asynchronous saves": (1, {"async_save": True, "use_persistent_ckpt_worker": True}),
    "like DeepSeek": (16, DEEPSEEK),
}


@pytest.mark.parametrize("world_size, flags", FINE.values(), ids=FINE)
def test_good_jobs_are_not_refused(tmp_path, world_size, flags):
    args = in_megatron(parsed, job(tmp_path, **flags), env=ranks(world_size)).result()
    assert args["world_size"] == world_size


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configs_are_not_refused(tmp_path, path):
    words = shlex.split(path.read_text(), comments=True)
    words += ["--mock-data", "--save", str(tmp_path), "--save-interval", "50"]
    words += ["--tokenizer-type", "NullTokenizer", "--vocab-size", "257"]
    for flag, value in (("--train-iters", "300"), ("--laep-prune-iteration", "150")):
        words += [] if flag in words else [flag, value]
    size = words[words.index("--expert-model-parallel-size") + 1]
    args = in_megatron(parsed, words, env={"WORLD_SIZE": size}).result()
    assert args["laep_prune_iteration"] in ([150], [2000])
