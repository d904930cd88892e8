"""What is installed, declared and shipped: pyproject.toml, scripts, configs, licence.

Nothing here trains. The one expensive step, building Megatron's argument parser, runs in a process
of its own, because importing Megatron leaves traces that other tests must not inherit.
"""

import ast
import functools
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from megatron_laep.mcore.versions import SUPPORTED

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "megatron_laep"
CONFIGS = sorted((ROOT / "configs").glob("*.args"))
SHELL_SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]
# The modules that work without torch and Megatron: what `pip install megatron-laep` alone must run.
PURE = tuple(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).replace(".", "/")
    for folder in ("settings", "plan", "records", "tools")
    for path in sorted((PACKAGE / folder).rglob("*.py"))
    if path.stem != "simulate"
)


@functools.cache
def requirements() -> dict[str, list[str]]:
    """What each extra of pyproject.toml asks for, as scripts/check_environment.py reads it; "" is the
    package alone."""
    script = runpy.run_path(str(ROOT / "scripts" / "check_environment.py"))
    return script["read_requirements"]()


def names(requirements: list[str]) -> set[str]:
    return {Requirement(text).name.lower().replace("_", "-") for text in requirements}


def third_party_imports(path: Path, top_level_only: bool) -> set[str]:
    """Names of the third-party modules that a file imports, without dots.

    top_level_only: leave out imports inside functions, which run only when somebody calls them.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    pending = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
        elif top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        pending.extend(ast.iter_child_nodes(node))
    ours = {"megatron_laep"} | {p.stem for f in ("tests", "scripts") for p in (ROOT / f).glob("*")}
    return found - set(sys.stdlib_module_names) - ours


def distributions_of(modules: set[str]) -> set[str]:
    """Distribution names, lower case with dashes, of top-level modules installed here."""
    known = packages_distributions()
    unknown = {module for module in modules if module not in known}
    assert not unknown, f"no installed distribution provides {sorted(unknown)}"
    return {known[module][0].lower().replace("_", "-") for module in modules}


def test_dependencies_are_what_the_pure_core_imports_at_top_level():
    modules = set()
    for name in PURE:
        modules |= third_party_imports(PACKAGE / f"{name}.py", top_level_only=True)
    assert distributions_of(modules) == names(requirements()[""])


@pytest.mark.parametrize(
    ("folder", "extras"),
    [("megatron_laep", "train report"), ("scripts", "train study"), ("tests", "test")],
)
def test_every_import_of_a_folder_is_declared(folder, extras):
    declared = names(requirements()[""])
    for extra in extras.split():
        declared |= names(requirements()[extra])
    # Come with torch, Megatron-Core and setuptools' users; and what only a GPU image has.
    declared |= {"packaging", "setuptools", "transformer-engine", "apex"}
    modules = set()
    for path in (ROOT / folder).rglob("*.py"):
        modules |= third_party_imports(path, top_level_only=False)
    modules -= {"transformer_engine", "apex", "tests"}
    assert distributions_of(modules) <= declared


def test_no_requirement_names_what_only_the_gpu_image_may_bring():
    declared = set().union(*map(names, requirements().values()))
    assert not declared & {"apex", "transformer-engine", "megatron-lm"}
    assert not names(requirements()[""]) & {"torch", "megatron-core"}


def test_each_extra_contains_those_that_it_names():
    train, test, dev = (set(requirements()[extra]) for extra in ("train", "test", "dev"))
    assert {"PyYAML", "psutil"} < train < test < dev
    assert names(sorted(dev - test)) == {"mypy", "ruff"}
    # Resolved: nothing asks an index for the package itself.
    assert "megatron-laep" not in names(sorted(dev))


def test_supported_megatron():
    (requirement,) = [
        Requirement(text) for text in requirements()["train"] if text.startswith("megatron-core")
    ]
    assert requirement.extras == {"training"}
    versions = ("0.17.1", "0.18.2", "0.19.0", "0.19.2", "0.20.0")
    accepted = [version for version in versions if version in requirement.specifier]
    assert accepted == ["0.18.2", "0.19.0", "0.19.2"]
    # The sentences of refusals say the same.
    assert str(Requirement(SUPPORTED).specifier) == str(requirement.specifier)


def test_import_of_the_package_loads_neither_torch_nor_megatron():
    code = (
        "import sys, megatron_laep, megatron_laep.plan.make_map, megatron_laep.plan.summary\n"
        "print([m for m in ('torch', 'megatron', 'transformer_engine') if m in sys.modules])"
    )
    result = run_python("-c", code)
    assert result.stdout.strip() == "[]", result.stderr


def run_python(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def read_flags(path: Path) -> list[str]:
    """The words of a configs/*.args file, as configs/README.md defines the format."""
    return shlex.split(path.read_text(encoding="utf-8"), comments=True)


# Parses the words of every file (JSON on the command line) and prints the values that were set, by
# file. Megatron's own add_megatron_arguments, then ours; abbreviations are off, as in Megatron.
PARSE = """
import argparse, json, sys
from megatron.training.arguments import add_megatron_arguments
from megatron_laep.settings.flags import add_arguments
parser = argparse.ArgumentParser(allow_abbrev=False)
add_megatron_arguments(parser)
add_arguments(parser)
for name, words in json.loads(sys.argv[1]).items():
    flags = [word for word in words if word.startswith("--")]
    unknown = [flag for flag in flags if flag not in parser._option_string_actions]
    repeated = sorted({flag for flag in flags if flags.count(flag) > 1})
    values = {} if unknown else vars(parser.parse_args(words))
    kept = {key: value for key, value in values.items() if isinstance(value, int | float | str)}
    print("RESULT", json.dumps([name, unknown, repeated, kept]))
"""


@functools.cache
def parsed_configs() -> dict:
    words = {path.name: read_flags(path) for path in CONFIGS}
    result = run_python("-c", PARSE, json.dumps(words))
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [line for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    return {name: rest for name, *rest in (json.loads(line[7:]) for line in lines)}


def test_the_two_jobs_of_the_readme_are_there():
    listed = re.findall(
        r"^\| `([^`]+\.args)`", (ROOT / "configs/README.md").read_text(), re.MULTILINE
    )
    assert sorted(listed) == [path.name for path in CONFIGS]
    assert len(listed) >= 2


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_flag_of_a_config_exists_once_and_parses(path):
    unknown, repeated, values = parsed_configs()[path.name]
    assert unknown == []
    assert repeated == []
    shape = re.search(r"-(\d+)l-(\d+)e-", path.name)
    assert (values["num_layers"], values["num_experts"]) == tuple(map(int, shape.groups()))
    for key in ("save", "load"):  # paths differ from machine to machine: they are not in a config
        assert key not in values


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_bash_reads_a_config_as_the_tests_do(path):
    command = 'mapfile -t f < <(sed "s/#.*//" "$1" | xargs -n 1); printf "%s\\n" "${f[@]}"'
    result = subprocess.run(
        ["bash", "-c", command, "bash", str(path)], capture_output=True, text=True, check=True
    )
    assert result.stdout.split("\n")[:-1] == read_flags(path)


@pytest.mark.parametrize("path", SHELL_SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_parse_and_stop_at_errors(path):
    result = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    if path.name != "setup_env.sh":  # sourced: its callers set the options
        assert os.access(path, os.X_OK)
        assert "\nset -euo pipefail\n" in path.read_text(encoding="utf-8")


def source_setup_env(commands: str, **variables: str) -> subprocess.CompletedProcess:
    """Sources scripts/setup_env.sh in a strict bash and runs the commands."""
    return subprocess.run(
        ["bash", "-c", f"set -euo pipefail; source scripts/setup_env.sh; {commands}", "setup"],
        cwd=ROOT,
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def write_executable(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path


def test_python_is_found_by_running_it(tmp_path):
    # $PYTHON is a shim that exists and refuses to run, as pyenv's do: the next candidate is taken.
    shim = write_executable(tmp_path / "python3.12", "#!/bin/sh\nexit 127\n")
    good = write_executable(tmp_path / "python3.13", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    result = source_setup_env(
        'find_python; echo "$BASE_PYTHON"',
        PYTHON=str(shim),
        PATH=f"{tmp_path}:{os.environ['PATH']}",
    )
    assert result.stdout.strip() == good.name, result.stderr
    assert f"PYTHON={shim} is passed over: does not run" in result.stderr


def test_no_python_gives_one_message_with_what_was_tried(tmp_path):
    old = write_executable(tmp_path / "python3", "#!/bin/sh\necho is Python 3.9\n")
    for name in ("python3.12", "python3.13"):
        write_executable(tmp_path / name, "#!/bin/sh\nexit 1\n")
    result = source_setup_env(
        "find_python",
        PYTHON=str(tmp_path / "nowhere"),
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        PYENV_ROOT=str(tmp_path),
    )
    assert result.returncode == 1
    for text in (
        "no usable Python >= 3.12",
        "nowhere: no such command",
        "python3.12: does not run",
    ):
        assert text in result.stderr
    assert f"{old.name}: is Python 3.9" in result.stderr


def test_an_environment_of_ones_own_is_used_as_it_is():
    result = source_setup_env(
        'setup_env test; echo "$VENV_PYTHON"; "$VENV_PYTHON" -c "import megatron_laep as m; '
        'print(m.__file__)"',
        MEGATRON_LAEP_VENV=sys.prefix,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-2:] == [
        f"{sys.prefix}/bin/python",
        str(PACKAGE / "__init__.py"),
    ]


PIP = """
Collecting torch>=2.6
  Downloading torch-2.14.1-cp312-cp312-manylinux_2_28_x86_64.whl (915.2 MB)
Collecting numpy
  Using cached numpy-2.3.5-cp312-cp312-manylinux_2_27_x86_64.whl.metadata (62 kB)
  Using cached https://index/nvidia_cublas-13.1.0.3-py3-none-any.whl (1.2 GB)
  Downloading tqdm-4.67.1-py3-none-any.whl (78 kB)
Installing collected packages: tqdm, numpy, torch
"""


@pytest.mark.parametrize("code", [0, 3])
def test_the_installer_shows_what_takes_long_and_keeps_the_rest(tmp_path, code):
    pip = write_executable(
        tmp_path / "pip", f"#!/bin/sh\ncat <<'EOF'\n{PIP}EOF\necho no space left >&2\nexit {code}\n"
    )
    log = tmp_path / "pip.log"
    result = source_setup_env(f"install {log} {pip} install || fail 'see {log}'")
    shown = result.stdout.splitlines()
    assert shown[:3] == [
        "   downloading torch, 915.2 MB",
        "   have nvidia_cublas, 1.2 GB",
        "   installing 3 packages",
    ]
    assert log.read_text(encoding="utf-8") == PIP + "no space left\n"
    if code == 0:
        assert (result.returncode, result.stderr, len(shown)) == (0, "", 4)
        assert re.fullmatch(r"   done in \d+ s", shown[3])
    else:
        assert (result.returncode, len(shown)) == (1, 3)
        assert result.stderr.splitlines()[-2:] == ["no space left", f"ERROR: see {log}"]


def test_gaps_in_an_environment_of_ones_own_are_listed_and_nothing_is_installed(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True
    )
    before = sorted((tmp_path / "bare").rglob("*"))
    result = source_setup_env("setup_env train", MEGATRON_LAEP_VENV=str(tmp_path / "bare"))
    assert result.returncode == 1
    assert "packaging: not installed" in result.stderr
    assert "Nothing is installed into an environment that is not this repository's own" in (
        result.stderr
    )
    assert sorted((tmp_path / "bare").rglob("*")) == before


def test_check_environment_tells_what_is_missing_or_too_old():
    find_gaps = runpy.run_path(str(ROOT / "scripts/check_environment.py"))["find_gaps"]
    assert find_gaps("megatron-core[training]>=0.18.2,<0.20") == []
    assert find_gaps("packaging>=1") == []
    assert find_gaps("no-such-distribution-anywhere") == [
        "no-such-distribution-anywhere: not installed"
    ]
    (gap,) = find_gaps("packaging<1")
    assert re.fullmatch(r"packaging<1: version [\d.]+ is installed", gap)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--iterations", "many"], "--iterations must be a whole number of at least 1, got 'many'"),
        (["--iterations", "10", "--prune-iteration", "10"], "less than --iterations, which is 10"),
        (["--prune-iteration"], "--prune-iteration needs a value"),
        (["--iteration", "5"], "unknown argument --iteration"),
    ],
)
def test_quickstart_refuses_bad_arguments_before_it_does_anything(arguments, message):
    result = subprocess.run(
        ["bash", "scripts/quickstart.sh", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 1
    assert message in result.stderr
    assert result.stdout == ""


def test_quickstart_never_deletes_a_folder_that_it_did_not_make(tmp_path):
    keep = tmp_path / "thesis.txt"
    keep.write_text("ten years", encoding="utf-8")
    result = subprocess.run(
        ["bash", "scripts/quickstart.sh", "--fresh", "--run-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "MEGATRON_LAEP_VENV": sys.prefix},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 1
    assert "is not empty and was not made by this script" in result.stderr
    assert keep.read_text(encoding="utf-8") == "ten years"


def test_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert text.split()[:4] == ["Apache", "License", "Version", "2.0,"]
    assert "END OF TERMS AND CONDITIONS" in text
