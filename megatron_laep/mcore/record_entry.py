"""The record in a checkpoint as it was unpickled: every field checked before anything rests on it.

A checkpoint may come from somebody else, and ``torch.load`` with ``weights_only`` gives any plain values.
``checkpoint.Record`` is made of what ``read_entry`` returns.
"""

from collections.abc import Mapping
from typing import Any

from megatron_laep.checks import Refusal, named_fields, shown, whole_number
from megatron_laep.plan.expert_map import ExpertMap
from megatron_laep.plan.lineage import Lineage
from megatron_laep.plan.windows import OpenWindow

VERSION = 2
_FIELDS = ("version", "lineage", "inherited", "map_state", "window", "ended", "declined")
_LARGEST = 2**63 - 1
_MOST_PRUNINGS = 1000


def read_entry(entry: object, states: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a ``Record``, by name; ``writer`` as a dict or None.

    Args:
        entry: what the checkpoint holds.
        states: of a map, besides None.

    Raises:
        Refusal: it is of another version, or damaged; the sentence has no file's name.
    """
    if not isinstance(entry, Mapping) or "version" not in entry:
        raise Refusal("its LAEP record is no record of megatron_laep's: it was damaged or edited")
    if entry["version"] != VERSION:
        raise Refusal(
            f"its LAEP record has version {shown(entry['version'])}, this megatron_laep reads "
            f"version {VERSION}: use the megatron_laep that wrote the checkpoint"
        )
    record = named_fields(entry, _FIELDS, "its LAEP record")
    lineage = Lineage(tuple(map(_map, _list(record["lineage"], "lineage", _MOST_PRUNINGS))))
    state = record["map_state"]
    if state is not None and state not in states:
        raise Refusal(
            f"its LAEP record: map_state must be {' or '.join(states)}, got {shown(state)}"
        )
    if (state is None) != (not lineage.steps):
        raise Refusal(
            f"its LAEP record: map_state is {shown(state)} with {len(lineage.steps)} maps: it was "
            "damaged or edited"
        )
    inherited = whole_number(
        record["inherited"], "its LAEP record: inherited", 0, most=len(lineage.steps)
    )
    window = record["window"]
    return {
        "lineage": lineage,
        "map_state": state,
        "window": None if window is None else _window(window, "window"),
        "ended": tuple(_window(item, "ended") for item in _list(record["ended"], "ended")),
        "declined": tuple(
            _iteration(item, "declined") for item in _list(record["declined"], "declined")
        ),
        # Records of before these have none.
        "postponed": tuple(map(_postponed, _list(record.get("postponed", ()), "postponed"))),
        "inherited": inherited,
        "writer": _writer(record.get("writer")),
        "checksums": _checksums(record.get("checksums", {})),
    }


def _map(text: object) -> ExpertMap:
    if not isinstance(text, str):
        raise Refusal(f"its LAEP record: a map must be a JSON text, got {type(text).__name__}")
    return ExpertMap.from_json(text)


def _list(value: object, name: str, most: int = 10**6) -> list | tuple:
    if not isinstance(value, list | tuple) or len(value) > most:
        raise Refusal(
            f"its LAEP record: {name} must be a list of at most {most}, got {shown(value)}"
        )
    return value


def _iteration(value: object, name: str) -> int:
    return whole_number(value, f"its LAEP record: {name}", 0)


def _postponed(pair: object) -> tuple[int, int]:
    at, to = (_iteration(item, "postponed") for item in _pair(pair, "postponed"))
    if to <= at:
        raise Refusal(f"its LAEP record: postponed from iteration {at} to {to}, which is not later")
    return at, to


def _pair(value: object, name: str) -> list | tuple:
    if len(_list(value, name)) != 2:
        raise Refusal(f"its LAEP record: {name} must hold pairs, got {shown(value)}")
    return value  # type: ignore[return-value]  # _list has looked


def _window(value: object, name: str) -> OpenWindow:
    fields = named_fields(value, ("start", "end", "tokens_LE"), f"its LAEP record: {name}")
    start, end = (_iteration(fields[side], f"{name}, {side}") for side in ("start", "end"))
    if end < start:
        raise Refusal(f"its LAEP record: {name} ends at {end}, before its start {start}")
    tokens = _tokens(fields["tokens_LE"], name)
    marks = []
    for mark in _list(fields.get("marks", ()), f"{name}, marks"):
        last, counts = _pair(mark, f"{name}, marks")
        marks.append((_iteration(last, f"{name}, marks"), _tokens(counts, name)))
        if list(map(len, marks[-1][1])) != list(map(len, tokens)):
            raise Refusal(f"its LAEP record: the parts of {name} are of different models")
    return OpenWindow(start, end, tokens, tuple(marks))


def _tokens(value: object, name: str) -> tuple[tuple[int, ...], ...]:
    rows = tuple(tuple(_list(row, f"{name}, tokens")) for row in _list(value, f"{name}, tokens"))
    for row in rows:
        if not all(type(count) is int and 0 <= count <= _LARGEST for count in row):
            raise Refusal(f"its LAEP record: {name} must hold token counts of at most 63 bits")
    return rows


def _writer(value: object) -> dict[str, Any] | None:
    if value is None:
        return None
    names = ("megatron_laep", "megatron_core", "torch", "settings")
    fields = named_fields(value, names, "its LAEP record: writer")
    settings = fields["settings"]
    texts = [fields[name] for name in names[:3]]
    if not isinstance(settings, Mapping) or not all(
        isinstance(text, str) for text in (*texts, *settings)
    ):
        raise Refusal("its LAEP record: writer must hold versions and settings by name")
    return {name: fields[name] for name in names}


def _checksums(value: object) -> dict[str, int]:
    if not isinstance(value, Mapping) or not all(
        isinstance(place, str) and type(crc) is int and 0 <= crc < 2**32
        for place, crc in value.items()
    ):
        raise Refusal("its LAEP record: checksums must be 32-bit numbers by their place")
    return dict(value)
