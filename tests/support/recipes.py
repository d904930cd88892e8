"""Public jobs, `tests/data/recipes.tsv`, and what `laep check` says of them: `docs/recipes.md`.

MEGATRON_LAEP_PLATFORM=cpu python -m tests.support.recipes > docs/recipes.md
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
TABLE = REPOSITORY / "tests" / "data" / "recipes.tsv"
_WORDS = {0: "yes", 3: "with `--laep-exit-after-prune`", 2: "**no**"}
_INTRO = """\
# What becomes of public jobs?

Every job of Megatron-LM's functional tests that trains a MoE model (tag core_v0.19.0, `tests/data/recipes.tsv`), as
`laep check` judges it with a pruning half-way, and with `--save` where it has none: accepted as it is, accepted with
`--laep-exit-after-prune` added, for the flags that stand beside it, or refused for them. A layer keeps at least the first and
at most the second number of its experts, whatever is counted; where that is all of them, fewer expert-parallel ranks would let
some go. The page says what is accepted, and not that the jobs were run: they need GPUs. Written by
`MEGATRON_LAEP_PLATFORM=cpu python -m tests.support.recipes > docs/recipes.md`.
"""


@dataclass(frozen=True)
class Recipe:
    """One row: the name in Megatron-LM, the ranks, and the words of the command line."""

    name: str
    ranks: int
    words: tuple[str, ...]


@dataclass(frozen=True)
class Said:
    """What the check says of one: exit code, whether a job that only records is accepted, the flags that
    the code is about, bounds of kept experts."""

    code: int
    records: bool
    about: tuple[str, ...]
    keeps: str


def recipes() -> list[Recipe]:
    """All rows, in the file's order."""
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    _, *rows = [line.split("\t") for line in lines if not line.startswith("#")]
    return [Recipe(name, int(ranks), tuple(shlex.split(flags))) for name, ranks, flags in rows]


def judged() -> dict[str, Said]:
    """What the check says of each recipe, by name. Runs where Megatron is."""
    from megatron_laep.loop.beforehand import examine
    from megatron_laep.tools.check import exit_code

    said = {}
    for recipe in recipes():
        # A benchmark does not save, a training does.
        save = ["--save", "PATH"] if "--save" not in recipe.words else []
        save += ["--save-interval", "50"] if "--save-interval" not in recipe.words else []
        found = examine([*recipe.words, *save], recipe.ranks)
        sentences = found.refused or found.lifted
        bounds = {(one.fewest, one.most) for one in found.outlook.layers} if found.outlook else ()
        said[recipe.name] = Said(
            exit_code(found),
            found.recording == (),
            tuple(re.sub(" is not supported .*", "", text) for text in sentences),
            ", ".join(f"{fewest} to {most}" for fewest, most in sorted(bounds)),
        )
    return said


def render(said: dict[str, Said]) -> str:
    """The page, as Markdown."""
    codes = [one.code for one in said.values()]
    counts = (
        f"Of {len(codes)} jobs {codes.count(0)} are accepted as they are, {codes.count(3)} with "
        f"`--laep-exit-after-prune`, {codes.count(2)} are refused."
    )
    records = sum(one.records for one in said.values())
    counts += f" Recording alone is accepted in {records}."
    rows = [
        f"| {name} | {_WORDS[one.code]} | {'yes' if one.records else '**no**'} | {'; '.join(f'`{flag}`' for flag in one.about)} | {one.keeps} |"
        for name, one in said.items()
    ]
    head = ["| job | pruned | recorded | for | a layer keeps |", "|---|---|---|---|---|"]
    return "\n".join([_INTRO, counts, "", *head, *rows]) + "\n"


if __name__ == "__main__":
    from megatron_laep import cpu

    cpu.enable()
    print(render(judged()), end="")
