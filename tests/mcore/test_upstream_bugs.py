"""Bugs of Megatron: the probes tell the truth, and nothing is repaired where there is nothing to repair.

The truth is a real optimizer that is saved, loaded and trained on. MEGATRON_LAEP_MEGATRON_TREE names a source tree of
Megatron on which all of this is asked as well.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mcore.test_optimizer_state import Trainee, equal, start
from tests.oracles.test_uneven_experts import flags as short_job
from tests.support.exact_job import Losses, exact_job, exact_losses
from tests.support.forks import in_megatron, on_ranks
from tests.support.runs import REPOSITORY

TREE = "MEGATRON_LAEP_MEGATRON_TREE"
# Of the distributed optimizer's methods; SGD's is another story, see below.
BUGS = ("padded_buckets", "fp32_state")
METHODS = {
    "padded_buckets": "sharded_param_state_fully_reshardable",
    "fp32_state": "load_parameter_state_from_dp_reshardable",
}


# -- what runs where Megatron is -------------------------------------------------------------------


def loses_state(bug: str, change: str = "") -> bool:
    """Whether a real optimizer that is saved and loaded goes on otherwise than one that is not. One process."""
    start()
    if change:
        from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

        CHANGES[change](DistributedOptimizer, bug)
    how = {
        # Even alone, a rank pads its buckets to a multiple of 64 elements; the norms have 16.
        "padded_buckets": {"bucket_size": 1000},
        "fp32_state": {"fp32": True, "sharding": "dp_reshardable"},
    }[bug]
    before = Trainee("distributed", chained=False, seed=1, **how)
    before.train(3, lr=1e-2)
    if bug == "padded_buckets":
        (optimizer,) = before.optimizer.chained_optimizers
        (buffer,) = optimizer.buffers
        assert any(b.numel_unpadded < b.grad_data.numel() for b in buffer.buckets[:-1])
    path = before.save("saved")
    after = Trainee("distributed", chained=False, seed=2, **how)
    try:
        after.load(path)
    except RuntimeError as error:
        assert "leaf Variable that requires grad" in str(error)
        return True
    for trainee in (before, after):
        trainee.train(3, lr=1e-2)
    return not equal(before.weights(), after.weights())


def repaired_state(bug: str) -> bool:
    from megatron_laep.mcore import upstream_bugs
    from megatron_laep.mcore.hooks import HookSet

    hooks = upstream_bugs.ask_megatron().hooks(lambda: True)
    HookSet().apply([hook for hook in hooks if hook.target.endswith(METHODS[bug])])
    return loses_state(bug)


def findings(change: str = "", bug: str = "") -> tuple[list[str], dict[str, str], dict[str, bool]]:
    """What is found after a change of the bug's method, and which methods install() then replaces."""
    import megatron.core.optimizer.distrib_optimizer as module

    import megatron_laep
    from megatron_laep.mcore import upstream_bugs

    if change:
        CHANGES[change](module.DistributedOptimizer, bug)
    before = dict(vars(module.DistributedOptimizer))
    found = upstream_bugs.ask_megatron()
    assert dict(vars(module.DistributedOptimizer)) == before, "to ask changes nothing"
    megatron_laep.install()
    after = vars(module.DistributedOptimizer)
    hooked = {name: after.get(METHODS[name]) is not before.get(METHODS[name]) for name in BUGS}
    megatron_laep.uninstall()
    assert dict(vars(module.DistributedOptimizer)) == before
    assert list(found.present)[-1] == "sgd_state"
    return list(found.present)[:-1], found.unknown, hooked


def correct(cls: type, bug: str) -> None:
    """Own code for what a Megatron without the bug does."""
    if bug == "fp32_state":
        import torch

        cls.load_parameter_state_from_dp_reshardable = torch.no_grad()(
            cls.load_parameter_state_from_dp_reshardable
        )
        return

    def right(self, model_sharded_state_dict, is_loading=False, metadata=None):
        from dataclasses import replace

        from megatron.core.dist_checkpointing.dict_utils import nested_values
        from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

        on_host = (metadata or {}).get("distrib_optim_fully_reshardable_mem_efficient", False)
        joined = self.get_parameter_state_dp_zero(
            use_gloo_comm=on_host,
            empty_data=is_loading,
            return_on_all_ranks=is_loading or not on_host,
        )
        if joined is None:
            return None
        entries = {id(entry.data): entry for entry in nested_values(model_sharded_state_dict)
                   if hasattr(entry, "replica_id")}  # fmt: skip
        state = {}
        for index, buffer in enumerate(self.buffers):
            (world,) = joined[index].values()
            starts, length = [], 0
            for bucket in buffer.buckets:
                starts.append(length)
                length += bucket.numel_unpadded
            for parameter, (begin, end, bucket_id) in buffer.param_index_map.items():
                entry = entries[id(parameter)]
                start = starts[bucket_id] + begin - buffer.buckets[bucket_id].offset
                state[len(state)] = tensors = {}
                for key, values in world.items():
                    if key in ("step", "numel_unpadded"):
                        continue
                    data = values[start : start + end - begin].reshape(entry.data.shape)
                    named = {"key": f"optimizer.state.{key}.{entry.key}", "data": data}
                    if not isinstance(entry, ShardedTensorFactory):
                        named["dtype"] = data.dtype
                    tensors[key] = replace(entry, **named)
        return state

    cls.sharded_param_state_fully_reshardable = right


def detach(cls: type, bug: str) -> None:
    """The other way not to have the bug: the optimizer steps on what autograd does not know."""
    original = cls._build_model_and_main_param_groups.__func__

    def build(cls, gbuf_ranges, param_gbuf_map, opt_group_ranges, config):
        groups = original(cls, gbuf_ranges, param_gbuf_map, opt_group_ranges, config)
        for group_range in opt_group_ranges:
            group = group_range["orig_group"]
            group["params"] = [parameter.detach() for parameter in group["params"]]
        for position, shards in enumerate(groups[3]):
            shards[:] = opt_group_ranges[position]["orig_group"]["params"][: len(shards)]
        return groups

    cls._build_model_and_main_param_groups = classmethod(build)


def remove(cls: type, bug: str) -> None:
    delattr(cls, METHODS[bug])


def return_nothing(cls: type, bug: str) -> None:
    setattr(cls, METHODS[bug], lambda self, *args, **kwargs: None)


def break_otherwise(cls: type, bug: str) -> None:
    """Wrong, but not as the known bug is: a repair of that would not help."""
    original = getattr(cls, METHODS[bug])

    def other(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        for tensors in (result or {}).values():
            tensors["exp_avg"].data.zero_()
        return result

    def fail(self, *args, **kwargs):
        raise RuntimeError("another error\nof many lines")

    setattr(cls, METHODS[bug], other if bug == "padded_buckets" else fail)


CHANGES = {
    "corrected": correct,
    "detached": detach,
    "removed": remove,
    "returns nothing": return_nothing,
    "broken otherwise": break_otherwise,
}


def correct_and_repair() -> bool:
    """What the repair would do to a Megatron that does not need it."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from megatron_laep.mcore import upstream_bugs

    correct(DistributedOptimizer, "padded_buckets")
    optimizer, entries, wanted = upstream_bugs._two_buckets()
    assert upstream_bugs._fully_reshardable(optimizer, entries) == wanted
    with upstream_bugs.ranges_without_padding(optimizer.buffers):
        return upstream_bugs._fully_reshardable(optimizer, entries) == wanted


def sgd_goes_on(
    *, repaired: bool, momentum: float = 0.9, made_by_megatron: bool = False
) -> dict[str, bool]:
    """Whether a real SGD that is saved and loaded goes on as one that is not; and what the probe says. One process."""
    from megatron.core import optimizer as module

    from megatron_laep.mcore import sgd_state, upstream_bugs
    from megatron_laep.mcore.hooks import HookSet

    start()
    if made_by_megatron:
        make = module._get_megatron_optimizer_based_on_param_groups

        def corrected(config, *more, skip_megatron_wrapping=False, **named):
            made = make(config, *more, skip_megatron_wrapping=skip_megatron_wrapping, **named)
            return (made[0], sgd_state.init_momentum) if skip_megatron_wrapping else made

        module._get_megatron_optimizer_based_on_param_groups = corrected
    found = upstream_bugs.ask_megatron()
    if repaired:
        HookSet().apply(
            [hook for hook in found.hooks(lambda: False) if "param_groups" in hook.target]
        )
    before = Trainee("fp32", chained=True, seed=1, optimizer="sgd")
    for group in before.optimizer.param_groups:
        group["momentum"] = momentum
    before.train(3, lr=1e-1)
    after = Trainee("fp32", chained=True, seed=2, optimizer="sgd")
    for group in after.optimizer.param_groups:
        group["momentum"] = momentum
    answer = {"found": "sgd_state" in found.present}
    try:
        after.load(before.save("saved"))
    except TypeError as error:
        assert "'NoneType' object is not callable" in str(error)
        return answer | {"goes on": False}
    for trainee in (before, after):
        trainee.train(3, lr=1e-1)
    return answer | {"goes on": equal(before.weights(), after.weights())}


def job_after(change: str, bug: str, arguments: list[str]) -> Losses:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    CHANGES[change](DistributedOptimizer, bug)
    return exact_job(arguments)


def help_of(text: str) -> tuple[str, list[str]]:
    import argparse

    from megatron_laep.mcore import upstream_bugs

    parser = argparse.ArgumentParser()
    parser.add_argument("--number", default=7)
    parser._actions[-1].help = text  # newer Pythons look at it when it is added
    found = upstream_bugs.Findings()
    upstream_bugs.mend_help(parser, found)
    return parser.format_help(), list(found.present)


# -- the probes ------------------------------------------------------------------------------------


_loses_state = functools.cache(lambda bug: in_megatron(loses_state, bug).result())
"""Main has no padded buckets any more; 0.18 and 0.19 have both bugs."""


def test_the_bugs_are_found_and_hooked():
    present, unknown, hooked = in_megatron(findings).result()
    assert present == [bug for bug in BUGS if _loses_state(bug)]
    assert unknown == {}
    assert hooked == {bug: _loses_state(bug) for bug in BUGS}


@pytest.mark.parametrize("bug", BUGS)
def test_the_probe_tells_the_truth(bug):
    if not _loses_state(bug):
        pytest.skip(f"this Megatron does not have {bug}")
    assert in_megatron(repaired_state, bug).result() is False


@pytest.mark.parametrize(
    "change, bug", [*(("corrected", bug) for bug in BUGS), ("detached", "fp32_state")]
)
def test_nothing_is_touched_on_a_megatron_that_is_right(change, bug):
    assert in_megatron(loses_state, bug, change).result() is False
    present, unknown, hooked = in_megatron(findings, change, bug).result()
    (other,) = set(BUGS) - {bug}
    assert present == [other] * _loses_state(other)
    assert unknown == {}
    assert hooked == {bug: False, other: _loses_state(other)}


def test_the_repair_would_spoil_a_megatron_that_is_right():
    assert in_megatron(correct_and_repair).result() is False


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize(
    "change, says",
    [
        ("removed", {name: "AttributeError" for name in BUGS}),
        ("returns nothing", {"padded_buckets": "TypeError", "fp32_state": "CannotTell: of param"}),
        (
            "broken otherwise",
            {"padded_buckets": "CannotTell: of the state", "fp32_state": "RuntimeError: another"},
        ),
    ],
)
def test_a_probe_that_understands_nothing_touches_nothing(bug, change, says):
    present, unknown, hooked = in_megatron(findings, change, bug).result()
    assert bug not in present and not hooked[bug]
    assert list(unknown) == [bug]
    assert unknown[bug].startswith(says[bug])
    assert "\n" not in unknown[bug]


def source_tree_tells_the_truth():
    answers = {}
    for words in (["ask"], *(["truth", bug] for bug in BUGS)):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "tests.mcore.test_upstream_bugs", *words],
            cwd=REPOSITORY,
            env=os.environ
            | {
                "PYTHONPATH": os.pathsep.join([os.environ[TREE], *sys.path]),
                "OMP_NUM_THREADS": "1",
                "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            },
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        answers[words[-1]] = json.loads(done.stdout.splitlines()[-1])
    found = answers["ask"]
    assert Path(found["megatron"]).is_relative_to(os.environ[TREE])
    assert found["unknown"] == {}
    for bug in BUGS:
        assert (bug in found["present"]) is answers[bug], bug
        assert found["hooked"][bug] is answers[bug], bug


if TREE in os.environ:  # not skipped without one: there is nothing to ask
    test_the_probes_tell_the_truth_of_a_source_tree = source_tree_tells_the_truth


def answer(question: str, bug: str = "") -> None:
    """In a process whose Megatron is the source tree: the answer on the last line."""
    import tempfile

    from megatron_laep import cpu

    cpu.enable(force=True)
    import megatron.core

    with tempfile.TemporaryDirectory() as scratch:
        os.environ.update(IN_MEGATRON_SCRATCH=scratch, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        if question == "truth":
            print(json.dumps(loses_state(bug)), flush=True)
        else:
            present, unknown, hooked = findings()
            said = {"present": present, "unknown": unknown, "hooked": hooked}
            print(json.dumps(said | {"megatron": megatron.core.__file__}), flush=True)


# -- help texts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, shown, mended",
    [
        ("headroom (1.10 = 10%).", "headroom (1.10 = 10%).", ["help_percent"]),
        ("a % block of %(default)s", "a % block of 7", ["help_percent"]),
        ("10%% of %(default)s", "10% of 7", []),
        ("50%% and 10%", "50% and 10%", ["help_percent"]),
    ],
)
def test_help_texts(text, shown, mended):
    printed, found = in_megatron(help_of, text).result()
    assert shown in printed
    assert found == mended


# -- SGD ---------------------------------------------------------------------------------------------


def test_the_probe_of_sgd_tells_the_truth():
    found = {"found": True}
    assert in_megatron(sgd_goes_on, repaired=False).result() == found | {"goes on": False}
    assert in_megatron(sgd_goes_on, repaired=True).result() == found | {"goes on": True}
    without = in_megatron(sgd_goes_on, repaired=True, momentum=0.0)
    assert without.result() == found | {"goes on": True}, "there is no momentum to be made"


def test_sgd_that_makes_its_momentum_is_left_alone():
    answer = in_megatron(sgd_goes_on, repaired=False, made_by_megatron=True).result()
    assert not answer["found"]


# -- jobs ------------------------------------------------------------------------------------------


FP32 = {
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
    "num_experts": 8,
    "train_iters": 8,
    "save_interval": 2,
    "lr_decay_iters": 20,
    "expert_model_parallel_size": 2,
}
PRUNE = 5


def fp32_job(folder: Path, **more) -> list[str]:
    pruning = {"laep_prune_iteration": PRUNE, "laep_window": 2, "laep_alpha": 1.0, "laep_beta": 0.5}
    return short_job(**{**FP32, **pruning, "save": folder, "load": folder, **more})


BF16 = {"bf16": True, "moe_router_dtype": "fp32"}


@pytest.mark.parametrize(
    "bug, more, says",
    [
        (
            "padded_buckets",
            {},
            ("fully reshardable checkpoints mix up", "train without --use-distributed-optimizer"),
        ),
        (
            "fp32_state",
            {},
            ("format dp_reshardable cannot be loaded", "add --dist-ckpt-optim-fully-reshardable"),
        ),
    ],
)
def test_a_job_that_rests_on_an_open_question_is_refused(tmp_path, bug, more, says):
    for outcome in on_ranks(2, job_after, "removed", bug, fp32_job(tmp_path, **more)):
        assert outcome.error == "Refusal"
        for text in ("--use-distributed-optimizer", "cannot be found out", METHODS[bug], *says):
            assert text in outcome.message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "bug, more",
    [
        ("padded_buckets", {"use_distributed_optimizer": None, "overlap_param_gather": None}),
        ("fp32_state", {"dist_ckpt_optim_fully_reshardable": True}),
        ("fp32_state", BF16),
    ],
)
def test_a_job_that_does_not_rest_on_it_runs(tmp_path, bug, more):
    arguments = fp32_job(tmp_path, **more, train_iters=PRUNE + 1)
    # Removing the method would take it from jobs that use it: it stays, and understands nothing.
    outcomes = on_ranks(2, job_with_open_question, bug, arguments)
    assert list(exact_losses(outcomes)) == list(range(1, PRUNE + 2))
    assert f"cannot_tell={bug}" in outcomes[0].output


def job_with_open_question(bug: str, arguments: list[str]) -> Losses:
    import dataclasses

    from megatron_laep.mcore import upstream_bugs

    def fail() -> bool:
        raise KeyError("moved")

    upstream_bugs.BUGS = tuple(
        dataclasses.replace(row, is_there=fail) if row.name == bug else row
        for row in upstream_bugs.BUGS
    )
    return exact_job(arguments)


if __name__ == "__main__":
    answer(*sys.argv[1:])
