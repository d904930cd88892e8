"""Hybrid stacks (`--hybrid-layer-pattern`): counted, pruned, placed and resumed under the stack's own layer numbers.

Oracles 1 to 4. Attention (*), MLP (-) and MoE (E) layers run on a CPU over the stand-in of TransformerEngine, since the
specs of hybrid stacks have no local layers. Mamba layers (M) need their kernels: what they compute here comes from a
stand-in (`tests/support/mamba_standin`), but what is built, saved and mapped is Megatron's own. Tolerances as in
test_permutation.
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
from tests.support import maps
from tests.support.failures import Failure
from tests.support.forks import in_megatron
from tests.support.runs import LAEP, SUPPORT, RunResult, run_batch, run_megatron

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
# Two modules of multi-token prediction behind the stack: layers 5 and 6, 7 and 8.
MTP = {"hybrid_layer_pattern": "*E-E/*E/*E"}
MTP_NUMBERS = (2, 4, 6, 8)
# Nemotron 3, made small.
NEMOTRON = {
    "hybrid_layer_pattern": "ME*EM/*E/*E",
    "mamba_state_dim": 16,
    "mamba_head_dim": 16,
    "mamba_num_groups": 2,
    "position_embedding_type": "none",
    "swiglu": False,
    "squared_relu": True,
    "group_query_attention": True,
    "num_query_groups": 2,
    "untie_embeddings_and_output_weights": True,
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.01,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_shared_expert_intermediate_size": 48,
}
NEMOTRON_NUMBERS = (2, 4, 7, 9)
ALL = ((17, 7), (1, 23), (12, 12), (24, 0))
KEPT = ((10, 9), (1, 4), (8, 8), (0, 7))
DECIDED = {
    "laep_prune_iteration": PRUNE,
    "laep_alpha": "1.0:1-4,0.8:5-8",
    "laep_beta": 0.3,
    "laep_expert_multiple": 1,
    "laep_record_interval": 1,
}
BF16 = {"bf16": True, "moe_router_dtype": "fp32", "use_distributed_optimizer": True}


def stock(**more) -> tuple:
    return False, flags(**{**BASE, **more})


def mapped(folder: Path, expert_map: ExpertMap, **more) -> tuple:
    folder.mkdir()
    (folder / "plan.json").write_text(expert_map.to_json())
    return True, flags(
        laep_prune_iteration=PRUNE,
        laep_plan=folder / "plan.json",
        laep_allow_empty_ranks=True,
        **{**BASE, **saved_in(folder), **more},
    )


def of(blocks, numbers: tuple[int, ...]) -> ExpertMap:
    return plan(blocks[: len(numbers)], layer_numbers=numbers)


def masked(folder: Path, map_file: str | Path = "plan.json", **more) -> tuple:
    """Stock Megatron from the checkpoint at the pruning, its experts masked."""
    return False, flags(**{**BASE, "load": folder, "ckpt_step": PRUNE, **more}), folder / map_file


def four_runs(folder: Path, name: str, numbers: tuple[int, ...], pattern: dict) -> dict[str, tuple]:
    """A stack that is not touched, one that is renumbered, one that is pruned, and that one masked."""
    return {
        f"{name} stock": stock(**pattern),
        f"{name} permuted": mapped(folder / f"{name} all", of(ALL, numbers), **pattern),
        f"{name} pruned": mapped(folder / f"{name} kept", of(KEPT, numbers), **pattern),
        f"{name} masked": masked(folder / f"{name} kept", **pattern),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hybrid")


@pytest.fixture(scope="module")
def two(folder) -> dict[str, RunResult]:
    same = maps.identity(NUMBERS, EXPERTS, expert_parallel_size=2, top_k=1)
    decided = folder / "decided"
    jobs = {
        **four_runs(folder, "plain", NUMBERS, PLAIN),
        "plain identity": mapped(folder / "identity", same, **PLAIN),
        **four_runs(folder, "Nemotron", NEMOTRON_NUMBERS, NEMOTRON),
        "decided": (True, flags(**{**BASE, **MTP, **BF16, **DECIDED, **saved_in(decided)})),
        "masked decided": masked(decided, map_of(decided), **MTP, **BF16),
    }
    return run_batch(jobs, world_size=2, path=STANDINS)


def assert_same_run(run: RunResult, reference: RunResult) -> None:
    same_run(run, reference, prune=PRUNE)
    for iteration, found in reference.exact_losses.items():
        assert run.exact_losses[iteration] == found, iteration


@pytest.mark.parametrize("stack", ["plain", "Nemotron"])
def test_permuted_equals_uninterrupted(two, stack) -> None:
    assert_same_run(two[f"{stack} permuted"], two[f"{stack} stock"])


@pytest.mark.parametrize("stack", ["plain", "Nemotron"])
def test_pruned_equals_masked(two, stack) -> None:
    assert_same_run(two[f"{stack} pruned"], two[f"{stack} masked"])


def test_identity_changes_nothing(two) -> None:
    assert two["plain identity"].exact == two["plain stock"].exact


def test_decided_by_its_own_loads(two, folder) -> None:
    expert_map = ExpertMap.from_json(map_of(folder / "decided").read_text())
    assert expert_map.layer_numbers == MTP_NUMBERS
    for layer in expert_map.layers:
        alpha = 1.0 if layer.layer_number <= 4 else 0.8
        assert set(layer.pruned) == set(experts_to_prune(layer.loads, alpha=alpha, beta=0.3))
        assert layer.pruned, "want a pruning of every layer"
        assert sum(layer.loads) == PRUNE * 4 * 32, "each token once: iterations, batch, sequence"
    log = load_log.read(folder / "decided" / "laep" / "loads-full.bin")
    assert log.layer_numbers == MTP_NUMBERS
    assert [tuple(row) for row in log.last(PRUNE)] == [layer.loads for layer in expert_map.layers]
    assert "mtp 1.2 = 6 " in two["decided"].logs[0] and "mtp 2.2 = 8 " in two["decided"].logs[0]
    assert_same_run(two["decided"], two["masked decided"])


@pytest.mark.long
def test_killed_again_and_again_with_the_same_command(two, folder) -> None:
    again = {**saved_in(folder / "again"), "save_interval": 2}
    command = flags(**{**BASE, **MTP, **BF16, **DECIDED, **again})
    parts = []
    for point, iteration in (
        ("iteration closed", 2),
        ("groups rebuilt", PRUNE),
        ("iteration closed", 6),
    ):
        killed = run_megatron(
            command,
            2,
            launcher=LAEP,
            env=Failure(point, "kill", iteration=iteration).environment(),
            check=False,
            path=STANDINS,
        )
        assert -9 in killed.returncodes and not killed.timed_out, killed.tail()
        parts.append(killed)
    parts.append(run_megatron(command, 2, launcher=LAEP, path=STANDINS))
    assert [max(part.exact) for part in parts] == [2, PRUNE, 6, ITERATIONS]
    found = {i: line for part in parts for i, line in part.exact.items()}
    assert found == two["decided"].exact


def test_inspect_names_the_layers(two, folder) -> None:
    layers = described(folder / "Nemotron kept" / f"iter_{ITERATIONS:07d}")["layers"]
    assert [layer["layer_number"] for layer in layers] == list(NEMOTRON_NUMBERS)
    assert [layer["name"] for layer in layers] == ["decoder", "decoder", "mtp 1.2", "mtp 2.2"]
    assert [layer["experts_in_checkpoint"] for layer in layers] == [sum(row) for row in KEPT]
    layers = described(folder / "plain kept" / f"iter_{PRUNE:07d}")["layers"]
    assert [layer["layer_number"] for layer in layers] == list(NUMBERS)
    assert [layer["experts_in_checkpoint"] for layer in layers] == [EXPERTS] * 3
    assert [layer["experts_in_model"] for layer in layers] == [sum(row) for row in KEPT[:3]]


def shapes_in(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    from torch.distributed.checkpoint import FileSystemReader

    entries = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    return {key: tuple(entry.size) for key, entry in entries.items() if hasattr(entry, "size")}


def test_only_the_experts_of_a_mamba_stack_change_their_shapes(two, folder) -> None:
    """The keys are the stack's own, before and after a pruning, weights and optimizer state alike."""
    kept = dict(zip(NEMOTRON_NUMBERS, map(sum, KEPT), strict=True))
    folder = folder / "Nemotron kept"
    full = in_megatron(shapes_in, folder / f"iter_{PRUNE:07d}").result()
    pruned = in_megatron(shapes_in, folder / f"iter_{ITERATIONS:07d}").result()
    wanted, of_experts = {}, set()
    for key, shape in full.items():
        if ".mlp.experts." in key or ".mlp.router." in key:
            layer = key.partition("layers.")[2]
            number = int(layer.partition(".")[0]) + 1
            if "mtp." in key:
                # layers.<module>.mtp_model_layer.layers.<index>, behind the five of the decoder
                index = int(layer.partition("layers.")[2].partition(".")[0]) + 1
                number = 5 + (number - 1) * 2 + index
            assert shape[0] == EXPERTS, key
            shape = (kept[number], *shape[1:])
            of_experts.add(number)
        wanted[key] = shape
    assert of_experts == set(NEMOTRON_NUMBERS)
    assert "decoder.layers.0.mixer.in_proj.weight.x" in full
    assert "decoder.layers.1.mlp.experts.experts.linear_fc1.weight" in full
    assert "mtp.layers.1.mtp_model_layer.layers.1.mlp.router.weight" in full
    assert "optimizer.state.exp_avg.decoder.layers.4.mixer.conv1d.weight.x" in full
    assert pruned == wanted


@pytest.fixture(scope="module")
def four(folder) -> dict[str, RunResult]:
    stages = {"pipeline_model_parallel_size": 2, "untie_embeddings_and_output_weights": True}
    pp = {"hybrid_layer_pattern": "*E-|*E/*E", **stages}
    vpp = {"hybrid_layer_pattern": "*E|-|E|*E", **stages}
    return run_batch(
        {**four_runs(folder, "PP", (2, 5, 7), pp), **four_runs(folder, "VPP", (2, 4, 6), vpp)},
        world_size=4,
        path=STANDINS,
    )


@pytest.mark.long
@pytest.mark.parametrize("layout", ["PP", "VPP"])
def test_pipeline_stages(four, layout) -> None:
    assert_same_run(four[f"{layout} permuted"], four[f"{layout} stock"])
    assert_same_run(four[f"{layout} pruned"], four[f"{layout} masked"])
