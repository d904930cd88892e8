"""The expert map: for each MoE layer, the list of old expert ids in their new order.

Placement is renumbering: an expert lives on the expert-parallel (EP) rank that its index falls on.
So "which experts stay" and "where they live" are one list per layer. `make_map` makes a map from
loads; `checkpoint` loads weights and optimizer state through it; `summary` prints it. It is a
frozen value of plain Python numbers, so that it survives JSON, a broadcast or a checkpoint
unchanged, and its hash tells whether two ranks hold the same one.

Words: `layer_number` is Megatron's 1-based number. `old_expert_id` and `new_expert_id` count the
experts of one layer, over all EP ranks, before and after the map is applied.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from megatron_laep.checks import Refusal, number_within, only_fields, whole_number, whole_numbers
from megatron_laep.json_text import parse_json

SCHEMA_VERSION = 1
_OTHER_VERSION = "It was written by another version of megatron_laep, or edited: make it anew"


@dataclass(frozen=True)
class LayerMap:
    """The map of one MoE layer.

    layer_number: Megatron's 1-based number.
    experts_before: number of experts of the layer in the old numbering (E).
    kept: old expert ids in new order, `kept[new_expert_id] == old_expert_id`; unique; length
        K >= 1.
    experts_per_rank: number of experts on each rank of the new EP group (length R, sum K), in the
        order of new ids: rank r holds the block of ids that follows those of ranks 0 to r - 1. The
        counts may differ; a rank with 0 holds no expert of this layer.
    loads: tokens per old expert in the window that the decision was made on (length E), or () if
        unknown.

    Numpy integers and any iterables are accepted and stored as tuples of Python ints.
    Errors: ValueError.
    """

    layer_number: int
    experts_before: int
    kept: tuple[int, ...]
    experts_per_rank: tuple[int, ...]
    loads: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        number = whole_number(self.layer_number, "layer_number", 1)
        where = f"layer {number}"
        converted = {
            "layer_number": number,
            "experts_before": whole_number(self.experts_before, f"{where}: experts_before", 1),
            "kept": whole_numbers(self.kept, f"{where}: kept", 0),
            "experts_per_rank": whole_numbers(
                self.experts_per_rank, f"{where}: experts_per_rank", 0
            ),
            "loads": whole_numbers(self.loads, f"{where}: loads", 0),
        }
        for name, value in converted.items():
            object.__setattr__(self, name, value)
        if not self.kept:
            raise Refusal(f"{where} keeps no expert: a layer needs at least 1")
        if max(self.kept) >= self.experts_before:
            raise Refusal(
                f"{where} keeps expert {max(self.kept)}, but has {self.experts_before} experts "
                f"(ids 0 to {self.experts_before - 1})"
            )
        if len(set(self.kept)) != len(self.kept):
            twice = next(i for i in self.kept if self.kept.count(i) > 1)
            raise Refusal(f"{where} keeps expert {twice} more than once")
        if sum(self.experts_per_rank) != len(self.kept):
            raise Refusal(
                f"{where} keeps {len(self.kept)} experts, but experts_per_rank "
                f"{list(self.experts_per_rank)} sums to {sum(self.experts_per_rank)}"
            )
        if self.loads and len(self.loads) != self.experts_before:
            raise Refusal(
                f"{where} has {len(self.loads)} loads for {self.experts_before} experts: give one "
                "for each old expert, or none"
            )
        if sum(self.loads) >= 2**63:
            raise Refusal(
                f"{where}: the loads sum to {sum(self.loads)}, more than 64-bit integers hold"
            )

    @property
    def experts_after(self) -> int:
        """Number of experts that the layer keeps (K)."""
        return len(self.kept)

    @property
    def pruned(self) -> tuple[int, ...]:
        """Old ids of the experts that go, ascending."""
        return tuple(sorted(set(range(self.experts_before)) - set(self.kept)))


def equal_blocks(num_experts: int, expert_parallel_size: int, layer_number: int) -> tuple[int, ...]:
    """Experts on each EP rank, equal counts; ValueError if they do not divide."""
    ranks = whole_number(expert_parallel_size, "expert-model-parallel-size", 1)
    if num_experts % ranks:
        raise Refusal(
            f"layer {layer_number} keeps {num_experts} experts, not divisible by "
            f"expert-model-parallel-size {ranks}: use an expert-model-parallel-size that divides "
            f"{num_experts}, or a map made with --laep-expert-multiple {ranks}"
        )
    return (num_experts // ranks,) * ranks


def near_equal_blocks(expert_counts: Sequence[int], ranks: int) -> tuple[tuple[int, ...], ...]:
    """Experts on each of `ranks` EP ranks, for layers of `expert_counts` experts: as equal as can be.

    Which ranks hold one more goes round from layer to layer, so that no rank collects them.
    Errors: ValueError if all layers together have fewer experts than there are ranks.
    """
    if sum(expert_counts) < ranks:
        raise Refusal(
            f"the {sum(expert_counts)} experts of all layers are too few for expert-model-parallel-"
            f"size {ranks}: use at most {sum(expert_counts)}"
        )
    blocks, first = [], 0
    for count in expert_counts:
        each, more = divmod(count, ranks)
        fuller = {(first + i) % ranks for i in range(more)}
        first += more
        blocks.append(tuple(each + (rank in fuller) for rank in range(ranks)))
    return tuple(blocks)


@dataclass(frozen=True)
class ExpertMap:
    """The map of a whole model, with the rules that it was made by.

    Equal on all ranks (compare `hash`).

    iteration: the iteration after which the map applies.
    layers: one LayerMap per MoE layer; stored sorted by layer_number, unique, at least one.
    alpha, beta, expert_multiple, placement: the rules (alpha as given, such as
        "0.2:1-10,0.4:11-24"), for the record. Every layer keeps a multiple of `expert_multiple`
        experts.
    expert_parallel_size_before, expert_parallel_size_after: EP ranks; the latter is every layer's
        number of blocks.
    top_k: experts that the router picks for a token; every layer keeps at least as many.

    Errors: ValueError.
    """

    iteration: int
    layers: tuple[LayerMap, ...]
    alpha: str
    beta: float
    expert_multiple: int
    placement: str
    expert_parallel_size_before: int
    expert_parallel_size_after: int
    top_k: int

    def __post_init__(self) -> None:
        for name, minimum in (
            ("iteration", 0),
            ("expert_multiple", 1),
            ("expert_parallel_size_before", 1),
            ("expert_parallel_size_after", 1),
            ("top_k", 1),
        ):
            object.__setattr__(self, name, whole_number(getattr(self, name), name, minimum))
        for name in ("alpha", "placement"):
            if not isinstance(getattr(self, name), str):
                raise Refusal(f"{name} must be a string, got {getattr(self, name)!r}")
        object.__setattr__(self, "beta", number_within(self.beta, "beta", 0, 1))
        layers = tuple(self.layers)
        if not layers or not all(isinstance(layer, LayerMap) for layer in layers):
            raise Refusal(f"layers must be one or more LayerMap values, got {self.layers!r}")
        object.__setattr__(
            self, "layers", tuple(sorted(layers, key=lambda layer: layer.layer_number))
        )
        if len(set(self.layer_numbers)) != len(layers):
            raise Refusal(f"a layer occurs more than once in {list(self.layer_numbers)}")
        for layer in self.layers:
            self._check_layer(layer)

    def _check_layer(self, layer: LayerMap) -> None:
        where = f"layer {layer.layer_number}"
        if len(layer.experts_per_rank) != self.expert_parallel_size_after:
            raise Refusal(
                f"{where} is laid out for {len(layer.experts_per_rank)} ranks, the map for "
                f"expert_parallel_size_after {self.expert_parallel_size_after}"
            )
        if layer.experts_after < self.top_k:
            raise Refusal(
                f"{where} keeps {layer.experts_after} experts, fewer than top_k {self.top_k}: "
                "a token could not be routed"
            )
        if layer.experts_after % self.expert_multiple:
            raise Refusal(
                f"{where} keeps {layer.experts_after} experts, not a multiple of "
                f"expert_multiple {self.expert_multiple}"
            )

    @property
    def layer_numbers(self) -> tuple[int, ...]:
        """Megatron numbers of the MoE layers, ascending."""
        return tuple(layer.layer_number for layer in self.layers)

    def layer(self, layer_number: int) -> LayerMap:
        """The map of one layer; ValueError if the map has none for it."""
        for layer in self.layers:
            if layer.layer_number == layer_number:
                return layer
        raise Refusal(
            f"the expert map has no layer {layer_number}: it has layers {list(self.layer_numbers)}"
        )

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON (sorted keys, no spaces, no hash field), 64 hex digits."""
        text = json.dumps(self._content(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def short_hash(self) -> str:
        """The first 12 digits of `hash`, for log lines."""
        return self.hash[:12]

    def laid_out_for(self, expert_parallel_size: int) -> ExpertMap:
        """The same experts in the same order on `expert_parallel_size` ranks.

        For its own size that is the map as it is, for another `near_equal_blocks`.
        A layer with fewer experts than ranks leaves some of them without.
        Errors: ValueError if all layers together have fewer.
        """
        ranks = whole_number(expert_parallel_size, "expert-model-parallel-size", 1)
        if ranks == self.expert_parallel_size_after:
            return self
        blocks = near_equal_blocks([layer.experts_after for layer in self.layers], ranks)
        layers = (
            replace(layer, experts_per_rank=counts)
            for layer, counts in zip(self.layers, blocks, strict=True)
        )
        return replace(self, layers=tuple(layers), expert_parallel_size_after=ranks)

    def _content(self) -> dict[str, Any]:
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        content["schema_version"] = SCHEMA_VERSION
        content["layers"] = [
            {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in vars(layer).items()
            }
            for layer in self.layers
        ]
        return content

    def to_dict(self) -> dict[str, Any]:
        """JSON-able dict: the fields, `schema_version` and `hash`."""
        return {**self._content(), "hash": self.hash}

    def to_json(self) -> str:
        """Readable JSON, one line for each list of a layer; `from_json` gives an equal value."""
        content = self.to_dict()
        blocks = []
        for layer in content["layers"]:
            rows = (f"   {json.dumps(name)}: {json.dumps(value)}" for name, value in layer.items())
            blocks.append("  {\n" + ",\n".join(rows) + "\n  }")
        lines = [
            f" {json.dumps(name)}: {json.dumps(value)}"
            for name, value in content.items()
            if name != "layers"
        ]
        lines.append(' "layers": [\n' + ",\n".join(blocks) + "\n ]")
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_dict(cls, data: object) -> ExpertMap:
        """The value that `to_dict` wrote.

        `hash` may be absent (a map edited by hand, or written by another tool); if it is there, it
        must fit.
        Errors: ValueError for another schema version, unknown or missing fields, a wrong hash,
        wrong values.
        """
        if not isinstance(data, Mapping):
            raise Refusal(f"an expert map must be a JSON object, got {type(data).__name__}")
        if "schema_version" not in data:
            raise Refusal(
                "this is no expert map: it has no field schema_version, which all maps of megatron_laep "
                "have"
            )
        version = data["schema_version"]
        if version != SCHEMA_VERSION:
            raise Refusal(
                f"the expert map has schema version {version!r}, this megatron_laep reads "
                f"{SCHEMA_VERSION}: use the version of megatron_laep that wrote it"
            )
        names = [field.name for field in fields(cls)]
        content = {name: value for name, value in data.items() if name != "hash"}
        only_fields(content, [*names, "schema_version"], "the expert map", _OTHER_VERSION)
        if not isinstance(content["layers"], list | tuple):
            raise Refusal(f"layers must be a list, got {content['layers']!r}")
        layer_names = [field.name for field in fields(LayerMap)]
        content["layers"] = tuple(
            LayerMap(
                **only_fields(layer, layer_names, f"layers[{i}] of the expert map", _OTHER_VERSION)
            )
            for i, layer in enumerate(content["layers"])
        )
        expert_map = cls(**{name: content[name] for name in names})
        if "hash" in data and data["hash"] != expert_map.hash:
            raise Refusal(
                f"the expert map says hash {data['hash']!r}, but its content has "
                f"{expert_map.hash!r}: it was damaged or edited. Restore it, or remove the hash "
                "field if the change is meant"
            )
        return expert_map

    @classmethod
    def from_json(cls, text: str) -> ExpertMap:
        """The value that `to_json` wrote. ValueError if it is no JSON, or as `from_dict`."""
        return cls.from_dict(parse_json(text, "the expert map"))


def compose(first: ExpertMap, second: ExpertMap) -> ExpertMap:
    """One map that does what `first` and then `second` do; kept ids are in first's old numbering.

    `second` was made on the model that `first` produced, so its old ids are first's new ids. What
    describes the start (experts and EP size before) is first's; rules, iteration, top-k and the
    layout after are second's. Loads become unknown: the experts that `first` pruned got no tokens in
    second's window. Composing is associative.

    Errors: ValueError if `second` was not made on that model (other layers or expert counts).
    """
    if first.layer_numbers != second.layer_numbers:
        raise Refusal(
            f"the first map has layers {list(first.layer_numbers)}, the second "
            f"{list(second.layer_numbers)}: both must describe the same model"
        )
    layers = []
    for one, two in zip(first.layers, second.layers, strict=True):
        if one.experts_after != two.experts_before:
            raise Refusal(
                f"layer {one.layer_number}: the first map leaves {one.experts_after} experts, the "
                f"second starts from {two.experts_before}"
            )
        layers.append(
            replace(
                two,
                experts_before=one.experts_before,
                kept=tuple(one.kept[expert_id] for expert_id in two.kept),
                loads=(),
            )
        )
    return replace(
        second,
        layers=tuple(layers),
        expert_parallel_size_before=first.expert_parallel_size_before,
    )
