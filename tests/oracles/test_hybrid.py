"""Hybrid stacks (`--hybrid-layer-pattern`): counted, pruned, placed and resumed under the stack's own layer numbers.

Oracles 1, 2 and 4, with attention (*), MLP (-) and MoE (E) layers, which run on a CPU over the stand-in of
TransformerEngine (the specs of hybrid stacks have no others), and multi-token prediction behind a slash. Mamba layers
(M) need their kernels: what they do here comes from a stand-in, but what is built, saved and mapped is Megatron's own.
Tolerances as in test_permutation.
"""

import os
from pathlib import Path

import pytest

from megatron_laep import ExpertMap
from megatron_laep.plan.pruning import experts_to_prune
from megatron_laep.records import load_log
from tests.oracles.test_mtp import described, map_of
from tests.oracles.test_permutation import assert_same_run as same_run
from tests.oracles.test_uneven_experts import EXPERTS, ITERATIONS, PRUNE, flags, plan, saved_in
from tests.support.runs import SUPPORT, RunResult, run_batch

pytestmark = [pytest.mark.distributed, pytest.mark.equality]

STANDINS = os.pathsep.join([str(SUPPORT / "te_standin"), str(SUPPORT / "mamba_standin")])
BASE = {
    "num_layers": None,
    "transformer_impl": "transformer_engine",
    "moe_grouped_gemm": True,
    "expert_model_parallel_size": 2,
}
PLAIN = {"hybrid_layer_pattern": "*E-*EE"}
NUMBERS = (2, 5, 6)
MTP = {"hybrid_layer_pattern": "*E-E/*E/*E"}
MTP_NUMBERS = (2, 4, 6, 8)
MAMBA = {
    "hybrid_layer_pattern": "ME*EM",
    "mamba_state_dim": 16,
    "mamba_head_dim": 16,
    "mamba_num_groups": 2,
}
MAMBA_NUMBERS = (2, 4)
ALL = ((17, 7), (1, 23), (24, 0), (12, 12))
KEPT = ((10, 9), (1, 4), (0, 7), (8, 8))
DECIDED = {
    "laep_prune_iteration": PRUNE,
    "laep_alpha": "1.0:1-4,0.8:5-6",
    "laep_beta": 0.3,
    "laep_expert_multiple": 1,
    "laep_record_interval": 1,
    "use_distributed_optimizer": True,
    "bf16": True,
    "moe_router_dtype": "fp32",
}


def mapped(folder: Path, blocks, numbers, **more) -> tuple:
    folder.mkdir()
    blocks = blocks[: len(numbers)]
    (folder / "plan.json").write_text(plan(blocks, layer_numbers=numbers).to_json())
    return True, flags(
        laep_prune_iteration=PRUNE,
        laep_plan=folder / "plan.json",
        laep_allow_empty_ranks=True,
        **BASE,
        **saved_in(folder),
        **more,
    )


def stock(**more) -> tuple:
    return False, flags(**{**BASE, **more})


def masked(folder: Path, map_file: str | Path = "plan.json", **more) -> tuple:
    """Stock Megatron from the checkpoint at the pruning, its experts masked."""
    return False, flags(**{**BASE, "load": folder, "ckpt_step": PRUNE, **more}), folder / map_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hybrid")


@pytest.fixture(scope="module")
def two(folder) -> dict[str, RunResult]:
    decided = folder / "decided"
    again = {**BASE, **PLAIN, **DECIDED, **saved_in(folder / "again"), "save_interval": 2}
    jobs = {}
    for name, pattern, numbers in (
        ("plain", PLAIN, NUMBERS),
        ("MTP", MTP, MTP_NUMBERS),
        ("Mamba", MAMBA, MAMBA_NUMBERS),
    ):
        jobs[f"{name} stock"] = stock(**pattern)
        jobs[f"{name} permuted"] = mapped(folder / f"{name} all", ALL, numbers, **pattern)
        jobs[f"{name} pruned"] = mapped(folder / f"{name} kept", KEPT, numbers, **pattern)
        jobs[f"{name} masked"] = masked(folder / f"{name} kept", **pattern)
    jobs |= {
        "decided": (True, flags(**BASE, **PLAIN, **DECIDED, **saved_in(decided))),
        "masked decided": masked(
            decided,
            map_of(decided),
            **PLAIN,
            **{name: value for name, value in DECIDED.items() if not name.startswith("laep")},
        ),
        # Stopped inside the window, at the pruning, and after it; each time the same command.
        "stopped in the window": (True, flags(**again, exit_interval=2)),
        "stopped at the pruning": (True, flags(**again, laep_exit_after_prune=True)),
        "stopped after the pruning": (True, flags(**again, exit_interval=5)),
        "resumed": (True, flags(**again)),
    }
    return run_batch(jobs, world_size=2, path=STANDINS)


def assert_same_run(run: RunResult, reference: RunResult) -> None:
    same_run(run, reference, prune=PRUNE)
    for iteration, found in reference.exact_losses.items():
        assert run.exact_losses[iteration] == found, iteration


@pytest.mark.parametrize("stack", ["plain", "MTP", "Mamba"])
def test_permuted_equals_uninterrupted(two, stack) -> None:
    assert_same_run(two[f"{stack} permuted"], two[f"{stack} stock"])


@pytest.mark.parametrize("stack", ["plain", "MTP", "Mamba"])
def test_pruned_equals_masked(two, stack) -> None:
    assert_same_run(two[f"{stack} pruned"], two[f"{stack} masked"])


def test_decided_by_its_own_loads(two, folder) -> None:
    expert_map = ExpertMap.from_json(map_of(folder / "decided").read_text())
    assert expert_map.layer_numbers == NUMBERS
    for layer in expert_map.layers:
        alpha = 1.0 if layer.layer_number <= 4 else 0.8
        assert set(layer.pruned) == set(experts_to_prune(layer.loads, alpha=alpha, beta=0.3))
        assert sum(layer.loads) == PRUNE * 4 * 32, "each token once: iterations, batch, sequence"
    log = load_log.read(folder / "decided" / "laep" / "loads-full.bin")
    assert log.layer_numbers == NUMBERS
    assert [tuple(row) for row in log.last(PRUNE)] == [layer.loads for layer in expert_map.layers]
    assert_same_run(two["decided"], two["masked decided"])


def test_the_same_command_goes_on(two) -> None:
    parts = (
        "stopped in the window",
        "stopped at the pruning",
        "stopped after the pruning",
        "resumed",
    )
    ends = [max(two[name].exact) for name in parts]
    assert ends == [2, PRUNE, 5, ITERATIONS]
    assert {i: line for name in parts for i, line in two[name].exact.items()} == two[
        "decided"
    ].exact


def test_inspect_names_the_layers(two, folder) -> None:
    layers = described(folder / "MTP kept" / f"iter_{ITERATIONS:07d}")["layers"]
    assert [layer["layer_number"] for layer in layers] == list(MTP_NUMBERS)
    assert [layer["name"] for layer in layers] == ["decoder", "decoder", "mtp 1.2", "mtp 2.2"]
    assert [layer["experts_in_checkpoint"] for layer in layers] == [sum(row) for row in KEPT]
    layers = described(folder / "plain kept" / f"iter_{PRUNE:07d}")["layers"]
    assert [layer["layer_number"] for layer in layers] == list(NUMBERS)
    assert [layer["experts_in_checkpoint"] for layer in layers] == [EXPERTS] * 3
    assert [layer["experts_in_model"] for layer in layers] == [sum(row) for row in KEPT[:3]]


@pytest.fixture(scope="module")
def four(folder) -> dict[str, RunResult]:
    stages = {"pipeline_model_parallel_size": 2}
    jobs = {}
    for name, pattern, numbers in (
        ("PP", {"hybrid_layer_pattern": "*E-|*E", **stages}, (2, 5)),
        ("VPP", {"hybrid_layer_pattern": "*E|-|E|*E", **stages}, (2, 4, 6)),
    ):
        jobs[f"{name} stock"] = stock(**pattern)
        jobs[f"{name} permuted"] = mapped(folder / f"{name} all", ALL, numbers, **pattern)
        pruned = (KEPT[0], KEPT[1], KEPT[3])
        jobs[f"{name} pruned"] = mapped(folder / f"{name} kept", pruned, numbers, **pattern)
        jobs[f"{name} masked"] = masked(folder / f"{name} kept", **pattern)
    return run_batch(jobs, world_size=4, path=STANDINS)


@pytest.mark.parametrize("layout", ["PP", "VPP"])
def test_pipeline_stages(four, layout) -> None:
    assert_same_run(four[f"{layout} permuted"], four[f"{layout} stock"])
    assert_same_run(four[f"{layout} pruned"], four[f"{layout} masked"])
