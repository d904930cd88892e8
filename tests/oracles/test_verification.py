"""What is loaded after a pruning is what was written: a load that goes wrong stops the job before its first step.

One job of two processes is pruned and exits; its checkpoint is then loaded by one process, as it is, damaged, and by a
loader that does something else than it should.
"""

import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from tests.support.forks import Outcome, in_megatron
from tests.support.maps import from_kept
from tests.support.runs import LAEP, PRETRAIN_GPT, run_megatron, tiny_arguments, unused_port

ITERATIONS, PRUNE = 4, 2
KEPT = {1: (6, 0, 3, 5), 2: (1, 2, 3, 4), 3: (7, 6, 1, 0), 4: (2, 5)}
MAP = from_kept(KEPT, experts_before=8, expert_parallel_size=2, top_k=2, iteration=PRUNE)
PENDING = f"iter_{PRUNE:07d}"


def flags(folder: Path, **more) -> list[str]:
    return tiny_arguments(
        **{
            "train_iters": ITERATIONS,
            "bf16": True,
            "moe_router_dtype": "fp32",
            "use_distributed_optimizer": True,
            "expert_model_parallel_size": 2,
            "save": folder,
            "load": folder,
            "save_interval": 100,
            "laep_prune_iteration": PRUNE,
            "laep_plan": folder / "plan.json",
            **more,
        }
    )


def launched(words: list[str], fault: str) -> None:
    """A whole job in one process, whose loader has a fault; where Megatron is."""
    import megatron_laep

    FAULTS[fault]()
    megatron_laep.install()
    sys.argv = [str(PRETRAIN_GPT), *words]
    megatron_laep.run(lambda: runpy.run_path(str(PRETRAIN_GPT), run_name="__main__"))


def nothing() -> None:
    """A loader as it is."""


def one_tensor_less() -> None:
    """The reader skips what it was asked for, and says that it is done."""
    from torch.distributed.checkpoint import FileSystemReader

    read = FileSystemReader.read_data

    def read_less(self, plan, planner):
        plan.items = [
            item
            for item in plan.items
            if item.dest_index.fqn != "decoder.layers.1.self_attention.linear_proj.weight"
        ]
        return read(self, plan, planner)

    FileSystemReader.read_data = read_less


def one_moment_forgotten() -> None:
    """Read, and never given to the optimizer."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    put = DistributedOptimizer._set_main_param_and_optimizer_states

    def put_some(self, parameter, tensors):
        put(
            self,
            parameter,
            {name: tensors[name] for name in tensors if name != "exp_avg_sq"}
            | {"exp_avg_sq": None},
        )

    DistributedOptimizer._set_main_param_and_optimizer_states = put_some


def other_experts() -> None:
    """The map is followed in another order: of shapes that fit, and finite."""
    from megatron_laep.mcore import sharding

    place = sharding._placed

    def placed_elsewhere(entry, places):
        turned = dict(zip(places.of, reversed(places.of.values()), strict=True))
        return place(entry, sharding.replace(places, of=turned))

    sharding._placed = placed_elsewhere


FAULTS = {
    fault.__name__: fault
    for fault in (nothing, one_tensor_less, one_moment_forgotten, other_experts)
}


def resume(folder: Path, fault: str = "nothing", **more) -> Outcome:
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(unused_port())}
    words = flags(folder, expert_model_parallel_size=1, **more)
    words += ["--laep-expert-model-parallel-size", "1"]
    return in_megatron(launched, words, fault, env=environment)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pruned")
    (folder / "plan.json").write_text(MAP.to_json())
    run_megatron(flags(folder, laep_exit_after_prune=True), 2, launcher=LAEP)
    return folder


@pytest.fixture
def copy(pruned, tmp_path) -> Path:
    return shutil.copytree(pruned, tmp_path / "copy")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / PENDING).iterdir()}


def test_the_same_experts_and_moments(copy) -> None:
    outcome = resume(copy, train_iters=ITERATIONS, exit_interval=3)
    assert outcome.error in (None, "SystemExit"), outcome.output[-3000:]
    (found,) = re.findall(
        r"event=load_verified tensors=(\d+) checksums=(\d+)/(\d+)", outcome.output
    )
    tensors, compared, recorded = map(int, found)
    # 4 layers x 2 experts x (two halves of fc1, fc2) x (weight, master, two moments).
    assert compared == recorded == 4 * 2 * 3 * 4
    assert tensors > 100


@pytest.mark.parametrize(
    "fault, wanted",
    {
        "one_tensor_less": "decoder.layers.1.self_attention.linear_proj.weight (rank 0)",
        "one_moment_forgotten": "exp_avg_sq (rank 0)",
        "other_experts": "do not have the checksum that they were written with: decoder.layers.",
    }.items(),
)
def test_a_loader_with_a_fault(copy, fault, wanted) -> None:
    before = files_of(copy)
    outcome = resume(copy, fault)
    assert outcome.error == "Refusal", outcome.output[-3000:]
    for text in (str(copy / PENDING), wanted, "Nothing was trained", "--ckpt-step"):
        assert text in outcome.message
    assert "iteration        3" not in outcome.output
    assert files_of(copy) == before


def test_a_disk_that_changed_a_byte(copy) -> None:
    place, offset = in_megatron(stored_at, str(copy / PENDING)).result()
    path = copy / PENDING / place
    damaged = bytearray(path.read_bytes())
    damaged[offset] ^= 4
    path.write_bytes(damaged)
    outcome = resume(copy)
    assert outcome.error == "Refusal", outcome.output[-3000:]
    assert "1 tensors do not have the checksum" in outcome.message


def stored_at(checkpoint: str) -> tuple[str, int]:
    """File, and a byte in the middle, of a moment of an expert that has a checksum."""
    from torch.distributed.checkpoint import FileSystemReader

    from megatron_laep.mcore.checkpoint import read_record
    from megatron_laep.mcore.verification import sampled_experts

    expert = sampled_experts(read_record(Path(checkpoint)).lineage.last)[3][0]
    metadata = FileSystemReader(checkpoint).read_metadata()
    (stored,) = (
        stored
        for index, stored in metadata.storage_data.items()
        if index.fqn
        == "optimizer.state.exp_avg.decoder.layers.2.mlp.experts.experts.linear_fc2.weight"
        and index.offset[0] == expert
    )
    return stored.relative_path, stored.offset + stored.length // 2


def test_an_older_record_has_no_checksums() -> None:
    assert in_megatron(record_without_checksums).result() == {}


def record_without_checksums() -> dict:
    from megatron_laep.mcore.checkpoint import ENTRY, Record

    entry = Record().to_entry()
    del entry["checksums"]
    return dict(Record.from_common_state({ENTRY: entry}, where="here").checksums)


def test_sentinels_of_every_type() -> None:
    in_megatron(fill_and_find).result()


def fill_and_find() -> None:
    import torch

    from megatron_laep.mcore import verification

    for dtype in (
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.int32,
    ):
        matrix = torch.zeros(5, 7, dtype=dtype)
        assert verification.left_in([("matrix", matrix)]) == []
        assert verification.fill(matrix[:, 2:4])  # also a view that is not contiguous
        assert verification.left_in([("other", torch.ones(3)), ("matrix", matrix)]) == ["matrix"]
        matrix[:, 2:4] = 1
        matrix[4, 3] = -1
        assert verification.left_in([("matrix", matrix)]) == []
    scalar = torch.tensor(1.0)
    assert verification.fill(scalar)
    assert verification.left_in([("scalar", scalar), ("empty", torch.ones(0))]) == ["scalar"]
    # A NaN that a computation makes is no sentinel.
    nan = torch.tensor([float("nan"), float("inf") - float("inf")])
    assert verification.left_in([("nan", nan), ("half", nan.bfloat16())]) == []
    assert not verification.fill(torch.ones(3, dtype=torch.uint8))
    verification._AT_ONCE = 4
    long = torch.zeros(3, 5)
    verification.fill(long[2, 4:])
    assert verification.left_in([("long", long)]) == ["long"]


# -- laep verify: the same questions, offline ----------------------------------------------------------


def laep_verify(*words: str) -> tuple[int, dict]:
    """Exit code, and what it says for programs."""
    import contextlib
    import io
    import json

    from megatron_laep.tools.__main__ import main

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = main(["verify", *words, "--json"])
    return code, json.loads(printed.getvalue())


def verified(path: Path, *words: str) -> tuple[int, dict[str, list[str] | None], dict]:
    code, found = in_megatron(laep_verify, str(path), *words).result()
    assert code == int(any(problems is None or problems for problems in found["checks"].values()))
    return code, found["checks"], found


def test_verify_a_sound_checkpoint(pruned) -> None:
    code, checks, found = verified(pruned / PENDING, "--all")
    assert (code, found["map_state"], found["iteration"]) == (0, "pending", PRUNE)
    assert checks == {"tracker": [], "files": [], "record": [], "shapes": [], "values": []}
    assert found["read"]["checksums"] == 4 * 2 * 3 * 4 < found["read"]["tensors"]
    # SAVE stands for its latest checkpoint; a sample reads less, but all that have a checksum.
    code, _, sampled = verified(pruned, "--sample", "5")
    assert code == 0 and sampled["path"] == found["path"]
    assert found["read"]["checksums"] == sampled["read"]["checksums"] <= sampled["read"]["tensors"]
    assert sampled["read"]["tensors"] <= found["read"]["checksums"] + 5


def test_verify_a_pruned_and_a_foreign_checkpoint(copy, tmp_path) -> None:
    resume(copy, exit_interval=3)
    code, checks, found = verified(copy, "--all")
    assert (code, found["map_state"], found["iteration"]) == (0, "applied", 3), checks
    run_megatron(tiny_arguments(train_iters=1, save=tmp_path / "stock", save_interval=1), 1)
    code, checks, found = verified(tmp_path / "stock")
    assert (code, found["map_state"]) == (0, "none"), checks


def test_verify_finds_damage(copy) -> None:
    checkpoint = copy / PENDING
    shard = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    whole = shard.read_bytes()

    shard.write_bytes(whole[:-100])
    code, checks, _ = verified(checkpoint)
    assert code == 1 and f"{shard.name} has {len(whole) - 100} bytes" in checks["files"][0]
    shard.unlink()
    code, checks, _ = verified(checkpoint)
    assert code == 1 and f"{shard.name} is not there" in checks["files"][0]

    shard.write_bytes(whole)
    place, offset = in_megatron(stored_at, str(checkpoint)).result()
    damaged = bytearray((checkpoint / place).read_bytes())
    damaged[offset] ^= 4
    (checkpoint / place).write_bytes(damaged)
    code, checks, _ = verified(checkpoint, "--sample", "0")
    assert code == 1 and ["checksum" in problem for problem in checks["values"]] == [True]

    shard.write_bytes(whole)
    metadata = (checkpoint / ".metadata").read_bytes()
    (checkpoint / ".metadata").write_bytes(metadata[: len(metadata) // 2])
    code, checks, _ = verified(checkpoint)
    assert code == 1 and "is damaged" in checks["files"][0]
    assert checks["shapes"] is checks["values"] is None


def test_verify_looks_at_the_tracker(copy) -> None:
    tracker = copy / "latest_checkpointed_iteration.txt"
    for text, wanted in (("", "names no iteration"), ("7", "iter_0000007, which is no complete")):
        tracker.write_text(text)
        code, checks, _ = verified(copy / PENDING)
        assert code == 1 and wanted in checks["tracker"][0] and checks["files"] == []
        code, checks, _ = verified(copy)
        assert code == 1 and list(checks) == ["tracker"]
    tracker.unlink()
    (copy / PENDING).rename(copy / "iter_0000003")
    code, checks, _ = verified(copy / "iter_0000003")
    assert code == 1 and "folder is of iteration 3, what is in it of 2" in checks["record"][0]


def with_another_record(checkpoint: str, edit: str) -> None:
    """Writes the common state of a checkpoint anew, its record edited, as ``common.pt``, which Megatron prefers."""
    import torch
    from megatron.core import dist_checkpointing

    from megatron_laep.mcore.checkpoint import ENTRY

    state = dist_checkpointing.load_common_state_dict(checkpoint)
    EDITS[edit](state[ENTRY])
    torch.save(state, f"{checkpoint}/common.pt")


def another_map(record: dict) -> None:
    other = from_kept(
        {n: (0, 1) for n in KEPT},
        experts_before=4,
        expert_parallel_size=2,
        top_k=2,
        iteration=PRUNE,
    )
    record["lineage"] = [other.to_json()]


EDITS = {
    "map": lambda record: record.update(lineage=[record["lineage"][0].replace("6, 0", "0, 6", 1)]),
    "fitting map": another_map,
    "state": lambda record: record.update(map_state="applied"),
    "window": lambda record: record.update(window={"start": 4}),
}


@pytest.mark.parametrize(
    "edit, check, wanted",
    [
        ("map", "record", "it was damaged or edited"),
        (
            "fitting map",
            "shapes",
            "layer 1: its record (pending, 1 maps) says 4 experts, its router has 8",
        ),
        (
            "state",
            "shapes",
            "layer 1: its record (applied, 1 maps) says 4 experts, its router has 8",
        ),
        ("window", "record", "window must be an object with the fields start, end, tokens_LE"),
    ],
)
def test_verify_an_edited_record(copy, edit, check, wanted) -> None:
    in_megatron(with_another_record, str(copy / PENDING), edit).result()
    code, checks, _ = verified(copy / PENDING, "--sample", "3")
    assert code == 1 and wanted in checks[check][0]


def test_a_metadata_that_would_run_something(copy, tmp_path) -> None:
    """Neither the tool nor a job does what the file asks for."""
    in_megatron(hostile_metadata, str(copy / PENDING / ".metadata"), str(tmp_path / "ran")).result()
    code, checks, _ = verified(copy / PENDING)
    assert code == 1 and "asks for posix.mkdir" in checks["files"][0]
    outcome = resume(copy)
    assert outcome.error == "Refusal", outcome.output[-2000:]
    assert "asks for posix.mkdir" in outcome.message
    assert not (tmp_path / "ran").exists()


def hostile_metadata(path: str, marker: str) -> None:
    import os
    import pickle

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (marker,)

    Path(path).write_bytes(pickle.dumps(Hostile()))


def test_verify_and_inspect_whatever_the_bytes_are(copy) -> None:
    """A sentence, and no exception: files of a checkpoint cut off, overwritten and mixed up at random."""
    codes = in_megatron(verify_random_damage, str(copy / PENDING), 60).result()
    assert set(codes) <= {0, 1, 2} and 1 in codes


def verify_random_damage(checkpoint: str, times: int) -> list[int]:
    import contextlib
    import io
    import random

    from megatron_laep.tools.__main__ import main

    draw, codes = random.Random(1), []
    files = [Path(checkpoint, name) for name in (".metadata", ".metadata", "metadata.json")]
    files.append(max(Path(checkpoint).glob("*.distcp"), key=lambda path: path.stat().st_size))
    for _ in range(times):
        path = draw.choice(files)
        whole = path.read_bytes()
        damaged = bytearray(whole)
        for _ in range(draw.choice((1, 1, 5))):
            at, new = draw.randrange(len(whole)), draw.randbytes(draw.randrange(1, 9))
            damaged[at : at + draw.choice((0, len(new)))] = new
        path.write_bytes(damaged[: draw.choice((len(damaged), len(damaged), at))])
        for words in (["verify", "--sample", "20"], ["inspect"]):
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                codes.append(main([*words, checkpoint]))
        path.write_bytes(whole)
    return codes
