"""Oracles 1 to 4 with the optimizers besides Adam: SGD, Lion, Muon, and the layer-wise distributed optimizer.

For each, jobs that run one after the other in the same two processes: renumbered in the middle, reloaded with the same
numbers, pruned, masked, and stopped at several points. Losses are equal to the last bit, tolerances of gradient norms are
those of `test_permutation`. What is special about Muon is the router: it is one matrix to it, whose rows are not
independent of each other (`fixed_order`, `masked`). An expert's matrices are its own.
"""

from importlib.metadata import version
from pathlib import Path

import pytest

from megatron_laep import ExpertMap
from tests.oracles.test_permutation import (
    EXPERTS,
    TOP_1,
    assert_same_run,
    identity,
    permutation,
)
from tests.support.maps import from_kept
from tests.support.runs import RunResult, run_batch, tiny_arguments

pytestmark = pytest.mark.equality

# Saves at 3 (before the pruning), 4 (the pruning), 6 and 9.
ITERATIONS, PRUNE, SAVE_INTERVAL = 9, 4, 3
KEPT = {1: (6, 0, 3, 5), 2: (1, 2, 3, 4), 3: (7, 6, 1, 0), 4: (2, 5)}
BF16 = {"bf16": True, "moe_router_dtype": "fp32"}
LAYER_WISE = {"use_distributed_optimizer": True, **BF16}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
KINDS = {
    "sgd": {"optimizer": "sgd", "lr": 0.1},
    "sgd, bf16": {"optimizer": "sgd", "lr": 0.1, **BF16},
    "lion": {"optimizer": "lion"},
    "muon": {"optimizer": "muon"},
    "muon and lion, bf16": {"optimizer": "muon", "muon_scalar_optimizer": "lion", **BF16},
    "layer-wise muon": {"optimizer": "muon", **LAYER_WISE, **OVERLAP},
    "layer-wise lion": {"optimizer": "lion", **LAYER_WISE},
}
# Megatron 0.19 was written for 0.2, which the package index does not have: with that on the path it is tested as well.
if version("emerging-optimizers") < "0.3":
    KINDS["adaptive muon"] = {"optimizer": "adaptive_muon"}


def flags(folder: Path, name: str, expert_map: ExpertMap | None, **more) -> tuple[bool, list[str]]:
    """A job; one without a map is stock."""
    pruning = {}
    if expert_map is not None:
        plan = folder / f"{name}.json"
        plan.write_text(expert_map.to_json())
        pruning = {
            "save": folder / name,
            "load": folder / name,
            "save_interval": SAVE_INTERVAL,
            "laep_prune_iteration": PRUNE,
            "laep_plan": plan,
            "laep_expert_model_parallel_size": expert_map.expert_parallel_size_after,
        }
    ep2 = {"expert_model_parallel_size": 2}
    common = {"train_iters": ITERATIONS, "clip_grad": 100.0, **TOP_1, **ep2}
    return expert_map is not None, tiny_arguments(**(common | pruning | more))


def pruned_map() -> ExpertMap:
    return from_kept(KEPT, experts_before=EXPERTS, expert_parallel_size=2, top_k=1, iteration=PRUNE)


# The others differ from these in one word each.
IN_EVERY_RUN = ("sgd", "layer-wise muon")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(kind, marks=() if kind in IN_EVERY_RUN else pytest.mark.long) for kind in KINDS
    ],
)
def jobs(request, tmp_path_factory) -> dict[str, RunResult]:
    folder, kind = tmp_path_factory.mktemp("jobs"), KINDS[request.param]

    def this(name: str, expert_map: ExpertMap | None = None, **more) -> tuple[bool, list[str]]:
        return flags(folder, name, expert_map, **kind, **more)

    pruned = this("pruned", pruned_map())
    one = {"expert_model_parallel_size": 1}
    every = {
        "stock": this("stock"),
        "permuted": this("permuted", permutation(2)),
        "identity": this("identity", identity(2)),
        "permuted to one": this("permuted to one", permutation(1)),
        "identity to one": this("identity to one", identity(1)),
        "permuted from one": this("permuted from one", permutation(2), **one),
        "identity from one": this("identity from one", identity(2), **one),
        "pruned": pruned,
        "masked": (*this("masked"), folder / "pruned.json"),
        # The same command four times, each time stopped behind another checkpoint.
        "until a save": this("stopped", pruned_map(), exit_interval=SAVE_INTERVAL),
        "until the pruning": this("stopped", pruned_map(), laep_exit_after_prune=True),
        "until another save": this("stopped", pruned_map(), exit_interval=2 * SAVE_INTERVAL),
        "until the end": this("stopped", pruned_map()),
    }
    return run_batch(every, world_size=2)


def test_permuted_equals_uninterrupted(jobs) -> None:
    assert_same_run(jobs["permuted"], jobs["stock"], prune=PRUNE)


def test_identity_restores_everything_to_the_bit(jobs) -> None:
    assert_same_run(jobs["identity"], jobs["stock"], norm=0.0, prune=PRUNE)


@pytest.mark.parametrize("change", ["to one", "from one"])
def test_another_expert_parallel_size(jobs, change) -> None:
    """As an identity with the same change: an expert's tokens are summed in other portions then."""
    assert_same_run(jobs[f"permuted {change}"], jobs[f"identity {change}"], prune=PRUNE)


def test_pruned_equals_masked(jobs) -> None:
    assert_same_run(jobs["pruned"], jobs["masked"], prune=PRUNE)
    assert jobs["pruned"].exact[ITERATIONS] != jobs["stock"].exact[ITERATIONS]


def test_stopped_and_resumed(jobs) -> None:
    parts = [jobs[f"until {end}"].exact for end in ("a save", "the pruning", "another save")]
    parts.append(jobs["until the end"].exact)
    assert [max(part) for part in parts] == [3, PRUNE, 6, ITERATIONS]
    assert {i: loss for part in parts for i, loss in part.items()} == jobs["pruned"].exact
    assert sum(map(len, parts)) == ITERATIONS
