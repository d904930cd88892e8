"""The launcher and the Python API: what they add to a job, and that they add nothing else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_laep import LaepConfig
from megatron_laep.__main__ import REFUSED
from tests.support.forks import in_megatron
from tests.support.runs import (
    LAEP,
    ON_CPU,
    PRETRAIN_GPT,
    REPOSITORY,
    RunResult,
    run_megatron,
    tiny_arguments,
)

ITERATIONS = 4
FLAGS = sorted("--" + name.replace("_", "-") for name in LaepConfig().to_arguments())


def launch(*words: str | Path) -> subprocess.CompletedProcess:
    """``python -m megatron_laep WORDS``, as on a machine with GPUs: without the CPU platform."""
    environment = {name: value for name, value in os.environ.items() if "PLATFORM" not in name}
    return subprocess.run(
        [sys.executable, "-m", "megatron_laep", *map(str, words)],
        env=environment | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


# ----------------------------------------------------------------------------------------------
# Usage


def test_without_a_script():
    run = launch()
    assert run.returncode == 2
    assert "usage: python -m megatron_laep SCRIPT" in run.stdout


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_of_the_launcher(flag):
    run = launch(flag)
    assert run.returncode == 0
    assert run.stdout.startswith("usage: python -m megatron_laep SCRIPT")


def test_script_that_does_not_exist(tmp_path):
    run = launch(tmp_path / "gone.py", "--lr", "1")
    assert run.returncode == REFUSED
    assert run.stderr.strip() == f"megatron_laep: the script {tmp_path}/gone.py does not exist"


PROBE = """
import json, os, sys
import megatron_laep.loop.loop_hooks, neighbour
from megatron.training import training
print(json.dumps({
    "name": __name__,
    "file": __file__,
    "argv": sys.argv,
    "path": sys.path[0],
    "neighbour": neighbour.__file__,
    "hooked": training.load_checkpoint.__module__,
    "cpu platform": "megatron_laep.cpu" in sys.modules,
}))
sys.exit(3)
"""


def test_script_runs_as_it_would_alone(tmp_path):
    script, neighbour = tmp_path / "probe.py", tmp_path / "neighbour.py"
    script.write_text(PROBE)
    neighbour.write_text("")
    run = launch(script, "--lr", "1", "--help")
    assert run.returncode == 3, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == {
        "name": "__main__",
        "file": str(script),
        "argv": [str(script), "--lr", "1", "--help"],
        "path": str(tmp_path),
        "neighbour": str(neighbour),
        "hooked": "megatron_laep.loop.loop_hooks",
        "cpu platform": False,
    }


def main_of_launcher(*words: str) -> None:
    """The launcher in a process that has Megatron already."""
    from megatron_laep.__main__ import main

    sys.argv = ["megatron_laep", str(PRETRAIN_GPT), *words]
    main()


def test_flags_show_in_the_help_of_the_script():
    outcome = in_megatron(main_of_launcher, "--help")
    assert (outcome.error, outcome.message) == ("SystemExit", "0")
    assert "--moe-router-topk" in outcome.output
    missing = [flag for flag in FLAGS if f"{flag} " not in outcome.output.replace("\n", " ")]
    assert FLAGS and missing == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--laep-placement", "best"], "argument --laep-placement: invalid choice: 'best'"),
        (["--laep-window", "many"], "argument --laep-window: invalid int value: 'many'"),
        (["--laep-beta"], "argument --laep-beta: expected one argument"),
        (["--laep-gamma", "1"], "unrecognized arguments: --laep-gamma 1"),
    ],
)
def test_usage_errors_of_the_flags(words, message):
    outcome = in_megatron(main_of_launcher, *words)
    assert (outcome.error, outcome.message) == ("SystemExit", str(REFUSED))
    (said,) = (text for text in outcome.output.splitlines() if text.startswith("megatron_laep: "))
    assert said.startswith(f"megatron_laep: {message}") and "--help" in said
    assert "usage:" not in outcome.output


def test_usage_errors_of_a_job_without_the_flags_are_megatrons():
    outcome = in_megatron(main_of_launcher, "--lr", "high")
    assert (outcome.error, outcome.message) == ("SystemExit", "2")
    assert "error: argument --lr: invalid float value: 'high'" in outcome.output


# ----------------------------------------------------------------------------------------------
# Without a flag


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> tuple[RunResult, Path]:
    """A job under the launcher, without any of its flags, that saves at its end."""
    save = tmp_path_factory.mktemp("save")
    arguments = tiny_arguments(
        expert_model_parallel_size=2, train_iters=ITERATIONS, save=save, save_interval=ITERATIONS
    )
    return run_megatron(arguments, 2, launcher=LAEP), save


@pytest.mark.equality
@pytest.mark.distributed
def test_without_a_flag_losses_are_those_of_the_script_alone(launched):
    arguments = tiny_arguments(expert_model_parallel_size=2, train_iters=ITERATIONS)
    alone = run_megatron(arguments, 2, launcher=ON_CPU)
    assert sorted(alone.exact) == list(range(1, ITERATIONS + 1))
    assert len(set(alone.exact.values())) == ITERATIONS
    assert launched[0].exact == alone.exact
    assert launched[0].exact_losses == alone.exact_losses
    assert "laep event=" not in launched[0].output


@pytest.mark.distributed
def test_flags_are_printed_with_the_other_arguments(launched):
    printed = launched[0].logs[0]
    # Megatron's own listing: "  name ........ value".
    assert re.search(r"^  moe_router_topk \.+ 2$", printed, re.MULTILINE)
    for name, value in LaepConfig().to_arguments().items():
        assert re.search(rf"^  {name} \.+ {re.escape(str(value))}$", printed, re.MULTILINE), name


def read_checkpoint(folder: str) -> dict:
    from megatron.core import dist_checkpointing

    state = dist_checkpointing.load_common_state_dict(folder)
    saved = {name: value for name, value in vars(state["args"]).items() if "laep" in name}
    tensors = dist_checkpointing.load_tensors_metadata(folder)
    return {"args": saved, "keys": [key for key in (*state, *tensors) if "laep" in key]}


@pytest.mark.distributed
def test_flags_are_saved_and_nothing_else(launched):
    folder = str(launched[1] / f"iter_{ITERATIONS:07d}")
    found = in_megatron(read_checkpoint, folder).result()
    assert found == {"args": LaepConfig().to_arguments(), "keys": []}
    assert not (launched[1] / "laep").exists()


# ----------------------------------------------------------------------------------------------
# install() and uninstall()


def attributes_of_megatron() -> dict[tuple[str, str], int]:
    """Every name in Megatron's loaded modules and their classes, with the identity of its value."""
    found = {}
    for module_name, module in list(sys.modules.items()):
        if not module_name.startswith("megatron.") or module is None:
            continue
        for name, value in list(vars(module).items()):
            found[module_name, name] = id(value)
            # Not under the other names that a class has in its module.
            if isinstance(value, type) and (value.__module__, value.__name__) == (
                module_name,
                name,
            ):
                for member, raw in list(vars(value).items()):
                    found[module_name, f"{name}.{member}"] = id(raw)
    return found


def install_and_uninstall() -> list[dict]:
    import megatron_laep
    import megatron_laep.loop.loop_hooks  # and with it all of Megatron that it imports
    from megatron_laep.mcore.upstream_bugs import ask_megatron

    repairs = len(ask_megatron().hooks(lambda: False))
    before = attributes_of_megatron()
    seen = []
    for _ in range(2):
        megatron_laep.install()
        during = attributes_of_megatron()
        megatron_laep.uninstall()
        after = attributes_of_megatron()
        seen.append(
            {
                "hooked": sorted(place for place in before if during[place] != before[place]),
                "left": sorted(place for place in before if after[place] != before[place]),
                "asked for": len(megatron_laep.loop.loop_hooks.hooks()) + repairs,
            }
        )
    return seen


def test_uninstall_gives_every_attribute_back():
    first, second = in_megatron(install_and_uninstall).result()
    assert first["left"] == second["left"] == []
    assert first["hooked"] == second["hooked"]
    assert ("megatron.training.training", "load_checkpoint") in first["hooked"]
    assert ("megatron.core.models.gpt.moe_module_specs", "MoELayer") in first["hooked"]
    assert len(first["hooked"]) == first["asked for"], "and nothing else"


def install_after(removed: list[tuple[str, str]]) -> tuple[str, list]:
    """Message of install() in a Megatron that lacks some names, and what it replaced even so."""
    import importlib

    import megatron_laep
    import megatron_laep.loop.launch

    for module, name in removed:
        delattr(importlib.import_module(module), name)
    before = attributes_of_megatron()
    try:
        megatron_laep.install()
    except ValueError as error:
        after = attributes_of_megatron()
        return str(error), [place for place in before if after[place] != before[place]]
    return "installed", []


def test_another_megatron_is_refused_whole():
    removed = [
        ("megatron.training.training", "checkpoint_and_decide_exit"),
        ("megatron.training.checkpointing", "generate_state_dict"),
    ]
    message, replaced = in_megatron(install_after, removed).result()
    assert replaced == []
    for module, name in removed:
        assert f"{module}:{name} is missing (needed to " in message
    assert "training:load_checkpoint" not in message
    assert message.startswith("megatron-core ") and "lacks what megatron_laep needs: " in message
    assert message.endswith("install such a version, or run the script without '-m megatron_laep'")


def install_twice() -> None:
    import megatron_laep

    megatron_laep.install()
    megatron_laep.install()


def test_second_install_is_refused():
    outcome = in_megatron(install_twice)
    assert outcome.error == "RuntimeError"
    assert "install() was called twice; call megatron_laep.uninstall()" in outcome.message


def install_config(config: LaepConfig, arguments: list[str]) -> dict:
    import megatron_laep

    before = attributes_of_megatron()
    try:
        megatron_laep.install(config)
    except ValueError as error:
        after = attributes_of_megatron()
        return {"error": str(error), "replaced": [p for p in before if after[p] != before[p]]}
    from megatron.training.arguments import parse_and_validate_args

    sys.argv = ["script.py", *map(str, arguments)]
    args = parse_and_validate_args()
    return {name: getattr(args, name) for name in config.to_arguments()}


def test_settings_can_come_from_python(tmp_path):
    config = LaepConfig(prune_iteration=3, window=2, alpha="0.3:1-4", exit_after_prune=True)
    arguments = tiny_arguments(save=tmp_path, save_interval=1000)
    outcome = in_megatron(install_config, config, arguments)
    assert outcome.result() == config.to_arguments()


def test_bad_settings_from_python_install_nothing():
    config = LaepConfig(prune_iteration=3, beta=1.5)
    assert in_megatron(install_config, config, []).result() == {
        "error": "--laep-beta must be within 0 and 1, got 1.5",
        "replaced": [],
    }
