"""A pruning from end to end on the stock loop: oracles 2 and 4, relaunches, and what refuses the result.

One reference run prunes inside the job; everything else is compared with it, losses to the last bit.
"""

import importlib.metadata
import json
import math
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from megatron_laep import ExpertMap
from megatron_laep.records import load_log, profile_log
from megatron_laep.statistics.load_metrics import load_metrics
from tests.oracles.test_permutation import ORDER_OF_SUM
from tests.support.forks import in_megatron
from tests.support.plans import planned
from tests.support.runs import (
    LAEP,
    ON_CPU,
    REPOSITORY,
    SUPPORT,
    RunResult,
    run_megatron,
    tiny_arguments,
)
from tests.support.written_scalars import tensorboard_scalars, wandb_scalars

# Saves at 4 (inside the window of iterations 3 to 6), 6 (the pruning), 8 and 12.
ITERATIONS, WINDOW, PRUNE, SAVE_INTERVAL = 14, 4, 6, 4
MASKED = (str(SUPPORT / "masked.py"),)


def stock_flags(folder: Path, **more) -> list[str]:
    return tiny_arguments(
        **{
            "expert_model_parallel_size": 2,
            # What real jobs use; stock Megatron runs it, too. (fp32: test_repaired_jobs.)
            "bf16": True,
            "moe_router_dtype": "fp32",
            "use_distributed_optimizer": True,
            "moe_router_topk": 1,
            "moe_router_score_function": "sigmoid",
            "train_iters": ITERATIONS,
            "lr_decay_iters": 2 * ITERATIONS,
            "clip_grad": 100.0,
            "save": folder,
            "load": folder,
            "save_interval": SAVE_INTERVAL,
            "seed": 4,
            **more,
        }
    )


def flags(folder: Path, **more) -> list[str]:
    return stock_flags(
        folder,
        **{
            "laep_prune_iteration": PRUNE,
            "laep_window": WINDOW,
            "laep_alpha": 1.0,
            "laep_beta": 0.5,
            "laep_record_interval": 2,
            **more,
        },
    )


def pending_copy(folder: Path, run: "Pruned") -> Path:
    """A folder whose latest checkpoint is the one with the pending map, as if the job had been killed right then."""
    folder.mkdir()
    name = f"iter_{PRUNE:07d}"
    shutil.copytree(run.folder / name, folder / name)
    (folder / "latest_checkpointed_iteration.txt").write_text(str(PRUNE))
    return folder


@dataclass
class Pruned:
    folder: Path
    result: RunResult
    expert_map: ExpertMap

    def assert_continues(self, result: RunResult, after: int) -> None:
        assert set(result.exact) == set(range(after + 1, ITERATIONS + 1))
        assert result.exact == {i: self.result.exact[i] for i in result.exact}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Pruned:
    folder = tmp_path_factory.mktemp("pruned")
    logs = {
        "log_interval": 2,  # that of the recorded loads
        "tensorboard_dir": folder / "tensorboard",
        "wandb_project": "laep",
        "wandb_exp_name": "pruned",
        "laep_profile": 4,
    }
    result = run_megatron(
        flags(folder, **logs), 2, launcher=LAEP, env={"WANDB_MODE": "offline"}, timeout=240
    )
    text = (folder / "laep" / f"iter_{PRUNE:07d}" / "map.json").read_text()
    return Pruned(folder, result, ExpertMap.from_json(text))


def test_it_prunes(run) -> None:
    assert sum(layer.experts_after for layer in run.expert_map.layers) < 4 * 8
    assert len({layer.experts_after for layer in run.expert_map.layers}) > 1, "want uneven layers"
    assert list(run.result.exact) == list(range(1, ITERATIONS + 1))
    assert "event=old_model_alive" not in run.result.output


def test_what_the_user_sees(run) -> None:
    log = run.result.logs[0]
    for event in ("window_closed", "planned", "committed", "tear_down", "load_through_map", "load"):
        assert f"laep event={event} " in log
    assert "busiest rank" in log and "memory freed per rank" in log
    assert (
        "LAEP WARNING\nIt is not known whether the loads are stable: 1 of the 4 windows of 4 iterations "
        "that this takes were counted before iteration 6.\nThe model is PRUNED ALL THE SAME"
    ) in log
    files = run.folder / "laep" / f"iter_{PRUNE:07d}"
    table = json.loads((files / "table.json").read_text())
    loads = json.loads((files / "loads.json").read_text())
    assert table["experts_after"] == sum(layer.experts_after for layer in run.expert_map.layers)
    tokens = WINDOW * 8 * 64  # iterations x global batch x sequence, top-1
    assert [sum(row) for row in loads["tokens"]] == [tokens] * 4
    assert [list(layer.loads) for layer in run.expert_map.layers] == loads["tokens"]


def laep(*arguments) -> dict:
    """What an offline tool prints for a program, run in a process without the CPU platform."""
    command = [sys.executable, "-m", "megatron_laep.tools", *map(str, arguments), "--json"]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=True
    )
    return json.loads(done.stdout)


def test_the_offline_plan_is_the_plan_of_the_job(run) -> None:
    loads = run.folder / "laep" / f"iter_{PRUNE:07d}" / "loads.json"
    rules = ("--alpha", "1.0", "--beta", "0.5", "--top-k", "1", "--ep", "2")
    assert laep("plan", loads, *rules)["expert_map_hash"] == run.expert_map.hash


def test_inspect_of_its_checkpoints(run) -> None:
    kept = [layer.experts_after for layer in run.expert_map.layers]
    found = {i: laep("inspect", run.folder / f"iter_{i:07d}") for i in (4, PRUNE, 8)}
    assert [item["map_state"] for item in found.values()] == ["none", "pending", "applied"]
    assert [item["iteration"] for item in found.values()] == [4, PRUNE, 8]
    for iteration, in_checkpoint, in_model in (
        (4, [8] * 4, [8] * 4),
        (PRUNE, [8] * 4, kept),
        (8, kept, kept),
    ):
        layers = found[iteration]["layers"]
        assert [layer["experts_in_checkpoint"] for layer in layers] == in_checkpoint
        assert [layer["experts_in_model"] for layer in layers] == in_model
    for item in found.values():
        assert item["versions"]["megatron_core"] == importlib.metadata.version("megatron-core")
        assert item["settings"]["prune_iteration"] == [PRUNE]
        assert item["settings"]["beta"] == 0.5
    assert found[8]["lineage"] == [run.expert_map.hash]
    assert found[8]["layers"][0]["lineage"] == list(run.expert_map.layers[0].kept)
    # Per expert: fc1 64 x 32, fc2 32 x 32.
    assert found[4]["expert_parameters"] == 4 * 8 * 3072
    assert found[8]["expert_parameters"] == sum(kept) * 3072
    gone = found[4]["parameters"] - found[8]["parameters"]
    assert gone == (32 - sum(kept)) * (3072 + 32), "with its row of the router"
    assert laep("inspect", run.folder)["iteration"] == ITERATIONS


def described(path: Path) -> dict:
    from megatron_laep.mcore.checkpoint_facts import describe_checkpoint

    return describe_checkpoint(path)


def test_inspect_of_damaged_checkpoints(run, tmp_path) -> None:
    def damaged(name: str, content: bytes | None) -> str:
        """What inspect says of the checkpoint with another content of a file, or without it."""
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(run.folder / "iter_0000008", folder)
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        outcome = in_megatron(described, folder)
        assert outcome.error == "Refusal", outcome.output
        return outcome.message

    shard = next((run.folder / "iter_0000008").glob("*.distcp"))
    whole = shard.read_bytes()
    assert f"{shard.name} is not there" in damaged(shard.name, None)
    assert f"{shard.name} has {len(whole) - 1} bytes" in damaged(shard.name, whole[:-1])
    for name in (".metadata", "metadata.json"):
        content = (run.folder / "iter_0000008" / name).read_bytes()
        assert "is damaged: its .metadata or metadata.json" in damaged(
            name, content[: len(content) // 2]
        )


def test_the_loads_are_recorded(run) -> None:
    folder = run.folder / "laep"
    full = load_log.read(folder / "loads-full.bin")
    pruned = load_log.read(folder / f"loads-{run.expert_map.short_hash}.bin")
    assert list(full.last_iterations) == [2, 4, 6] and list(full.first_iterations) == [1, 3, 5]
    assert list(pruned.last_iterations) == [8, 10, 12, 14]
    # The pruning window is iterations 3 to 6: the last two that were recorded.
    assert [tuple(row) for row in full.last(2)] == [layer.loads for layer in run.expert_map.layers]
    kept = tuple(layer.experts_after for layer in run.expert_map.layers)
    assert pruned.expert_counts == kept and pruned.lineage == (run.expert_map.hash,)
    assert {int(row.sum()) for row in pruned.window(0)} == {2 * 8 * 64}


def test_the_metrics_of_the_training_log(run) -> None:
    """TensorBoard, W&B and console, against the loads that were recorded for the same intervals."""
    expected: dict[str, dict[int, float]] = {}
    folder, lines = run.folder / "laep", []
    for log, pruned in (
        (load_log.read(folder / "loads-full.bin"), False),
        (load_log.read(folder / f"loads-{run.expert_map.short_hash}.bin"), True),
    ):
        for window, iteration in enumerate(log.last_iterations):
            tokens = [np.array(row) for row in log.window(window)]
            kept = None
            if not pruned:
                plan = planned(tokens, log.layer_numbers, top_k=1, alpha="1.0", beta=0.5)
                kept = [np.array(layer.kept) for layer in plan.layers]
            blocks = [(row.size // 2,) * 2 for row in tokens]
            found = load_metrics(tokens, log.layer_numbers, blocks, kept)
            for name, value in found.scalars().items():
                expected.setdefault(name, {})[int(iteration)] = value
            lines.append(
                f"laep event=load iteration={iteration} imbalance_mean={found.imbalance_L.mean():.4g} "
            )
    assert set(expected["laep/imbalance/mean"]) == set(range(2, ITERATIONS + 1, 2))
    assert set(expected["laep/prunable/tokens"]) == {2, 4, PRUNE}
    for written, precision in (
        (tensorboard_scalars(run.folder / "tensorboard"), 1e-6),  # float32
        (wandb_scalars(run.folder / "wandb"), 1e-12),
    ):
        assert {name for name in written if name.startswith("laep/")} == set(expected)
        for name, values in expected.items():
            assert written[name] == pytest.approx(values, rel=precision), name
        assert set(written["lm loss"]) == set(range(1, ITERATIONS + 1))
    for line in lines:
        assert run.result.logs[0].count(line) == 1
    assert run.result.logs[0].count(" prunable_experts=") == 3


def test_where_the_time_went(run) -> None:
    """Both models were timed; that timing changes nothing is told by all that is equal to this run."""
    timed = profile_log.read(run.folder / "laep" / profile_log.NAME)
    assert [item["iteration"] for item in timed] == [4, 8, 12]
    for item in timed:
        assert [layer["layer"] for layer in item["layers"]] == [1, 2, 3, 4]
        for layer in item["layers"]:
            assert min(layer[part] for part in ("router", "dispatch", "experts", "combine")) > 0
            assert layer["waiting"] >= 0


@pytest.mark.equality
def test_a_job_that_does_not_prune_can_be_recorded(run, tmp_path) -> None:
    result = run_megatron(
        stock_flags(tmp_path, train_iters=4, laep_record_interval=2), 2, launcher=LAEP, timeout=240
    )
    assert result.exact == {i: run.result.exact[i] for i in range(1, 5)}
    mine, reference = (
        load_log.read(folder / "laep" / "loads-full.bin") for folder in (tmp_path, run.folder)
    )
    assert [row.tolist() for row in mine.last(2)] == [
        (a + b).tolist() for a, b in zip(reference.window(0), reference.window(1), strict=True)
    ]


@pytest.mark.equality
def test_pruned_equals_masked(run, tmp_path) -> None:
    """Oracle 2. The pending checkpoint is an ordinary one: stock Megatron opens it as the full model."""
    folder = pending_copy(tmp_path / "masked", run)
    map_file = run.folder / "laep" / f"iter_{PRUNE:07d}" / "map.json"
    masked = run_megatron(
        stock_flags(folder), 2, launcher=MASKED, env={"MASK": str(map_file)}, timeout=240
    )
    assert set(masked.exact) == set(range(PRUNE + 1, ITERATIONS + 1))
    for iteration, (loss, norm) in masked.exact.items():
        pruned_loss, pruned_norm = run.result.exact[iteration]
        assert loss == pruned_loss
        # The same squares and some zeros, summed in another order.
        assert math.isclose(float.fromhex(norm), float.fromhex(pruned_norm), rel_tol=ORDER_OF_SUM)


@pytest.mark.equality
def test_exit_after_prune_and_relaunch(run, tmp_path) -> None:
    first = run_megatron(flags(tmp_path, laep_exit_after_prune=True), 2, launcher=LAEP, timeout=240)
    assert first.returncodes == [0, 0]
    assert max(first.exact) == PRUNE
    second = run_megatron(
        flags(tmp_path, laep_exit_after_prune=True), 2, launcher=LAEP, timeout=240
    )
    run.assert_continues(second, after=PRUNE)


def test_a_pruned_checkpoint_does_not_open_without_the_launcher(run) -> None:
    result = run_megatron(
        stock_flags(run.folder, save=None, save_interval=None), 2, launcher=ON_CPU, check=False
    )
    assert not result.ok and not result.exact
    for log in result.logs:
        assert "this checkpoint was pruned by LAEP" in log and "'-m megatron_laep'" in log


def test_a_pruned_checkpoint_opens_without_laep_flags(run) -> None:
    result = run_megatron(
        stock_flags(
            run.folder,
            save=None,
            save_interval=None,
            train_iters=ITERATIONS + 2,
            use_checkpoint_opt_param_scheduler=True,
        ),
        2,
        launcher=LAEP,
    )
    assert set(result.exact) == {ITERATIONS + 1, ITERATIONS + 2}


@pytest.mark.equality
def test_a_job_that_began_elsewhere_goes_on_from_its_own_folder(run, tmp_path) -> None:
    """--load and --ckpt-step belong to the first start; the same command later continues."""
    command = flags(
        tmp_path, load=run.folder, ckpt_step=SAVE_INTERVAL, exit_interval=2 * SAVE_INTERVAL
    )
    first = run_megatron(command, 2, launcher=LAEP, timeout=240)
    assert set(first.exact) == set(range(SAVE_INTERVAL + 1, 2 * SAVE_INTERVAL + 1))
    second = run_megatron(command, 2, launcher=LAEP, timeout=240)
    run.assert_continues(second, after=2 * SAVE_INTERVAL)


@pytest.mark.equality
def test_an_empty_tracker_file_is_mended(run, tmp_path) -> None:
    """What Megatron leaves if it is killed while it writes the file, here behind the pruning's checkpoint."""
    folder = pending_copy(tmp_path / "empty", run)
    (folder / "latest_checkpointed_iteration.txt").write_text("")
    result = run_megatron(flags(folder), 2, launcher=LAEP, timeout=240)
    assert f"event=tracker_mended file={folder}/latest_checkpointed_iteration.txt" in result.logs[0]
    run.assert_continues(result, after=PRUNE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 16}, "pruned from --num-experts 8, got --num-experts 16"),
        ({"laep_prune_iteration": 9}, "was pruned at iteration 6, but --laep-prune-iteration is 9"),
    ],
)
def test_a_pruned_checkpoint_does_not_open_in_another_model(run, change, message) -> None:
    result = run_megatron(flags(run.folder, **change), 2, launcher=LAEP, check=False)
    assert not result.ok and not result.exact
    assert message in result.logs[0]
