"""``scripts/apply_patch.sh`` and the patches themselves: they only add, go in once, and come out without a trace.

What the patched tree does is tested in ``tests/oracles/test_patched_tree.py``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.patched_tree import (
    PATCHES,
    REPOSITORY,
    added_lines,
    apply_patch,
    copy_tree,
    megatron_root,
)

PARSER = "megatron/training/arguments.py"
SCRIPTS = ("pretrain_gpt.py", "pretrain_hybrid.py")
# What scripts/test.sh --megatron has unpacked, and what lies beside it; without any, this environment's.
TREES = [
    megatron_root(),
    *(path.parents[2] for path in REPOSITORY.glob(".megatron/*/megatron/core/package_info.py")),
]


# ----------------------------------------------------------------------------------------------
# The patches


@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.stem)
def test_a_patch_only_adds_with_the_least_context(patch):
    hunks = re.split(r"^@@ .* @@.*\n", patch.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    assert len(hunks) == 1 + len(SCRIPTS)
    for hunk in hunks:
        lines = hunk.partition("diff --git")[0].splitlines()
        assert (lines[0][0], lines[-1][0]) == (" ", " ")
        assert {line[0] for line in lines[1:-1]} == {"+"}


def test_all_patches_add_what_the_readme_shows():
    readme = (REPOSITORY / "patches" / "README.md").read_text(encoding="utf-8")
    once, enter = re.findall(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    for patch in PATCHES:
        added = added_lines(patch)
        assert re.sub(r"^    ", "", added.pop(PARSER), flags=re.MULTILINE) == once
        assert added == dict.fromkeys(SCRIPTS, enter)


def test_there_is_a_patch_for_each_version_that_the_readme_lists():
    readme = (REPOSITORY / "patches" / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\S+\.patch)` \| ([^|]+) \|", readme, re.MULTILINE)
    assert [name for name, _ in listed] == [patch.name for patch in PATCHES]
    for (name, version), patch in zip(listed, PATCHES, strict=True):
        assert patch.read_text(encoding="utf-8").startswith(version.split(",")[0])
        commit = re.search(r"main-([0-9a-f]{12})", name)
        assert commit is None or f" at commit {commit[1]}" in version


# ----------------------------------------------------------------------------------------------
# Trees


def patch_for(tree: Path) -> Path:
    info = (tree / "megatron" / "core" / "package_info.py").read_text(encoding="utf-8")
    version = ".".join(re.findall(r"^(?:MAJOR|MINOR|PATCH) = (\d+)", info, re.MULTILINE))
    name = "main-" if version == "0.20.0" else version
    (patch,) = (path for path in PATCHES if path.stem.startswith(f"megatron-core-{name}"))
    return patch


def write_scripts(tree: Path) -> None:
    """Pre-training scripts, where the tree has none: as much of them as the patch looks at."""
    text = patch_for(tree).read_text(encoding="utf-8")
    for name in SCRIPTS:
        line = int(re.search(rf"^\+\+\+ b/{name}\n@@ -(\d+),", text, re.MULTILINE)[1])
        if not (tree / name).exists():
            lines = ["#\n"] * (line - 1) + ["_PROGRAM_START_TIME = time.time()\n", "\n"]
            (tree / name).write_text("".join(lines) + "import json\n", encoding="utf-8")


@pytest.fixture(scope="module", params=TREES, ids=lambda path: path.name)
def copied(request, tmp_path_factory) -> Path:
    tree = tmp_path_factory.mktemp("tree")
    root = request.param
    if root == megatron_root():
        return copy_tree(tree)
    shutil.copytree(root / "megatron", tree / "megatron")
    return tree


def contents(tree: Path) -> dict[str, bytes]:
    """Of what a patch could touch."""
    paths = [*tree.glob("*.py"), *(tree / "megatron" / "training").rglob("*.py")]
    return {str(path.relative_to(tree)): path.read_bytes() for path in paths}


@pytest.fixture
def tree(copied) -> Iterator[Path]:
    """A source tree with two pre-training scripts; what a test does to it is taken back."""
    write_scripts(copied)
    before = contents(copied)
    yield copied
    for name in contents(copied).keys() - before.keys():
        (copied / name).unlink()
    for name, content in before.items():
        (copied / name).write_bytes(content)


def test_twice_is_once_and_reverse_takes_it_out(tree):
    before = contents(tree)
    first = apply_patch(tree)
    assert first.returncode == 0, first.stderr
    assert f"{patch_for(tree).name} applied to {PARSER} {' '.join(SCRIPTS)}\n" in first.stdout
    patched = contents(tree)
    added = added_lines(patch_for(tree))
    assert {name for name in before if patched[name] != before[name]} == set(added)
    for name, lines in added.items():
        assert patched[name].replace(lines.encode(), b"", 1) == before[name]
    second = apply_patch(tree)
    assert (second.returncode, contents(tree)) == (0, patched)
    assert "is patched already" in second.stdout and "nothing was changed" in second.stdout
    out = apply_patch("--reverse", tree)
    assert (out.returncode, contents(tree)) == (0, before)
    assert "taken out of" in out.stdout
    again = apply_patch("--reverse", tree)
    assert (again.returncode, contents(tree)) == (0, before)
    assert "is not patched" in again.stdout


def test_a_tree_inside_of_a_repository_and_without_scripts(tree):
    subprocess.run(["git", "init", "-q", tree.parent], check=True)
    for name in SCRIPTS:
        (tree / name).unlink()
    before = contents(tree)
    try:
        done = apply_patch(tree)
    finally:
        shutil.rmtree(tree.parent / ".git")
    assert done.returncode == 0, done.stderr
    changed = [name for name, content in contents(tree).items() if content != before[name]]
    assert changed == [PARSER]
    assert "there is no pre-training script; patches/README.md has the lines" in done.stdout


def other_call(tree: Path) -> None:
    path = tree / PARSER
    call = "    args = parse_args(extra_args_provider, ignore_unknown_args)\n"
    text = path.read_text(encoding="utf-8")
    assert text.count(call) == 1
    path.write_text(text.replace(call, call.replace("ignore", "ours_ignore")), encoding="utf-8")


def other_script(tree: Path) -> None:
    path = tree / SCRIPTS[1]
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("_PROGRAM_START_TIME", "_STARTED"), encoding="utf-8")


def half_patched(tree: Path) -> None:
    subprocess.run(["git", "apply", "--include", PARSER, patch_for(tree)], cwd=tree, check=True)


def without_a_seam(tree: Path) -> None:
    path = tree / "megatron" / "training" / "training.py"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("checkpoint_and_decide_exit", "save_or_leave"), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (other_call, [f"{PARSER}: patch does not apply"]),
        (other_script, [f"{SCRIPTS[1]}: patch does not apply"]),
        (half_patched, [f"{PARSER}: patch does not apply"]),
        (
            without_a_seam,
            ["megatron.training.training:checkpoint_and_decide_exit is missing (needed to"],
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_tree_that_differs_is_refused_and_left_as_it_is(tree, change, wanted):
    change(tree)
    before = contents(tree)
    done = apply_patch(tree)
    assert (done.returncode, contents(tree)) == (1, before)
    for text in (str(tree), "nothing was changed", *wanted):
        assert text in done.stderr


def test_another_version_is_refused(tree):
    info = tree / "megatron" / "core" / "package_info.py"
    text = info.read_text(encoding="utf-8")
    before = contents(tree)
    try:
        info.write_text(re.sub(r"^MINOR = \d+", "MINOR = 17", text, flags=re.MULTILINE))
        done = apply_patch(tree)
    finally:
        info.write_text(text, encoding="utf-8")
    assert (done.returncode, contents(tree)) == (1, before)
    assert " is megatron-core 0.17." in done.stderr and "there is no patch" in done.stderr
    assert all(patch.name in done.stderr for patch in PATCHES)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([], "got 0 arguments, wanted one"),
        (["a", "b"], "got 2 arguments"),
        ([REPOSITORY / "docs"], "docs has no megatron/core and megatron/training"),
    ],
)
def test_usage(words, wanted):
    done = apply_patch(*words)
    assert done.returncode == 1
    assert wanted in done.stderr
