"""A job goes on only from checkpoints that its flags and its model go with."""

import shutil
from pathlib import Path

import pytest

from megatron_laep.plan.expert_map import ExpertMap
from tests.support.forks import in_megatron, init_process_group
from tests.support.jobs import (
    KEPT,
    LAYERS,
    UNSUPPORTED,
    assert_complaint,
    expert_map,
    job,
    parsed,
    ranks,
)


def write_checkpoints(checkpoints: dict[str, dict]) -> None:
    """Real distributed checkpoints of nothing but their common state, by folder.

    Each: iteration, and what its record says, as keywords of Record (maps as JSON); no record
    without ``map_state``. ``legacy`` writes Megatron's format of one file a rank.
    """
    import torch
    from megatron.core import dist_checkpointing

    from megatron_laep.mcore.checkpoint import ENTRY, Record
    from megatron_laep.plan.lineage import Lineage
    from megatron_laep.plan.windows import OpenWindow

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
            window = content.get("window")
            state[ENTRY] = Record(
                lineage=Lineage(tuple(map(ExpertMap.from_json, content.get("maps", ())))),
                map_state=content["map_state"],
                window=window and OpenWindow(**window),
                ended=tuple(OpenWindow(**ended) for ended in content.get("ended", ())),
                declined=content.get("declined", ()),
            ).to_entry()
        dist_checkpointing.save(state, str(path))


def window(start: int, end: int) -> dict:
    return {"start": start, "end": end, "tokens_LE": tuple((8,) * 8 for _ in LAYERS)}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """Folders of checkpoints by what they hold, made once; nothing may be written to them."""
    uneven = dict(KEPT) | {2: (0, 2, 4, 6, 1, 3)}
    second = expert_map({number: (2, 0) for number in LAYERS}, iteration=16, experts=4)
    contents = {
        "foreign": {"iteration": 7},
        "full": {"iteration": 7, "map_state": None},
        "inside": {"iteration": 7, "map_state": None, "window": window(5, 7)},
        "in the third": {
            "iteration": 7,
            "map_state": None,
            "window": window(6, 7),
            "ended": [window(2, 4), window(4, 6)],
        },
        "declined": {"iteration": 7, "map_state": None, "declined": (5,)},
        "pending": {"iteration": 10, "map_state": "pending", "maps": [expert_map().to_json()]},
        "applied": {"iteration": 15, "map_state": "applied", "maps": [expert_map().to_json()]},
        "uneven": {"iteration": 15, "map_state": "applied", "maps": [expert_map(uneven).to_json()]},
        "pruned twice": {
            "iteration": 17,
            "map_state": "applied",
            "maps": [expert_map().to_json(), second.to_json()],
            "window": window(16, 17),
        },
        "legacy": {"iteration": 7, "legacy": True},
        "release": {"iteration": 7, "release": True},
    }
    root = tmp_path_factory.mktemp("checkpoints")
    in_megatron(write_checkpoints, {str(root / name): contents[name] for name in contents}).result()
    return {name: root / name for name in contents}


PLAN = "plan of the original model.json"

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
        [
            "--laep-window 4",
            "begins at iteration 7",
            "is at iteration 7",
            "--laep-window 3 or less",
        ],
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
    "too few windows to tell, stable or not": (
        "foreign",
        {"laep_window": 1, "laep_prune_when_stable": True},
        ["--laep-prune-when-stable compares 4 windows", "iteration 7", "has 3 of --laep-window 1"],
    ),
    "windows of other lengths": (
        "in the third",
        {"laep_window": 1, "laep_require_stable": True},
        ["--laep-require-stable compares 4 windows", "has 3 of --laep-window 1", "prune later"],
    ),
    "declined, and asked for earlier": (
        "declined",
        {"laep_prune_iteration": 6},
        ["iteration 7", "not pruned", "--laep-prune-iteration 6, which is past", "choose a later"],
    ),
    "pruned at another iteration": (
        "applied",
        {"laep_prune_iteration": 12},
        ["pruned at iteration 10", "--laep-prune-iteration is 12", "--laep-prune-iteration 10"],
    ),
    "pruned again since": (
        "pruned twice",
        {},
        ["iteration 10 and 16", "--laep-prune-iteration is 10", "--laep-prune-iteration 10 16"],
    ),
    "pruned again at another iteration": (
        "pruned twice",
        {"laep_prune_iteration": [10, 17]},
        ["iteration 10 and 16", "is 10 17: give --laep-prune-iteration 10 16 to go on"],
    ),
    "pruned twice where once was asked for": (
        "pruned twice",
        {"laep_prune_iteration": 18, "laep_prune_when_stable": True, "laep_window": 4},
        ["iteration 10 and 16", "--laep-prune-iteration is 18"],
    ),
    "past the second iteration": (
        "applied",
        {"laep_prune_iteration": [10, 15]},
        ["iteration 15", "not pruned", "--laep-prune-iteration 15, which is past", "leave 15 out"],
    ),
    "no counts for the second": (
        "applied",
        {"laep_prune_iteration": [10, 17]},
        ["--laep-prune-iteration 17", "begins at iteration 11", "no counts", "--laep-window 2"],
    ),
    "a plan for two": (
        "full",
        {"laep_prune_iteration": [10, 15], "laep_window": 3, "laep_plan": "plan.json"},
        ["--laep-plan plan.json is the map of one pruning", "2 are still to come", "10 15"],
    ),
    "a plan of the original model for the second": (
        "applied",
        {"laep_prune_iteration": [10, 18], "laep_window": 3, "laep_plan": PLAN},
        ["--laep-plan", "layer 1 has 8 experts in it, 4 in the model"],
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
    if flags.get("laep_plan") is PLAN:
        flags["laep_plan"] = tmp_path / PLAN
        flags["laep_plan"].write_text(expert_map().to_json())
    assert_complaint(in_megatron(parsed, job(tmp_path, **flags), env=ranks(2)), *wanted)


STARTS_OVER = {
    "fine-tuning": {"load": "full", "finetune": True},
    "pretrained": {"pretrained_checkpoint": "full", "load": "nothing"},
    "release": {"load": "release"},
    "fine-tuning from another format": {"load": "legacy", "finetune": True},
}


@pytest.mark.parametrize("flags", STARTS_OVER.values(), ids=STARTS_OVER)
def test_a_checkpoint_that_gives_only_its_weights_may_be_late(tmp_path, checkpoints, flags):
    flags = {
        name: value if value is True else checkpoints.get(value, tmp_path / value)
        for name, value in flags.items()
    }
    flags |= {"laep_prune_iteration": 5, "laep_window": 5}
    in_megatron(parsed, job(tmp_path, **flags)).result()


def test_fine_tuning_a_pruned_model_prunes_it_again(tmp_path, checkpoints):
    """What the other job did at its iterations is not what this one is to do at its own."""
    flags = {"load": checkpoints["applied"], "finetune": True, "expert_model_parallel_size": 2}
    words = job(tmp_path, **flags, laep_prune_iteration=[5, 12], laep_window=5)
    assert in_megatron(legs_to_come, words, env=ranks(2)).result() == [5, 12]


def legs_to_come(words: list[str]) -> list[int]:
    from megatron_laep.loop.session import session

    parsed(words)
    return [leg.end for leg in session.start.legs]


def test_a_checkpoint_in_another_format_is_not_taken_for_a_new_start(tmp_path, checkpoints):
    outcome = in_megatron(parsed, job(tmp_path, load=checkpoints["legacy"]))
    assert_complaint(
        outcome,
        "iter_0000007",
        "--ckpt-format torch_dist",
        "--laep-prune-iteration 10",
        "--ckpt-convert-format torch_dist",
    )


def test_half_a_checkpoint_is_not_taken_for_a_new_start(tmp_path, checkpoints):
    """A job that began elsewhere, and was stopped while it wrote its last checkpoint again."""
    save = tmp_path / "save"
    shutil.copytree(checkpoints["full"], save)
    (save / "iter_0000007" / "metadata.json").unlink()
    words = job(tmp_path, load=checkpoints["foreign"])
    outcome = in_megatron(parsed, words)
    wanted = [f"{save}/iter_0000007", "names this checkpoint, and it is not complete", "newest"]
    assert_complaint(outcome, *wanted)


def test_a_pruned_job_does_without_its_plan_file(tmp_path, checkpoints):
    flags = {"load": checkpoints["applied"], "laep_plan": tmp_path / "gone.json"}
    in_megatron(parsed, job(tmp_path, **flags, expert_model_parallel_size=2), env=ranks(2)).result()


# -> EP size that the job gets
GOOD_STARTS = {
    "window ahead": ("foreign", {"laep_window": 3}, 2),
    "window open": ("inside", {"laep_window": 5}, 2),
    "no window wanted": ("full", {"laep_prune_iteration": None}, 2),
    "windows behind it": (
        "in the third",
        {"laep_window": 2, "laep_require_stable": True},
        2,
    ),
    "declined": ("declined", {"laep_prune_iteration": 5}, 2),
    "declined, and later again": ("declined", {"laep_window": 3}, 2),
    "pruned": ("applied", {}, 2),
    "pruned, and a window for the next that would not have fitted before": (
        "applied",
        {"laep_prune_iteration": [10, 30], "laep_window": 12, "train_iters": 40},
        2,
    ),
    "pruned, and that iteration skipped": (
        "applied",
        {"laep_prune_iteration": [10, 18], "laep_window": 2, "iterations_to_skip": [8, 11]},
        2,
    ),
    "pruned, padded on ranks with 3 and 2": (
        "uneven",
        {
            "expert_model_parallel_size": 4,
            "moe_pad_expert_input_to_capacity": True,
            "moe_expert_capacity_factor": 1.0,
        },
        4,
    ),
    "pruned, to ranks with 3 and 2": ("uneven", {"expert_model_parallel_size": 4}, 4),
    "pruned, and again later": (
        "applied",
        {"laep_prune_iteration": [10, 18], "laep_window": 3},
        2,
    ),
    "pruned twice": ("pruned twice", {"laep_prune_iteration": [10, 16]}, 2),
    "pruned twice, and again later": (
        "pruned twice",
        {"laep_prune_iteration": [10, 16, 18]},
        2,
    ),
    "pruned twice before the latest iterations": (
        "pruned twice",
        {"laep_prune_iteration": [12, 18], "laep_prune_when_stable": True, "laep_window": 1},
        2,
    ),
    "pruned before the latest iteration": (
        "applied",
        {"laep_prune_iteration": 12, "laep_prune_when_stable": True, "laep_window": 2},
        2,
    ),
    "pruned, and no flags": ("applied", {"laep_prune_iteration": None}, 2),
    "pruned, to fewer ranks": ("pending", {"laep_expert_model_parallel_size": 1}, 1),
    "pruned, other rules": ("pending", {"laep_alpha": "0.9", "laep_window": 3}, 2),
}


@pytest.mark.parametrize("name, flags, size", GOOD_STARTS.values(), ids=GOOD_STARTS)
def test_a_checkpoint_that_the_job_can_go_on_from(tmp_path, checkpoints, name, flags, size):
    flags = {"load": checkpoints[name], "expert_model_parallel_size": 2} | flags
    env = ranks(max(2, flags["expert_model_parallel_size"]))
    args = in_megatron(parsed, job(tmp_path, **flags), env=env).result()
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
def test_a_pruned_checkpoint_does_not_get_around_the_refusals(tmp_path, checkpoints, flags, wanted):
    flags = {"load": checkpoints["applied"], "laep_prune_iteration": None} | flags
    outcome = in_megatron(parsed, job(tmp_path, **flags))
    assert_complaint(outcome, *wanted, "is not supported", str(checkpoints["applied"]))
