"""Rules of the repository that no reviewer should have to check by eye."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "megatron_laep"
PURE = (
    "alpha",
    "balancing",
    "config",
    "expert_map",
    "lineage",
    "load_log",
    "load_recorder",
    "metrics",
    "placement",
    "planning",
    "pruning",
    "decision_log",
    "schedule",
    "stability",
    "stage_placement",
    "summary",
    "window_parts",
    "cost_inputs",
    "cost_model",
    "tools.__main__",
    "tools.inspect",
    "tools.options",
    "tools.plan",
    "tools.report",
    "tools.simulate",
    "tools.stability",
    "tools.sweep",
)
MAX_LINES = 500
NOT_SOURCE = {".git", ".venv", "__pycache__", ".pytest_cache", ".hypothesis", ".ruff_cache"}


def loaded_after(statement: str) -> set[str]:
    """Names of the modules that a fresh interpreter has loaded after `statement`."""
    code = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return set(done.stdout.split())


def source_files() -> list[Path]:
    """Text files of the repository, without what tools leave behind."""
    found = []
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        skipped = any(part in NOT_SOURCE or part.endswith(".egg-info") for part in parts)
        skipped |= parts[0] in ("data", "runs")  # what the quickstart makes; tests/data is source
        if skipped or not path.is_file() or path.is_symlink():
            continue
        if path.suffix in {".py", ".md", ".sh", ".txt", ".toml", ".cfg", ".ini", ".json", ".yaml"}:
            found.append(path)
        elif path.suffix in {".yml", ".svg", ".patch", ""}:
            found.append(path)
    return found


@pytest.mark.parametrize("name", PURE)
def test_planning_needs_neither_torch_nor_megatron(name):
    loaded = {module.split(".")[0] for module in loaded_after(f"import megatron_laep.{name}")}
    assert "megatron_laep" in loaded
    assert not loaded & {"torch", "megatron", "transformer_engine"}


def test_importing_the_package_does_not_touch_the_cpu_platform():
    loaded = loaded_after("import megatron_laep")
    assert "megatron_laep" in loaded
    assert not [name for name in loaded if name.startswith("megatron_laep.cpu")]


def test_no_long_files():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in PACKAGE.rglob("*.py")
    }
    assert len(lengths) > len(PURE)
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def test_every_module_says_what_it_is_for():
    without = [
        str(path.relative_to(ROOT))
        for path in PACKAGE.rglob("*.py")
        if not path.read_text(encoding="utf-8").startswith('"""')
    ]
    assert without == []


def test_the_repository_names_no_machine_of_ours():
    forbidden = "/" + "work/"  # in two parts, so that this file does not find itself
    files = source_files()
    assert PACKAGE / "config.py" in files
    naming = [
        str(path.relative_to(ROOT))
        for path in files
        if forbidden in path.read_text(encoding="utf-8", errors="replace")
    ]
    assert naming == []
