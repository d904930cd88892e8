"""The table of refusals: every row is hit by what it says, alone; all hits at once; the page is the table."""

from __future__ import annotations

from argparse import Namespace

import pytest

from megatron_laep.checks import Refusal
from megatron_laep.mcore import optimizer_kinds, refusals
from megatron_laep.mcore.argument_table import OPTIONAL
from megatron_laep.mcore.unsupported import ROWS, When
from megatron_laep.settings.config import LaepConfig
from tests.support.forks import in_megatron
from tests.support.jobs import assert_complaint, job, parsed
from tests.support.runs import REPOSITORY
from tests.test_architecture import loaded_after

PAGE = REPOSITORY / "docs" / "refusals.md"

# Megatron's arguments of a job that can be pruned, as far as the table reads them.
SOUND = dict(
    ckpt_format="torch_dist",
    cuda_graph_impl="none",
    distrib_optim_fully_reshardable_mem_efficient=False,
    enable_ft_package=False,
    fp8=None,
    fp8_recipe="delayed",
    heterogeneous_layers_config_encoded_json=None,
    heterogeneous_layers_config_path=None,
    micro_batch_size=1,
    num_experts=8,
    seq_length=4,
    inprocess_restart=False,
    moe_pad_expert_input_to_capacity=False,
    moe_router_force_biased=None,
    moe_router_force_load_balancing=False,
    moe_router_load_balancing_type="none",
    moe_token_dispatcher_type="alltoall",
    moe_use_upcycling=False,
    mtp_num_layers=None,
    nccl_ub=False,
    no_save_optim=None,
    no_save_rng=None,
    non_persistent_ckpt_type=None,
    optimizer="adam",
    optimizer_cuda_graph=False,
    perform_rl_step=False,
    pipeline_model_parallel_size=1,
    profile=False,
    profile_step_end=12,
    profile_step_start=8,
    rerun_mode="validate_results",
    save="/checkpoints",
    skip_train=False,
    tp_comm_overlap=False,
    untie_embeddings_and_output_weights=False,
    use_gloo_process_groups=True,
    use_megatron_fsdp=False,
    use_torch_fsdp2=False,
)
PRUNINGS = [4, 10]


@pytest.fixture(autouse=True)
def adaptive_muon_does_not_fit(monkeypatch) -> None:
    """Without asking Megatron, which is not here: `test_optimizer_kinds` does."""
    monkeypatch.setattr(optimizer_kinds, "adaptive_muon_steps", lambda: False)


# What hits a row, by the flag of the row: arguments, and how the sentence names them.
GIVEN = {
    "--ckpt-format {ckpt_format}": ({"ckpt_format": "zarr"}, "--ckpt-format zarr"),
    "--moe-pad-expert-input-to-capacity with --moe-token-dispatcher-type flex": (
        {"moe_pad_expert_input_to_capacity": True, "moe_token_dispatcher_type": "flex"},
        "--moe-pad-expert-input-to-capacity with --moe-token-dispatcher-type flex",
    ),
    "--moe-ncclep-static-shape (or -zero-copy)": (
        {"moe_ncclep_zero_copy": True},
        "--moe-ncclep-static-shape (or -zero-copy)",
    ),
    "--mtp-num-layers {mtp_num_layers} with pipeline stages and tied embeddings": (
        {"mtp_num_layers": 2, "pipeline_model_parallel_size": 4},
        "--mtp-num-layers 2 with pipeline stages and tied embeddings",
    ),
    "--heterogeneous-layers-config-path (or -encoded-json)": (
        {"heterogeneous_layers_config_path": "layers.json"},
        "--heterogeneous-layers-config-path (or -encoded-json)",
    ),
    "--use-megatron-fsdp": ({"use_megatron_fsdp": True}, "--use-megatron-fsdp"),
    "--use-torch-fsdp2": ({"use_torch_fsdp2": True}, "--use-torch-fsdp2"),
    "--tensor-parallel-num-weight-shards (or --expert-tensor-parallel-num-weight-shards)": (
        {"expert_gtp_weight_remat_size": 2},
        "--tensor-parallel-num-weight-shards (or --expert-tensor-parallel-num-weight-shards)",
    ),
    "--cuda-graph-impl {cuda_graph_impl}": (
        {"cuda_graph_impl": "local"},
        "--cuda-graph-impl local",
    ),
    "--flextron": ({"flextron": True}, "--flextron"),
    "--moe-use-upcycling": ({"moe_use_upcycling": True}, "--moe-use-upcycling"),
    "--non-persistent-ckpt-type local": (
        {"non_persistent_ckpt_type": "local"},
        "--non-persistent-ckpt-type local",
    ),
    "--moe-router-force-load-balancing": (
        {"moe_router_force_load_balancing": True},
        "--moe-router-force-load-balancing",
    ),
    "--moe-router-force-biased {moe_router_force_biased}": (
        {"moe_router_force_biased": 0.0},
        "--moe-router-force-biased 0.0",
    ),
    "--moe-router-load-balancing-type quantile_balancing with --num-experts {num_experts}, "
    "--micro-batch-size {micro_batch_size} and --seq-length {seq_length}": (
        {"moe_router_load_balancing_type": "quantile_balancing"},
        "--moe-router-load-balancing-type quantile_balancing with --num-experts 8, --micro-batch-size 1 "
        "and --seq-length 4",
    ),
    "--no-save-optim": ({"no_save_optim": True}, "--no-save-optim"),
    "--no-save-rng": ({"no_save_rng": True}, "--no-save-rng"),
    "--override-ckpt-iteration {override_ckpt_iteration}": (
        {"override_ckpt_iteration": 0},
        "--override-ckpt-iteration 0",
    ),
    "--rerun-mode {rerun_mode}": ({"rerun_mode": "report_stats"}, "--rerun-mode report_stats"),
    "--skip-train": ({"skip_train": True}, "--skip-train"),
    "--perform-rl-step": ({"perform_rl_step": True}, "--perform-rl-step"),
    "--distrib-optim-fully-reshardable-mem-efficient without gloo groups": (
        {
            "distrib_optim_fully_reshardable_mem_efficient": True,
            "use_gloo_process_groups": False,
        },
        "--distrib-optim-fully-reshardable-mem-efficient without gloo groups",
    ),
    "--optimizer-cuda-graph": ({"optimizer_cuda_graph": True}, "--optimizer-cuda-graph"),
    "--optimizer soap": ({"optimizer": "soap"}, "--optimizer soap"),
    "--optimizer adaptive_muon": ({"optimizer": "adaptive_muon"}, "--optimizer adaptive_muon"),
    "--moe-token-dispatcher-type flex": (
        {"moe_token_dispatcher_type": "flex"},
        "--moe-token-dispatcher-type flex",
    ),
    "--tp-comm-overlap": ({"tp_comm_overlap": True}, "--tp-comm-overlap"),
    "--enable-ft-package": ({"enable_ft_package": True}, "--enable-ft-package"),
    "--nccl-ub": ({"nccl_ub": True}, "--nccl-ub"),
    "--fp8-recipe delayed": ({"fp8": "hybrid"}, "--fp8-recipe delayed"),
    "--profile from iteration {profile_step_start} to {profile_step_end}": (
        {"profile": True},
        "--profile from iteration 8 to 12",
    ),
    "--inprocess-restart": ({"inprocess_restart": True}, "--inprocess-restart"),
}


def hits(when: When, **given: object) -> list[refusals.Hit]:
    return refusals.hits(
        Namespace(**(SOUND | given)), {when: "here"}, prunings=PRUNINGS, prune_flag="--prune 4 10"
    )


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.when.name} {row.flag.split()[0]}")
def test_a_row_is_hit_by_its_flag_alone(row):
    assert hits(row.when) == []
    given, named = GIVEN[row.flag]
    (hit,) = hits(row.when, **given)
    assert hit.row is row
    assert hit.sentence.startswith(f"{named} is not supported here: ")
    assert hit.sentence.endswith(f"; {row.remedy}")
    assert "{" not in hit.sentence


def test_every_flag_of_the_table_is_tried_and_no_other():
    assert {row.flag for row in ROWS} == set(GIVEN)


def test_a_profile_is_refused_only_across_a_pruning():
    (hit,) = hits(When.REBUILD, profile=True)
    assert "may come after iteration 10 (--prune 4 10)" in hit.sentence
    assert hits(When.REBUILD, profile=True, profile_step_end=10) == []


def test_arguments_that_this_megatron_lacks_hit_nothing():
    assert not set(OPTIONAL) & set(SOUND)
    assert [hit for when in When for hit in hits(when)] == []


def test_a_job_knows_what_its_exit_would_lift():
    args = Namespace(**(SOUND | {"nccl_ub": True, "no_save_rng": True, "moe_use_upcycling": True}))
    config = LaepConfig(prune_iteration=10)
    found = refusals.hits_of_pruning(args, config, config.legs())
    assert {hit.row.flag.split()[0]: hit.row.lifted for hit in found} == {
        "--moe-use-upcycling": False,
        "--no-save-rng": False,
        "--nccl-ub": True,
    }


def test_several_sentences_are_one_refusal():
    refusals.refuse([])
    with pytest.raises(Refusal, match="^the only one$"):
        refusals.refuse(["the only one"])
    with pytest.raises(Refusal) as raised:
        refusals.refuse(["one", "another"])
    assert str(raised.value) == "2 things are in the way:\n  1. one\n  2. another"


def test_a_job_learns_of_everything_at_once(tmp_path):
    flags = {
        "moe_use_upcycling": True,
        "no_save_rng": True,
        "enable_ft_package": True,
        "laep_prune_iteration": 20,
        "laep_expert_multiple": 3,
    }
    together = "is not supported together with --laep-prune-iteration: "
    wanted = [
        f"1. --moe-use-upcycling {together}",
        f"2. --no-save-rng {together}the random state would be lost at pruning; remove it",
        "--laep-prune-iteration 20 is not before the end of training",
        "--laep-expert-multiple 3 does not divide --num-experts 8",
    ]
    outcome = in_megatron(parsed, job(tmp_path, **flags))
    assert_complaint(
        outcome, "5 things are in the way:", f"3. --enable-ft-package {together}", *wanted
    )
    lifted = in_megatron(parsed, job(tmp_path, **flags, laep_exit_after_prune=True))
    assert_complaint(lifted, "4 things are in the way:", *wanted)
    assert "--enable-ft-package" not in lifted.message


def test_the_page_is_the_table():
    assert PAGE.read_text(encoding="utf-8") == refusals.render(), (
        "python -m megatron_laep.mcore.refusals > docs/refusals.md"
    )


def test_the_page_can_be_written_without_torch():
    loaded = loaded_after("import megatron_laep.mcore.refusals")
    assert "megatron_laep.mcore.unsupported" in loaded
    assert not {module.split(".")[0] for module in loaded} & {"torch", "megatron"}
