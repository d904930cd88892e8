#!/usr/bin/env python3
"""What the package's own collectives, plans and records cost at 64, 1,024 and 10,240 ranks.

    scripts/bench_scale.py [--ranks N ...] [--layers L] [--experts E] [--ep R]

One process is rank 0 of so many: it calls the package's own functions, and what the other ranks would
send is made here, pickled and unpickled as torch.distributed does. So the times are those of the work on
rank 0, without a network; bytes and messages are counted from the same objects. An all-gather is taken
as a ring (N - 1 messages to each rank), an all-reduce as a ring (2 (N - 1) messages, twice the tensor's
bytes at most), a broadcast as a tree (log2 N).

Exit code 1 if a step takes more than linearly longer with more ranks.
"""

from __future__ import annotations

import argparse
import math
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))
TOP_K = 8
RULE = {"alpha": "0.4", "beta": 0.1}
WINDOW_PARTS = 4
# Noise of a busy machine, and what a step costs however few the ranks: not growth.
ALLOWANCE, FIXED_SECONDS = 1.5, 0.05


@dataclass(frozen=True)
class Step:
    """One step of the sequence at one number of ranks.

    seconds: on rank 0. received: bytes that a rank receives; messages: to a rank.
    """

    name: str
    when: str
    ranks: int
    seconds: float
    received: float
    messages: int


class Fake:
    """torch.distributed as rank 0 of many sees it, if the others send what this rank does."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.received, self.messages = 0.0, 0

    def all_gather_object(self, found: list, mine: object, group: object = None) -> None:
        for rank in range(self.ranks):
            data = pickle.dumps(mine)
            self.received += len(data)
            found[rank] = pickle.loads(data)
        self.messages += self.ranks - 1

    def all_reduce(self, tensor, op: object = None, group: object = None) -> None:
        self.received += 2 * tensor.numel() * tensor.element_size()
        self.messages += 2 * (self.ranks - 1)

    def broadcast_object_list(self, values: list, src: int = 0) -> None:
        self.received += len(pickle.dumps(values))
        self.messages += math.ceil(math.log2(self.ranks))

    @contextmanager
    def installed(self) -> Iterator[None]:
        import torch.distributed as dist

        names = ("all_gather_object", "all_reduce", "broadcast_object_list")
        others = {
            "get_world_size": lambda *_: self.ranks,
            "get_rank": lambda *_: 0,
            "is_initialized": lambda: True,
        }
        replaced = {name: getattr(self, name) for name in names} | others
        before = {name: getattr(dist, name) for name in replaced}
        for name, function in replaced.items():
            setattr(dist, name, function)
        try:
            yield
        finally:
            for name, function in before.items():
                setattr(dist, name, function)


def random_loads(layers: int, experts: int) -> np.ndarray:
    """Lognormal loads, spread 1."""
    generator = np.random.default_rng(0)
    return np.rint(1e6 * generator.lognormal(0.0, 1.0, (layers, experts))).astype(np.int64)


class FakeStore:
    """The store by which the ranks find each other: every rank has seen the same, rank 0's digest."""

    DIGEST = b"0" * 64

    def __init__(self, fake: Fake) -> None:
        self.fake = fake

    def wait(self, keys: list[str], patience: timedelta) -> None:
        pass

    def get(self, key: str) -> bytes:
        self.fake.received += len(self.DIGEST)
        self.fake.messages += 1
        return self.DIGEST


def steps_of(ranks: int, layers: int, experts: int, ep: int, folder: Path) -> list[Step]:
    """All steps at one number of ranks, in the order of a job."""
    import torch

    from megatron_laep.events import on_rank_0
    from megatron_laep.loop import agreement
    from megatron_laep.loop.commit import agree_on_plan
    from megatron_laep.mcore import checkpoint
    from megatron_laep.plan.expert_map import ExpertMap
    from megatron_laep.plan.layout import ModelLayout
    from megatron_laep.plan.lineage import Lineage
    from megatron_laep.plan.summary import summarize
    from megatron_laep.settings.rules import PruningRules
    from megatron_laep.statistics import load_metrics
    from megatron_laep.statistics.recorder import Recording
    from megatron_laep.statistics.routing_stats import PruningWindow, RoutingStats

    fake, found = Fake(ranks), []

    def step(name: str, when: str, function: Callable[[], Any]) -> Any:
        best, result = math.inf, None
        for _ in range(2):
            fake.received, fake.messages = 0.0, 0
            start = time.perf_counter()
            result = function()
            best = min(best, time.perf_counter() - start)
        found.append(Step(name, when, ranks, best, fake.received, fake.messages))
        return result

    numbers = range(1, layers + 1)
    loads_LE = random_loads(layers, experts)
    counters = {number: torch.zeros(experts, dtype=torch.int64) for number in numbers}
    rules = PruningRules(**RULE)
    with fake.installed():
        store = FakeStore(fake)
        patience = timedelta(minutes=10)
        step(
            "all ranks see the same job",
            "start",
            lambda: agreement._compare(store, "start", "{}", ranks, patience),
        )
        stats = step("which rank has which layer", "start", lambda: RoutingStats(counters, stage=0))
        for number, row in zip(numbers, loads_LE, strict=True):
            counters[number] += torch.from_numpy(row)
        zero = torch.zeros(layers, experts, dtype=torch.int64)
        tokens, _ = step("loads of an interval", "log, record", lambda: stats.advance(zero))
        recording = Recording(
            stats,
            folder / str(ranks),
            interval=1,
            top_k=TOP_K,
            lineage=Lineage(),
            iteration=0,
            expert_parallel_size=ep,
        )
        intervals = iter(range(1, 100))
        step("a record of an interval", "record", lambda: recording.end_iteration(next(intervals)))
        recording.close()
        blocks = [(experts // ep,) * ep] * layers
        step(
            "metrics of an interval",
            "log",
            lambda: load_metrics.load_metrics(tokens, stats.layer_numbers, blocks).scalars(),
        )

        def window():
            counting = PruningWindow(stats, 0, WINDOW_PARTS)
            counting._snapshots = [(0, zero)]
            for iteration in range(1, WINDOW_PARTS + 1):
                counting._snapshots.append((iteration, stats.snapshot() * iteration))
            return counting.read(WINDOW_PARTS)

        counted = step("a window in four parts", "window", window)
        layout = ModelLayout.of(
            dict.fromkeys(numbers, experts), top_k=TOP_K, expert_parallel_size_before=ep
        )
        expert_map: ExpertMap = step(
            "the plan, and its broadcast",
            "pruning",
            lambda: agree_on_plan(counted, WINDOW_PARTS, layout, rules, None),
        )
        step("the table", "pruning", lambda: summarize(expert_map, None).format_table(None, {}))
        step(
            "map.json",
            "pruning",
            lambda: (folder / "map.json").write_text(expert_map.to_json(), encoding="utf-8"),
        )
        # The sum over the ranks of one replica, which is what the collective gives.
        replica = {
            layer.layer_number: SimpleNamespace(local_expert_indices=range(len(layer.kept)))
            for layer in expert_map.layers
        }
        step(
            "every kept expert is read once",
            "load through the map",
            lambda: checkpoint._check_coverage(expert_map, replica),
        )
        step("a decision, broadcast", "window", lambda: on_rank_0(lambda: True))
    return found


def growing(found: list[Step]) -> list[str]:
    """Sentences about the steps that grow faster than the number of ranks."""
    by_name: dict[str, list[Step]] = {}
    for one in found:
        by_name.setdefault(one.name, []).append(one)
    wrong = []
    for name, rows in by_name.items():
        for few, many in zip(rows, rows[1:], strict=False):
            limit = ALLOWANCE * few.seconds * many.ranks / few.ranks + FIXED_SECONDS
            if many.seconds > limit:
                wrong.append(
                    f"{name}: {few.seconds:.3f} s with {few.ranks} ranks, {many.seconds:.3f} s with "
                    f"{many.ranks}"
                )
    return wrong


def format_table(found: list[Step]) -> str:
    from tabulate import tabulate

    sizes = sorted({one.ranks for one in found})
    last = [one for one in found if one.ranks == sizes[-1]]
    rows = []
    for one in last:
        times = [item.seconds for item in found if item.name == one.name]
        rows.append(
            (
                one.when,
                one.name,
                *(f"{1e3 * seconds:.1f}" for seconds in times),
                f"{one.received / 2**20:.2f}",
                one.messages,
            )
        )
    headers = (
        "when",
        "step",
        *(f"ms, {size:,}" for size in sizes),
        f"MiB to a rank, {sizes[-1]:,}",
        f"messages, {sizes[-1]:,}",
    )
    return tabulate(
        rows,
        headers=headers,
        disable_numparse=True,
        colalign=("left", "left", *["right"] * (len(sizes) + 2)),
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 1024, 10_240])
    parser.add_argument("--layers", type=int, default=100)
    parser.add_argument("--experts", type=int, default=512)
    parser.add_argument("--ep", type=int, default=64, help="expert-parallel size (default: 64)")
    options = parser.parse_args()
    if options.experts % options.ep:
        parser.error(f"--experts {options.experts} is not a multiple of --ep {options.ep}")
    for ranks in options.ranks:
        if ranks < options.ep or ranks % options.ep:
            parser.error(f"--ranks {ranks} is not a multiple of --ep {options.ep}")
    os.environ.setdefault("MEGATRON_LAEP_PLATFORM", "cpu-force")
    from megatron_laep import cpu

    cpu.enable()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in sorted(options.ranks):
            found += steps_of(ranks, options.layers, options.experts, options.ep, Path(folder))
    print(f"{options.layers} layers of {options.experts} experts, EP {options.ep}, on rank 0")
    print(format_table(found))
    wrong = growing(found)
    print("\n".join(["", *(f"FASTER THAN LINEAR: {text}" for text in wrong)]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
