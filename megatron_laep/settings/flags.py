"""The `--laep-*` flags and the docs' table of them, made of the fields of `LaepConfig`.

First in the flow: the launcher adds the flags to Megatron's parser.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import Field, fields
from typing import Any

from megatron_laep.settings.config import LaepConfig
from megatron_laep.settings.fields import flag


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the group 'laep' to `parser` and returns it: an extra arguments provider for
    Megatron.
    """
    group = parser.add_argument_group(
        "laep", "layer-adaptive expert pruning (LAEP) of a mixture-of-experts model"
    )
    for item in fields(LaepConfig):
        options = dict(item.metadata)
        if item.default is False:
            options["action"] = "store_true"
        group.add_argument(flag(item.name), default=item.default, **options)
    return parser


def given(words: Iterable[str]) -> list[str]:
    """The words of a command line that are flags of this package, or are meant to be."""
    return [word for word in words if word.startswith("--laep-")]


def flags_table() -> str:
    """The flags for people: a Markdown table, one line each, in the order of the help."""
    lines = ["| flag | what it does |", "| --- | --- |"]
    for item in fields(LaepConfig):
        meaning = str(item.metadata["help"]).replace("%%", "%").replace("|", r"\|")
        lines.append(f"| `{_usage(item)}` | {meaning} |")
    return "\n".join(lines) + "\n"


def _usage(item: Field[Any]) -> str:
    """The flag and what follows it, as argparse shows it."""
    options, name = item.metadata, flag(item.name)
    if item.default is False:
        return name
    value = options["metavar"] if "metavar" in options else r"\|".join(options["choices"])
    return f"{name} {value} [{value} ...]" if options.get("nargs") == "+" else f"{name} {value}"
