"""Reads the model and hardware files of `laep simulate` and `laep calibrate`: YAML, or JSON."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from megatron_laep import json_text
from megatron_laep.json_text import parse_json

_MOST_BYTES = 2**22


def read_text(path: Path) -> str:
    """A text file. Errors: ValueError, one sentence."""
    try:
        return json_text.read_text(path, most=_MOST_BYTES)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} cannot be read: it is not a text file") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """The named fields of a YAML or JSON file. Errors: ValueError, one sentence."""
    text = read_text(path)
    if path.suffix == ".json":
        data = parse_json(text, str(path))
    else:
        # Here, and not on top: whoever has only JSON files does not need PyYAML.
        try:
            import yaml
        except ImportError:
            raise ValueError(
                f"{path} is YAML, and PyYAML is not installed: pip install PyYAML, "
                "or use a .json file"
            ) from None
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
        except RecursionError:
            raise ValueError(f"{path} is nested too deeply to be a file of ours") from None
        except ValueError as error:  # of a date or a number that Python will not make
            raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold named fields, got {type(data).__name__}")
    return data


def make(kind, section: object, where: str):
    """A dataclass from a section of a file; ValueError that names unknown or missing fields."""
    if not isinstance(section, dict):
        raise ValueError(f"{where}: this section is missing, or has no named fields")
    fields = dataclasses.fields(kind)
    required = {item.name for item in fields if item.default is dataclasses.MISSING}
    unknown = sorted(map(str, set(section) - {item.name for item in fields}))
    for problem, names in (("unknown", unknown), ("missing", sorted(required - set(section)))):
        if names:
            raise ValueError(f"{where}: {problem} fields: {', '.join(names)}")
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in section.items()}
    try:
        return kind(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None
