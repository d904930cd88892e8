"""scripts/pretrain_gpt.py: what it mends before Megatron starts. That it trains, most other tests show."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from tests.support.forks import in_megatron
from tests.support.runs import PRETRAIN_GPT

pytestmark = pytest.mark.distributed


def compiles(folder: str) -> bool:
    """Whether Megatron would still call make, if its index helper lay in `folder`."""
    from megatron.core.datasets import utils

    def compile_helpers() -> None:
        """Megatron's."""

    utils.compile_helpers, utils.__file__ = compile_helpers, str(Path(folder) / "utils.py")
    runpy.run_path(str(PRETRAIN_GPT), run_name="library")["do_without_make"]()
    return utils.compile_helpers is compile_helpers


def test_make_is_called_where_there_is_a_makefile(tmp_path):
    assert in_megatron(compiles, str(tmp_path)).result() is False
    (tmp_path / "Makefile").write_text("")
    assert in_megatron(compiles, str(tmp_path)).result() is True
