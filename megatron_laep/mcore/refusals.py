"""Which rows of the table ``unsupported`` a job's arguments hit, as sentences; and the table as a page.

``arguments`` reports every hit at once. ``docs/refusals.md`` is written by
``python -m megatron_laep.mcore.refusals``. Needs neither torch nor Megatron.
"""

import re
import string
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_laep.checks import Refusal
from megatron_laep.mcore import symbols
from megatron_laep.mcore.unsupported import ROWS, Row, When, spanned
from megatron_laep.settings.config import LaepConfig
from megatron_laep.settings.schedule import Leg


@dataclass(frozen=True)
class Hit:
    """A row that a job is refused for, and the sentence that says so."""

    row: Row
    sentence: str


def hits(
    args: Namespace,
    situations: Mapping[When, str],
    *,
    prunings: Sequence[int] = (),
    prune_flag: str = "",
) -> list[Hit]:
    """Every row that the arguments hit, in the table's order.

    Args:
        args: Megatron's arguments after its validation.
        situations: the kinds of rows to look at, each with what completes "FLAG is not supported".
        prunings: the iterations at which the job may be pruned.
        prune_flag: that flag of the job, with its values.
    """
    found = []
    for row in ROWS:
        if row.when not in situations or not row.given(args, prunings):
            continue
        values = _Values(args, {"spanned": spanned(args, prunings), "prune_flag": prune_flag})
        flag, reason = (_FILLED.vformat(text, (), values) for text in (row.flag, row.reason))
        situation = situations[row.when]
        sentence = f"{flag} is not supported {situation}: {reason}; {row.remedy}"
        found.append(Hit(row, sentence))
    return found


def hits_of_pruning(args: Namespace, config: LaepConfig, legs: Sequence[Leg]) -> list[Hit]:
    """What a job that is to be pruned hits; also what --laep-exit-after-prune lifts.

    Args:
        legs: the prunings that are still to come.
    """
    situation = "together with --laep-prune-iteration"
    return hits(
        args,
        {when: situation for when in (When.MODEL, When.PRUNING, When.REBUILD)},
        prunings=[iteration for leg in legs for iteration in leg.possible_ends],
        prune_flag=config.prune_flag,
    )


def refuse(sentences: Sequence[str]) -> None:
    """Raises all sentences as one refusal, the only one as it is; nothing if there is none."""
    if len(sentences) == 1:
        raise Refusal(sentences[0])
    if sentences:
        lines = [f"\n  {number}. {text}" for number, text in enumerate(sentences, start=1)]
        raise Refusal(f"{len(sentences)} things are in the way:{''.join(lines)}")


_FILLED = string.Formatter()
# With the value that a remedy gives it.
_FLAG = re.compile(r"--[a-z][a-z0-9-]*(?: (?:adam|alltoall|global|muon|torch_dist)\b)?")


class _Values(Mapping):
    """What stands for a name in braces: a given value, else that argument's."""

    def __init__(self, args: Namespace, given: dict[str, Any]) -> None:
        self._args, self._given = args, given

    def __getitem__(self, name: str) -> Any:
        return self._given[name] if name in self._given else symbols.argument(self._args, name)

    def __iter__(self):
        return iter(self._given)

    def __len__(self) -> int:
        return len(self._given)


def render() -> str:
    """The table as Markdown."""
    parts = [
        "# What does a pruning not go together with?",
        "",
        "A job that is refused ends before its first iteration, on every rank. It says all at once what is "
        "in the way: each",
        "flag below that it has, why, and what to do. Written by "
        "`python -m megatron_laep.mcore.refusals > docs/refusals.md`.",
    ]
    for when in When:
        parts += ["", f"## {when.value}", ""]
        if when is When.REBUILD:
            parts += [
                "`--laep-exit-after-prune` lifts all of these: the job ends after the pruning, and the "
                "same command goes on with the smaller model.",
                "",
            ]
        parts += ["| flag | why | what to do |", "|---|---|---|"]
        for row in ROWS:
            if row.when is when:
                flag = row.shown or f"`{_FILLED.vformat(row.flag, (), _Dots())}`"
                reason = _FILLED.vformat(row.reason, (), _Dots())
                remedy = _FLAG.sub(lambda found: f"`{found[0]}`", row.remedy)
                parts.append(f"| {flag} | {reason} | {remedy} |")
    return "\n".join(parts) + "\n"


class _Dots(dict):
    def __missing__(self, name: str) -> str:
        return "`--laep-prune-iteration ...`" if name == "prune_flag" else "..."


if __name__ == "__main__":
    print(render(), end="")
