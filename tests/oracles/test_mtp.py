"""Multi-token prediction (MTP): its MoE layers are counted, pruned, placed and resumed like the decoder's.

Oracles 1, 2 and 4 in jobs whose MTP layers have experts. Their losses are compared to the bit as well: the tokens after
the next are predicted by these layers alone. Tolerances as in test_permutation.
"""

from pathlib import Path

import pytest

from megatron_laep import ExpertMap
from megatron_laep.plan.pruning import experts_to_prune
from megatron_laep.records import load_log
from tests.oracles.test_permutation import assert_same_run as same_run
from tests.oracles.test_uneven_experts import EXPERTS, ITERATIONS, PRUNE, flags, plan, saved_in
from tests.support.forks import in_megatron
from tests.support.runs import RunResult, run_batch

pytestmark = pytest.mark.equality

# Three layers and two of MTP, which are layers 4 and 5.
MTP = {"num_layers": 3, "mtp_num_layers": 2, "expert_model_parallel_size": 2}
NUMBERS = (1, 2, 3, 4, 5)
ALL = ((12, 12), (17, 7), (1, 23), (24, 0), (5, 19))
KEPT = ((8, 8), (10, 9), (1, 4), (0, 7), (6, 2))
# Decides by itself, and has saved, and recorded, before it prunes.
DECIDED = {
    "laep_prune_iteration": PRUNE,
    "laep_alpha": "1.0:1-3,0.8:4-5",
    "laep_beta": 0.3,
    "laep_expert_multiple": 1,
    "laep_record_interval": 1,
}
BF16 = {"bf16": True, "moe_router_dtype": "fp32", "use_distributed_optimizer": True}
PIPELINE = {
    "num_layers": 2,
    "mtp_num_layers": 1,
    "pipeline_model_parallel_size": 2,
    # Else Megatron cannot save the model.
    "untie_embeddings_and_output_weights": True,
}


def mapped(folder: Path, blocks, numbers=NUMBERS, **more) -> tuple:
    folder.mkdir(exist_ok=True)
    (folder / "plan.json").write_text(plan(blocks, layer_numbers=numbers).to_json())
    return True, flags(
        laep_prune_iteration=PRUNE,
        laep_plan=folder / "plan.json",
        laep_allow_empty_ranks=True,
        **{**MTP, **saved_in(folder), **more},
    )


def stock(**more) -> tuple:
    return False, flags(**{**MTP, **more})


def masked(folder: Path, map_file: str | Path = "plan.json", **more) -> tuple:
    """Stock Megatron from the checkpoint at the pruning, its experts masked."""
    return False, flags(**{**MTP, "load": folder, "ckpt_step": PRUNE, **more}), folder / map_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("mtp")


@pytest.fixture(scope="module")
def two(folder) -> dict[str, RunResult]:
    decided = folder / "decided"
    cut = {**BF16, **DECIDED, **saved_in(decided)}
    again = {**BF16, **DECIDED, **saved_in(folder / "again"), "save_interval": 2}
    repeated = {"mtp_use_repeated_layer": True}
    return run_batch(
        {
            "stock": stock(),
            "permuted": mapped(folder / "a", ALL),
            "pruned": mapped(folder / "b", KEPT),
            "masked": masked(folder / "b"),
            "stock repeated": stock(**repeated),
            "permuted repeated": mapped(folder / "c", ALL[:4], NUMBERS[:4], **repeated),
            "decided": (True, flags(**{**MTP, **cut})),
            "masked decided": masked(decided, map_of(decided), **BF16),
            # Stopped inside the window, at the pruning, and after it; each time the same command.
            "stopped in the window": (True, flags(**{**MTP, **again, "exit_interval": 2})),
            "stopped at the pruning": (True, flags(**{**MTP, **again}, laep_exit_after_prune=True)),
            "stopped after the pruning": (True, flags(**{**MTP, **again, "exit_interval": 5})),
            "resumed": (True, flags(**{**MTP, **again})),
        },
        world_size=2,
    )


def described(path: Path) -> dict:
    return in_megatron(describe_checkpoint, path).result()


def describe_checkpoint(path: Path) -> dict:
    from megatron_laep.mcore import checkpoint_facts

    return checkpoint_facts.describe_checkpoint(path)


def map_of(folder: Path) -> Path:
    return folder / "laep" / f"iter_{PRUNE:07d}" / "map.json"


def assert_same_run(run: RunResult, reference: RunResult, losses: int = 2) -> None:
    same_run(run, reference, prune=PRUNE)
    for iteration, found in reference.exact_losses.items():
        assert len(found) == 1 + losses
        assert run.exact_losses[iteration] == found, iteration


def test_permuted_equals_uninterrupted(two) -> None:
    assert_same_run(two["permuted"], two["stock"])


def test_pruned_equals_masked(two) -> None:
    assert_same_run(two["pruned"], two["masked"])


def test_one_layer_for_all_depths(two) -> None:
    assert_same_run(two["permuted repeated"], two["stock repeated"])


def test_decided_by_its_own_loads(two, folder) -> None:
    expert_map = ExpertMap.from_json(map_of(folder / "decided").read_text())
    assert expert_map.layer_numbers == NUMBERS
    for layer in expert_map.layers:
        alpha = 1.0 if layer.layer_number <= 3 else 0.8
        assert set(layer.pruned) == set(experts_to_prune(layer.loads, alpha=alpha, beta=0.3))
        assert layer.pruned, "want a pruning of every layer"
        assert sum(layer.loads) == PRUNE * 4 * 32, "each token once: iterations, batch, sequence"
    assert_same_run(two["decided"], two["masked decided"])


def test_its_loads_are_recorded_and_shown(two, folder) -> None:
    log = load_log.read(folder / "decided" / "laep" / "loads-full.bin")
    assert log.layer_numbers == NUMBERS
    expert_map = ExpertMap.from_json(map_of(folder / "decided").read_text())
    assert [tuple(row) for row in log.last(PRUNE)] == [layer.loads for layer in expert_map.layers]
    assert "mtp 1 = 4 " in two["decided"].logs[0] and "mtp 2 = 5 " in two["decided"].logs[0]


def test_inspect_knows_them(two, folder) -> None:
    expert_map = ExpertMap.from_json(map_of(folder / "decided").read_text())
    layers = described(folder / "decided" / f"iter_{ITERATIONS:07d}")["layers"]
    assert [layer["layer_number"] for layer in layers] == list(NUMBERS)
    assert [layer["name"] for layer in layers] == ["decoder"] * 3 + ["mtp 1", "mtp 2"]
    kept = [layer.experts_after for layer in expert_map.layers]
    assert [layer["experts_in_checkpoint"] for layer in layers] == kept
    stacked = described(folder / "decided" / f"iter_{PRUNE:07d}")["layers"]
    assert [layer["experts_in_checkpoint"] for layer in stacked] == [EXPERTS] * 5
    assert [layer["experts_in_model"] for layer in stacked] == kept


def test_the_same_command_goes_on(two) -> None:
    parts = (
        "stopped in the window",
        "stopped at the pruning",
        "stopped after the pruning",
        "resumed",
    )
    ends = [max(two[name].exact) for name in parts]
    assert ends == [2, PRUNE, 5, ITERATIONS]
    found = {i: line for name in parts for i, line in two[name].exact_losses.items()}
    assert found == two["decided"].exact_losses
    assert {i: line for name in parts for i, line in two[name].exact.items()} == two[
        "decided"
    ].exact


@pytest.fixture(scope="module")
def four(folder) -> dict[str, RunResult]:
    """The last of two pipeline stages has a decoder layer and the MTP layer."""
    virtual = {
        **PIPELINE,
        "num_layers": 4,
        "num_layers_per_virtual_pipeline_stage": 1,
    }
    jobs = {}
    for name, flags_, numbers in (
        ("PP", PIPELINE, (1, 2, 3)),
        ("VPP", virtual, NUMBERS),
    ):
        jobs[f"{name} stock"] = stock(**flags_)
        jobs[f"{name} permuted"] = mapped(
            folder / f"{name} all", ALL[-len(numbers) :], numbers, **flags_
        )
        jobs[f"{name} pruned"] = mapped(
            folder / f"{name} kept", KEPT[-len(numbers) :], numbers, **flags_
        )
        jobs[f"{name} masked"] = masked(folder / f"{name} kept", **flags_)
    return run_batch(jobs, world_size=4)


@pytest.mark.long
@pytest.mark.parametrize("layout", ["PP", "VPP"])
def test_on_the_last_pipeline_stage(four, layout) -> None:
    assert_same_run(four[f"{layout} permuted"], four[f"{layout} stock"], losses=1)
    assert_same_run(four[f"{layout} pruned"], four[f"{layout} masked"], losses=1)
