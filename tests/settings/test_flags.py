"""Flags, help and docs: one source, the fields of the settings."""

import argparse
from dataclasses import fields
from pathlib import Path

import pytest

from megatron_laep.settings.config import LaepConfig
from megatron_laep.settings.flags import add_arguments, flags_table
from megatron_laep.settings.rules import PruningRules

DOCS = Path(__file__).parents[2] / "docs" / "flags.md"


def actions() -> dict[str, argparse.Action]:
    parser = add_arguments(argparse.ArgumentParser(add_help=False))
    return {action.dest.removeprefix("laep_"): action for action in parser._actions}


def test_the_docs_hold_this_table():
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("|")] == flags_table().splitlines()


def test_the_table_says_what_the_help_says():
    """Row by row against argparse's own actions, in their order."""
    rows = [row.strip("| ").split(" | ") for row in flags_table().splitlines()[2:]]
    assert len(rows) == len(actions())
    for (usage, meaning), action in zip(rows, actions().values(), strict=True):
        assert usage.strip("`").split()[0] == action.option_strings[0]
        assert meaning == action.help.replace("%%", "%")


def test_a_field_of_the_rules_is_described_once():
    ours = {item.name: item for item in fields(LaepConfig)}
    for item in fields(PruningRules):
        assert ours[item.name].default == item.default
        assert ours[item.name].metadata["help"] == item.metadata["help"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("alpha", "every MoE layer in exactly one range; default: 0.4)."),
        ("beta", "0 prunes nothing (default: 0.1)."),
        ("placement", "in blocks as equal as possible (default: balanced)."),
        ("window", "(default: 100, or all since the N before if these are fewer)."),
        ("stability_share", "Of what counts as stable: share of the layers that must be stable"),
    ],
)
def test_a_help_text_names_the_default_that_holds(name, text):
    assert text in actions()[name].help


def test_types_and_switches():
    found = actions()
    assert found["prune_iteration"].nargs == "+" and found["prune_iteration"].type is int
    assert found["exit_after_prune"].nargs == 0 and found["exit_after_prune"].default is False
    assert found["placement"].choices == ("balanced", "greedy", "none")
    assert found["stability_patience"].type is int and found["stability_churn"].type is float
