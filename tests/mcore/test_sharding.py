"""Where a layer's tensors are read from and written to, on made entries: no model, no processes of a job.

That a layer's own entries are the ones that are looked for is tested where there is a layer
(`tests/oracles/test_grouped_experts.py`).

Shape suffixes: E experts in the checkpoint, K in the model, H hidden.
"""

import pytest

from megatron_laep.plan.expert_map import LayerMap
from tests.support.forks import in_megatron

# Of seven experts five stay, in this order, two on the first rank and three on the second.
KEPT, BLOCKS, EXPERTS = (5, 2, 6, 0, 3), (2, 3), 7
PREFIX = "decoder.layers.1.mlp."


# -- what runs where Megatron is -------------------------------------------------------------------


def read_experts(rank: int, through: bool) -> list:
    """(local slot, place in the checkpoint, experts there) of what a rank reads of `experts.`."""
    import torch
    from megatron.core.dist_checkpointing.mapping import (
        ShardedObject,
        ShardedTensor,
        ShardedTensorFactory,
    )

    from megatron_laep.mcore.sharding import place_entries
    from megatron_laep.mcore.slot_table import SlotTable

    own, entries = BLOCKS[rank], {}
    for slot in range(own):
        # As Megatron has it: each rank takes its own count for everybody's.
        here = (rank * own + slot, own * len(BLOCKS))
        name = f"{PREFIX}experts.experts.{slot}"
        data = torch.full((2, 3), float(slot))
        entries[f"{name}.fc2"] = ShardedTensor.from_rank_offsets(
            "fc2", data, (0, *here), prepend_axis_num=1
        )
        entries[f"{name}.extra"] = ShardedObject("extra", slot, (here[1],), (here[0],))

        def halves(key, tensor, replica_id, flattened_range, here=here):
            return [
                ShardedTensor.from_rank_offsets(
                    key, part, (0, *here), (1, half, 2), prepend_axis_num=1
                )
                for half, part in enumerate(tensor.chunk(2))
            ]

        entries[f"{name}.fc1"] = ShardedTensorFactory("fc1", data, halves, torch.cat)
    entries[f"{PREFIX}shared_experts.fc1"] = shared = ShardedTensor.from_rank_offsets(
        "shared", torch.zeros(2)
    )
    place_entries(
        entries,
        PREFIX,
        2,
        rank=rank,
        table=SlotTable(BLOCKS),
        read_through=LayerMap(2, EXPERTS, KEPT, BLOCKS) if through else None,
    )
    assert entries.pop(f"{PREFIX}shared_experts.fc1") is shared
    found = []
    for name, entry in entries.items():
        slot = int(name.split(".")[-2])
        parts = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        for part in parts:
            if isinstance(part, ShardedTensor):
                assert part.axis_fragmentations[0] == part.global_shape[0]
                assert (part.data == slot).all()
            found.append((slot, part.global_offset[0], part.global_shape[0]))
    assert len(found) == own * 4
    return sorted(set(found))


def read_rows(name: str, through: bool) -> dict:
    """What is read of a router's tensor: row of the checkpoint for row of the model, and what becomes of it."""
    import torch
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    from megatron_laep.mcore.sharding import place_entries
    from megatron_laep.mcore.slot_table import SlotTable

    data_K = torch.arange(len(KEPT), dtype=torch.float32)
    data_KH = data_K[:, None] * 10 + torch.arange(2) if name == "weight" else data_K
    key = f"{PREFIX}router.{name}"
    entry = ShardedTensor.from_rank_offsets(key, data_KH, replica_id=(0, 3, 1))
    entries = {key: entry, f"{PREFIX}router.other": entry}
    place_entries(
        entries,
        PREFIX,
        2,
        rank=1,
        table=SlotTable(BLOCKS),
        read_through=LayerMap(2, EXPERTS, KEPT, BLOCKS) if through else None,
    )
    assert entries[f"{PREFIX}router.other"] is entry
    if not isinstance(entries[key], ShardedTensorFactory):
        return {"whole": entries[key] is entry}
    parts = entries[key].build()
    # As a loader does it: the row of the checkpoint takes the place of the part's.
    stored_E = torch.arange(100.0, 100.0 + EXPERTS)
    loaded = [stored_E[part.global_offset[0]].expand(part.local_shape) for part in parts]
    return {
        "rows": [
            (part.data.flatten()[0].item(), part.global_offset, part.global_shape) for part in parts
        ],
        "replicas": {part.replica_id for part in parts},
        "keys": {part.key for part in parts},
        "merged": entries[key].merge_fn(loaded).reshape(len(KEPT), -1)[:, 0].tolist(),
    }


def refuse(kind: str) -> None:
    import torch
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from megatron_laep.mcore.sharding import place_entries
    from megatron_laep.mcore.slot_table import SlotTable

    part = torch.zeros(2)
    entries = {
        "an unknown kind": {f"{PREFIX}experts.weight": part},
        "other experts": {
            f"{PREFIX}experts.weight": ShardedTensor.from_rank_offsets("w", part, (0, 0, 8))
        },
        "rows that are split": {
            f"{PREFIX}router.weight": ShardedTensor.from_rank_offsets("r", part, (0, 0, 2))
        },
    }[kind]
    layer_map = LayerMap(2, EXPERTS, KEPT, BLOCKS)
    place_entries(entries, PREFIX, 2, rank=1, table=SlotTable(BLOCKS), read_through=layer_map)


# -- the tests -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank, places", [(0, (5, 2)), (1, (6, 0, 3))])
def test_experts_are_read_through_the_map(rank, places):
    found = in_megatron(read_experts, rank, True).result()
    assert found == [(slot, old, EXPERTS) for slot, old in enumerate(places)]


@pytest.mark.parametrize("rank, places", [(0, (0, 1)), (1, (2, 3, 4))])
def test_experts_in_their_own_numbers_lie_behind_those_of_the_ranks_before(rank, places):
    found = in_megatron(read_experts, rank, False).result()
    assert found == [(slot, new, len(KEPT)) for slot, new in enumerate(places)]


@pytest.mark.parametrize("name", ["weight", "bias", "expert_bias", "qb_beta"])
def test_each_row_of_the_router_is_read_from_its_expert_s(name):
    found = in_megatron(read_rows, name, True).result()
    scale, more = (10, (0,)) if name == "weight" else (1, ())
    shape = (EXPERTS, 2) if name == "weight" else (EXPERTS,)
    assert found["rows"] == [(new * scale, (old, *more), shape) for new, old in enumerate(KEPT)]
    assert found["merged"] == [100 + old for old in KEPT]
    assert found["replicas"] == {(0, 3, 1)}
    assert found["keys"] == {f"{PREFIX}router.{name}"}


def test_the_router_of_a_model_in_its_own_numbers_is_read_as_it_is():
    assert in_megatron(read_rows, "weight", False).result() == {"whole": True}


@pytest.mark.parametrize(
    "kind, says",
    [
        (
            "an unknown kind",
            "layer 2: got a Tensor among the expert weights, wanted a ShardedTensor",
        ),
        ("other experts", "w: got 16 experts along axis 0, layer 2 was built for 6"),
        (
            "rows that are split",
            r"r: got local shape (2,) of global (4,), wanted all 5 rows of layer 2",
        ),
    ],
)
def test_what_has_no_expert_axis_is_refused(kind, says):
    outcome = in_megatron(refuse, kind)
    assert outcome.error == "Refusal"
    assert says in outcome.message
