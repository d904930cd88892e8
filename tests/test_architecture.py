"""Rules of the repository that no reviewer should have to check by eye."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "megatron_laep"
# What the modules of each folder may import at their top: other folders and files of the package, and
# packages beside the standard library. None imports a folder below it.
TOP = {"checks", "json_text", "events", "failure_points", "pruned_checkpoint"}
MAY_IMPORT = {
    "settings": ({"checks"}, set()),
    "plan": ({"checks", "json_text", "settings"}, {"numpy", "tabulate"}),
    "records": ({"checks", "json_text", "settings", "plan"}, {"numpy"}),
    "statistics": ({"checks", "events", "settings", "plan", "records"}, {"numpy", "torch"}),
    "simulate": ({"checks", "json_text", "settings", "plan"}, {"numpy", "yaml"}),
    "mcore": (
        TOP | {"settings", "plan", "records", "statistics"},
        {"numpy", "torch", "megatron"},
    ),
    "loop": (
        TOP | {"settings", "plan", "records", "statistics", "mcore"},
        {"numpy", "torch", "megatron"},
    ),
    "cpu": ({"checks"}, {"torch", "megatron", "numpy"}),
    "measure": ({"checks", "simulate", "cpu"}, {"numpy", "torch"}),
    "tools": (
        TOP | {"__init__", "settings", "plan", "records", "simulate", "measure"},
        {"numpy", "tabulate", "tqdm", "yaml"},
    ),
}
# Of these, no module may load torch or Megatron, not even through others.
PURE = ("settings", "plan", "records", "simulate", "tools")
MAX_LINES = 500
NOT_SOURCE = {".git", ".megatron", ".venv", "__pycache__", ".hypothesis"}
NOT_SOURCE |= {".pytest_cache", ".ruff_cache", ".mypy_cache"}


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


def modules_of(folder: str) -> list[str]:
    """Names of the folder's modules below ``megatron_laep``."""
    return sorted(
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        for path in (PACKAGE / folder).rglob("*.py")
    )


def imported_at_top(path: Path) -> set[str]:
    """What a module imports when it is loaded, with dots; what functions import is left out."""
    found, pending = set(), list(ast.parse(path.read_text(encoding="utf-8")).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending.extend(ast.iter_child_nodes(node))
    return found


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_what_it_may(folder):
    ours, others = MAY_IMPORT[folder]
    wrong = []
    for path in (PACKAGE / folder).rglob("*.py"):
        for name in imported_at_top(path):
            package, _, rest = name.partition(".")
            if package == "megatron_laep":
                part = rest.partition(".")[0]
                part = part if part in TOP or part in MAY_IMPORT else "__init__"
                if part not in ours | {folder}:
                    wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
            elif package not in sys.stdlib_module_names | others:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert wrong == []


def test_no_folder_may_import_one_below_it():
    order = list(MAY_IMPORT)
    for folder, (ours, _) in MAY_IMPORT.items():
        assert ours - TOP - {"__init__"} <= set(order[: order.index(folder)])


def test_every_folder_has_a_rule_and_a_sentence():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(MAY_IMPORT)
    top = {path.stem for path in PACKAGE.glob("*.py")}
    # checkpoint: where checkpoints look that are older than pruned_checkpoint.
    assert top == TOP | {"__init__", "__main__", "checkpoint", "entry"}


@pytest.mark.parametrize("folder", PURE)
def test_a_pure_folder_loads_neither_torch_nor_megatron(folder):
    modules = [f"megatron_laep.{name}" for name in modules_of(folder)]
    statement = "import " + ", ".join(modules)
    loaded = {module.split(".")[0] for module in loaded_after(statement)}
    assert "megatron_laep" in loaded
    assert not loaded & {"torch", "megatron", "transformer_engine"}


def test_importing_the_package_does_not_touch_the_cpu_platform():
    loaded = loaded_after("import megatron_laep")
    assert "megatron_laep" in loaded
    assert not [name for name in loaded if name.startswith("megatron_laep.cpu")]


def test_what_a_person_can_put_right_is_a_refusal():
    # A plain ValueError would end the job under its traceback, as a defect does; the offline tools have
    # a way of their own to show sentences.
    plain = [
        str(path.relative_to(ROOT))
        for path in PACKAGE.rglob("*.py")
        if "tools" not in path.parts and "raise ValueError(" in path.read_text(encoding="utf-8")
    ]
    assert plain == []


def test_no_long_files():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in PACKAGE.rglob("*.py")
    }
    assert len(lengths) > 40
    lengths.pop("megatron_laep/mcore/symbol_table.py")  # a table, one row a symbol
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
    assert PACKAGE / "__init__.py" in files
    naming = [
        str(path.relative_to(ROOT))
        for path in files
        if forbidden in path.read_text(encoding="utf-8", errors="replace")
    ]
    assert naming == []
