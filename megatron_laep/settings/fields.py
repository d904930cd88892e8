"""How a field of the settings says what it is: one place for its flag, its help text and the docs.

`rules`, `config` and `thresholds` declare their fields with it, `flags` makes the command line and
the table of the docs of them.
"""

from __future__ import annotations

from dataclasses import field, fields
from typing import Any


def setting(default: object, help_text: str, **options: object) -> Any:
    """A field of the settings.

    help_text: for argparse, so that a percent sign is doubled; ``{default}`` stands for the default.
    options: what argparse's `add_argument` takes besides: `metavar`, `type`, `nargs`, `choices`. A
        default of False makes a switch.
    """
    text = help_text.replace("{default}", str(default))
    return field(default=default, metadata={"help": text, **options})


def same_setting(kind: type, name: str) -> Any:
    """A field with the default and the description of another dataclass's field."""
    (item,) = (item for item in fields(kind) if item.name == name)
    return field(default=item.default, metadata=item.metadata)


def flag(name: str) -> str:
    """The flag of a field of `LaepConfig`."""
    return "--laep-" + name.replace("_", "-")
