"""What ``python -m build`` makes, and that the wheel alone works: the tools with little, a job beside Megatron."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import pytest

import megatron_laep
from megatron_laep.plan import expert_map
from megatron_laep.records import load_format, pruning_loads
from tests.support.runs import PRETRAIN_GPT, tiny_arguments, unused_port

ROOT = Path(__file__).resolve().parent.parent
JOB = ROOT / "tests" / "data" / "job_pruned_at_6"


def run(*words: str | Path, cwd: Path, timeout: float = 120, **variables: str) -> str:
    """What a command prints; it sees nothing of this repository but what it is told."""
    hidden = {"PYTHONPATH", "VIRTUAL_ENV", "MEGATRON_LAEP_PLATFORM"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        list(map(str, words)),
        cwd=cwd,
        env=environment | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return done.stdout


def files_of_the_repository() -> set[str]:
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    return {name for name in listed.split("\0") if name and (ROOT / name).is_file()}


@dataclass
class Built:
    wheel: Path
    sdist: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    """The sdist, and the wheel that is built from it; of a copy, since a build leaves files behind."""
    folder = tmp_path_factory.mktemp("build")
    for name in files_of_the_repository():
        target = folder / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    run(
        *(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist"),
        cwd=folder / "source",
    )
    (wheel,) = (folder / "dist").glob("*.whl")
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    return Built(wheel, sdist)


def test_files_are_named_after_the_version(built):
    version = megatron_laep.__version__
    assert built.wheel.name == f"megatron_laep-{version}-py3-none-any.whl"
    assert built.sdist.name == f"megatron_laep-{version}.tar.gz"


def test_the_sdist_holds_the_repository(built):
    with tarfile.open(built.sdist) as archive:
        packed = {Path(*Path(m.name).parts[1:]).as_posix() for m in archive if m.isfile()}
    made = {name for name in packed if name.startswith("megatron_laep.egg-info/")}
    assert packed - made - {"PKG-INFO", "setup.cfg"} == files_of_the_repository()


def test_the_wheel_holds_the_package_and_nothing_else(built):
    package = {name for name in files_of_the_repository() if name.startswith("megatron_laep/")}
    with zipfile.ZipFile(built.wheel) as archive:
        packed = set(archive.namelist())
        (information,) = {name.partition("/")[0] for name in packed} - {"megatron_laep"}
        assert b"Apache License" in archive.read(f"{information}/licenses/LICENSE")
        metadata = archive.read(f"{information}/METADATA").decode()
        assert b"laep = megatron_laep.tools.__main__:main" in archive.read(
            f"{information}/entry_points.txt"
        )
    assert {name for name in packed if name.startswith("megatron_laep/")} == package
    assert f"\nVersion: {megatron_laep.__version__}\n" in metadata
    assert "\nRequires-Python: >=3.12\n" in metadata
    needed = re.findall(r"^Requires-Dist: ([^;\n]+)$", metadata, re.MULTILINE)
    assert needed == ["numpy", "tabulate", "tqdm"]


def environment(folder: Path, wheel: Path, beside: Path) -> Path:
    """A virtual environment with the wheel, and on its path a folder with other packages."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python")
    run(*pip, "install", "--quiet", "--no-index", "--no-deps", wheel, cwd=folder.parent)
    (packages,) = folder.glob("lib/python*/site-packages")
    # The .pth files of that folder are not read: an editable installation of this package hides behind one.
    (packages / "beside.pth").write_text(f"{beside}\n", encoding="utf-8")
    return folder / "bin"


def where(binaries: Path, *modules: str) -> dict[str, str]:
    """The file of each module in an environment; "" where there is none."""
    code = (
        "import importlib.util as u, json, sys; found = map(u.find_spec, sys.argv[1:]);"
        "print(json.dumps([s.origin if s else '' for s in found]))"
    )
    output = run(binaries / "python", "-c", code, *modules, cwd=binaries)
    return dict(zip(modules, json.loads(output), strict=True))


def test_the_wheel_and_little_else_run_the_tools(built, tmp_path):
    light = tmp_path / "light"
    light.mkdir()
    for name in ("numpy", "tabulate", "tqdm"):
        package = distribution(name)
        for part in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
            (light / part).symlink_to(package.locate_file(part))
    binaries = environment(tmp_path / "venv", built.wheel, light)
    found = where(binaries, "megatron_laep", "numpy", "torch", "megatron", "yaml")
    assert Path(found.pop("megatron_laep")).is_relative_to(tmp_path / "venv")
    assert Path(found.pop("numpy")).is_relative_to(light)
    assert set(found.values()) == {""}
    made = tmp_path / "map.json"
    printed = run(
        *(binaries / "laep", "plan", JOB / "loads.json", "--alpha", "1.0", "--beta", "0.5"),
        *("--output", made),
        cwd=tmp_path,
    )
    assert "busiest rank" in printed
    assert (
        json.loads(made.read_text())["hash"] == json.loads((JOB / "map.json").read_text())["hash"]
    )


@pytest.mark.long
def test_the_wheel_beside_megatron_prunes(built, tmp_path):
    packages = Path(str(distribution("megatron-core").locate_file("")))
    binaries = environment(tmp_path / "venv", built.wheel, packages)
    found = where(binaries, "megatron_laep", "torch")
    assert Path(found["megatron_laep"]).is_relative_to(tmp_path / "venv")
    assert Path(found["torch"]).is_relative_to(packages)
    words = tiny_arguments(
        train_iters=4,
        save=tmp_path / "save",
        save_interval=4,
        laep_prune_iteration=2,
        laep_alpha=1.0,
        laep_beta=0.5,
    )
    printed = run(
        *(binaries / "python", "-m", "megatron_laep", PRETRAIN_GPT, *words),
        cwd=tmp_path,
        timeout=240,
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(unused_port()),
        MEGATRON_LAEP_PLATFORM="cpu",
        CUDA_DEVICE_MAX_CONNECTIONS="1",
        OMP_NUM_THREADS="1",
    )
    assert "laep event=load_through_map" in printed
    assert re.search(r"iteration +4/ +4 \|", printed)
    checkpoint = tmp_path / "save" / "iter_0000004"
    shown = json.loads(run(binaries / "laep", "inspect", checkpoint, "--json", cwd=tmp_path))
    assert shown["writer"]["megatron_laep"] == megatron_laep.__version__


# ----------------------------------------------------------------------------------------------
# What the pages say of it


def test_the_changelog_s_newest_section_is_this_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", text, re.MULTILINE)
    (version, date), *_ = [section for section in sections if section[0] != "Unreleased"]
    assert version == megatron_laep.__version__
    assert date


def test_upgrading_says_which_versions_are_read():
    page = (ROOT / "docs" / "upgrading.md").read_text(encoding="utf-8")
    read = dict(re.findall(r"^\| ([^|]+?) \| .*? \| (\d+) \|", page, re.MULTILINE))
    record = re.search(
        r"^VERSION = (\d+)$",
        (ROOT / "megatron_laep" / "mcore" / "record_entry.py").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert {name: int(version) for name, version in read.items()} == {
        "the record in a checkpoint": int(record[1]),
        "`map.json`, and the file of `--laep-plan`": expert_map.SCHEMA_VERSION,
        "`loads.json`": pruning_loads.VERSION,
        "`loads-*.json` and `loads-*.bin`": load_format.VERSION,
    }
    assert f"## {megatron_laep.__version__}" in page


def test_the_image_has_the_built_wheel_and_not_the_sources():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    *_, build, final = re.split(r"^(?=FROM )", text, flags=re.MULTILINE)
    assert build.startswith("FROM base AS wheel\n") and "\nCOPY . .\n" in build
    assert re.search(r"^RUN pip wheel .*--no-deps.* --wheel-dir /wheels \.$", build, re.MULTILINE)
    assert "COPY --from=wheel /wheels /wheels\n" in final
    assert re.search(r"^RUN pip install .*--no-deps.* /wheels/\*\.whl", final, re.MULTILINE)
    copied = re.findall(r"^COPY (?!--)(.+) \S+$", final, re.MULTILINE)
    sources = {name for words in copied for name in words.split()}
    assert sources and "megatron_laep" not in sources and "." not in sources
    assert all((ROOT / name).exists() for name in sources)
