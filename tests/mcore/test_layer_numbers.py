"""Numbers of MoE layers: decoders, multi-token prediction after them, hybrid stacks through their patterns."""

from __future__ import annotations

from argparse import Namespace

from tests.support.forks import in_megatron


def numbered(flags: dict) -> tuple[list[int], int, dict[int, str]]:
    from megatron_laep.mcore.layer_numbers import moe_layer_numbers, mtp_names, total_layers

    args = Namespace(
        **{
            "num_layers": 4,
            "moe_layer_freq": 1,
            "hybrid_layer_pattern": None,
            "mtp_num_layers": None,
            "mtp_use_repeated_layer": False,
            **flags,
        }
    )
    return moe_layer_numbers(args), total_layers(args), mtp_names(args)


def test_decoder_and_mtp() -> None:
    for flags, wanted in (
        ({}, ([1, 2, 3, 4], 4, {})),
        ({"moe_layer_freq": 2}, ([1, 3], 4, {})),
        ({"moe_layer_freq": [0, 1, 1, 0]}, ([2, 3], 4, {})),
        ({"mtp_num_layers": 2}, ([1, 2, 3, 4, 5, 6], 6, {5: "mtp 1", 6: "mtp 2"})),
        # Like the last layer of the decoder.
        ({"mtp_num_layers": 1, "moe_layer_freq": [1, 1, 1, 0]}, ([1, 2, 3], 5, {})),
        (
            {"mtp_num_layers": 2, "mtp_use_repeated_layer": True, "moe_layer_freq": [0, 0, 0, 1]},
            ([4, 5], 5, {5: "mtp 1"}),
        ),
    ):
        assert in_megatron(numbered, flags).result() == wanted, flags


def test_hybrid_stacks() -> None:
    for flags, wanted in (
        ({"hybrid_layer_pattern": "*E-E", "num_layers": 4}, ([2, 4], 4, {})),
        ({"hybrid_layer_pattern": "M*E|ME-", "num_layers": 6}, ([3, 5], 6, {})),
        (
            {"hybrid_layer_pattern": "*E|E/*E/*E", "num_layers": 3, "mtp_num_layers": 2},
            ([2, 3, 5, 7], 7, {5: "mtp 1.2", 7: "mtp 2.2"}),
        ),
        ({"hybrid_layer_pattern": "*E/-/-", "num_layers": 2, "mtp_num_layers": 2}, ([2], 4, {})),
    ):
        assert in_megatron(numbered, flags).result() == wanted, flags
