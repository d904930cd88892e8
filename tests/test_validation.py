"""Bad command lines give one clear error before the model is built, good ones none.

The command lines go through Megatron's own parser and validation with the package's hooks in, in
processes that have Megatron (``in_megatron``), up to where a script would build its model.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from distributed import LAEP, PRETRAIN_GPT, REPOSITORY, tiny_arguments
from in_megatron import Outcome, in_megatron, init_process_group, on_ranks

from megatron_laep.expert_map import ExpertMap

LAYERS = (1, 2, 3, 4)
KEPT = {number: (5, 1, 0, 4) for number in LAYERS}
NEEDS_JOB = pytest.mark.xfail(strict=True, reason="waits for a change of megatron_laep/job.py")
CONFIGS = sorted((REPOSITORY / "configs").glob("*.args"))


def expert_map(kept=KEPT, *, iteration=10, ranks=2, experts=8, top_k=2) -> ExpertMap:
    return ExpertMap.from_kept(
        kept, experts_before=experts, expert_parallel_size=ranks, top_k=top_k, iteration=iteration
    )


# -- what runs where Megatron is -------------------------------------------------------------------


def parsed(words: list[str], inside_run: bool = True) -> dict:
    """The job's arguments, as far as JSON goes, once everything about them was checked."""
    import megatron_laep
    from megatron.training.arguments import parse_and_validate_args

    megatron_laep.install()
    sys.argv = ["pretrain_gpt.py", *words]
    args = megatron_laep.run(parse_and_validate_args) if inside_run else parse_and_validate_args()
    return {name: value for name, value in vars(args).items() if isinstance(value, str | int)}


def write_checkpoints(checkpoints: dict[str, dict]) -> None:
    """Real distributed checkpoints of nothing but their common state, by folder.

    Each: iteration, and what its record says, as keywords of Record (the map as JSON); no record
    without ``map_state``. ``legacy`` writes Megatron's format of one file a rank.
    """
    import torch
    from megatron.core import dist_checkpointing

    from megatron_laep.checkpoint import ENTRY, Record
    from megatron_laep.routing_stats import OpenWindow

    init_process_group()
    for folder, content in checkpoints.items():
        iteration = content["iteration"]
        name = "release" if content.get("release") else f"iter_{iteration:07d}"
        path = Path(folder) / name
        path.mkdir(parents=True)
        (path.parent / "latest_checkpointed_iteration.txt").write_text(
            "release" if content.get("release") else str(iteration)
        )
        if content.get("legacy"):
            (path / "mp_rank_00").mkdir()
            torch.save({"iteration": iteration}, path / "mp_rank_00" / "model_optim_rng.pt")
            continue
        state = {"iteration": iteration}
        if "map_state" in content:
            plan, window = content.get("map"), content.get("window")
            state[ENTRY] = Record(
                expert_map=plan and ExpertMap.from_json(plan),
                map_state=content["map_state"],
                window=window and OpenWindow(**window),
            ).to_entry()
        dist_checkpointing.save(state, str(path))


def plan_on_rank_0(tokens_LE: list[list], laep: dict) -> str:
    """What the pruning job makes of loads; the map as JSON. Only rank 0 sees them."""
    from argparse import Namespace
    from types import SimpleNamespace

    import torch

    from megatron_laep.config import LaepConfig
    from megatron_laep.job import Job

    job = Job(LaepConfig(prune_iteration=10, **laep))
    job._stats = SimpleNamespace(layer_numbers=LAYERS[: len(tokens_LE)])
    args = Namespace(
        expert_model_parallel_size=2,
        moe_router_topk=2,
        num_experts=8,
        moe_layer_freq=1,
        num_layers=4,
    )
    seen = tokens_LE if torch.distributed.get_rank() == 0 else None
    return job._plan(seen, 10, args).to_json()


# -- helpers ---------------------------------------------------------------------------------------


def job(tmp_path: Path, **flags: object) -> list[str]:
    """A job of 20 iterations that prunes after 10; `flags` on top, None takes one away."""
    defaults = {"save": tmp_path / "save", "save_interval": 1000, "laep_prune_iteration": 10}
    return tiny_arguments(**(defaults | flags))


def ranks(number: int) -> dict[str, str]:
    return {"WORLD_SIZE": str(number)}


def assert_complaint(outcome: Outcome, *wanted: str) -> None:
    """One ValueError, in whose sentence each of `wanted` stands."""
    assert outcome.error == "ValueError", (outcome.error, outcome.message, outcome.output[-3000:])
    missing = [text for text in wanted if text not in outcome.message]
    assert not missing, f"{missing} not in: {outcome.message}"


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
    "multiple and EP size": (
        {"laep_expert_multiple": 3, "laep_expert_model_parallel_size": 2},
        ["--laep-expert-multiple 3", "expert-model-parallel-size 2"],
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
    "multiple and the EP size that stays": (
        4,
        {"expert_model_parallel_size": 4, "laep_expert_multiple": 2},
        ["--laep-expert-multiple 2", "expert-model-parallel-size 4"],
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
    "optimizer whose chain changes": (
        2,
        {
            "expert_model_parallel_size": 2,
            "laep_expert_model_parallel_size": 1,
            "optimizer": "muon",
        },
        [
            "--optimizer muon",
            "--expert-model-parallel-size 2",
            "--laep-expert-model-parallel-size 1",
        ],
    ),
}


@pytest.mark.parametrize("world_size, flags, wanted", MORE_RANKS.values(), ids=MORE_RANKS)
def test_sizes_that_do_not_go_together(tmp_path, world_size, flags, wanted):
    assert_complaint(in_megatron(parsed, job(tmp_path, **flags), env=ranks(world_size)), *wanted)


# -- what cannot be pruned -------------------------------------------------------------------------

HETEROGENEOUS = json.dumps(
    {
        "hidden_act": "silu",
        "num_hidden_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "tie_word_embeddings": True,
        "rope_theta": 10000,
        "rope_scaling": {"factor": 8.0},
        "block_configs": [{"attention": {"n_heads_in_group": 1}}] * 4,
    }
)
HETEROGENEOUS_FLAGS = {
    "heterogeneous_layers_config_encoded_json": HETEROGENEOUS,
    "group_query_attention": True,
    "num_query_groups": 4,
    "use_rope_scaling": True,
    "use_rotary_position_embeddings": True,
}

UNSUPPORTED = {
    "group-limited routing": (
        {"moe_router_num_groups": 4, "moe_router_group_topk": 2},
        ["--moe-router-num-groups 4"],
    ),
    "quantile balancing": (
        {"moe_router_load_balancing_type": "quantile_balancing"},
        ["--moe-router-load-balancing-type quantile_balancing"],
    ),
    "quantile balancing among others": (
        {
            "moe_router_load_balancing_type": ["seq_aux_loss", "quantile_balancing"],
            "moe_aux_loss_coeff": [1e-3, 1e-3],
        },
        ["--moe-router-load-balancing-type quantile_balancing"],
    ),
    "flex": ({"moe_token_dispatcher_type": "flex"}, ["--moe-token-dispatcher-type flex"]),
    "MTP": ({"mtp_num_layers": 1}, ["--mtp-num-layers 1"]),
    "hybrid": ({"hybrid_layer_pattern": "*E*E"}, ["--hybrid-layer-pattern *E*E"]),
    "hybrid, old name": ({"hybrid_override_pattern": "*E*E"}, ["--hybrid-layer-pattern *E*E"]),
    "heterogeneous": (HETEROGENEOUS_FLAGS, ["--heterogeneous-layers-config-path"]),
    "layer-wise optimizer": (
        {"optimizer": "muon", "use_distributed_optimizer": True},
        ["--optimizer muon"],
    ),
    "upcycling": ({"moe_use_upcycling": True}, ["--moe-use-upcycling"]),
}

NOT_WHILE_PRUNING = {
    "forced balance": (
        {"moe_router_force_load_balancing": True},
        ["--moe-router-force-load-balancing"],
    ),
    "forced bias": ({"moe_router_force_biased": -0.5}, ["--moe-router-force-biased -0.5"]),
    "routing replay": ({"moe_enable_routing_replay": True}, ["--moe-enable-routing-replay"]),
    "no optimizer state": ({"no_save_optim": True}, ["--no-save-optim"]),
    "no random state": ({"no_save_rng": True}, ["--no-save-rng"]),
    "iteration set back": ({"override_ckpt_iteration": 4}, ["--override-ckpt-iteration 4"]),
    "reruns": ({"rerun_mode": "report_stats"}, ["--rerun-mode report_stats"]),
    "no training": ({"skip_train": True}, ["--skip-train"]),
    "no gloo groups": (
        {
            "use_distributed_optimizer": True,
            "disable_gloo_process_groups": True,
            "distrib_optim_fully_reshardable_mem_efficient": True,
        },
        ["--distrib-optim-fully-reshardable-mem-efficient", "--disable-gloo-process-groups"],
    ),
}

ONLY_IN_A_RELAUNCH = {
    "CUDA graphs": ({"cuda_graph_impl": "local"}, ["--cuda-graph-impl local"]),
    "CUDA graphs, old name": ({"enable_cuda_graph": True}, ["--cuda-graph-impl local"]),
    "CUDA graph of the optimizer": ({"optimizer_cuda_graph": True}, ["--optimizer-cuda-graph"]),
    "in-process restart": ({"inprocess_restart": True}, ["--inprocess-restart"]),
}

REFUSED = UNSUPPORTED | NOT_WHILE_PRUNING | ONLY_IN_A_RELAUNCH


@pytest.mark.parametrize("flags, wanted", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_pruned_is_refused(tmp_path, flags, wanted):
    outcome = in_megatron(parsed, job(tmp_path, **flags))
    assert_complaint(outcome, *wanted, "is not supported together with --laep-prune-iteration: ")


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


def test_yaml_does_not_get_past_the_checks(tmp_path):
    """Megatron 0.19 itself cannot run from a YAML file that names flags of later versions only."""
    path = tmp_path / "job.yaml"
    path.write_text("language_model:\n  num_layers: 4\n")
    outcome = in_megatron(parsed, job(tmp_path, yaml_cfg=path))
    assert outcome.error is not None


@NEEDS_JOB
def test_settings_without_a_prune_iteration_are_not_ignored(tmp_path):
    outcome = in_megatron(parsed, job(tmp_path, laep_prune_iteration=None, laep_beta=0.2))
    assert_complaint(outcome, "--laep-beta", "without --laep-prune-iteration")


def test_a_rebuild_needs_run(tmp_path):
    outcome = in_megatron(parsed, job(tmp_path), inside_run=False)
    assert_complaint(outcome, "--laep-exit-after-prune", "megatron_laep.run(main)")
    in_megatron(parsed, job(tmp_path, laep_exit_after_prune=True), inside_run=False).result()


# -- plan files ------------------------------------------------------------------------------------


def other_plans() -> dict[str, tuple[ExpertMap, list[str]]]:
    fewer_layers = {number: KEPT[number] for number in (1, 2, 3)}
    return {
        "layers": (expert_map(fewer_layers), ["[1, 2, 3]", "[1, 2, 3, 4]"]),
        "experts": (expert_map(experts=16), ["16 experts in it", "8 in the model"]),
        "top-k": (expert_map(top_k=1), ["top-k 1", "top-k 2"]),
        "EP size": (expert_map(ranks=4), ["4 expert-parallel ranks", "job has 2"]),
    }


@pytest.mark.parametrize("name", other_plans())
def test_a_plan_for_another_model_is_refused(tmp_path, name):
    plan, wanted = other_plans()[name]
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    words = job(tmp_path, expert_model_parallel_size=2, laep_plan=path)
    assert_complaint(in_megatron(parsed, words, env=ranks(2)), f"--laep-plan {path}", *wanted)


def damaged_plans() -> dict[str, bytes | None]:
    text = expert_map().to_json()
    return {
        "missing": None,
        "empty": b"",
        "cut off": text[: len(text) // 2].encode(),
        "edited": text.replace("0.0", "0.5", 1).encode(),
        "no map": b"[1, 2, 3]",
        "no text": b"\x80\x81\x82",
    }


@pytest.mark.parametrize("name", damaged_plans())
def test_a_damaged_plan_is_refused(tmp_path, name):
    path = tmp_path / "plan.json"
    content = damaged_plans()[name]
    if content is not None:
        path.write_bytes(content)
        assert content != expert_map().to_json().encode()
    words = job(tmp_path, expert_model_parallel_size=2, laep_plan=path)
    assert_complaint(in_megatron(parsed, words, env=ranks(2)), f"--laep-plan {path}: ")


def test_a_fitting_plan_is_accepted(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(expert_map(iteration=3).to_json())
    words = job(tmp_path, expert_model_parallel_size=2, laep_plan=path)
    in_megatron(parsed, words, env=ranks(2)).result()
    # what decides without a plan plays no part with one
    words = job(tmp_path, expert_model_parallel_size=2, laep_plan=path, laep_alpha="0.4:1-2")
    in_megatron(parsed, words, env=ranks(2)).result()


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
    "muon, EP 4 to 2": (
        4,
        {
            "optimizer": "muon",
            "expert_model_parallel_size": 4,
            "laep_expert_model_parallel_size": 2,
        },
    ),
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
    assert args["laep_prune_iteration"] in (150, 2000)


# -- going on from a checkpoint --------------------------------------------------------------------


def window(start: int, end: int) -> dict:
    return {"start": start, "end": end, "tokens_LE": tuple((8,) * 8 for _ in LAYERS)}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """Folders of checkpoints by what they hold, made once; nothing may be written to them."""
    uneven = dict(KEPT) | {2: (0, 2, 4, 6, 1, 3)}
    contents = {
        "foreign": {"iteration": 7},
        "full": {"iteration": 7, "map_state": None},
        "inside": {"iteration": 7, "map_state": None, "window": window(5, 7)},
        "pending": {"iteration": 10, "map_state": "pending", "map": expert_map().to_json()},
        "applied": {"iteration": 15, "map_state": "applied", "map": expert_map().to_json()},
        "uneven": {"iteration": 15, "map_state": "applied", "map": expert_map(uneven).to_json()},
        "legacy": {"iteration": 7, "legacy": True},
        "release": {"iteration": 7, "release": True},
    }
    root = tmp_path_factory.mktemp("checkpoints")
    in_megatron(write_checkpoints, {str(root / name): contents[name] for name in contents}).result()
    return {name: root / name for name in contents}


BAD_STARTS = {
    "past the iteration": (
        "full",
        {"laep_prune_iteration": 5},
        ["iter_0000007", "iteration 7", "--laep-prune-iteration 5"],
    ),
    "at the iteration": (
        "foreign",
        {"laep_prune_iteration": 7},
        ["iteration 7", "not pruned", "--laep-prune-iteration 7"],
    ),
    "no counts": (
        "foreign",
        {"laep_window": 4},
        ["--laep-window 4", "begins at iteration 7", "is at iteration 7", "--laep-window 3 or less"],
    ),
    "counts from later": (
        "inside",
        {"laep_window": 7},
        ["--laep-window 7", "begins at iteration 4", "counts from 6 on", "--laep-window 3"],
    ),
    "counts from earlier": (
        "inside",
        {"laep_window": 4},
        ["--laep-window 4", "begins at iteration 7", "counts from 6 on"],
    ),
    "pruned at another iteration": (
        "applied",
        {"laep_prune_iteration": 12},
        ["pruned at iteration 10", "--laep-prune-iteration is 12", "--laep-prune-iteration 10"],
    ),
    "pending for another iteration": (
        "pending",
        {"laep_prune_iteration": 12},
        ["pruned at iteration 10", "--laep-prune-iteration is 12"],
    ),
}


@pytest.mark.parametrize("name, flags, wanted", BAD_STARTS.values(), ids=BAD_STARTS)
def test_a_checkpoint_that_the_pruning_cannot_go_on_from(
    tmp_path, checkpoints, name, flags, wanted
):
    flags = {"load": checkpoints[name], "expert_model_parallel_size": 2} | flags
    assert_complaint(in_megatron(parsed, job(tmp_path, **flags), env=ranks(2)), *wanted)


STARTS_OVER = {
    "fine-tuning": {"load": "full", "finetune": True},
    "pretrained": {"pretrained_checkpoint": "full", "load": "nothing"},
    "release": {"load": "release"},
}


@NEEDS_JOB
@pytest.mark.parametrize("flags", STARTS_OVER.values(), ids=STARTS_OVER)
def test_a_checkpoint_that_gives_only_its_weights_may_be_late(tmp_path, checkpoints, flags):
    flags = {
        name: value if value is True else checkpoints.get(value, tmp_path / value)
        for name, value in flags.items()
    }
    flags |= {"laep_prune_iteration": 5, "laep_window": 5}
    in_megatron(parsed, job(tmp_path, **flags)).result()


@NEEDS_JOB
def test_a_checkpoint_in_another_format_is_not_taken_for_a_new_start(tmp_path, checkpoints):
    outcome = in_megatron(parsed, job(tmp_path, load=checkpoints["legacy"]))
    assert_complaint(
        outcome,
        "iter_0000007",
        "--ckpt-format torch_dist",
        "--laep-prune-iteration 10",
        "--ckpt-convert-format torch_dist",
    )


@NEEDS_JOB
def test_a_pruned_job_does_without_its_plan_file(tmp_path, checkpoints):
    flags = {"load": checkpoints["applied"], "laep_plan": tmp_path / "gone.json"}
    in_megatron(parsed, job(tmp_path, **flags, expert_model_parallel_size=2), env=ranks(2)).result()


# -> EP size that the job gets
GOOD_STARTS = {
    "fine-tuning from another format": ("legacy", {"finetune": True}, 2),
    "window ahead": ("foreign", {"laep_window": 3}, 2),
    "window open": ("inside", {"laep_window": 5}, 2),
    "no window wanted": ("full", {"laep_prune_iteration": None}, 2),
    "pruned": ("applied", {}, 2),
    "pruned, and no flags": ("applied", {"laep_prune_iteration": None}, 2),
    "pruned, to fewer ranks": ("pending", {"laep_expert_model_parallel_size": 1}, 1),
    "pruned, other rules": ("pending", {"laep_alpha": "0.9", "laep_window": 3}, 2),
}


@pytest.mark.parametrize("name, flags, size", GOOD_STARTS.values(), ids=GOOD_STARTS)
def test_a_checkpoint_that_the_job_can_go_on_from(tmp_path, checkpoints, name, flags, size):
    flags = {"load": checkpoints[name], "expert_model_parallel_size": 2} | flags
    args = in_megatron(parsed, job(tmp_path, **flags), env=ranks(2)).result()
    assert args["expert_model_parallel_size"] == size


BAD_MODELS = {
    "experts": ("applied", {"num_experts": 16}, ["--num-experts 8", "--num-experts 16"]),
    "experts as after pruning": ("applied", {"num_experts": 4}, ["--num-experts 8", "got", "4"]),
    "no experts": (
        "applied",
        {"num_experts": None, "moe_ffn_hidden_size": None, "expert_model_parallel_size": 1},
        ["MoE layers [1, 2, 3, 4]", "MoE layers []"],
    ),
    "layers": ("pending", {"num_layers": 2}, ["MoE layers [1, 2, 3, 4]", "MoE layers [1, 2]"]),
    "dense layers": (
        "applied",
        {"moe_layer_freq": "([0]+[1]*3)"},
        ["MoE layers [1, 2, 3, 4]", "MoE layers [2, 3, 4]"],
    ),
    "EP size": (
        "uneven",
        {"expert_model_parallel_size": 4},
        ["layer 2", "keeps 6 experts", "expert-model-parallel-size 4", "divides 2"],
    ),
    "top-k": (
        "applied",
        {"moe_router_topk": 5},
        ["--moe-router-topk 5", "layer 1", "keeps 4 experts", "--moe-router-topk 2"],
    ),
}


@pytest.mark.parametrize("name, flags, wanted", BAD_MODELS.values(), ids=BAD_MODELS)
def test_a_pruned_checkpoint_wants_its_own_model(tmp_path, checkpoints, name, flags, wanted):
    """Also from a command without LAEP flags."""
    defaults = {
        "load": checkpoints[name],
        "expert_model_parallel_size": 2,
        "laep_prune_iteration": None,
    }
    outcome = in_megatron(parsed, job(tmp_path, **defaults | flags), env=ranks(4))
    assert_complaint(outcome, f"{checkpoints[name]}", *wanted)


@pytest.mark.parametrize("flags, wanted", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_a_pruned_checkpoint_does_not_get_around_the_refusals(
    tmp_path, checkpoints, flags, wanted
):
    flags = {"load": checkpoints["applied"], "laep_prune_iteration": None} | flags
    outcome = in_megatron(parsed, job(tmp_path, **flags))
    assert_complaint(outcome, *wanted, "is not supported", str(checkpoints["applied"]))


# -- loads -----------------------------------------------------------------------------------------

GOOD_ROW = [10, 0, 5, 100, 30, 5, 40, 10]
BAD_LOADS = {
    "NaN": ([*GOOD_ROW[:7], float("nan")], "layer 2: the load of expert 7 is NaN"),
    "negative": ([*GOOD_ROW[:7], -8], "layer 2: the load of expert 7 is negative: -8"),
    "all zero": ([0] * 8, "layer 2: the loads of all 8 experts are zero"),
}


@pytest.mark.parametrize("row, complaint", BAD_LOADS.values(), ids=BAD_LOADS)
def test_bad_loads_stop_every_rank(row, complaint):
    """Rank 0 alone looks at the loads; nobody goes on without it."""
    for outcome in on_ranks(2, plan_on_rank_0, [GOOD_ROW, row], {}):
        assert_complaint(outcome, "pruning at iteration 10: ", complaint)


def test_good_loads_give_every_rank_the_same_plan():
    plans = [outcome.result() for outcome in on_ranks(2, plan_on_rank_0, [GOOD_ROW] * 4, {})]
    assert plans[0] == plans[1]
    assert ExpertMap.from_json(plans[0]).layer(4).pruned == (1, 2)


def test_a_plan_file_that_vanishes_stops_every_rank(tmp_path):
    laep = {"plan": str(tmp_path / "gone.json")}
    for outcome in on_ranks(2, plan_on_rank_0, [GOOD_ROW] * 4, laep):
        assert_complaint(outcome, "pruning at iteration 10: --laep-plan", "gone.json")


# -- a real run ------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_every_rank_of_a_real_run_complains_before_it_begins(tmp_path):
    words = job(tmp_path, expert_model_parallel_size=2, laep_expert_multiple=3)
    environment = dict(
        os.environ,
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29400",  # nobody gets so far as to use it
        MEGATRON_LAEP_PLATFORM="cpu",
        OMP_NUM_THREADS="1",
        CUDA_DEVICE_MAX_CONNECTIONS="1",
    )
    processes = [
        subprocess.Popen(
            [sys.executable, *LAEP, str(PRETRAIN_GPT), *map(str, words)],
            cwd=REPOSITORY,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        logs = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, log in zip(processes, logs, strict=True):
        assert process.returncode != 0
        complaints = [line for line in log.splitlines() if line.startswith("ValueError: ")]
        assert len(complaints) == 1, log[-3000:]
        assert "--laep-expert-multiple 3" in complaints[0]
        assert "expert-model-parallel-size 2" in complaints[0]
        assert "building GPT model" not in log and "iteration        1/" not in log
    assert not (tmp_path / "save").exists()
