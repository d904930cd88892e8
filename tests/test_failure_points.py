"""The steps that the package passes by are those that it lists; without the variable nothing else happens."""

import ast
from pathlib import Path

from megatron_laep import failure_points
from megatron_laep.failure_points import HOOK_VARIABLE, STEPS, position, reached

PACKAGE = Path(failure_points.__file__).parent
called: list[tuple[str, int | None]] = []


def on_step(step: str, iteration: int | None) -> None:
    called.append((step, iteration))


def test_every_step_is_passed_by_at_one_place():
    found = [
        node.args[0].value
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "reached"
        and isinstance(node.args[0], ast.Constant)
    ]
    assert sorted(found) == sorted(STEPS)


def test_the_hook_is_called_where_the_variable_names_one(monkeypatch):
    before = position.count
    reached("step done", 7)
    assert (position.step, position.iteration, position.count) == ("step done", 7, before + 1)
    assert called == []
    monkeypatch.setenv(HOOK_VARIABLE, f"{__name__}:on_step")
    reached("iteration closed")
    assert called == [("iteration closed", 7)]
