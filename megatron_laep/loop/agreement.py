"""Whether every rank of a job sees the same job: the same checkpoint, maps, flags and code.

Asked before groups are made and before anything is written. Through the store by which the ranks find
each other, not by a collective: a rank that was started without LAEP would take part in another one,
and a rank with other parallel sizes in none. Rank 0 compares, the others wait for what it says.
"""

import dataclasses
import hashlib
import json
from argparse import Namespace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.distributed import distributed_c10d

from megatron_laep.checks import Refusal, listed
from megatron_laep.loop.start import Start
from megatron_laep.mcore import symbols, versions

_SHOWN_RANKS = 8
# What may differ between nodes: who a rank is, and where a node keeps its own files.
_OWN = {"rank", "local_rank"}
_OWN_PATHS = ("_dir", "_path", "_cache", "_file", "_cache_path")

_WITHOUT = "without LAEP"  # in the place of a digest

_starts = 0  # of this process; the same number on all ranks, which are rebuilt together


@dataclasses.dataclass(frozen=True)
class View:
    """What one rank sees.

    Attributes:
        checkpoint: which one is loaded, its maps by their hashes, the last one's state, and the map of
            --laep-plan.
        flags: the arguments by name, as text.
        code: versions, and a hash of the sources of this package.
    """

    checkpoint: dict[str, str]
    flags: dict[str, str]
    code: dict[str, str]

    @staticmethod
    def of(start: Start, args: Namespace) -> "View":
        state = start.record.map_state if start.record is not None else None
        return View(
            checkpoint={
                "checkpoint": str(start.source),
                "maps": " ".join(start.lineage.hashes) or "none",
                "map state": str(state),
                "--laep-plan": start.plan.hash if start.plan is not None else "none",
            },
            flags={
                name: str(value)
                for name, value in vars(args).items()
                if isinstance(value, str | int | float | list | tuple | None)
                and name not in _OWN
                and (name in ("save", "load") or not name.endswith(_OWN_PATHS))
            },
            code={
                "megatron_laep": _own_sources(),
                "megatron-core": versions.megatron_version(),
                "torch": str(torch.__version__),
            },
        )

    def differences(self, other: "View") -> dict[str, tuple[str, str]]:
        """What differs, by a name for people: here, and there."""
        found = {}
        for part in dataclasses.fields(self):
            mine, others = getattr(self, part.name), getattr(other, part.name)
            for name in sorted({*mine, *others}):
                pair = mine.get(name, "not there"), others.get(name, "not there")
                if pair[0] != pair[1]:
                    shown = "--" + name.replace("_", "-") if part.name == "flags" else name
                    found[shown] = pair
        return found


@cache
def _own_sources() -> str:
    """A hash of all modules of this package: two checkouts of one version differ in it."""
    found = hashlib.sha256()
    folder = Path(__file__).parent.parent
    for path in sorted(folder.rglob("*.py")):
        found.update(str(path.relative_to(folder)).encode())
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


def agree(start: Start, args: Namespace) -> None:
    """Compares all ranks. To be called once for each start, by the ranks that have nothing to do, too.

    Args:
        start: of this rank; inactive where LAEP has nothing to do: then nothing is waited for.
        args: Megatron's arguments, validated.

    Raises:
        Refusal: on all ranks with LAEP, if some see another job than rank 0; it names them.
    """
    global _starts
    _starts += 1
    store = distributed_c10d._get_default_store()
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    prefix = f"megatron_laep/agreement/{_starts}"
    if not start.active:
        store.set(f"{prefix}/{rank}", _WITHOUT)
        if rank == 0:
            store.set(f"{prefix}/verdict", _without_laep([0], size))
        return
    patience = timedelta(minutes=symbols.argument(args, "distributed_timeout_minutes"))
    view = json.dumps(dataclasses.asdict(View.of(start, args)))
    digest = hashlib.sha256(view.encode()).hexdigest()
    if rank == 0:
        store.set(f"{prefix}/0", digest)
        store.set(f"{prefix}/verdict", _compare(store, prefix, view, size, patience))
    else:
        _wait(store, f"{prefix}/0", patience, "rank 0 has not come to where the model is built")
        # A view has all flags, and there may be ten thousand ranks: only one that differs is sent.
        same = store.get(f"{prefix}/0") == digest.encode()
        store.set(f"{prefix}/{rank}", digest if same else view)
    _wait(store, f"{prefix}/verdict", patience, "rank 0 does not say whether all see the same job")
    verdict = store.get(f"{prefix}/verdict").decode()
    if verdict:
        raise Refusal(verdict)


def _compare(store: Any, prefix: str, view: str, size: int, patience: timedelta) -> str:
    """What is wrong, in a sentence; empty if nothing is.

    Args:
        view: rank 0's. Of every other rank the store has rank 0's digest, or its own view.
    """
    same = store.get(f"{prefix}/0")
    differing: dict[str, list[int]] = {}
    without: list[int] = []
    for rank in range(1, size):
        key = f"{prefix}/{rank}"
        _wait(store, key, patience, f"rank {rank} has not come to where the model is built")
        other = store.get(key)
        if other == _WITHOUT.encode():
            without.append(rank)
        elif other != same:
            differing.setdefault(other.decode(), []).append(rank)
    if without:
        return _without_laep(without, size)
    if not differing:
        return ""
    parts = []
    for text, ranks in differing.items():
        found = View(**json.loads(view)).differences(View(**json.loads(text)))
        shown = "; ".join(f"{name}: {a} on rank 0, {b} here" for name, (a, b) in found.items())
        sees = "sees" if len(ranks) == 1 else "see"
        parts.append(f"{_names(ranks)} of {size} {sees} another job than rank 0 ({shown})")
    return (
        f"{' and '.join(parts)}. Nothing was written. Start all ranks with the same command, the same "
        "installation of megatron_laep, Megatron and torch, and the same files behind --load and --save"
    )


def _without_laep(ranks: list[int], size: int) -> str:
    has = "has" if len(ranks) == 1 else "have"
    return (
        f"{_names(ranks)} of {size} {has} no pruning, recording or pruned checkpoint to follow, others "
        "have. Nothing was written. Start all ranks with the same --laep flags, and the same files "
        "behind --load and --save"
    )


def _names(ranks: list[int]) -> str:
    shown = listed([str(rank) for rank in ranks], _SHOWN_RANKS)
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _wait(store: Any, key: str, patience: timedelta, complaint: str) -> None:
    try:
        store.wait([key], patience)
    except RuntimeError as error:
        raise Refusal(
            f"{complaint}, after {patience} (--distributed-timeout-minutes). Nothing was written. Is it "
            "started with the same command, under megatron_laep?"
        ) from error
