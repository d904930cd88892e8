"""When a job prunes, on Megatron's own loop: once its loads are stable, or not at all; and then again.

One reference run prunes early, since its loads are stable, and a second time at the latest iteration, although they are
not. Everything else is compared with it, losses to the last bit.
"""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest

from megatron_laep import ExpertMap
from megatron_laep.plan.lineage import Lineage
from megatron_laep.plan.stability import StabilityDecision
from megatron_laep.records import decision_log, load_log
from megatron_laep.settings.rules import PruningRules
from megatron_laep.settings.schedule import Verdict
from megatron_laep.settings.thresholds import StabilityThresholds
from megatron_laep.tools.report import data as report_data
from megatron_laep.tools.stability import decisions
from tests.oracles.test_permutation import ORDER_OF_SUM
from tests.oracles.test_pruning_run import stock_flags
from tests.support.exact_job import Losses, exact_job, exact_losses
from tests.support.failures import Failure
from tests.support.forks import in_megatron, on_ranks

# Windows end at 2, 4, 6 and so on. The saves, at 5, 10, 15 and 20, are inside one, or after it.
ITERATIONS, LATEST, WINDOW, SAVE_INTERVAL = 22, (12, 18), 2, 5
THRESHOLDS = StabilityThresholds(rank_correlation=0.65, churn=1.0, patience=2)
RULES = PruningRules(alpha="1.0", beta=0.5)


def flags(folder: Path, **more) -> list[str]:
    thresholds = dataclasses.asdict(THRESHOLDS)
    return stock_flags(
        folder,
        **{
            "train_iters": ITERATIONS,
            "save_interval": SAVE_INTERVAL,
            "laep_prune_iteration": LATEST,
            "laep_prune_when_stable": True,
            "laep_window": WINDOW,
            "laep_alpha": RULES.alpha,
            "laep_beta": RULES.beta,
            "laep_record_interval": WINDOW,
            **{f"laep_stability_{name}": value for name, value in thresholds.items()},
            **more,
        },
    )


@dataclasses.dataclass
class Run:
    folder: Path
    losses: Losses
    output: str

    @property
    def maps(self) -> list[ExpertMap]:
        paths = sorted(self.folder.glob("laep/iter_*/map.json"))
        return [ExpertMap.from_json(path.read_text()) for path in paths]

    @property
    def decided(self) -> list[dict]:
        return decision_log.read(self.folder / "laep" / decision_log.NAME)

    def assert_same(self, folder: Path, losses: Losses, after: int) -> None:
        """A job that went on after an iteration trained, decided and pruned as this one."""
        assert losses == {i: loss for i, loss in self.losses.items() if i > after}
        other = Run(folder, losses, "")
        assert other.maps == self.maps
        assert [line | {"row": 0} for line in other.decided] == [
            line | {"row": 0} for line in self.decided
        ]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("when")
    outcomes = on_ranks(2, exact_job, flags(folder))
    return Run(folder, exact_losses(outcomes), outcomes[0].output)


def recorded(run: Run) -> tuple[load_log.LoadLog, list[StabilityDecision]]:
    """What ``laep stability`` says of the loads that the job recorded up to its first pruning."""
    log = load_log.read(run.folder / "laep" / "loads-full.bin")
    return log, decisions(log, RULES, THRESHOLDS)


def test_it_prunes_at_the_first_window_end_at_which_the_loads_are_stable(run):
    _, found = recorded(run)
    stable = [decision.stable for decision in found]
    assert stable == [False] * (len(stable) - 1) + [True]
    # Neither at the first window end at which it could be, nor because it was the last one.
    assert (THRESHOLDS.patience + 1) * WINDOW < found[-1].iteration < LATEST[0]
    assert [step.iteration for step in run.maps] == [found[-1].iteration, LATEST[1]]
    assert list(run.losses) == list(range(1, ITERATIONS + 1))
    assert "event=old_model_alive" not in run.output


def test_each_decision_is_logged_with_its_reasons(run):
    log, found = recorded(run)
    decided = run.decided[: len(found)]
    assert len(found) >= 4
    for line, decision in zip(decided, found, strict=True):
        assert decision.format() in run.output
        expected = json.loads(json.dumps(decision.to_dict()))
        assert {name: line[name] for name in expected} == expected
    verdicts = [line["verdict"] for line in decided]
    assert verdicts == [Verdict.WAIT] * (len(found) - 1) + [Verdict.PRUNE]
    # The pruning is decided on the window that ended then.
    end = found[-1].iteration
    assert decided[-1]["windows"] == [[end - 5, end - 4], [end - 3, end - 2], [end - 1, end]]
    loads = json.loads((run.folder / "laep" / f"iter_{end:07d}" / "loads.json").read_text())
    assert (loads["iteration"], loads["window"]) == (end, WINDOW)
    assert loads["tokens"] == [row.tolist() for row in log.window(-1)]


def test_a_pruning_of_loads_that_are_not_stable_is_hard_to_overlook(run):
    later = [(line["iteration"], line["verdict"]) for line in run.decided[-3:]]
    assert later == [(14, "wait"), (16, "wait"), (18, "prune although not stable")]
    assert run.output.count("LAEP WARNING") == 1
    assert (
        "LAEP WARNING\nThe loads are not stable at --laep-prune-iteration 18.\n"
        "The model is PRUNED ALL THE SAME; with --laep-require-stable"
    ) in run.output


def test_what_was_pruned_first_stays_pruned(run):
    first, second = run.maps
    assert [layer.experts_before for layer in second.layers] == [
        layer.experts_after for layer in first.layers
    ]
    assert (
        0 < sum(x.experts_after for x in second.layers) < sum(x.experts_after for x in first.layers)
    )
    lineage = Lineage((first, second))
    log = load_log.read(run.folder / "laep" / f"loads-{second.short_hash}.bin")
    assert log.lineage == lineage.hashes and log.original_ids == lineage.original_ids
    history = report_data.gather(run.folder)["history"]
    assert [[list(ids) for ids in stage] for stage in history["original_ids"]] == [
        [list(range(8))] * 4,
        [list(layer.kept) for layer in first.layers],
        [list(layer.kept) for layer in lineage.composed.layers],
    ]
    assert [window["stage"] for window in history["windows"]] == [0] * 4 + [1] * 5 + [2] * 2


def facts(folder: str, iterations: list[int]) -> list[dict]:
    from megatron_laep.mcore.checkpoint_facts import describe_checkpoint

    return [describe_checkpoint(Path(folder) / f"iter_{i:07d}") for i in iterations]


def test_its_checkpoints_know_their_lineage(run):
    first, second = run.maps
    iterations = [5, first.iteration, 10, 18, 20]
    found = in_megatron(facts, str(run.folder), iterations).result()
    states = [item["map_state"] for item in found]
    assert states == ["none", "pending", "applied", "pending", "applied"]
    hashes = [[], [first.hash], [first.hash], [first.hash, second.hash], [first.hash, second.hash]]
    assert [item["lineage"] for item in found] == hashes
    counts = [
        [[layer[name] for layer in item["layers"]] for item in found]
        for name in ("experts_in_checkpoint", "experts_in_model")
    ]
    full, once, twice = (
        [8] * 4,
        [layer.experts_after for layer in first.layers],
        [layer.experts_after for layer in second.layers],
    )
    assert counts == [[full, full, once, once, twice], [full, once, once, twice, twice]]
    composed = Lineage((first, second)).composed
    assert found[-1]["layers"][2]["lineage"] == list(composed.layers[2].kept)
    assert [step["iteration"] for step in found[-1]["prunings"]] == [first.iteration, 18]


@pytest.mark.equality
def test_pruned_twice_equals_masked_twice(run, tmp_path):
    """Stock Megatron goes on from the first pending checkpoint, a full model, with its experts masked."""
    first, second = run.maps
    name = f"iter_{first.iteration:07d}"
    shutil.copytree(run.folder / name, tmp_path / name)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(str(first.iteration))
    union = tmp_path / "union.json"
    union.write_text(Lineage((first, second)).composed.to_json())
    masks = [str(run.folder / "laep" / name / "map.json"), str(union)]
    words = stock_flags(tmp_path, train_iters=ITERATIONS, save_interval=1000)
    losses = exact_losses(on_ranks(2, exact_job, words, masks=masks))
    assert list(losses) == list(range(first.iteration + 1, ITERATIONS + 1))
    for iteration, (loss, norm) in losses.items():
        pruned_loss, pruned_norm = run.losses[iteration]
        assert loss == pruned_loss, iteration
        # The same squares and some zeros, summed in another order.
        assert math.isclose(float.fromhex(norm), float.fromhex(pruned_norm), rel_tol=ORDER_OF_SUM)


@pytest.mark.equality
def test_killed_again_and_again(run, tmp_path):
    """After a save inside a window that counts for the decision, and on both sides of the second commit."""
    for point, iteration, complete in (
        ("iteration closed", SAVE_INTERVAL, SAVE_INTERVAL),
        ("saved but not committed", 18, 15),
        ("committed", 18, 18),
    ):
        killed = on_ranks(
            2, exact_job, flags(tmp_path), failure=Failure(point, "kill", iteration=iteration)
        )
        assert [outcome.error for outcome in killed] == ["Died", "Died"], killed[0].output[-3000:]
        tracker = (tmp_path / "latest_checkpointed_iteration.txt").read_text()
        assert int(tracker) == complete
    losses = exact_losses(on_ranks(2, exact_job, flags(tmp_path)))
    run.assert_same(tmp_path, losses, after=18)


@pytest.mark.equality
def test_exit_after_each_pruning_and_relaunch(run, tmp_path):
    losses = {}
    for last in (run.maps[0].iteration, 18, ITERATIONS):
        outcomes = on_ranks(2, exact_job, flags(tmp_path, laep_exit_after_prune=True))
        part = exact_losses(outcomes)
        assert not set(part) & set(losses) and max(part) == last
        losses |= part
    run.assert_same(tmp_path, losses, after=0)
    assert 'event=prunings done="' in outcomes[0].output and "to_come=none" in outcomes[0].output


def test_loads_that_are_not_stable_are_not_pruned_if_they_must_be(tmp_path):
    """Neither at the first iteration nor, after a relaunch, at the second."""
    words = flags(
        tmp_path,
        exit_interval=5,
        laep_prune_iteration=[4, 10],
        laep_prune_when_stable=None,
        laep_require_stable=True,
        laep_stability_rank_correlation=1.0,
        laep_stability_churn=0.0,
        laep_stability_load_change=0.0,
        laep_stability_patience=1,
    )
    outputs = []
    for last in (5, 10):
        outcomes = on_ranks(2, exact_job, words)
        assert list(exact_losses(outcomes)) == list(range(last - 4, last + 1))
        outputs.append(outcomes[0].output)
    for output, iteration in zip(outputs, (4, 10), strict=True):
        warning = f"LAEP WARNING\nThe loads are not stable at --laep-prune-iteration {iteration}."
        assert output.count("LAEP WARNING") == output.count(warning) == 1
        assert "The model is NOT PRUNED (--laep-require-stable)" in output
        assert "  layer 3: not stable: " in output
        state = "stable=False layers=0/4 needed=4 windows=2/2"
        assert f"event=stability iteration={iteration} {state}" in output
    assert "The job will try again up to iteration 10." in outputs[0]
    assert "event=prunings done=none declined=4 postponed=none to_come=10" in outputs[1]
    assert "relaunch with a later --laep-prune-iteration" in outputs[1]
    unpruned = Run(tmp_path, {}, "")
    assert unpruned.maps == []
    assert [(line["iteration"], line["verdict"]) for line in unpruned.decided] == [
        (4, "do not prune"),
        (10, "do not prune"),
    ]
