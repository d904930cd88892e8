"""Plan files and loads that no pruning may rest on."""

import pytest

from megatron_laep.plan.expert_map import ExpertMap
from megatron_laep.plan.layout import ModelLayout
from tests.support import maps
from tests.support.forks import in_megatron, on_ranks
from tests.support.jobs import KEPT, LAYERS, assert_complaint, expert_map, job, parsed, ranks

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


# -- loads -----------------------------------------------------------------------------------------


def plan_on_rank_0(tokens_LE: list[list]) -> str:
    """What the pruning job makes of loads; the map as JSON. Only rank 0 sees them."""
    import torch

    from megatron_laep.loop.commit import agree_on_plan
    from megatron_laep.plan.windows import OpenWindow
    from megatron_laep.settings.rules import PruningRules

    experts = dict.fromkeys(LAYERS[: len(tokens_LE)], 8)
    layout = ModelLayout.of(experts, top_k=2, expert_parallel_size_before=2)
    seen = OpenWindow(0, 10, tokens_LE) if torch.distributed.get_rank() == 0 else None
    return agree_on_plan(seen, 10, layout, PruningRules(), None).to_json()


GOOD_ROW = [10, 0, 5, 100, 30, 5, 40, 10]
BAD_LOADS = {
    "NaN": ([*GOOD_ROW[:7], float("nan")], "layer 2: the load of expert 7 is NaN"),
    "negative": ([*GOOD_ROW[:7], -8], "layer 2: the load of expert 7 is negative: -8"),
    "all zero": ([0] * 8, "layer 2: the loads of all 8 experts are zero"),
}


@pytest.mark.distributed
@pytest.mark.parametrize("row, complaint", BAD_LOADS.values(), ids=BAD_LOADS)
def test_bad_loads_stop_every_rank(row, complaint):
    """Rank 0 alone looks at the loads; nobody goes on without it."""
    for outcome in on_ranks(2, plan_on_rank_0, [GOOD_ROW, row]):
        assert_complaint(outcome, "pruning at iteration 10: ", complaint)


@pytest.mark.distributed
def test_good_loads_give_every_rank_the_same_plan():
    plans = [outcome.result() for outcome in on_ranks(2, plan_on_rank_0, [GOOD_ROW] * 4)]
    assert plans[0] == plans[1]
    assert ExpertMap.from_json(plans[0]).layer(4).pruned == (1, 2)


def plan_from_file(plan: str, tokens_LE: list) -> str:
    """What the job makes of a plan that it read from a file."""
    from megatron_laep.loop.commit import agree_on_plan
    from megatron_laep.plan.windows import OpenWindow
    from megatron_laep.settings.rules import PruningRules

    given = ExpertMap.from_json(plan)
    layout = ModelLayout.of(
        {layer.layer_number: layer.experts_before for layer in given.layers},
        top_k=2,
        expert_parallel_size_before=2,
    )
    window = OpenWindow(0, 10, tokens_LE)
    return agree_on_plan(window, 10, layout, PruningRules(), given).to_json()


@pytest.mark.distributed
def test_a_plan_from_a_file_gets_the_loads_and_sizes_of_the_job():
    plan = maps.from_kept(
        {number: (5, 1, 0, 4) for number in (1, 2, 3, 4)},
        experts_before=8,
        expert_parallel_size=2,
        expert_parallel_size_before=8,
        top_k=2,
    )
    first, second = on_ranks(2, plan_from_file, plan.to_json(), [GOOD_ROW] * 4)
    used = ExpertMap.from_json(first.result())
    assert first.result() == second.result()
    assert [layer.kept for layer in used.layers] == [layer.kept for layer in plan.layers]
    assert {layer.loads for layer in used.layers} == {tuple(GOOD_ROW)}
    assert (used.iteration, used.expert_parallel_size_before) == (10, 2)
