"""scripts/study.py: its table, the controls' plans, what it reads from logs, and a real run that is
killed, continued and collected.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_laep.cpu.fused_adam import FusedAdam
from megatron_laep.plan.expert_map import ExpertMap, LayerMap

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
sys.path.append(str(SCRIPTS))

from study_parts import collect, corpus, execute, plans, table, train  # noqa: E402
from study_parts.execute import Place  # noqa: E402
from study_parts.table import BASE, BUSIEST, DEFAULT, RANDOM, Run, Setting  # noqa: E402

SETTING = Setting()
ROWS = {row.name: row for row in table.rows(SETTING)}


def value(flags: tuple[str, ...] | list[str], name: str) -> str:
    """Of the last occurrence, which is the one that argparse takes."""
    return flags[len(flags) - 1 - flags[::-1].index(name) + 1]


# -- the table --------------------------------------------------------------------------------------


def test_the_table_has_what_the_paper_has_and_the_controls():
    groups = {row.group for row in ROWS.values()}
    assert groups == {"table 1", "table 2", "which experts", "moment", "resume", "equal compute"}
    alone = {name: row for name, row in ROWS.items() if "inf" in row.flags}
    assert {value(row.flags, "--laep-beta") for row in alone.values()} == {"0.05", "0.1", "0.2"}
    alphas = {value(r.flags, "--laep-alpha") for r in ROWS.values() if r.group == "table 2"}
    assert alphas == {"0.2", "0.6", "0.2:1,0.4:2-3,0.2:4"}
    assert value(ROWS[DEFAULT].flags, "--laep-alpha") == "0.4"
    assert value(ROWS[DEFAULT].flags, "--laep-beta") == "0.1"
    assert ROWS[BASE].flags == ()
    assert {row.plan for row in ROWS.values()} == {None, "random", "busiest", "small"}


def test_moments_are_shares_of_the_training():
    at = {name: value(row.flags, "--laep-prune-iteration") for name, row in ROWS.items() if row.flags
          and "--laep-prune-iteration" in row.flags}  # fmt: skip
    shares = {name: int(at[name]) / SETTING.iterations for name in at}
    assert shares[DEFAULT] == 0.25
    assert [shares[f"moment-{p}"] for p in (10, 50, 75)] == [0.1, 0.5, 0.75]


def test_three_steps_leave_as_many_tokens_untouched_as_one():
    flags = ROWS["three-steps"].flags
    iterations = flags[1:4]
    assert all(word.isdigit() for word in iterations) and not flags[4].isdigit()
    # The rule prunes a share below beta of what is left, three times.
    untouched = (1 - float(value(flags, "--laep-beta"))) ** 3
    assert abs(untouched - 0.9) < 3 * 0.00005  # beta has four decimals
    assert sum(map(int, iterations)) == 3 * SETTING.prune_at


def test_seeds_and_order_of_the_queue():
    queue = table.runs(tuple(ROWS.values()))
    seeds = Counter(run.row.name for run in queue)
    assert {name for name, count in seeds.items() if count == 5} == {BASE, DEFAULT}
    assert set(seeds.values()) == {3, 5}
    names = [run.name for run in queue]
    assert len(set(names)) == len(names)
    assert {run.row.name for run in queue[:10]} == {BASE, DEFAULT}
    # Then one seed of every other row before the second of any.
    others = len(ROWS) - 2
    assert [run.seed for run in queue[10:]] == [1] * others + [2] * others + [3] * others
    for run in queue:
        assert run.needs is None or names.index(run.needs) < names.index(run.name)


def test_runs_of_a_seed_differ_in_their_row_only(tmp_path):
    place = Place(tmp_path)
    base = execute.flags(place, Run(ROWS[BASE], 2), execute.TRAIN)
    other = execute.flags(place, Run(ROWS["aux-1e-2"], 2), execute.TRAIN)
    own = ["--moe-router-load-balancing-type", "aux_loss", "--moe-aux-loss-coeff", "1e-2"]
    assert other == [word.replace(f"{BASE}-", "aux-1e-2-") for word in base] + own
    assert value(base, "--seed") == "2" and value(base, "--lr-decay-iters") == "2000"
    longer = execute.flags(place, Run(ROWS["longer-10"], 2), execute.TRAIN)
    assert value(longer, "--train-iters") == value(longer, "--lr-decay-iters") == "2200"


def test_all_runs_are_judged_on_the_same_sequences(tmp_path):
    place = Place(tmp_path)
    for name in (BASE, DEFAULT):
        for seed in (1, 2):
            flags = execute.flags(place, Run(ROWS[name], seed), execute.EVALUATE)
            assert value(flags, "--seed") == str(execute.EVALUATION_SEED)
            assert "--skip-train" in flags and "--save" not in flags
            assert not [word for word in flags if word.startswith("--laep-")]
            assert flags[-1] != "1"  # no value is left of a flag that was taken out
            assert value(flags, "--load") == str(tmp_path / f"{name}-seed{seed}")


# -- the controls' plans ----------------------------------------------------------------------------


def some_map() -> ExpertMap:
    """Two layers of 6 experts, of which LAEP kept 4 and 3."""
    loads = ((50, 1, 40, 2, 30, 20), (9, 8, 70, 60, 7, 50))
    kept = ((0, 2, 5, 4), (2, 3, 5))
    layers = tuple(
        LayerMap(number, 6, kept[i], (len(kept[i]),), loads[i]) for i, number in enumerate((1, 2))
    )
    return ExpertMap(
        iteration=500,
        layers=layers,
        alpha="0.4",
        beta=0.1,
        expert_multiple=1,
        placement="balanced",
        expert_parallel_size_before=1,
        expert_parallel_size_after=1,
        top_k=2,
    )


def test_the_busiest_go():
    made = plans.control(some_map(), BUSIEST, seed=1)
    # Layer 1: the two busiest, 0 and 2, go. Layer 2: the three busiest, 2, 3 and 5.
    assert [layer.kept for layer in made.layers] == [(1, 3, 4, 5), (0, 1, 4)]
    assert ExpertMap.from_json(made.to_json()) == made


def test_random_ones_go_as_many_in_each_layer_and_the_same_for_a_seed():
    source = some_map()
    drawn = [plans.control(source, RANDOM, seed) for seed in range(20)]
    for made in drawn:
        assert [layer.experts_after for layer in made.layers] == [4, 3]
    assert drawn[3] == plans.control(source, RANDOM, 3)
    # 15 choices of layer 1: that 20 draws are all one has the probability 15^-19.
    assert len({made.layers[0].kept for made in drawn}) > 1


@pytest.mark.parametrize("kept, wanted", [((4, 3), 4), ((3, 3), 3), ((2, 2), 2), ((6, 5), 6)])
def test_the_small_model_has_the_nearest_uniform_count(kept, wanted):
    """3.5 is as near to 3 as to 4; Python rounds half to even. 5.5 is rounded to 6."""
    source = some_map()
    layers = tuple(
        LayerMap(layer.layer_number, 6, range(n), (n,), layer.loads)
        for n, layer in zip(kept, source.layers, strict=True)
    )
    assert plans.small_model(dataclasses.replace(source, layers=layers)) == wanted


def test_a_control_takes_its_plan_from_the_run_of_its_seed(tmp_path):
    place = Place(tmp_path)
    run = Run(ROWS["control-busiest"], 2)
    folder = tmp_path / f"{DEFAULT}-seed2" / "laep" / "iter_0000500"
    assert not place.ready(run)
    with pytest.raises(ValueError, match="0 maps.*wanted that of one pruning"):
        execute.flags(place, run, execute.TRAIN)
    folder.mkdir(parents=True)
    (folder / "map.json").write_text(some_map().to_json())
    (folder.parents[1] / "result.json").write_text("{}")
    assert place.ready(run)
    plan = value(execute.flags(place, run, execute.TRAIN), "--laep-plan")
    assert ExpertMap.from_json(Path(plan).read_text()).layers[1].kept == (0, 1, 4)
    small = execute.flags(place, Run(ROWS["control-small"], 2), execute.TRAIN)
    assert value(small, "--num-experts") == "4"
    assert "--num-experts" in execute.flags(place, Run(ROWS["control-small"], 2), execute.EVALUATE)


# -- the text ---------------------------------------------------------------------------------------


def test_the_sets_share_no_file_and_leave_none_out():
    files = corpus.files_of_sets()
    every = [path for name in corpus.SETS for path in files[name]]
    assert len(set(every)) == len(every) > 3000
    for name in ("valid", "test"):
        assert 0.01 < len(files[name]) / len(every) < 0.05  # one of 40 parts of the names
        assert {path.suffix for path in files[name]} == {".py", ".h"}


# -- what is read from logs -------------------------------------------------------------------------

LOG = """\
 [2026] iteration       10/      40 | consumed samples: 160 | lm loss: 5.0E+00 | loss scale: 1.0 |
 [2026] iteration       20/      40 | consumed samples: 320 | lm loss: 4.5E+00 | loss scale: 1.0 |
 validation loss at iteration 20 | lm loss value: 4.400000E+00 | lm loss PPL: 8.1E+01 |
 [2026] iteration       20/      40 | consumed samples: 320 | lm loss: 4.0E+00 | loss scale: 1.0 |
 validation loss at iteration 20 | lm loss value: 3.900000E+00 | lm loss PPL: 8.1E+01 |
 validation loss at iteration 40 on validation set | lm loss value: 3.1E+00 | lm loss PPL: 2.2E+01 |
 validation loss at iteration 40 on test set | lm loss value: 3.2E+00 | lm loss PPL: 2.4E+01 |
"""


def test_of_repeated_iterations_the_later_line_counts():
    training, curves = collect.losses(LOG)
    assert training == [[10, 5.0], [20, 4.0]]
    assert curves == {"validation": [[20, 3.9], [40, 3.1]], "test": [[40, 3.2]]}


def test_the_slope_is_that_of_the_end():
    # Until 800 it falls by 1 in 100 iterations, from there by 0.25.
    curve = [[i, 20 - 0.01 * min(i, 800) - 0.0025 * max(0, i - 800)] for i in range(0, 1001, 10)]
    assert collect.slope(curve, 1000) == pytest.approx(-0.25)
    assert collect.slope(curve[-2:], 1000) is None


# -- what follows on a pruning ----------------------------------------------------------------------


class TinyModel(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = torch.nn.ModuleDict(
            {"router": torch.nn.Linear(4, 3, bias=False), "expert": torch.nn.Linear(4, 4)}
        )


@pytest.fixture
def learning():
    """(model, optimizer as Megatron wraps one, what makes a step), after two steps."""
    torch.manual_seed(0)
    model = TinyModel()
    adam = FusedAdam(model.parameters(), lr=0.1, weight_decay=0.1)

    def step() -> float:
        for parameter in model.parameters():
            parameter.grad = parameter.main_grad
        norm = sum(float(p.grad.square().sum()) for p in model.parameters()) ** 0.5
        adam.step()
        return norm

    optimizer = SimpleNamespace(optimizer=adam, step=step)

    def learn() -> float:
        for parameter in model.parameters():
            parameter.main_grad = torch.randn_like(parameter)
        return optimizer.step()

    learn()
    learn()
    return model, optimizer, learn


def snapshot(model: torch.nn.Module, optimizer: SimpleNamespace) -> dict[str, torch.Tensor]:
    state = optimizer.optimizer.state
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = parameter.detach().clone()
        found |= {f"{name} {m}": state[parameter][m].clone() for m in train.MOMENTS}
    return found


def test_only_the_router_learns_for_so_many_steps(learning):
    model, optimizer, learn = learning
    train.learn_router_only(optimizer, [model], steps=2)
    for _ in range(2):
        before = snapshot(model, optimizer)
        norm = learn()
        after = snapshot(model, optimizer)
        assert {n for n in before if not torch.equal(before[n], after[n])} == {
            name for name in before if name.startswith("mlp.router.")
        }
        assert norm == pytest.approx(float(model.mlp.router.weight.main_grad.norm()))
    before = after
    learn()
    after = snapshot(model, optimizer)
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_without_moments_adam_does_what_a_new_one_does(learning):
    model, optimizer, learn = learning
    new = copy.deepcopy(model)
    train.forget_moments(optimizer)
    torch.manual_seed(1)
    learn()
    fresh = FusedAdam(new.parameters(), lr=0.1, weight_decay=0.1)
    torch.manual_seed(1)
    for parameter in new.parameters():
        parameter.grad = torch.randn_like(parameter)
    fresh.step()
    for ours, theirs in zip(model.parameters(), new.parameters(), strict=True):
        assert torch.equal(ours, theirs)


# -- processes --------------------------------------------------------------------------------------


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait_for(what, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


def study(root: Path, *more: str, **named) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-u", str(SCRIPTS / "study.py"), "--root", str(root), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **named,
    )


def test_pause_and_continue_reach_the_processes_of_runs_and_no_others(tmp_path):
    sleepers = [subprocess.Popen(["sleep", "60"], start_new_session=True) for _ in range(2)]
    try:
        mine, other = (process.pid for process in sleepers)
        for name, pid, started in (
            ("base-seed1", mine, execute.start_time(mine)),
            ("base-seed2", other, "1"),  # the number of a process that ended, given to another
        ):
            (tmp_path / name).mkdir()
            (tmp_path / name / "process.json").write_text(
                json.dumps({"pid": pid, "started": started})
            )
        said, _ = study(tmp_path, "--pause").communicate(timeout=60)
        assert said == "paused: base-seed1\n"
        wait_for(lambda: state(mine) == "T")
        assert state(other) == "S"
        assert (tmp_path / "PAUSE").exists()
        said, _ = study(tmp_path, "--continue").communicate(timeout=60)
        assert said == "going on: base-seed1\n"
        wait_for(lambda: state(mine) == "S")
        assert not (tmp_path / "PAUSE").exists()
    finally:
        for process in sleepers:
            process.kill()
            process.wait()


def test_runs_leave_the_cores_to_others():
    process = subprocess.Popen(["sleep", "60"], preexec_fn=execute._last_in_queue)
    try:
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == 19
        assert os.sched_getscheduler(process.pid) == os.SCHED_IDLE
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    "flags, wanted",
    [
        (["--only", "nothing*"], "no run has such a name"),
        (["--iterations", "5"], "at least 20"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
    ],
)
def test_mistakes_are_told(tmp_path, flags, wanted):
    process = study(tmp_path, *flags)
    said, _ = process.communicate(timeout=60)
    assert wanted in said and "Traceback" not in said
    assert process.returncode == 2


SMALL_CORPUS = """
import json, sys
from pathlib import Path
from prepare_data import byte_tokenizer, write_dataset
data = Path(sys.argv[1])
for name, source in (("train", "argparse"), ("valid", "json/decoder"), ("test", "ast")):
    file = Path(json.__file__).parents[1] / f"{source}.py"
    write_dataset([file], data / name, byte_tokenizer(), "text")
(data / "corpus.json").write_text('{"text": "a few files"}')
"""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.long
def test_a_run_is_killed_continued_and_collected(tmp_path):
    """With the driver; the run goes on from its checkpoint, and is not repeated when it has ended."""
    name = f"{DEFAULT}-seed1"
    folder = tmp_path / name
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SMALL_CORPUS, str(tmp_path / "data")],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{SCRIPTS}"},
        capture_output=True,
        timeout=120,
        check=True,
    )
    asked = ("--iterations", "20", "--jobs", "1", "--normal-priority", "--only", name)

    driver = study(tmp_path, *asked)
    wait_for((folder / "latest_checkpointed_iteration.txt").exists, 150)
    process = json.loads((folder / "process.json").read_text())
    second, _ = study(tmp_path, *asked).communicate(timeout=60)
    assert "another driver works in" in second
    driver.send_signal(signal.SIGKILL)
    driver.communicate(timeout=60)
    wait_for(lambda: execute.start_time(process["pid"]) != process["started"])
    assert not (folder / "result.json").exists()

    driver = study(tmp_path, *asked)
    said, _ = driver.communicate(timeout=240)
    assert driver.returncode == 0, said
    log = (folder / "train.log").read_text()
    assert "loading distributed checkpoint from" in log
    found = json.loads((folder / "result.json").read_text())
    assert found["iterations"] == 20
    assert [i for i, _ in found["training"]] == list(range(1, 21))
    assert found["tokens"] == 20 * 16 * 128
    assert [pruning["iteration"] for pruning in found["prunings"]] == [5]
    left = sum(found["prunings"][0]["experts_after"])
    assert found["parameters_before"] > found["parameters_after"] and left < 64
    assert "iteration=5 stable=" in found["stability"][-1]
    # The last window is one iteration: four experts for each token of it, in every layer.
    assert [sum(row) for row in found["last_loads"]] == [16 * 128 * 4] * 4
    # Losses in nats a byte, of a model that has hardly begun: below that of 257 equal guesses.
    assert 1 < found["test_loss"] < 5.55 and 1 < found["validation_loss"] < 5.55
    assert len(list(folder.glob("iter_*"))) == 1
    assert found["machine"]["torch"] == torch.__version__.partition("+")[0]

    said, _ = study(tmp_path, *asked).communicate(timeout=60)
    assert "train" not in said
    assert (folder / "train.log").read_text() == log
    results = tmp_path / "results.json"
    study(tmp_path, *asked, "--collect", str(results)).communicate(timeout=60)
    collected = json.loads(results.read_text())
    assert collected["runs"] == [found] and collected["wanted"] == [name]
    assert collected["corpus"] == {"text": "a few files"}
