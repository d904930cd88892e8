"""Command lines of LAEP jobs, checked by Megatron's parser with the package's hooks in.

Shared by the tests of ``arguments``. The checks run in processes that have Megatron
(``forks``), up to where a script would build its model.
"""

import json
import sys
from pathlib import Path

from megatron_laep.plan.expert_map import ExpertMap
from tests.support import maps
from tests.support.forks import Outcome
from tests.support.runs import tiny_arguments

LAYERS = (1, 2, 3, 4)
KEPT = {number: (5, 1, 0, 4) for number in LAYERS}


def expert_map(kept=KEPT, *, iteration=10, ranks=2, experts=8, top_k=2) -> ExpertMap:
    return maps.from_kept(
        kept, experts_before=experts, expert_parallel_size=ranks, top_k=top_k, iteration=iteration
    )


def parsed(words: list[str], inside_run: bool = True) -> dict:
    """The job's arguments, as far as they are numbers, texts or lists, once everything was checked.

    Runs where Megatron is.
    """
    from megatron.training.arguments import parse_and_validate_args

    import megatron_laep

    megatron_laep.install()
    sys.argv = ["pretrain_gpt.py", *words]
    args = megatron_laep.run(parse_and_validate_args) if inside_run else parse_and_validate_args()
    return {
        name: value for name, value in vars(args).items() if isinstance(value, str | int | list)
    }


def job(tmp_path: Path, **flags: object) -> list[str]:
    """A job of 20 iterations that prunes after 10; `flags` on top, None takes one away."""
    defaults = {"save": tmp_path / "save", "save_interval": 1000, "laep_prune_iteration": 10}
    return tiny_arguments(**(defaults | flags))


def ranks(number: int) -> dict[str, str]:
    return {"WORLD_SIZE": str(number)}


def assert_complaint(outcome: Outcome, *wanted: str) -> None:
    """One Refusal, in whose sentence each of `wanted` stands."""
    assert outcome.error == "Refusal", (outcome.error, outcome.message, outcome.output[-3000:])
    missing = [text for text in wanted if text not in outcome.message]
    assert not missing, f"{missing} not in: {outcome.message}"


HETEROGENEOUS = json.dumps(
    {
        "hidden_act": "silu",
        "num_hidden_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "tie_word_embeddings": True,
        "rope_theta": 10000,
        "rope_scaling": {"factor": 8.0},
        "block_configs": [{"attention": {"n_heads_in_group": 1}}] * 4,
    }
)
HETEROGENEOUS_FLAGS = {
    "heterogeneous_layers_config_encoded_json": HETEROGENEOUS,
    "group_query_attention": True,
    "num_query_groups": 4,
    "use_rope_scaling": True,
    "use_rotary_position_embeddings": True,
}

# What does not go with pruned layers: flags, and what the complaint names.
UNSUPPORTED = {
    "padding in the kernels": (
        {
            "moe_token_dispatcher_type": "flex",
            "moe_flex_dispatcher_backend": "hybridep",
            "moe_pad_expert_input_to_capacity": True,
            "moe_expert_capacity_factor": 1.0,
        },
        ["--moe-pad-expert-input-to-capacity", "--moe-token-dispatcher-type alltoall"],
    ),
    "heterogeneous": (HETEROGENEOUS_FLAGS, ["--heterogeneous-layers-config-path"]),
    "upcycling": ({"moe_use_upcycling": True}, ["--moe-use-upcycling"]),
}
