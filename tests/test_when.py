"""Pruning at the first window end at which the loads are stable, or not at all: on Megatron's own loop.

One reference run prunes when its loads are stable, early; a job that was killed before it has the same losses.
"""

import dataclasses
import json
from pathlib import Path

import pytest
from exact_job import Losses, exact_job, exact_losses
from in_megatron import on_ranks
from test_pruning_run import stock_flags

from megatron_laep import decision_log, load_log
from megatron_laep.schedule import Verdict
from megatron_laep.stability import StabilityDecision, StabilityThresholds
from megatron_laep.tools.stability import decisions

# Windows end at 2, 4, 6 and so on. The saves, at 5 and 10, are inside one.
ITERATIONS, LATEST, WINDOW, SAVE_INTERVAL = 14, 12, 2, 5
THRESHOLDS = StabilityThresholds(rank_correlation=0.65, churn=1.0, patience=2)
RULE = {"alpha": "1.0", "beta": 0.5}


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
            "laep_alpha": RULE["alpha"],
            "laep_beta": RULE["beta"],
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
    def written(self) -> list[dict]:
        return decision_log.read(self.folder / "laep" / decision_log.NAME)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("when")
    outcomes = on_ranks(2, exact_job, flags(folder))
    return Run(folder, exact_losses(outcomes), outcomes[0].output)


def pruned_at(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("iter_")) for path in sorted(folder.glob("laep/iter_*"))]


def recorded(run: Run) -> tuple[load_log.LoadLog, list[StabilityDecision]]:
    """What ``laep stability`` says of the loads that the job recorded up to its pruning."""
    log = load_log.read(run.folder / "laep" / "loads-full.bin")
    return log, decisions(log, **RULE, thresholds=THRESHOLDS)


def test_it_prunes_at_the_first_window_end_at_which_the_loads_are_stable(run):
    _, found = recorded(run)
    stable = [decision.stable for decision in found]
    assert stable == [False] * (len(stable) - 1) + [True]
    # Neither at the first window end at which it could be, nor because it was the last one.
    assert (THRESHOLDS.patience + 1) * WINDOW < found[-1].iteration < LATEST
    assert pruned_at(run.folder) == [found[-1].iteration]
    assert list(run.losses) == list(range(1, ITERATIONS + 1))


def test_each_decision_is_logged_with_its_reasons(run):
    log, found = recorded(run)
    assert len(run.written) == len(found) >= 4
    for line, decision in zip(run.written, found, strict=True):
        assert decision.format() in run.output
        expected = json.loads(json.dumps(decision.to_dict()))
        assert {name: line[name] for name in expected} == expected
    verdicts = [line["verdict"] for line in run.written]
    assert verdicts == [Verdict.WAIT] * (len(found) - 1) + [Verdict.PRUNE]
    assert "LAEP WARNING" not in run.output
    # The pruning is decided on the window that ended then.
    end = found[-1].iteration
    assert run.written[-1]["windows"] == [[end - 5, end - 4], [end - 3, end - 2], [end - 1, end]]
    loads = json.loads((run.folder / "laep" / f"iter_{end:07d}" / "loads.json").read_text())
    assert (loads["iteration"], loads["window"]) == (end, WINDOW)
    assert loads["tokens"] == [row.tolist() for row in log.window(-1)]


def test_a_killed_job_decides_what_the_other_one_did(run, tmp_path):
    """Killed after a save inside a window, with windows that count behind it."""
    point = ("after the first ordinary save", SAVE_INTERVAL)
    killed = on_ranks(2, exact_job, flags(tmp_path), point)
    assert [outcome.error for outcome in killed] == ["Died", "Died"]
    assert pruned_at(tmp_path) == []
    losses = exact_losses(on_ranks(2, exact_job, flags(tmp_path)))
    assert pruned_at(tmp_path) == pruned_at(run.folder)
    assert losses == {i: loss for i, loss in run.losses.items() if i > SAVE_INTERVAL}
    again = Run(tmp_path, losses, "")
    assert [{**line, "row": 0} for line in again.written] == [
        {**line, "row": 0} for line in run.written
    ]


def test_loads_that_are_not_stable_are_not_pruned_if_they_must_be(tmp_path):
    """Nor by the relaunch, which trains on."""
    strict = {
        "laep_prune_iteration": 4,
        "laep_prune_when_stable": None,
        "laep_require_stable": True,
        "laep_stability_rank_correlation": 1.0,
        "laep_stability_churn": 0.0,
        "laep_stability_load_change": 0.0,
        "laep_stability_patience": 1,
        "use_checkpoint_opt_param_scheduler": True,
    }
    outputs = []
    for last in (5, 7):
        words = flags(tmp_path, **strict, train_iters=last, save_interval=last)
        outcomes = on_ranks(2, exact_job, words)
        assert max(exact_losses(outcomes)) == last
        outputs.append(outcomes[0].output)
    first, second = outputs
    assert "LAEP WARNING\nThe loads are not stable at --laep-prune-iteration 4." in first
    assert "The model is NOT PRUNED (--laep-require-stable)" in first
    assert "  layer 3: not stable: " in first
    assert "event=stability iteration=4 stable=False layers=0/4 needed=4 windows=2/2" in first
    assert "event=not_pruned iteration=4" in second
    assert "event=stability" not in second and "LAEP WARNING" not in second
    assert pruned_at(tmp_path) == []
    (line,) = decision_log.read(tmp_path / "laep" / decision_log.NAME)
    assert line["verdict"] == Verdict.DECLINE
