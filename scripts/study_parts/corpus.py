"""The text of the study: training, validation and test set, held apart by whole files.

Two kinds of real text that the environment brings along, so that its versions say which text it is:
the sources of Python's standard library, and the C++ headers of torch. Files that a program wrote,
nearly the same many times over, are left out: torch's operator headers and any header above 200 kB.
Which set a file is in depends on its name alone.
"""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from pathlib import Path

from megatron_laep.json_text import read_json

SETS = ("train", "valid", "test")
LARGEST_HEADER = 200_000
# Of 40 parts of the files, one each is held out.
PARTS = 40
HELD_OUT = {0: "test", 1: "valid"}


def set_of(name: str) -> str:
    """The set that the file of this name, relative to its folder, is in."""
    digest = hashlib.sha256(name.encode()).digest()
    return HELD_OUT.get(int.from_bytes(digest[:8], "big") % PARTS, "train")


def files_of_sets() -> dict[str, list[Path]]:
    """The files of each set, in order."""
    import torch
    from prepare_data import stdlib_files

    library = Path(sysconfig.get_paths()["stdlib"])
    headers = Path(torch.__file__).parent / "include"
    sources = [(path, library) for path in stdlib_files()]
    sources += [
        (path, headers)
        for path in sorted(headers.rglob("*.h"))
        if "ops" not in path.relative_to(headers).parts and path.stat().st_size <= LARGEST_HEADER
    ]
    files = {name: [] for name in SETS}
    for path, folder in sources:
        files[set_of(path.relative_to(folder).as_posix())].append(path)
    return files


def prepare(folder: Path) -> dict:
    """Writes the sets into `folder`, unless they are there; returns what they consist of."""
    description = folder / "corpus.json"
    if description.is_file():
        return read_json(description, str(description))
    import torch
    from prepare_data import byte_tokenizer, write_dataset
    from study_parts.files import write_json

    sets = {}
    for name, files in files_of_sets().items():
        prefix = folder / name
        documents, tokens = write_dataset(files, prefix, byte_tokenizer(), "text")
        digest = hashlib.sha256(prefix.with_suffix(".bin").read_bytes()).hexdigest()
        sets[name] = {"files": documents, "tokens": tokens, "sha256": digest}
    found = {
        "text": "sources of Python's standard library, C++ headers of torch; bytes",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sets": sets,
    }
    write_json(description, found)
    return found
