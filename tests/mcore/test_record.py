"""The record in a checkpoint: round trips, who can open it, and which checkpoint is found.

Checkpoints are real ones, of little more than their common state.
"""

import importlib.metadata
import json
import pickle
import resource
import signal
from argparse import Namespace
from pathlib import Path

import pytest

import megatron_laep
from megatron_laep.plan.expert_map import ExpertMap
from tests.support import maps
from tests.support.forks import in_megatron, init_process_group

MAP = maps.from_kept(
    {1: (5, 1, 0, 4), 3: (2, 6)}, experts_before=8, expert_parallel_size=2, top_k=2, iteration=10
).to_json()
SECOND = maps.from_kept(
    {1: (3, 0), 3: (1, 0)},
    experts_before={1: 4, 3: 2},
    expert_parallel_size=2,
    top_k=2,
    iteration=20,
).to_json()
WINDOW = {"start": 5, "end": 7, "tokens_LE": ((1, 2**40, 3), (0, 0, 9))}
NAME = "relaunch_with_python_m_megatron_laep"
DATA = Path(__file__).resolve().parents[1] / "data"


# -- what runs where Megatron is -------------------------------------------------------------------


def record(map_state: str | None, window: dict | None = None, second: bool = False):
    from megatron_laep.mcore.checkpoint import Record, Writer
    from megatron_laep.plan.lineage import Lineage
    from megatron_laep.plan.windows import OpenWindow
    from megatron_laep.settings.config import LaepConfig

    maps = [MAP, SECOND] if second else [MAP]
    return Record(
        lineage=Lineage(tuple(map(ExpertMap.from_json, maps if map_state else ()))),
        map_state=map_state,
        window=OpenWindow(**window) if window else None,
        ended=(OpenWindow(1, 3, ((1, 2, 3), (4, 5, 6))),) if window else (),
        declined=(4, 8) if window else (),
        inherited=int(second),
        iteration=10,
        writer=Writer.now(LaepConfig(prune_iteration=(10, 20), alpha="0.2:1-3")),
    )


def save(path: str, state: dict) -> None:
    from megatron.core import dist_checkpointing

    Path(path).mkdir(parents=True)
    dist_checkpointing.save(state, path)


def round_trip(path: str, map_state: str | None, window: dict | None, second: bool) -> None:
    import dataclasses

    from megatron_laep.mcore.checkpoint import ENTRY, read_record
    from megatron_laep.pruned_checkpoint import allow_pruned_checkpoints

    init_process_group()
    one = record(map_state, window, second)
    save(path, {"iteration": 10, ENTRY: one.to_entry()})
    allow_pruned_checkpoints()
    assert read_record(Path(path)) == one
    # A record that was read is written again in the next checkpoint.
    again = dataclasses.replace(read_record(Path(path)))
    save(f"{path}-again", {"iteration": 12, ENTRY: again.to_entry()})
    assert read_record(Path(f"{path}-again")) == dataclasses.replace(one, iteration=12)


def write(path: str, state: dict, map_state: str | None, second: bool = False) -> None:
    """A checkpoint with an entry made of a record, unless `state` has its own."""
    from megatron_laep.mcore.checkpoint import ENTRY

    init_process_group()
    save(path, {ENTRY: record(map_state, second=second).to_entry()} | state)


def open_as_stock(path: str) -> dict:
    from megatron.core import dist_checkpointing

    return dist_checkpointing.load_common_state_dict(path)


def save_and_open_entry(path: str, map_state: str | None, allow: bool) -> str:
    """The entry alone, by torch.save; the name of the class that comes back."""
    import torch

    from megatron_laep.pruned_checkpoint import allow_pruned_checkpoints

    torch.save(record(map_state).to_entry(), path)
    if allow:
        allow_pruned_checkpoints()
    return type(torch.load(path, weights_only=True)).__name__


def read(path: str) -> str:
    from megatron_laep.mcore.checkpoint import read_record
    from megatron_laep.pruned_checkpoint import allow_pruned_checkpoints

    allow_pruned_checkpoints()
    return repr(read_record(Path(path)))


def read_is_laep(path: str) -> tuple | None:
    from megatron_laep.mcore.checkpoint import read_record

    one = read_record(Path(path))
    return one and (one.is_laep, one.iteration, one.lineage.composed, one.map_state, one.window)


def holders_are_equal() -> list[bool]:
    one, other = record("applied").to_entry(), record("applied").to_entry()
    third = record("applied", WINDOW).to_entry()
    return [one == other, one == third, one == one.record]


def find_both(folder: str, flags: dict) -> tuple[str | None, str | None]:
    """What is found, and what Megatron loads."""
    from megatron.training import checkpointing

    from megatron_laep.mcore.checkpoint import find_checkpoint

    defaults = {
        "load": folder,
        "ckpt_step": None,
        "non_persistent_ckpt_type": None,
        "non_persistent_global_ckpt_dir": None,
        "exit_on_missing_checkpoint": False,
        "auto_detect_ckpt_format": False,
        "use_dist_ckpt": True,
    }
    args = Namespace(**defaults | flags)
    found = find_checkpoint(folder, args)
    # Megatron says True only where it wants no more than the common state.
    _, name, _, _ = checkpointing._load_base_checkpoint(folder, args, rank0=True)
    return found and str(found), name or None


def make_checkpoints(folder: str, names: list[str], tracker: str | None) -> None:
    init_process_group()
    for name in names:
        save(f"{folder}/{name}", {"iteration": 0})
    Path(folder).mkdir(exist_ok=True)
    if tracker is not None:
        Path(folder, "latest_checkpointed_iteration.txt").write_text(tracker)


def write_json_until_the_disk_is_full(path: str) -> None:
    from megatron_laep.json_text import write_json

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        write_json(Path(path), list(range(1000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_json_file(path: str, value: object) -> None:
    from megatron_laep.json_text import write_json

    write_json(Path(path), value)


def override(args: Namespace) -> dict:
    from megatron_laep.mcore.checkpoint import commit_point_arguments

    with pytest.raises(KeyboardInterrupt), commit_point_arguments(args):
        inside = vars(args).copy()
        raise KeyboardInterrupt
    return inside | {"after": vars(args).copy()}


# -- the tests -------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, WINDOW], ids=["", "window"])
@pytest.mark.parametrize(
    ("map_state", "second"),
    [(None, False), ("pending", False), ("applied", False), ("pending", True)],
)
def test_round_trip(tmp_path, map_state, second, window):
    in_megatron(round_trip, str(tmp_path / "saved"), map_state, window, second).result()


@pytest.mark.parametrize("map_state", [None, "pending"])
def test_stock_megatron_opens_what_is_still_a_full_model(tmp_path, map_state):
    path = str(tmp_path / "saved")
    in_megatron(write, path, {"iteration": 10}, map_state).result()
    assert in_megatron(open_as_stock, path).result()["iteration"] == 10


@pytest.mark.parametrize(("map_state", "second"), [("applied", False), ("pending", True)])
def test_nobody_else_opens_a_pruned_checkpoint(tmp_path, map_state, second):
    """Nor one that waits for its second pruning: its weights are of the first one."""
    path = str(tmp_path / "saved")
    in_megatron(write, path, {"iteration": 10}, map_state, second).result()
    stock = in_megatron(open_as_stock, path)
    assert stock.error is not None
    for text in ("pruned by LAEP", "'-m megatron_laep' before the script", NAME):
        assert text in stock.message
    assert map_state in in_megatron(read, path).result()


def test_the_record_of_a_pruned_model_is_no_plain_value(tmp_path):
    """Nor can it be opened by a loader that trusts plain values only."""
    path = str(tmp_path / "entry.pt")
    refused = in_megatron(save_and_open_entry, path, "applied", allow=False)
    assert refused.error == "UnpicklingError"
    assert NAME in refused.message
    allowed = in_megatron(save_and_open_entry, path, "applied", allow=True).result()
    assert allowed == "PrunedCheckpoint"
    for map_state in (None, "pending"):
        assert in_megatron(save_and_open_entry, path, map_state, allow=False).result() == "dict"


def open_entry(path: str) -> str:
    import torch

    from megatron_laep.pruned_checkpoint import allow_pruned_checkpoints

    allow_pruned_checkpoints()
    return type(torch.load(path, weights_only=True)["megatron_laep"]).__name__


def test_a_checkpoint_of_the_time_before_the_layout():
    """A run that was begun when the pickled function stood in ``megatron_laep.mcore.checkpoint``."""
    before = DATA / "checkpoint_before_layout"
    assert b"cmegatron_laep.checkpoint\n" + NAME.encode() in (before / "common.pt").read_bytes()
    text = in_megatron(read, str(before)).result()
    expert_map = ExpertMap.from_json(MAP)
    assert expert_map.hash in text or repr(expert_map.layers[0].kept) in text
    assert "map_state='applied'" in text
    refused = in_megatron(open_as_stock, str(before))
    assert NAME in refused.message
    assert in_megatron(open_entry, str(before / "common.pt")).result() == "PrunedCheckpoint"


def writer_of(path: str) -> dict | None:
    import dataclasses

    from megatron_laep.mcore.checkpoint import read_record
    from megatron_laep.pruned_checkpoint import allow_pruned_checkpoints

    allow_pruned_checkpoints()
    writer = read_record(Path(path)).writer
    return writer and dataclasses.asdict(writer)


def test_the_record_says_by_what_it_was_written(tmp_path):
    path = str(tmp_path / "saved")
    in_megatron(write, path, {"iteration": 10}, "pending").result()
    found = in_megatron(writer_of, path).result()
    assert (
        found.pop("torch").partition("+")[0]
        == importlib.metadata.version("torch").partition("+")[0]
    )
    assert found == {
        "megatron_laep": megatron_laep.__version__,
        "megatron_core": importlib.metadata.version("megatron-core"),
        "settings": {"prune_iteration": [10, 20], "alpha": "0.2:1-3"},
    }


def test_a_record_that_does_not_say_by_what_it_was_written():
    """As all of version 0.1.0."""
    assert in_megatron(writer_of, str(DATA / "checkpoint_before_layout")).result() is None


def test_the_path_that_is_pickled(tmp_path):
    """Checkpoints of all later versions name it: it never changes."""
    from megatron_laep.pruned_checkpoint import PrunedCheckpoint

    pickled = pickle.dumps(PrunedCheckpoint({}), protocol=0)
    assert f"cmegatron_laep.pruned_checkpoint\n{NAME}\n".encode() in pickled


def test_megatron_compares_records_of_ranks():
    assert in_megatron(holders_are_equal).result() == [True, False, False]


def test_other_checkpoints_have_no_map(tmp_path):
    in_megatron(make_checkpoints, str(tmp_path), ["iter_0000004"], "4").result()
    foreign = in_megatron(read_is_laep, str(tmp_path / "iter_0000004")).result()
    assert foreign == (False, 0, None, None, None)
    (tmp_path / "iter_0000005" / "mp_rank_00").mkdir(parents=True)
    assert in_megatron(read_is_laep, str(tmp_path / "iter_0000005")).result() is None
    assert in_megatron(read_is_laep, str(tmp_path / "iter_0000006")).result() is None


def test_a_record_of_a_later_version(tmp_path):
    path = str(tmp_path / "saved")
    entry = {"version": 3, "lineage": [], "map_state": None, "window": None}
    in_megatron(write, path, {"iteration": 10, "megatron_laep": entry}, None).result()
    outcome = in_megatron(read, path)
    assert outcome.error == "Refusal"
    for text in (path, "version 3", "reads version 2", "use the megatron_laep that wrote"):
        assert text in outcome.message


def test_a_record_whose_map_was_changed(tmp_path):
    path = str(tmp_path / "saved")
    changed = MAP.replace("[5, 1, 0, 4]", "[5, 1, 0, 3]").replace("[5,1,0,4]", "[5,1,0,3]")
    assert changed != MAP
    entry = {"version": 2, "lineage": [changed], "map_state": "pending", "window": None}
    entry |= {"ended": [], "declined": [], "inherited": 0}
    in_megatron(write, path, {"iteration": 10, "megatron_laep": entry}, None).result()
    outcome = in_megatron(read, path)
    assert outcome.error == "Refusal"
    assert path in outcome.message and "hash" in outcome.message


FOUND = {
    "tracker": (["iter_0000004", "iter_0000008"], "4", {}, "iter_0000004"),
    "release": (["release"], "release", {}, "release"),
    "step": (["iter_0000004", "iter_0000008"], "8", {"ckpt_step": 4}, "iter_0000004"),
    "step without tracker": (["iter_0000004"], None, {"ckpt_step": 4}, "iter_0000004"),
    "nothing": ([], None, {}, None),
    "no tracker": (["iter_0000004"], None, {}, None),
    "temporary, later": (
        ["iter_0000004", "non_persistent/iter_0000006"],
        "4",
        {"non_persistent_ckpt_type": "global"},
        "non_persistent/iter_0000006",
    ),
    "temporary, as late": (
        ["iter_0000006", "non_persistent/iter_0000006"],
        "6",
        {"non_persistent_ckpt_type": "global"},
        "non_persistent/iter_0000006",
    ),
    "temporary, older": (
        ["iter_0000008", "non_persistent/iter_0000006"],
        "8",
        {"non_persistent_ckpt_type": "global"},
        "iter_0000008",
    ),
    "temporary only": (
        ["non_persistent/iter_0000006"],
        None,
        {"non_persistent_ckpt_type": "global"},
        "non_persistent/iter_0000006",
    ),
    "temporary not asked for": (
        ["iter_0000004", "non_persistent/iter_0000006"],
        "4",
        {},
        "iter_0000004",
    ),
}


@pytest.mark.parametrize("names, tracker, flags, expected", FOUND.values(), ids=FOUND)
def test_the_checkpoint_that_megatron_loads_is_found(tmp_path, names, tracker, flags, expected):
    folder = str(tmp_path / "run")
    in_megatron(make_checkpoints, folder, names, tracker).result()
    if any(name.startswith("non_persistent") for name in names):
        (tmp_path / "run/non_persistent/latest_checkpointed_iteration.txt").write_text("6")
    found, loaded = in_megatron(find_both, folder, flags).result()
    assert found == loaded == (f"{folder}/{expected}" if expected else None)


def test_temporary_checkpoints_in_another_folder(tmp_path):
    folder, other = str(tmp_path / "run"), str(tmp_path / "other")
    in_megatron(make_checkpoints, folder, ["iter_0000004"], "4").result()
    in_megatron(make_checkpoints, other, ["iter_0000006"], "6").result()
    flags = {"non_persistent_ckpt_type": "global", "non_persistent_global_ckpt_dir": other}
    found, loaded = in_megatron(find_both, folder, flags).result()
    assert found == loaded == f"{other}/iter_0000006"


def test_a_step_that_does_not_exist_is_not_found(tmp_path):
    """Megatron stops there; a job that looks for its own checkpoints first must not."""
    outcome = in_megatron(find_both, str(tmp_path), {"ckpt_step": 4})
    assert outcome.error == "FileNotFoundError"
    assert "find_checkpoint" not in outcome.output.split("Traceback")[-1]


def test_json_files_are_whole_or_old(tmp_path):
    path = tmp_path / "laep" / "map.json"
    in_megatron(write_json_file, str(path), {"one": 1}).result()
    assert json.loads(path.read_text()) == {"one": 1}
    assert in_megatron(write_json_until_the_disk_is_full, str(path)).error == "OSError"
    assert json.loads(path.read_text()) == {"one": 1}
    in_megatron(write_json_file, str(path), {"two": 2}).result()
    assert json.loads(path.read_text()) == {"two": 2}
    assert [file.name for file in path.parent.iterdir()] == ["map.json"]


def test_arguments_of_the_commit_point_are_put_back():
    given = {
        "dist_ckpt_optim_fully_reshardable": False,
        "async_save": True,
        "ckpt_assume_constant_structure": True,
        "non_persistent_save_interval": 5,
        "other": 1,
    }
    seen = in_megatron(override, Namespace(**given)).result()
    assert seen.pop("after") == given
    assert seen == {
        "dist_ckpt_optim_fully_reshardable": True,
        "async_save": False,
        "ckpt_assume_constant_structure": False,
        "non_persistent_save_interval": None,
        "other": 1,
    }
