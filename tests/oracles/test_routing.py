"""Routers that drop tokens, pad experts, or balance quantiles: pruned, and compared with the masked model; resumed.

What the rules see is what the routers chose, whatever happens to a token afterwards. Tolerances: `test_permutation`.
"""

import json
from pathlib import Path

import pytest

from megatron_laep import ExpertMap
from tests.oracles.test_permutation import assert_same_run as same_run
from tests.support.jobs import lacking, skip_without
from tests.support.runs import RunResult, run_batch, tiny_arguments

pytestmark = pytest.mark.equality

ITERATIONS, PRUNE, EXPERTS, RANKS = 7, 3, 16, 2
TOKENS, TOP_K = 8 * 32, 2

DROPPING = {"moe_expert_capacity_factor": 0.6}
KINDS = {
    "dropping": DROPPING,
    "dropping by position": DROPPING
    | {"moe_token_drop_policy": "position", "moe_token_dispatcher_type": "allgather"},
    "padding": DROPPING | {"moe_pad_expert_input_to_capacity": True},
    "quantiles": {
        "moe_router_load_balancing_type": "quantile_balancing",
        "moe_router_quantile_balancing_ema": 0.5,
    },
    "replay": {"moe_enable_routing_replay": True},
}


def flags(kind: str, **more) -> list[str]:
    return tiny_arguments(
        **{
            "num_experts": EXPERTS,
            "moe_router_topk": TOP_K,
            "expert_model_parallel_size": RANKS,
            "train_iters": ITERATIONS,
            "clip_grad": 100.0,
            "seq_length": 32,
            "max_position_embeddings": 32,
            **KINDS[kind],
            **more,
        }
    )


def pruned(folder: Path, kind: str) -> tuple:
    rules = {"laep_alpha": 1.0, "laep_beta": 0.4, "laep_expert_multiple": 1}
    saved = {"save": folder, "load": folder, "save_interval": 1000}
    return True, flags(kind, laep_prune_iteration=PRUNE, **rules, **saved)


def files(folder: Path) -> Path:
    return folder / "laep" / f"iter_{PRUNE:07d}"


def masked(folder: Path, kind: str) -> tuple:
    return False, flags(kind, load=folder, ckpt_step=PRUNE), files(folder) / "map.json"


def resumed(folder: Path, kind: str) -> tuple:
    return True, flags(kind, load=folder, ckpt_step=PRUNE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("routing")


def there() -> list[str]:
    """The kinds that this Megatron knows: 0.18 balances no quantiles."""
    return [kind for kind, more in KINDS.items() if not lacking(more)]


@pytest.fixture(scope="module")
def runs(folder) -> dict[str, RunResult]:
    jobs = {}
    for kind in there():
        for run in (pruned, masked, resumed):
            jobs[f"{run.__name__}, {kind}"] = run(folder / kind.replace(" ", "-"), kind)
    return run_batch(jobs, world_size=RANKS)


@pytest.mark.parametrize("kind", KINDS)
def test_pruned_equals_masked_and_resumed(runs, folder, kind) -> None:
    skip_without(KINDS[kind])
    folder /= kind.replace(" ", "-")
    expert_map = ExpertMap.from_json((files(folder) / "map.json").read_text())
    assert any(len(set(layer.experts_per_rank)) > 1 for layer in expert_map.layers), "want uneven"
    same_run(runs[f"pruned, {kind}"], runs[f"masked, {kind}"], prune=PRUNE)
    mine, again = runs[f"pruned, {kind}"].exact, runs[f"resumed, {kind}"].exact
    assert again == {i: mine[i] for i in range(PRUNE + 1, ITERATIONS + 1)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_choice_is_counted(runs, folder, kind) -> None:
    skip_without(KINDS[kind])
    loads = json.loads((files(folder / kind.replace(" ", "-")) / "loads.json").read_text())
    assert {sum(row) for row in loads["tokens"]} == {PRUNE * TOKENS * TOP_K}
    # Padded and dropped, all experts would have the same.
    assert all(len(set(row)) > 1 for row in loads["tokens"])


def test_the_kinds_differ(runs) -> None:
    """Each flag does something before and after the pruning; padding and replay alone change no result."""
    losses = {kind: runs[f"pruned, {kind}"].exact for kind in there()}
    assert losses["padding"][PRUNE] == losses["dropping"][PRUNE]
    others = [losses[kind] for kind in losses if kind != "padding"]
    for iteration in (PRUNE, ITERATIONS):
        assert len({run[iteration] for run in others}) == len(others)
