"""No test vanishes silently: conftest.py in a pytest run of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.core_suite import CORE, SHORT

TESTS = Path(__file__).parent
SOURCE = """
import pytest

@pytest.mark.skipif(True, reason="no browser: install one")
@pytest.mark.parametrize("number", range(3))
def test_page(number): ...

def test_module():
    pytest.importorskip("no_such_module")

def test_passes(): ...
"""


def run(folder: Path, source: str, **env: str) -> subprocess.CompletedProcess:
    (folder / "test_it.py").write_text(source)
    (folder / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    (folder / "pytest.ini").write_text("[pytest]\n")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "test_it.py"],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name != "CI"}
        | {"PYTHONPATH": str(TESTS.parent)}
        | env,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("env", "code", "begins"),
    [
        ({}, 0, "SKIPPED: 4 ("),
        ({"CI": "false"}, 0, "SKIPPED: 4 ("),
        ({"CI": "true"}, 1, "FAILED, CI=true allows no skipped test: 4 ("),
    ],
)
def test_what_was_skipped_is_one_line(tmp_path, env, code, begins) -> None:
    done = run(tmp_path, SOURCE, **env)
    assert done.returncode == code, done.stdout
    (line,) = [line for line in done.stdout.splitlines() if "no browser" in line]
    assert line.startswith(begins)
    assert "3 in test_it.py: no browser: install one" in line
    assert "1 in test_it.py: could not import 'no_such_module'" in line


def test_nothing_skipped(tmp_path) -> None:
    done = run(tmp_path, "def test_passes(): ...\n", CI="true")
    assert done.returncode == 0 and "skipped" not in done.stdout.lower()


def test_the_core_suite_names_what_there_is() -> None:
    """A name that was moved would silently be run on no other Megatron."""
    repository = TESTS.parent
    assert [file for file in CORE if not (repository / file).is_file()] == []
    for test in SHORT:
        file, _, name = test.partition("::")
        assert file in CORE, test
        assert f"def {name}(" in (repository / file).read_text(), test
