#!/usr/bin/env python3
"""Says whether a Megatron source tree has what megatron_laep reads, wraps and replaces.

    python scripts/check_seams.py ~/Megatron-LM
    python scripts/check_seams.py "$VENV/lib/python3.12/site-packages"

Nothing of the tree is imported or installed, and neither torch nor a GPU is needed: its files are parsed.
The list is that of a running job (``megatron_laep/mcore/symbol_table.py`` and ``argument_table.py``):
symbols, the parameters they are given, names that a hook relies on being looked up, arguments.

Exit code: 0 if nothing is missing or different, 1 if something is, 2 if TREE is no Megatron tree.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_laep.mcore.argument_table import OPTIONAL, PARSED, RUNNING, VALIDATED
from megatron_laep.mcore.symbol_table import SYMBOLS, Symbol
from megatron_laep.mcore.symbols import MISSING, alternatives, not_looked_up, wrong_parameters

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_DEFINITIONS = (*_FUNCTIONS, ast.ClassDef)


class Tree:
    """The sources below a folder that holds ``megatron/``, looked up by module and name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.module = cache(self._module)

    def _module(self, name: str) -> ast.Module | None:
        path = self.root.joinpath(*name.split("."))
        for file in (path / "__init__.py", path.with_suffix(".py")):
            if file.is_file():
                return ast.parse(file.read_text(encoding="utf-8"))
        return None

    def resolve(self, module: str, name: str) -> tuple[str, ast.AST] | None:
        """Where a module's attribute is defined, imports followed: module and node."""
        tree = self.module(module)
        if tree is None:
            return None
        found: tuple[str, ast.AST] | None = None
        for node in _statements(tree.body):
            if isinstance(node, _DEFINITIONS) and node.name == name:
                found = module, node
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [n.id for target in targets for n in ast.walk(target) if _is_name(n)]
                if name in names and not isinstance(found and found[1], _DEFINITIONS):
                    found = module, node
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        found = self._imported(module, node, alias.name) or found
            elif isinstance(node, ast.Import):
                if any((alias.asname or alias.name) == name for alias in node.names):
                    found = found or (module, node)
        if found is None and self.module(f"{module}.{name}") is not None:
            return module, self.module(f"{module}.{name}")
        return found

    def _imported(self, module: str, node: ast.ImportFrom, name: str) -> tuple[str, ast.AST] | None:
        source = node.module or ""
        if node.level:
            is_package = (self.root.joinpath(*module.split(".")) / "__init__.py").is_file()
            parents = module.split(".")
            parents = parents[: len(parents) - node.level + is_package]
            source = ".".join([*parents, *filter(None, [node.module])])
        if not source.startswith("megatron"):
            return module, node  # of another package: there as far as this tree goes
        return self.resolve(source, name)

    def imported_inside(self, module: str, name: str) -> tuple[str, ast.AST] | None:
        """As ``resolve``, for a name that a function of the module imports for itself."""
        for node in ast.walk(self.module(module)):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self._imported(module, node, alias.name)
        return self.resolve(module, name)

    def member(self, module: str, owner: ast.ClassDef, name: str) -> ast.AST | None:
        """What defines an attribute of a class or of its objects: in it, or in its base classes."""
        for node in owner.body:
            if isinstance(node, _DEFINITIONS) and node.name == name:
                return node
            if isinstance(node, ast.AnnAssign) and _is_name(node.target, name):
                return node
            if isinstance(node, ast.Assign) and any(_is_name(t, name) for t in node.targets):
                return node
        for method in owner.body:
            if isinstance(method, _FUNCTIONS) and name in _set_on_self(method):
                return method
        for base in owner.bases:
            found = self.resolve(module, ast.unparse(base).partition(".")[0])
            if found is not None and isinstance(found[1], ast.ClassDef):
                inherited = self.member(found[0], found[1], name)
                if inherited is not None:
                    return inherited
        return None

    def fields(self, module: str, owner: ast.ClassDef) -> list[str]:
        """The fields of a dataclass, in the order of its constructor."""
        names = []
        for base in owner.bases:
            found = self.resolve(module, ast.unparse(base))
            if found is not None and isinstance(found[1], ast.ClassDef):
                names += self.fields(*found)
        own = [n.target.id for n in owner.body if isinstance(n, ast.AnnAssign)]
        return names + [name for name in own if name not in names]

    def files(self, folder: str) -> Iterator[ast.Module]:
        for path in sorted(self.root.joinpath(folder).rglob("*.py")):
            yield ast.parse(path.read_text(encoding="utf-8"))


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Those of a module, inside ``if`` and ``try``, too."""
    for node in body:
        yield node
        for inner in ("body", "orelse", "handlers", "finalbody"):
            if not isinstance(node, _DEFINITIONS):
                yield from _statements(getattr(node, inner, []))


def _is_name(node: ast.AST, name: str | None = None) -> bool:
    return isinstance(node, ast.Name) and name in (None, node.id)


def _set_on_self(method: ast.FunctionDef) -> set[str]:
    found = set()
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "register_buffer":
            found |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    return found


def _parameters(node: ast.FunctionDef) -> list[str]:
    arguments = node.args
    found = [*arguments.posonlyargs, *arguments.args]
    found += [arguments.vararg] if arguments.vararg else []
    found += arguments.kwonlyargs
    found += [arguments.kwarg] if arguments.kwarg else []
    return [argument.arg for argument in found]


def _words_of(node: ast.AST) -> set[str]:
    found = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name):
            found.add(inner.id)
        elif isinstance(inner, ast.Attribute):
            found.add(inner.attr)
        elif isinstance(inner, ast.Constant) and isinstance(inner.value, str):
            found.add(inner.value)
    return found


def problem_of(tree: Tree, symbol: Symbol) -> str | None:
    """What is missing or different; None where the symbol is as the table says."""
    module, _, path = symbol.target.partition(":")
    owner, *rest = path.split(".")
    found = tree.resolve(module, owner)
    if found is None:
        return MISSING if tree.module(module) is not None else f"{MISSING}, as is {module}"
    where, node = found
    for name in rest:
        node = tree.member(where, node, name) if isinstance(node, ast.ClassDef) else None
        if node is None:
            return MISSING
    if symbol.takes:
        if isinstance(node, ast.ClassDef):
            constructor = tree.member(where, node, "__init__")
            takes = (
                tree.fields(where, node) if constructor is None else _parameters(constructor)[1:]
            )
        elif isinstance(node, _FUNCTIONS):
            takes = _parameters(node)
            # Called on the class: its first parameter is not given.
            if any(_is_name(d, "classmethod") for d in node.decorator_list):
                takes = takes[1:]
        else:
            return "is no function or class"
        wrong = wrong_parameters(symbol, takes)
        if wrong is not None:
            return wrong
    wanted = alternatives(symbol, lambda name: tree.resolve(module, name) is not None)
    return not_looked_up(wanted, _words_of(node)) if wanted else None


def arguments_of(tree: Tree) -> tuple[set[str], set[str]]:
    """The names of Megatron's arguments: those that its parser knows, and those set somewhere later."""
    parsed, later = set(), set()
    for module in tree.files("megatron/training"):
        for node in ast.walk(module):
            if isinstance(node, ast.Call):
                parsed |= _flags(tree, node, module)
            elif isinstance(node, _FUNCTIONS):
                stored = {
                    n.attr
                    for n in ast.walk(node)
                    if isinstance(n, ast.Attribute)
                    and isinstance(n.ctx, ast.Store)
                    and _is_name(n.value, "args")
                }
                later |= stored
                parsed |= stored if node.name == "parse_args" else set()
    return parsed, later | parsed


def _flags(tree: Tree, call: ast.Call, module: ast.Module) -> set[str]:
    """The arguments that a call of ``add_argument`` or ``ArgumentGroupFactory`` makes."""
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if getattr(call.func, "attr", "") == "add_argument":
        if isinstance(keywords.get("dest"), ast.Constant):
            return {keywords["dest"].value}
        flags = [a.value for a in call.args if isinstance(a, ast.Constant)]
        long = [flag for flag in flags if str(flag).startswith("--")]
        return {long[0].removeprefix("--").replace("-", "_")} if long else set()
    if getattr(call.func, "id", "") != "ArgumentGroupFactory" or not call.args:
        return set()
    found = tree.imported_inside("megatron.training.arguments", ast.unparse(call.args[0]))
    if found is None or not isinstance(found[1], ast.ClassDef):
        return set()
    excluded = keywords.get("exclude")
    if isinstance(excluded, ast.Name):
        lists = [
            node.value
            for node in ast.walk(module)
            if isinstance(node, ast.Assign) and _is_name(node.targets[0], excluded.id)
        ]
        excluded = lists[0] if lists else None
    names = set(tree.fields(*found)) - (_words_of(excluded) if excluded is not None else set())
    # field(metadata={"argparse_meta": {"dest": "another name"}})
    for node in ast.walk(found[1]):
        if isinstance(node, ast.Dict):
            names |= {
                value.value
                for key, value in zip(node.keys, node.values, strict=True)
                if getattr(key, "value", None) == "dest" and isinstance(value, ast.Constant)
            }
    return names


def version_of(tree: Tree) -> str:
    module = tree.module("megatron.core.package_info")
    values = {
        node.targets[0].id: node.value.value
        for node in (module.body if module is not None else [])
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    }
    return ".".join(str(values.get(name, "?")) for name in ("MAJOR", "MINOR", "PATCH"))


def report(tree: Tree) -> tuple[list[str], list[str]]:
    """Sentences on what a job cannot do without, and on what it can."""
    missing, without = [], []
    symbols = [symbol for symbol in SYMBOLS if symbol.target.startswith("megatron.")]
    for symbol in symbols:
        problem = problem_of(tree, symbol)
        if problem is not None:
            sentence = f"{symbol.target} {problem} (needed to {symbol.why})"
            optional = symbol.optional and problem.startswith(MISSING)
            optional |= symbol.probed_by == "mcore.upstream_bugs"
            (without if optional else missing).append(sentence)
    parsed, later = arguments_of(tree)
    for listed, known in ((PARSED, parsed), (VALIDATED, later), (RUNNING, later)):
        for name, reason in listed.items():
            if name not in known:
                flag = name.replace("_", "-")
                missing.append(f"argument --{flag} is missing (needed to {reason})")
    for name, optional in OPTIONAL.items():
        if name not in later:
            flag = name.replace("_", "-")
            without.append(
                f"argument --{flag} is missing, taken as {optional.default} (needed to {optional.why})"
            )
    return missing, without


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tree", type=Path, metavar="TREE", help="folder that holds megatron/")
    root = parser.parse_args(words).tree
    if not (root / "megatron" / "core").is_dir() or not (root / "megatron" / "training").is_dir():
        print(
            f"{root}: has no megatron/core and megatron/training; name the folder of a source tree of "
            "Megatron-LM, or the site-packages that megatron-core is installed in",
            file=sys.stderr,
        )
        return 2
    tree = Tree(root)
    missing, without = report(tree)
    arguments = sum(map(len, (PARSED, VALIDATED, RUNNING, OPTIONAL)))
    symbols = sum(symbol.target.startswith("megatron.") for symbol in SYMBOLS)
    print(f"{root}: megatron-core {version_of(tree)}, {symbols} symbols, {arguments} arguments")
    for sentence in missing:
        print(f"  wrong:   {sentence}")
    for sentence in without:
        print(f"  without: {sentence}")
    print(f"  {len(missing)} missing or different, {len(without)} that a job can do without")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
