"""A copy of the Megatron that the tests run on, with the patch of ``patches/`` for its version in it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PATCHES = sorted((REPOSITORY / "patches").glob("*.patch"))
APPLY = REPOSITORY / "scripts" / "apply_patch.sh"


def megatron_root() -> Path:
    """The folder that ``megatron.training`` is found in; nothing of it is imported."""
    spec = importlib.util.find_spec("megatron.training")
    assert spec is not None and spec.origin is not None, "no Megatron in this environment"
    return Path(spec.origin).parents[2]


def copy_tree(folder: Path) -> Path:
    """Its sources, and the pre-training scripts that a source tree has; returns the folder."""
    root = megatron_root()
    ignored = shutil.ignore_patterns("__pycache__")
    for part in ("core", "training", "legacy"):
        if (root / "megatron" / part).exists():
            shutil.copytree(root / "megatron" / part, folder / "megatron" / part, ignore=ignored)
    # In site-packages there are none, and what else lies there is not Megatron's.
    if (root / "pretrain_gpt.py").exists():
        for path in root.glob("*.py"):
            shutil.copy(path, folder)
    return folder


def apply_patch(*words: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [APPLY, *map(str, words)],
        env=os.environ | {"PYTHON": sys.executable},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def added_lines(patch: Path) -> dict[str, str]:
    """What a patch adds to each file."""
    parts = re.split(r"^diff --git a/(\S+) .*\n", patch.read_text(encoding="utf-8"), flags=re.M)
    return {
        name: "".join(re.findall(r"^\+(?!\+\+ )(.*\n)", hunks, re.M))
        for name, hunks in zip(parts[1::2], parts[2::2], strict=True)
    }


def script_of(tree: Path) -> Path:
    """The tree's own ``pretrain_gpt.py``; where it has none, this repository's with the patch's lines."""
    script = tree / "pretrain_gpt.py"
    if not script.exists():
        future = "from __future__ import annotations\n"
        before, found, after = (
            (REPOSITORY / "scripts" / "pretrain_gpt.py")
            .read_text(encoding="utf-8")
            .partition(future)
        )
        assert found, "the lines go behind the import from __future__"
        lines = added_lines(PATCHES[0])["pretrain_gpt.py"]
        script.write_text(before + future + "\n" + lines + after, encoding="utf-8")
    return script
