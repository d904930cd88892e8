"""Hooks: all of them or none, taken back in full, and a message that says what is missing."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from megatron_laep.mcore.hooks import Hook, HookSet

MODULE = "module_of_test_hooks"


class Original:
    def method(self) -> str:
        return "method"

    @staticmethod
    def plain() -> str:
        return "plain"


@pytest.fixture
def module(monkeypatch) -> ModuleType:
    """A module as Megatron's might be: a function, and a class with methods."""
    module = ModuleType(MODULE)
    module.function = lambda: "function"
    module.Class = type("Class", (), dict(vars(Original)))
    module.Child = type("Child", (module.Class,), {})
    monkeypatch.setitem(sys.modules, MODULE, module)
    return module


def hook(path: str) -> Hook:
    def make(original):
        return lambda *args: "hooked " + original(*args)

    return Hook(f"{MODULE}:{path}", make)


def attributes(module: ModuleType) -> list:
    """Everything that hooks could have touched, by identity."""
    return [
        {name: id(value) for name, value in vars(owner).items()}
        for owner in (module, module.Class, module.Child)
    ]


def test_apply_and_undo(module):
    before = attributes(module)
    hooks = HookSet()
    assert not hooks.installed
    hooks.apply([hook("function"), hook("Class.method")])
    assert hooks.installed
    assert module.function() == "hooked function"
    assert module.Class().method() == module.Child().method() == "hooked method"
    hooks.undo()
    assert not hooks.installed
    assert attributes(module) == before


def test_static_method_comes_back_as_one(module):
    before = vars(module.Class)["plain"]
    hooks = HookSet()
    hooks.apply([Hook(f"{MODULE}:Class.plain", lambda original: staticmethod(lambda: "new"))])
    assert module.Class().plain() == "new"
    hooks.undo()
    assert vars(module.Class)["plain"] is before
    assert module.Class().plain() == "plain"


def test_undo_twice_is_harmless(module):
    hooks = HookSet()
    hooks.apply([hook("function")])
    hooks.undo()
    hooks.undo()
    assert module.function() == "function"


def test_can_be_applied_again(module):
    hooks = HookSet()
    for _ in range(2):
        hooks.apply([hook("function")])
        assert module.function() == "hooked function"
        hooks.undo()


@pytest.mark.parametrize(
    "path",
    [
        "gone",
        "Class.gone",
        "NoClass.method",
        # Replaced in the subclass, it would be left there by undo, and the base stay as it is.
        "Child.method",
    ],
)
def test_nothing_is_replaced_when_a_target_is_missing(module, path):
    before = attributes(module)
    hooks = HookSet()
    with pytest.raises(RuntimeError) as raised:
        hooks.apply([hook("function"), hook(path), hook("Class.method")])
    assert f"no {MODULE}:{path} (" in str(raised.value)
    assert f"{MODULE}:function" not in str(raised.value)
    assert attributes(module) == before
    assert not hooks.installed


def test_message_lists_everything_that_is_missing(module):
    absent = Hook("module_that_is_not_there:function", lambda original: original)
    with pytest.raises(RuntimeError) as raised:
        HookSet().apply([hook("gone"), absent])
    message = str(raised.value)
    assert message.startswith(f"nothing is hooked, since there is no {MODULE}:gone (")
    assert ", no module_that_is_not_there:function (" in message


def test_second_install_is_refused(module):
    first, second = HookSet(), HookSet()
    first.apply([hook("function")])
    before = attributes(module)
    with pytest.raises(RuntimeError, match=r"function is hooked already.*uninstall\(\)"):
        second.apply([hook("Class.method"), hook("function")])
    assert attributes(module) == before
    assert not second.installed
    first.undo()
    assert module.function() == "function"


def test_nothing_is_replaced_when_a_replacement_cannot_be_made(module):
    def fail(original):
        raise ZeroDivisionError

    before = attributes(module)
    hooks = HookSet()
    with pytest.raises(ZeroDivisionError):
        hooks.apply([hook("function"), Hook(f"{MODULE}:Class.method", fail)])
    assert attributes(module) == before
    assert not hooks.installed
