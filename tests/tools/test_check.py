"""`laep check`: the verdict of the job itself, for everything at once, without starting anything."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import shlex
from pathlib import Path

import pytest

from tests.loop.test_resumption import write_checkpoints
from tests.support.forks import in_megatron
from tests.support.jobs import LAYERS, expert_map, job, parsed
from tests.support.recipes import TABLE, judged, recipes, render
from tests.support.runs import REPOSITORY

CONFIGS = sorted((REPOSITORY / "configs").glob("*.args"))
TOOLS = REPOSITORY / "docs" / "tools.md"
PAGE = REPOSITORY / "docs" / "recipes.md"


def checks(lines: list[tuple[int, list[str]]], *options: str) -> list[tuple[int, str]]:
    """Exit code and output of ``laep check`` for each: ranks, training arguments."""
    from megatron_laep.tools.__main__ import main

    found = []
    for ranks, words in lines:
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            code = main(["check", "--ranks", str(ranks), *options, "--", *words])
        found.append((code, text.getvalue()))
    return found


JOBS = {
    "accepted": (2, {"expert_model_parallel_size": 2}),
    "everything at once": (
        1,
        {
            "moe_use_upcycling": True,
            "no_save_rng": True,
            "enable_ft_package": True,
            "laep_prune_iteration": 20,
            "laep_expert_multiple": 3,
        },
    ),
    "lifted": (1, {"enable_ft_package": True}),
    "lifted already": (1, {"enable_ft_package": True, "laep_exit_after_prune": True}),
    "half-way": (1, {"laep_prune_iteration": None}),
    "records only": (1, {"laep_prune_iteration": None, "laep_record_interval": 5}),
    "of no use": (1, {"laep_beta": 1.5, "no_save_rng": True}),
    "Megatron's own": (3, {"pipeline_model_parallel_size": 2, "no_save_rng": True}),
    "Megatron's own, without a text": (1, {"micro_batch_size": 0}),
    "the script's own": (1, {"flag_of_the_script": 3}),
    "mistyped": (1, {"laep_alpah": 0.4}),
    "no number": (1, {"num_layers": "four"}),
    "groups": (
        8,
        {
            "num_experts": 16,
            "global_batch_size": 16,
            "expert_model_parallel_size": 4,
            "moe_router_num_groups": 4,
            "moe_router_group_topk": 1,
            "mtp_num_layers": 1,
            "laep_expert_model_parallel_size": 2,
            "laep_prune_when_stable": True,
            "laep_window": 2,
            "laep_stability_patience": 1,
        },
    ),
    "groups, cut": (
        3,
        {
            "num_experts": 12,
            "moe_router_num_groups": 4,
            "moe_router_group_topk": 1,
            "laep_expert_model_parallel_size": 3,
            "global_batch_size": 6,
        },
    ),
    "nothing to prune": (8, {"expert_model_parallel_size": 8, "global_batch_size": 16}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("check")


@pytest.fixture(scope="module")
def said(folder) -> dict[str, tuple[int, str]]:
    lines = [(ranks, job(folder, **flags)) for ranks, flags in JOBS.values()]
    return dict(zip(JOBS, in_megatron(checks, lines).result(), strict=True))


def test_an_accepted_job_is_told_what_may_change(said, folder):
    code, text = said["accepted"]
    assert code == 0
    assert text.startswith("accepted\n")
    # top-2, and one on each of two ranks
    assert (
        "MoE layers 1-4: 8 experts, of which each keeps 2 to 8 (2 a token, multiples of 2)" in text
    )
    assert "expert-parallel size 2, as before; 2 ranks, so each expert is on 1 of them" in text
    assert "--laep-expert-model-parallel-size may be 1, 2\n" in text
    assert "pruned after iteration 10, on the tokens of the 10 iterations before" in text
    assert "goes on with the smaller model in the same processes" in text
    assert not (folder / "save").exists()


def test_everything_that_is_in_the_way_is_listed(said):
    code, text = said["everything at once"]
    assert code == 2
    assert text.startswith("refused\n")
    refused, _, lifted = text.partition("lifted by --laep-exit-after-prune:")
    for wanted in (
        "1. --moe-use-upcycling is not supported together with --laep-prune-iteration",
        "2. --no-save-rng is not supported",
        "3. --laep-prune-iteration 20 is not before the end of training",
        "4. --laep-expert-multiple 3 does not divide --num-experts 8",
    ):
        assert wanted in refused
    assert "1. --enable-ft-package is not supported" in lifted
    assert "recording alone (--laep-record-interval) would be accepted" in text
    assert "what would change" not in text


def test_what_an_exit_lifts_has_a_code_of_its_own(said):
    code, text = said["lifted"]
    assert (code, text.splitlines()[0]) == (3, "accepted with --laep-exit-after-prune")
    assert "--enable-ft-package" in text
    assert "then ends with code 0; the same command goes on" in text
    code, text = said["lifted already"]
    assert (code, text.splitlines()[0]) == (0, "accepted")


def test_without_a_flag_a_pruning_half_way_is_assumed(said):
    code, text = said["half-way"]
    assert code == 0
    assert text.startswith("accepted (as if --laep-prune-iteration 10 were given: half-way)")
    code, text = said["records only"]
    assert (code, text) == (0, "accepted\n")


def test_what_stands_before_the_checks_does_not_hide_them(said):
    code, text = said["of no use"]
    assert code == 2
    assert "1. --laep-beta must be within 0 and 1, got 1.5" in text
    assert "2. --no-save-rng is not supported" in text
    code, text = said["Megatron's own"]
    assert code == 2
    assert "1. Megatron itself refuses these arguments: world size (3) is not divisible" in text
    assert "2. --no-save-rng is not supported" in text
    code, text = said["Megatron's own, without a text"]
    assert code == 2
    assert "it ends at `assert args.micro_batch_size > 0`" in text


def test_words_that_nobody_knows(said):
    code, text = said["the script's own"]
    assert code == 0
    assert text.endswith(
        "unknown to Megatron's own parser, the script's own: --flag-of-the-script 3\n"
    )
    code, text = said["mistyped"]
    assert code == 2
    assert "1. there is no flag --laep-alpah" in text
    code, text = said["no number"]
    assert code == 2
    assert "Megatron's parser: argument --num-layers: invalid int value: 'four'" in text


def test_groups_and_sizes(said):
    code, text = said["groups"]
    assert code == 0
    # Each of 4 groups keeps at least top-2 from the one group that a token gets: 8 in all.
    assert (
        "MoE layers 1-5 (5 is mtp 1): 16 experts, of which each keeps 8 to 16 "
        "(2 a token, multiples of 2, equally many in each of 4 groups)" in text
    )
    assert "expert-parallel size 4 before, 2 after; 8 ranks, so each expert is on 4 of them" in text
    # 8 cuts the groups into halves of 2 experts, which hold a token's; 16 are more than there are ranks.
    assert "--laep-expert-model-parallel-size may be 1, 2, 4, 8\n" in text
    # Two windows of 2 iterations: after 4 at the earliest.
    assert "pruned after iteration 4 to 10, on the tokens of the 2 iterations before" in text
    code, text = said["groups, cut"]
    assert code == 2
    assert "would cut the 4 groups of --moe-router-num-groups unevenly" in text
    code, text = said["nothing to prune"]
    assert code == 0
    assert (
        "each keeps all (2 a token, multiples of 8); fewer expert-parallel ranks, or --laep-e"
        in text
    )


@pytest.mark.parametrize(
    "name", ["accepted", "everything at once", "groups, cut", "lifted already"]
)
def test_the_job_itself_says_the_same(said, folder, name):
    ranks, flags = JOBS[name]
    outcome = in_megatron(parsed, job(folder, **flags), env={"WORLD_SIZE": str(ranks)})
    code, text = said[name]
    assert (outcome.error == "Refusal") == (code == 2), outcome.message
    if code == 2:
        sentences = [line.partition(". ")[2] for line in outcome.message.splitlines()[1:]]
        for sentence in sentences or [outcome.message]:
            assert sentence in text


def test_json(folder):
    (code, text), (_, refused) = in_megatron(
        checks,
        [(2, job(folder, laep_record_interval=5)), (1, job(folder, no_save_rng=True))],
        "--json",
    ).result()
    found = json.loads(text)
    assert (code, found["verdict"], found["assumed"]) == (0, "accepted", False)
    assert found["prune_iterations"] == [10]
    assert found["outlook"]["layers"] == [
        {"layers": [1, 2, 3, 4], "experts": 8, "fewest": 2, "most": 8}
    ]
    assert found["outlook"]["prunings"] == [[10, 10, 10]]
    found = json.loads(refused)
    assert (found["verdict"], found["outlook"], found["recording_refused_for"]) == (
        "refused",
        None,
        [],
    )


def test_a_job_goes_on_from_its_checkpoint(folder):
    content = {"iteration": 10, "map_state": "pending", "maps": [expert_map().to_json()]}
    in_megatron(write_checkpoints, {str(folder / "pruned"): content}).result()
    flags = {"save": folder / "pruned", "expert_model_parallel_size": 2, "train_iters": 40}
    again, done = in_megatron(
        checks,
        [
            (2, job(folder, **flags, laep_prune_iteration=[10, 30])),
            (2, job(folder, **flags, laep_prune_iteration=10)),
        ],
    ).result()
    goes_on = f"goes on from {folder}/pruned/iter_0000010, pruned after 10"
    assert (again[0], done[0]) == (0, 0)
    assert goes_on in again[1]
    assert f"MoE layers 1-{LAYERS[-1]}: 4 experts, of which each keeps 2 to 4" in again[1]
    assert "pruned after iteration 30" in again[1]
    assert done[1] == f"accepted\n\n{goes_on}\n"


def test_without_megatron_it_is_a_sentence(monkeypatch):
    from megatron_laep.tools import check

    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="Megatron's own parser, and torch is not installed here"):
        check.run(argparse.Namespace(ranks=8, json=False, arguments=["--", "--lr", "1"]))


@pytest.mark.parametrize(
    "words, wanted",
    [(["--ranks", "0", "--", "--lr", "1"], "at least 1"), (["--ranks", "8"], "behind --")],
)
def test_of_itself_it_needs_little(words, wanted, capsys):
    from megatron_laep.tools.__main__ import main

    assert main(["check", *words]) == 2
    assert wanted in capsys.readouterr().err


# -- what people train ------------------------------------------------------------------------------


def test_the_page_of_public_jobs_is_what_the_check_says():
    said = in_megatron(judged).result()
    assert len(said) == len(recipes()) == 68
    assert PAGE.read_text(encoding="utf-8") == render(said), (
        "MEGATRON_LAEP_PLATFORM=cpu python -m tests.support.recipes > docs/recipes.md"
    )
    assert {one.code for one in said.values()} == {0, 2, 3}


def test_the_public_jobs_keep_to_megatron():
    """None of them is refused by Megatron itself: then its flags would have been carried over wrongly."""
    assert "Megatron itself" not in PAGE.read_text(encoding="utf-8")
    assert TABLE.read_text(encoding="utf-8").count("--num-experts") == 68


def ranks_of(path: Path) -> int:
    return int("".join(filter(str.isdigit, path.stem.rpartition("-")[2])))


def test_every_config_is_accepted_on_its_ranks(folder):
    lines = []
    for path in CONFIGS:
        words = [*shlex.split(path.read_text(), comments=True), "--save", str(folder / path.stem)]
        for flag, value in (("--train-iters", "300"), ("--save-interval", "50")):
            words += [] if flag in words else [flag, value]
        lines.append((ranks_of(path), words))
    said = dict(
        zip((path.stem for path in CONFIGS), in_megatron(checks, lines).result(), strict=True)
    )
    assert {name for name, (code, _) in said.items() if code} == set()
    name = "deepseek-v3-like-61l-256e-1024gpu"
    example = rf"^```text\n\$ laep check [^\n]*{name}[^\n]*\n(.*?)^```$"
    shown = re.search(example, TOOLS.read_text(encoding="utf-8"), re.M | re.S)
    assert shown[1] == said[name][1]
    for name, (_, text) in said.items():
        # Each of them leaves something to prune.
        assert "what would change" in text and "keeps all" not in text, name
