"""Megatron with the patch of ``patches/`` in it: plain scripts, without the launcher, prune and go on after a kill.

The Megatron is the one that the tests run on, copied and patched; ``scripts/test.sh --megatron VERSION`` takes another.
"""

from __future__ import annotations

import os
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_laep import ExpertMap, enter
from megatron_laep.entry import REFUSED
from tests.oracles.test_permutation import assert_same_run
from tests.support import maps
from tests.support.forks import in_megatron
from tests.support.patched_tree import PATCHES, added_lines, apply_patch, copy_tree, script_of
from tests.support.runs import (
    LAEP,
    ON_CPU,
    REPOSITORY,
    SUPPORT,
    RunResult,
    run_megatron,
    tiny_arguments,
)

pytestmark = [pytest.mark.distributed, pytest.mark.equality]

ITERATIONS, PRUNE, SAVED = 8, 3, 6
TWO_RANKS = {
    "expert_model_parallel_size": 2,
    "moe_router_topk": 1,
    "moe_router_score_function": "sigmoid",
    "clip_grad": 100.0,
}


@dataclass
class Tree:
    folder: Path
    script: Path

    def run(self, words: list[str], launcher: tuple[str, ...] = (), **more) -> RunResult:
        """A job on two ranks; without a launcher, as by ``torchrun pretrain_gpt.py WORDS``."""
        return run_megatron(
            words, 2, launcher=launcher, script=self.script, path=str(self.folder), **more
        )


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Tree:
    folder = copy_tree(tmp_path_factory.mktemp("tree"))
    done = apply_patch(folder)
    assert done.returncode == 0, done.stderr
    return Tree(folder, script_of(folder))


def pruning_job(folder: Path) -> list[str]:
    return tiny_arguments(
        **TWO_RANKS,
        train_iters=ITERATIONS,
        save=folder,
        load=folder,
        save_interval=SAVED,
        use_distributed_optimizer=True,
        laep_prune_iteration=PRUNE,
        laep_window=2,
        laep_alpha=1.0,
        laep_beta=0.5,
    )


def test_pruned_killed_and_continued_without_the_launcher(tree, tmp_path):
    launched = run_megatron(pruning_job(tmp_path / "launched"), 2, launcher=LAEP)
    # The model is rebuilt inside the job after iteration 3; the job dies behind the save of iteration 6.
    killed = tree.run(
        pruning_job(tmp_path / "plain"),
        launcher=(str(SUPPORT / "killed_after_save.py"), str(SAVED)),
        check=False,
    )
    assert killed.returncodes == [-9, -9], killed.tail()
    assert killed.output.count("laep event=committed") == 1
    continued = tree.run(pruning_job(tmp_path / "plain"))
    assert [*killed.exact, *continued.exact] == list(range(1, ITERATIONS + 1))
    assert killed.exact | continued.exact == launched.exact
    loaded = ExpertMap.from_json(
        (tmp_path / "plain" / "laep" / f"iter_{PRUNE:07d}" / "map.json").read_text()
    )
    assert sum(layer.experts_after for layer in loaded.layers) < 4 * 8


def unpatched_script(tree: Tree) -> Path:
    """Somebody's own script, without the lines that the patch adds to Megatron's."""
    script = tree.folder / "own_script.py"
    lines = added_lines(PATCHES[0])["pretrain_gpt.py"]
    text = tree.script.read_text(encoding="utf-8")
    assert text.count(lines) == 1
    script.write_text(text.replace(lines, ""), encoding="utf-8")
    return script


def hooks_of_a_job(script: str, words: list[str], launched: bool) -> dict:
    """Runs a script as far as Megatron's ``pretrain``, and looks at the hooks there; where Megatron is."""
    import megatron.training

    from megatron_laep.__main__ import main
    from megatron_laep.loop.session import session

    seen: dict = {}

    def pretrain(*more, **named) -> None:
        originals = [original for _, _, original in session.hooks._undo]
        seen.update(
            tree=megatron.training.__file__,
            hooked=len(originals),
            twice=sum(getattr(original, "_megatron_laep_hook", False) for original in originals),
            interval=megatron.training.get_args().laep_record_interval,
        )

    megatron.training.pretrain = pretrain
    sys.argv = [*(["megatron_laep"] if launched else []), script, *words]
    try:
        if launched:
            main()
        else:
            runpy.run_path(script, run_name="__main__")
    except SystemExit as ending:
        if ending.code:
            raise
    return seen


@pytest.mark.parametrize("script", ["patched", "own"])
def test_hooks_are_in_once_with_and_without_the_launcher(tree, script):
    path = tree.script if script == "patched" else unpatched_script(tree)
    words = tiny_arguments(laep_record_interval=2, save="unused", save_interval=1000)
    plain, launched = (
        in_megatron(hooks_of_a_job, str(path), words, launched, path=str(tree.folder)).result()
        for launched in (False, True)
    )
    assert plain == launched
    assert Path(plain.pop("tree")).is_relative_to(tree.folder)
    assert plain.pop("hooked") > 10
    assert plain == {"twice": 0, "interval": 2}


def test_a_script_that_is_not_patched_is_told_how_to_prune(tree, tmp_path):
    words = tiny_arguments(laep_prune_iteration=PRUNE, save=tmp_path, save_interval=1000)
    outcome = in_megatron(
        hooks_of_a_job, str(unpatched_script(tree)), words, False, path=str(tree.folder)
    )
    assert outcome.error == "Refusal", outcome.output[-3000:]
    assert "--laep-exit-after-prune" in outcome.message


def test_a_refused_job_ends_as_under_the_launcher(tree):
    words = tiny_arguments(laep_alpha=0.3)
    outcome = in_megatron(hooks_of_a_job, str(tree.script), words, False, path=str(tree.folder))
    assert (outcome.error, outcome.message) == ("SystemExit", str(REFUSED))
    # Megatron's main says first what it runs on.
    assert outcome.output.count("megatron_laep: --laep-alpha is given without --laep-prune-") == 1


def test_a_script_that_is_imported_is_not_run(tree):
    enter("__mp_main__", str(tree.script))  # as multiprocessing imports it


@pytest.mark.long
def test_permuted_without_the_launcher(tree, tmp_path):
    flags = dict(TWO_RANKS, train_iters=ITERATIONS)
    stock = run_megatron(tiny_arguments(**flags), 2, launcher=ON_CPU)
    plan = tmp_path / "plan.json"
    plan.write_text(
        maps.permutation(range(1, 5), 8, seed=1, expert_parallel_size=2, top_k=1).to_json()
    )
    permuted = tree.run(
        tiny_arguments(
            **flags,
            save=tmp_path / "save",
            load=tmp_path / "save",
            save_interval=1000,
            laep_prune_iteration=PRUNE,
            laep_plan=plan,
        ),
        # New processes: the CPU platform, too, comes with the patch's lines.
        fresh=True,
        env={"PYTHONPATH": f"{tree.folder}{os.pathsep}{REPOSITORY}"},
    )
    assert "laep event=load_through_map" in permuted.output
    assert_same_run(permuted, stock, prune=PRUNE)


@pytest.mark.long
def test_launched_as_well_and_a_script_of_ones_own(tree, tmp_path):
    in_patched = tree.run(pruning_job(tmp_path / "launched"), launcher=LAEP)
    own = Tree(tree.folder, unpatched_script(tree))
    words = [*pruning_job(tmp_path / "own"), "--laep-exit-after-prune"]
    until, after = own.run(words), own.run(words)
    assert [*until.exact] == list(range(1, PRUNE + 1))
    assert [*after.exact] == list(range(PRUNE + 1, ITERATIONS + 1))
    assert until.exact | after.exact == in_patched.exact
