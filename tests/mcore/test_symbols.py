"""The table of Megatron's symbols and arguments: complete, without anything unused, and probed."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from megatron_laep.mcore import symbols
from megatron_laep.mcore.argument_table import OF_SCRIPTS, OPTIONAL, PARSED, RUNNING, VALIDATED
from megatron_laep.mcore.symbol_table import CALLERS, HOOKED, REPAIRED, SYMBOLS, Symbol
from megatron_laep.mcore.symbols import leading_and_named
from tests.support.forks import in_megatron
from tests.support.jobs import assert_complaint, job, parsed
from tests.support.runs import REPOSITORY

PACKAGE = REPOSITORY / "megatron_laep"
TABLES = {"mcore/symbol_table.py", "mcore/argument_table.py"}
ARGUMENTS = PARSED | VALIDATED | RUNNING
TARGETS = [symbol.target for symbol in SYMBOLS]

CONFIG = "megatron.core.transformer.transformer_config:TransformerConfig"
MOE_LAYER = "megatron.core.transformer.moe.moe_layer:MoELayer"
DDP = "megatron.core.distributed:DistributedDataParallel"
GROUPS = "megatron.core.process_groups_config:ProcessGroupCollection"
BUFFERS = "megatron.core.distributed.param_and_grad_buffer"
SHARDED = "megatron.core.dist_checkpointing.mapping:ShardedTensor"
# Variables that hold Megatron's objects, which no import tells: file, name -> class.
OBJECTS = {
    ("mcore/sharding.py", "entry"): SHARDED,
    ("mcore/moe_layer.py", "config"): CONFIG,
    ("mcore/moe_layer.py", "layer_config"): CONFIG,
    ("mcore/moe_layer.py", "in_slots"): CONFIG,
    ("mcore/moe_layer.py", "pg_collection"): GROUPS,
    ("mcore/moe_layer.py", "self.config"): CONFIG,
    ("mcore/token_dispatcher.py", "self.config"): CONFIG,
    ("mcore/token_dispatcher.py", "in_slots"): CONFIG,
    ("mcore/token_dispatcher.py", "pg_collection"): GROUPS,
    ("mcore/model_size.py", "layer"): MOE_LAYER,
    ("mcore/model_size.py", "layer.config"): CONFIG,
    ("mcore/rebuild.py", "module"): MOE_LAYER,
    ("mcore/rebuild.py", "chunk"): DDP,
    ("mcore/optimizer_state.py", "buffer"): f"{BUFFERS}:_ParamAndGradBuffer",
    ("mcore/optimizer_state.py", "bucket"): f"{BUFFERS}:_ParamAndGradBucket",
    ("cpu/norm.py", "config"): CONFIG,
}
# What these objects have of torch, or of this package.
NOT_MEGATRONS = {
    "build_fn",  # of a ShardedTensorFactory, in its ``takes``
    "get_config_for_layer",  # set here, looked up by TransformerBlock._build_layers
    "modules",
    "parameters",
    "register_buffer",
    "training",
}


def sources() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name not in TABLES:
            yield name, ast.parse(path.read_text(encoding="utf-8"))


def is_module(name: str) -> bool:
    """Whether Megatron has a module of the name; looks at files, imports nothing."""
    (root,) = importlib.util.find_spec("megatron").submodule_search_locations
    path = Path(root).parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def attributes_of(tree: ast.Module, name: str) -> set[str]:
    """What is read of, or set on, a variable, by ``x.a``, ``getattr(x, "a")``, ``_replace(x, "a", ...)``."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == name:
            found.add(node.attr)
        elif isinstance(node, ast.Call) and len(node.args) >= 2:
            owner, attribute = node.args[:2]
            if ast.unparse(owner) == name and isinstance(attribute, ast.Constant):
                found.add(attribute.value)
    return found - {"__name__"}


def is_listed(target: str) -> bool:
    return any(found == target or found.startswith(f"{target}.") for found in TARGETS)


def is_member(owner: str, name: str) -> bool:
    """Whether an attribute of a class is listed, by itself or among what its constructor takes."""
    constructors = [symbol.takes for symbol in SYMBOLS if symbol.target == owner]
    named = {name for takes in constructors for part in leading_and_named(takes) for name in part}
    return is_listed(f"{owner}.{name}") or name in named


def imported() -> Iterator[tuple[str, str]]:
    """Every use of an import from Megatron: file, target."""
    for file, tree in sources():
        if file in ("mcore/upstream_bugs.py", "mcore/sgd_state.py"):
            continue  # they ask Megatron themselves: a name that is missing is an answer there
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [(a.name, a.asname or a.name) for a in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(f"{node.module}.{a.name}", a.asname or a.name) for a in node.names]
            else:
                continue
            for name, alias in names:
                if not name.startswith("megatron."):
                    continue
                if is_module(name):
                    yield file, f"{name}:"
                    for attribute in attributes_of(tree, alias):
                        if not is_module(f"{name}.{attribute}"):
                            yield file, f"{name}:{attribute}"
                else:
                    target = ":".join(name.rsplit(".", 1))
                    yield file, target
                    for attribute in attributes_of(tree, alias):
                        yield file, f"{target}.{attribute}"


def test_every_import_from_megatron_is_listed():
    found = list(imported())
    assert ("mcore/rebuild.py", "megatron.core.parallel_state:_global_process_group_list") in found
    assert ("cpu/platform.py", "megatron.core.optimizer:Adam") in found
    modules = {target.partition(":")[0] + ":" for target in TARGETS}
    missing = [
        f"{file}: {target}"
        for file, target in found
        if not (target in modules if target.endswith(":") else is_listed(target))
    ]
    assert missing == []


def test_every_attribute_of_megatrons_objects_is_listed():
    missing, found = [], 0
    trees = dict(sources())
    for (file, name), owner in OBJECTS.items():
        attributes = attributes_of(trees[file], name) - NOT_MEGATRONS
        attributes = {attribute for attribute in attributes if not attribute.startswith("laep_")}
        assert attributes or name in ("layer.config",), f"{file}: no {name} any more"
        found += len(attributes)
        missing += [f"{file}: {owner}.{a}" for a in attributes if not is_member(owner, a)]
    assert found > 30
    assert missing == []


def test_every_inherited_member_is_listed():
    """``self.x`` and ``super().x`` in subclasses of Megatron's classes, unless x is set there."""
    missing, classes = [], []
    for file, tree in sources():
        bases_of = {
            alias.asname or alias.name: f"{node.module}:{alias.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron.")
            for alias in node.names
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.ClassDef):
                continue
            bases = [bases_of[b.id] for b in node.bases if getattr(b, "id", "") in bases_of]
            if not bases:
                continue
            classes.append(node.name)
            own = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
            stored = {
                n.attr
                for n in ast.walk(node)
                if isinstance(n, ast.Attribute)
                and isinstance(n.ctx, ast.Store)
                and n.attr.startswith(("_", "laep_", "read_through"))
            }
            mixed_in = {"_num_slots", "_experts_here", "_slots_E"}  # set by _InSlots
            used = attributes_of(node, "self") - own - stored - mixed_in
            used = {name for name in used if not name.startswith("laep_")}
            # Megatron's dispatchers keep their config, as every module does.
            used |= attributes_of(node, "super()")
            for name in used - NOT_MEGATRONS - {"config", "__init__"}:
                if not any(is_member(base, name) for base in bases):
                    missing.append(f"{file}: {node.name} uses {name} of {', '.join(bases)}")
    assert {"LaepMoELayer", "SlotAlltoAllTokenDispatcher", "SlotFlexTokenDispatcher"} <= set(
        classes
    )
    assert missing == []


def arguments_read() -> Iterator[tuple[str, str, str]]:
    """Every argument that is read or set: file, name, how."""
    for file, tree in sources():
        if not file.startswith(("mcore/", "loop/")):
            continue
        by_name = False
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                owner = ast.unparse(node.value)
                if owner in ("args", "get_args()"):
                    yield file, node.attr, "read"
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called == "symbols.argument" and isinstance(node.args[1], ast.Constant):
                    yield file, node.args[1].value, "accessor"
                elif called == "symbols.argument":
                    by_name = True
                elif called.endswith("overridden"):
                    for keyword in node.keywords:
                        if keyword.arg is not None:
                            yield file, keyword.arg, "set"
                elif called == "getattr" and ast.unparse(node.args[0]) == "args":
                    assert isinstance(node.args[1], ast.Name), f"{file}: {ast.unparse(node)}"
                    assert file == "mcore/symbols.py", f"{file}: {ast.unparse(node)}"
        if by_name and file.startswith("loop/"):
            # Whoever reads arguments by a variable has their names in dicts.
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "dict":
                    yield from ((file, k.arg, "set") for k in node.keywords)
                elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
                    yield file, node.slice.value, "set"
                elif isinstance(node, ast.Dict):
                    keys = [k.value for k in node.keys if isinstance(k, ast.Constant)]
                    yield from ((file, key, "set") for key in keys)


def test_every_argument_is_listed_and_optional_ones_are_read_through_the_accessor():
    found = set(arguments_read())
    assert "moe_layer_freq" in {name for _, name, _ in found}
    assert ("mcore/checkpoint.py", "dist_ckpt_strictness", "set") in found
    assert ("loop/start.py", "no_load_rng", "set") in found
    missing = sorted(
        f"{file}: {name}"
        for file, name, how in found
        if name not in ARGUMENTS and (how == "read" or name not in OPTIONAL | OF_SCRIPTS)
    )
    assert missing == []


def test_no_listed_argument_is_unused():
    used = {name for _, name, _ in arguments_read()}
    assert sorted(set(ARGUMENTS | OPTIONAL | OF_SCRIPTS) - used) == []


def words_of_the_sources() -> set[str]:
    found = set()
    for _, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                found.add(node.id)
            elif isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.alias):
                found |= set(node.name.split("."))
            elif isinstance(node, ast.keyword | ast.arg):
                found.add(node.arg)
            elif isinstance(node, ast.FunctionDef):
                found.add(node.name)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                # Texts for people are no use of a symbol.
                found |= set(re.split("[.:]", node.value)) | {node.value}
    return found


def test_no_listed_symbol_is_unused():
    words = words_of_the_sources()
    unused = []
    for symbol in SYMBOLS:
        names = {name for alternatives in symbols.alternatives(symbol) for name in alternatives}
        if symbol not in CALLERS and not (symbol in REPAIRED and symbol.looks_up):
            names.add(symbol.target.rpartition(":")[2].rpartition(".")[2])
        if not names & words:
            unused.append(symbol.target)
    assert unused == []


def test_everything_is_listed_once():
    assert len(set(TARGETS)) == len(TARGETS)
    names = [*PARSED, *VALIDATED, *RUNNING, *OPTIONAL, *OF_SCRIPTS]
    assert len(set(names)) == len(names)


def hooked_targets() -> tuple[list[str], list[str]]:
    from megatron_laep.loop.loop_hooks import hooks
    from megatron_laep.mcore.upstream_bugs import BUGS

    return [hook.target for hook in hooks()], [bug.hook.target for bug in BUGS if bug.hook]


def test_every_hook_is_listed_as_one():
    hooked, repaired = in_megatron(hooked_targets).result()
    optional = {symbol.target for symbol in HOOKED if symbol.optional}
    assert set(hooked) | optional == {symbol.target for symbol in HOOKED}
    assert len(hooked) == len(set(hooked))
    assert set(repaired) <= {symbol.target for symbol in REPAIRED}


# -- the probe ----------------------------------------------------------------------------------------

MODULE = "tests.module_of_test_symbols"


@dataclass
class Fields:
    without_default: int
    with_default: int = 0


class Thing:
    def __init__(self, first, second, *, third=None) -> None:
        self.set_on_objects = first

    def calls(self):
        def inside():
            return new_name() + "a text"  # noqa: F821

        return inside


def function(first, second, **more): ...


@pytest.fixture(autouse=True)
def module(monkeypatch) -> None:
    module = ModuleType(MODULE)
    module.Fields, module.Thing, module.function = Fields, Thing, function
    monkeypatch.setitem(sys.modules, MODULE, module)


@pytest.mark.parametrize(
    "path, needs",
    [
        ("function", {}),
        ("function", {"takes": "first, *, more"}),
        ("function", {"takes": "first, second, *, more", "exactly": True}),
        ("Thing", {"takes": "first, second, *, third", "exactly": True}),
        ("Thing.calls", {"looks_up": "old_name | new_name, a text"}),
        ("Thing.set_on_objects", {}),
        ("Fields.without_default", {}),
        ("Fields", {"takes": "*, with_default"}),
        ("gone", {"optional": True}),
        ("Thing.calls", {"looks_up": "new_name, gone?"}),
    ],
)
def test_what_is_there_is_found(path, needs):
    assert symbols.missing_symbols([Symbol(f"{MODULE}:{path}", "test it", **needs)]) == []


@pytest.mark.parametrize(
    "path, needs, complaint",
    [
        ("gone", {}, "is missing"),
        ("Thing.gone", {}, "is missing"),
        ("Gone.attribute", {}, "is missing"),
        ("function", {"takes": "first, *, fourth"}, "takes no fourth"),
        (
            "function",
            {"takes": "second, first"},
            "takes (first, second, more), wanted (second, first, ...)",
        ),
        ("function", {"takes": "first", "exactly": True}, "takes also second, more"),
        ("function", {"takes": "*, fourth", "optional": True}, "takes no fourth"),
        ("Thing.calls", {"looks_up": "old_name"}, "does not look up old_name"),
        ("Thing.calls", {"looks_up": "function?"}, "does not look up function"),
        ("Thing.calls", {"looks_up": "old | older"}, "does not look up old or older"),
    ],
)
def test_what_differs_is_named_with_what_it_is_for(path, needs, complaint):
    (found,) = symbols.missing_symbols([Symbol(f"{MODULE}:{path}", "test it", **needs)])
    assert found == f"{MODULE}:{path} {complaint} (needed to test it)"


def test_what_somebody_else_has_wrapped_only_has_to_be_there(monkeypatch):
    """A profiler's or a test's wrapper has its own parameters, and hands them on."""
    wrapper = SimpleNamespace(__call__=lambda: None, __module__="another.package")
    monkeypatch.setattr(sys.modules[MODULE], "function", wrapper)
    symbol = Symbol(f"{MODULE}:function", "test it", takes="fourth", looks_up="a name")
    assert symbols.missing_symbols([symbol]) == []


def test_a_package_that_is_not_there_is_told_once():
    gone = [Symbol(f"package_that_is_gone.{name}:name", "test it") for name in ("a", "b")]
    found = symbols.missing_symbols([*gone, Symbol(f"{MODULE}:gone", "test it")])
    assert found == [
        "package_that_is_gone.a:name cannot be imported: No module named 'package_that_is_gone' "
        "(needed to test it)",
        f"{MODULE}:gone is missing (needed to test it)",
    ]


def test_the_accessor_knows_defaults_and_refuses_what_is_not_listed():
    args = Namespace(gtp_weight_remat_size=4, save="here")
    assert symbols.argument(args, "gtp_weight_remat_size") == 4
    assert symbols.argument(args, "expert_gtp_weight_remat_size") == 1
    assert symbols.argument(args, "save") == "here"
    with pytest.raises(KeyError, match="not in argument_table"):
        symbols.argument(args, "unheard_of")
    with pytest.raises(AttributeError):
        symbols.argument(args, "load")


def probed() -> list[str]:
    return symbols.missing_symbols(SYMBOLS)


def test_this_megatron_has_everything():
    assert in_megatron(probed).result() == []


def parsed_without(words: list[str], names: list[str]) -> dict:
    """As ``parsed``, in a Megatron whose parser does not know some arguments."""
    from megatron.training import arguments

    parse = arguments.parse_args

    def parse_args(*more, **named):
        args = parse(*more, **named)
        for name in names:
            delattr(args, name)
        return args

    arguments.parse_args = parse_args
    return parsed(words)


def test_missing_arguments_are_named_in_one_sentence(tmp_path):
    outcome = in_megatron(parsed_without, job(tmp_path), ["ckpt_step", "moe_layer_freq"])
    assert_complaint(
        outcome,
        "lacks what megatron_laep needs: argument --ckpt-step (needed to find the checkpoint",
        "; argument --moe-layer-freq (needed to tell which layers have experts); supported is ",
    )


def test_optional_arguments_may_be_missing(tmp_path):
    outcome = in_megatron(parsed_without, job(tmp_path), ["moe_ncclep_static_shape"])
    assert outcome.result()["laep_prune_iteration"] == [10]


def left_out_without(names: list[tuple[str, str]]) -> list[str]:
    """The hooks that are left out in a Megatron that lacks some names, and is fine all the same."""
    import importlib

    from megatron_laep.loop.loop_hooks import hooks

    before = [hook.target for hook in hooks()]
    for module, name in names:
        delattr(importlib.import_module(module), name)
    symbols.check_megatron()
    after = [hook.target for hook in hooks()]
    return [target for target in before if target not in after]


def test_hooks_of_a_feature_that_this_megatron_lacks_are_left_out():
    """As quantile balancing in 0.18."""
    names = [
        ("megatron.core.distributed.finalize_model_grads", "_update_router_qb_beta"),
        ("megatron.core.transformer.moe.router", "qb_dual_update"),
    ]
    left_out = in_megatron(left_out_without, names).result()
    assert left_out == [":".join(name) for name in names]
