#!/usr/bin/env python3
"""What pruning and rearranging bring on equal work, on this machine, beside what is predicted.

    scripts/bench_speedup.py [--loads natural|published] [--minutes M] [--hardware FILE] [--json FILE]

Two gloo processes, a core each: start it on a machine with nothing else to do. Each variant is a whole
Megatron job of its own (the model of configs/bench-2l-32e-cpu-2proc.yaml, mock data). All are alive at
once, and wait; in each round every one is woken for a block of iterations, in an order that is drawn.
So whatever else the machine does falls on all alike, and only ratios are told: the full model's time
over the variant's, median of the rounds, with the 95 % interval of that median (bootstrap).

    full             all experts, in the order of their ids
    balanced         all experts with equal loads: what an auxiliary loss brings at best, the control
    rearranged       all experts, placed by Algorithm 2
    pruned           Algorithm 1, order kept
    both             pruned and rearranged
    both, uneven     exact counts and balanced placement: ranks hold different numbers of experts

The loads are given, not trained: each router's logits are fixed numbers of its layer's experts plus
Gumbel noise, such that its two choices fall on the experts that are there in proportion to their loads. `natural` takes those
that a job on real text without an auxiliary loss recorded (tests/data/expert_loads_tiny.json, last
window, layers 1 and 2); `published` draws some by the rule of scripts/generate_loads.py: hottest over
coldest 500, three quarters of the experts kept, their spread 1, the two
of 99 draws that are typical in how uneven they leave the ranks. Both are fixed while the benchmark runs.

Predictions are those of the cost model with the hardware file of `laep calibrate`, which is measured
first unless one is given. Rounds go on until each interval is narrower than 3 % to each side, or the
minutes are over.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))
SCRIPT = REPOSITORY / "scripts" / "pretrain_gpt.py"
MODEL = REPOSITORY / "configs" / "bench-2l-32e-cpu-2proc.yaml"
RECORDED = REPOSITORY / "tests" / "data" / "expert_loads_tiny.json"
RANKS = 2
VARIANTS = ("full", "balanced", "rearranged", "pruned", "both", "both, uneven")
NARROW = 0.03
FEWEST_ROUNDS = 5
RESAMPLES = 2000
DRAWS = 99


@dataclass(frozen=True)
class Variant:
    """loads: of the experts that it holds, in their order, by layer; expert_map: JSON of the map that
    gives the layers their experts."""

    name: str
    loads: tuple[tuple[int, ...], ...]
    experts_per_rank: tuple[tuple[int, ...], ...]
    expert_map: str

    @property
    def imbalance(self) -> float:
        """Of the loads, as they were given."""
        return measured_imbalance(self, self.loads)

    @property
    def experts(self) -> int:
        return sum(map(sum, self.experts_per_rank))


@dataclass(frozen=True)
class Speedup:
    """The full model's time over the variant's: median of the rounds, and its interval; the same of the
    processor times of the busier rank, which have no waiting in them and on which other users of the
    machine have less influence; and what is predicted.
    """

    variant: str
    ratio: float
    low: float
    high: float
    processor: float
    predicted: float
    imbalance: float
    imbalance_measured: float
    experts: int


def read_model(path: Path) -> dict[str, Any]:
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8"))


def given_loads(kind: str, description: dict[str, Any]) -> list[list[int]]:
    """Loads of both layers' experts, in the order of their ids."""
    experts = description["model"]["num_experts"]
    if kind == "natural":
        from megatron_laep.records import load_log

        return [row.tolist() for row in load_log.read(RECORDED).last(1)[:2]]
    library = runpy.run_path(str(REPOSITORY / "scripts" / "generate_loads.py"), run_name="library")
    rules = description["laep"]
    generator = np.random.default_rng(0)
    draws = [
        library["draw_layer"](
            generator,
            kept=experts * 3 // 4,
            num_experts=experts,
            top_k=description["model"]["top_k"],
            tokens=10**7,
            spread=1.0,
            alpha=float(rules["alpha"]),
            beta=rules["beta"],
            multiple=RANKS,
        ).tolist()
        for _ in range(DRAWS)
    ]
    # Typical ones: those whose ranks are as uneven as those of the median draw, and its neighbour.
    draws.sort(key=lambda row: abs(sum(row[: experts // 2]) / sum(row) - 0.5))
    return draws[DRAWS // 2 : DRAWS // 2 + 2]


def make_variants(loads_LE: list[list[int]], description: dict[str, Any]) -> list[Variant]:
    """All six, planned by the planner of a job."""
    from megatron_laep.plan.layout import ModelLayout
    from megatron_laep.plan.loads import Loads
    from megatron_laep.plan.make_map import make_expert_map
    from megatron_laep.settings.rules import PruningRules

    window = Loads.of_window(loads_LE, range(1, len(loads_LE) + 1))
    layout = ModelLayout.of(
        window.experts,
        top_k=description["model"]["top_k"],
        expert_parallel_size_before=RANKS,
    )

    def planned(name: str, **changes: Any) -> Variant:
        rules = PruningRules(**{**description["laep"], **changes})
        expert_map = make_expert_map(window, layout, rules, iteration=0)
        return Variant(
            name,
            tuple(
                tuple(row[old_expert_id] for old_expert_id in layer.kept)
                for row, layer in zip(loads_LE, expert_map.layers, strict=True)
            ),
            tuple(layer.experts_per_rank for layer in expert_map.layers),
            expert_map.to_json(),
        )

    full = planned("full", beta=0.0, placement="none")
    even = replace(full, name="balanced", loads=tuple((1,) * len(row) for row in loads_LE))
    return [
        full,
        even,
        planned("rearranged", beta=0.0),
        planned("pruned", placement="none"),
        planned("both"),
        planned("both, uneven", expert_multiple=1, placement="balanced"),
    ]


def logits_for(loads_E: list[int]) -> list[float]:
    """Logits with which two choices, Gumbel noise added, fall on experts in proportion to their loads.

    The first choice falls on i with p_i = softmax(logits)_i, the second on another one by the same p, so
    that i gets p_i (1 + sum over j != i of p_j / (1 - p_j)) tokens of each; p is adapted until that is
    proportional to the loads. No expert can get more than one choice of each token: a load above half
    of the layer's is one that every token chooses, as nearly as can be.
    """
    wanted = np.clip(2 * np.asarray(loads_E, dtype=float) / sum(loads_E), 1e-9, 0.98)
    p = wanted / wanted.sum()
    for _ in range(500):
        odds = p / (1 - p)
        found = p * (1 + odds.sum() - odds)
        p *= wanted / found
        p /= p.sum()
    return np.log(p).tolist()


# -- one variant -----------------------------------------------------------------------------------


def megatron_flags(description: dict[str, Any]) -> list[str]:
    model, job = description["model"], description["parallelism"]
    from megatron_laep.cpu import cpu_arguments

    flags = {
        "num-layers": model["num_layers"],
        "hidden-size": model["hidden"],
        "num-attention-heads": model["attention_heads"],
        "kv-channels": model["head_dim"],
        "ffn-hidden-size": model["expert_ffn"],
        "moe-ffn-hidden-size": model["expert_ffn"],
        "seq-length": model["sequence_length"],
        "max-position-embeddings": model["sequence_length"],
        "position-embedding-type": "rope",
        "normalization": "RMSNorm",
        "num-experts": model["num_experts"],
        "moe-router-topk": model["top_k"],
        "moe-router-load-balancing-type": "none",
        "moe-token-dispatcher-type": "alltoall",
        "expert-model-parallel-size": job["expert"],
        "tokenizer-type": "NullTokenizer",
        "vocab-size": model["vocab"],
        "micro-batch-size": job["micro_batch_size"],
        "global-batch-size": job["micro_batch_size"] * job["micro_batches"] * job["data"],
        "attention-dropout": 0,
        "hidden-dropout": 0,
        "lr": 1e-6,
        "train-iters": 10**6,
        "lr-decay-iters": 10**6,
        "eval-iters": 0,
        "eval-interval": 10**7,
        "log-interval": 10**7,
    }
    words = [*cpu_arguments(), "--swiglu", "--disable-bias-linear", "--mock-data"]
    for name, value in flags.items():
        words += [f"--{name}", str(value)]
    return words


class Woken:
    """Takes the place of Megatron's ``train_step``: waits for the coordinator, then runs a block."""

    def __init__(self, connection: Connection, train_step: Any) -> None:
        self._connection, self._train_step = connection, train_step
        self._left = 0
        self._marks: list[tuple[float, float]] = []

    def __call__(self, forward_step, data, model, *args, **named):
        import torch

        if self._left == 0:
            if self._marks:
                self._mark()
                self._connection.send((np.diff(self._marks, axis=0), _counted(model)))
            try:
                self._left = self._connection.recv()
            except EOFError:  # the coordinator has ended
                os._exit(0)
            self._marks = []
            torch.distributed.barrier()
        self._mark()
        self._left -= 1
        return self._train_step(forward_step, data, model, *args, **named)

    def _mark(self) -> None:
        self._marks.append((time.perf_counter(), time.process_time()))


def _counted(model: list) -> list[list[int]]:
    from megatron_laep.mcore.moe_layer import token_counters

    return [counter.tolist() for counter in token_counters(model).values()]


def run_variant(pipe: int, index: int, loads_file: str) -> None:
    """One rank of one variant; never returns."""
    rank = int(os.environ["RANK"])
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= RANKS:
        os.sched_setaffinity(0, {cores[rank]})
    from megatron_laep import cpu

    cpu.enable()
    import torch
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.transformer_block import TransformerBlock
    from megatron.training import training

    import megatron_laep
    from megatron_laep.mcore.moe_layer import set_layer_counts
    from megatron_laep.plan.expert_map import ExpertMap

    given = json.loads(Path(loads_file).read_text())[index]
    description = read_model(MODEL)
    expert_map = ExpertMap.from_json(given["map"])
    logits_LE = [torch.tensor(logits_for(row)) for row in given["loads"]]
    build, gating = TransformerBlock._build_layers, TopKRouter.gating

    def build_layers(self):
        set_layer_counts(self.config, expert_map)
        return build(self)

    def forced_gating(self, *inputs, **named):
        logits = gating(self, *inputs, **named)
        noise = -torch.empty_like(logits).exponential_().log()
        # The router's own logits stay in the graph, and too small to count.
        return logits * 1e-6 + noise + logits_LE[self.layer_number - 1].to(logits.dtype)

    megatron_laep.install()
    TransformerBlock._build_layers, TopKRouter.gating = build_layers, forced_gating
    training.train_step = Woken(Connection(pipe), training.train_step)
    sys.argv = [str(SCRIPT), *megatron_flags(description)]
    runpy.run_path(str(SCRIPT), run_name="__main__")


# -- the coordinator -------------------------------------------------------------------------------


class Jobs:
    """All variants' processes; `block` wakes one of them."""

    def __init__(self, scratch: Path) -> None:
        self.variants: list[Variant] = []
        self.processes: list[subprocess.Popen] = []
        self.connections: dict[tuple[int, int], Connection] = {}
        self.logs = scratch

    def start(self, variants: list[Variant]) -> None:
        """Starts all of them, one after the other, and lets each run an iteration."""
        self.variants = variants
        loads_file = self.logs / "variants.json"
        loads_file.write_text(
            json.dumps([{"loads": item.loads, "map": item.expert_map} for item in variants])
        )
        for index in range(len(variants)):
            self._start(index, loads_file)
            self.block(index, 1)

    def _start(self, index: int, loads_file: Path) -> None:
        environment = os.environ | {
            "WORLD_SIZE": str(RANKS),
            "LOCAL_WORLD_SIZE": str(RANKS),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "OMP_NUM_THREADS": "1",
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            "MEGATRON_LAEP_PLATFORM": "cpu",
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        }
        for rank in range(RANKS):
            self.connections[index, rank], theirs = Pipe()
            words = ["--variant", str(theirs.fileno()), str(index), str(loads_file)]
            with (self.logs / f"variant{index}-rank{rank}.log").open("w") as log:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, __file__, *words],
                        env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        pass_fds=[theirs.fileno()],
                    )
                )
            # So that a rank that has died is the end of the pipe.
            theirs.close()

    def block(self, index: int, iterations: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Seconds of each iteration, by the clock and of the processor [iterations, 2], of the slower
        rank; tokens per expert that were counted so far.

        Errors: RuntimeError with the end of its log if the job has died.
        """
        ranks = [self.connections[index, rank] for rank in range(RANKS)]
        for connection in ranks:
            connection.send(iterations)
        replies = []
        for rank, connection in enumerate(ranks):
            if not wait([connection], timeout=600):
                raise RuntimeError(f"{self.variants[index].name}: no answer in ten minutes")
            try:
                replies.append(connection.recv())
            except (EOFError, ConnectionError):
                log = (self.logs / f"variant{index}-rank{rank}.log").read_text(errors="replace")
                raise RuntimeError(
                    f"{self.variants[index].name}, rank {rank}, has died:\n{log[-3000:]}"
                ) from None
        seconds = np.max([times for times, _ in replies], axis=0)
        layers = zip(*(counted for _, counted in replies), strict=True)
        return seconds, [np.sum(layer, axis=0) for layer in layers]

    def stop(self) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGKILL)
            process.wait()


def _free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def compare(rounds: np.ndarray, seed: int = 0) -> list[tuple[float, float, float]]:
    """Seconds [rounds, variants] -> for each variant the median of full / variant, and the ends of the
    95 % interval of that median, by drawing whole rounds again.
    """
    ratios = rounds[:, :1] / rounds
    drawn = np.random.default_rng(seed).integers(len(ratios), size=(RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(ratios[drawn], axis=1), [2.5, 97.5], axis=0)
    return list(zip(np.median(ratios, axis=0).tolist(), low.tolist(), high.tolist(), strict=True))


def narrow(compared: list[tuple[float, float, float]]) -> bool:
    """Whether no interval reaches further than 3 % from its median."""
    return all(high / mid - 1 < NARROW and 1 - low / mid < NARROW for mid, low, high in compared)


def predict(variants: list[Variant], description: dict[str, Any], hardware: Any) -> list[float]:
    """The full model's predicted time over each variant's."""
    from megatron_laep.simulate.cost_inputs import ModelShape, Parallelism, place_loads
    from megatron_laep.simulate.cost_model import estimate

    shape = ModelShape(**description["model"])
    job = Parallelism(**description["parallelism"])
    seconds = []
    for variant in variants:
        placements = {
            number: place_loads(row, counts)
            for number, (row, counts) in enumerate(
                zip(variant.loads, variant.experts_per_rank, strict=True), start=1
            )
        }
        seconds.append(estimate(shape, hardware, job, placements).step_seconds)
    return [seconds[0] / value for value in seconds]


def measured_imbalance(variant: Variant, tokens_LE: Sequence[Sequence[int] | np.ndarray]) -> float:
    """Busiest rank over mean of the tokens that were counted; mean of the layers."""
    from megatron_laep.plan.placement import imbalance, rank_loads

    layers = zip(tokens_LE, variant.experts_per_rank, strict=True)
    return float(np.mean([imbalance(rank_loads(row, counts)) for row, counts in layers]))


def calibrated(scratch: Path) -> Path:
    """A hardware file of this machine, measured in as many processes as the benchmark has."""
    target = scratch / "hardware.yaml"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += [str(RANKS), "-m", "megatron_laep.tools", "calibrate", str(MODEL), "-o", str(target)]
    command += ["--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"laep calibrate ended with {done.returncode}:\n{done.stderr[-3000:]}")
    print(done.stdout.strip(), flush=True)
    return target


def measure(
    jobs: Jobs, seconds: float, block: int, fewest: int, seed: int
) -> tuple[np.ndarray, list[list[np.ndarray]]]:
    """Rounds until the intervals are narrow or the time is over: seconds an iteration by the clock and
    of the processor [rounds, variants, 2], and for each variant the tokens counted in all of them.
    """
    order, rows = random.Random(seed), []
    names = range(len(jobs.variants))
    before = [jobs.block(index, 1)[1] for index in names]
    after = before
    end = time.monotonic() + seconds
    while len(rows) < fewest or (
        time.monotonic() < end and not narrow(compare(np.array(rows)[:, :, 0]))
    ):
        row = np.zeros((len(jobs.variants), 2))
        after = list(after)
        for index in order.sample(names, len(names)):
            times, after[index] = jobs.block(index, block + 1)
            # The first one finds the caches full of another job.
            row[index] = times[1:].mean(axis=0)
        rows.append(row)
    counted = [
        [late - early for late, early in zip(*pair, strict=True)]
        for pair in zip(after, before, strict=True)
    ]
    return np.array(rows), counted


def format_table(results: list[Speedup]) -> str:
    from tabulate import tabulate

    rows = [
        (
            item.variant,
            item.experts,
            f"{item.imbalance:.3f}",
            f"{item.imbalance_measured:.3f}",
            f"{item.ratio:.3f}",
            f"{item.low:.3f} to {item.high:.3f}",
            f"{item.processor:.3f}",
            f"{item.predicted:.3f}",
            f"{100 * (item.predicted / item.ratio - 1):+.1f} %",
        )
        for item in results
    ]
    headers = (
        "variant",
        "experts",
        "busiest / mean,\nas given",
        "\ncounted",
        "step rate\n/ full",
        "95 % interval\nof the median",
        "by processor\ntime",
        "predicted",
        "predicted\n/ measured",
    )
    align = ("left", *["right"] * 8)
    return tabulate(rows, headers=headers, disable_numparse=True, colalign=align)


def main() -> int:
    if sys.argv[1:2] == ["--variant"]:
        run_variant(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
        return 1  # a variant is ended by the coordinator
    options = parse_options(sys.argv[1:])
    description = read_model(MODEL)
    loads_LE = given_loads(options.loads, description)
    variants = make_variants(loads_LE, description)
    with tempfile.TemporaryDirectory(prefix="laep-speedup-") as scratch:
        from megatron_laep.simulate.cost_inputs import Hardware

        hardware_file = options.hardware or calibrated(Path(scratch))
        text = hardware_file.read_text(encoding="utf-8")
        hardware = Hardware(**read_model(hardware_file))
        predicted = predict(variants, description, hardware)
        jobs = Jobs(Path(scratch))
        try:
            jobs.start(variants)
            rounds, counted = measure(
                jobs, 60 * options.minutes, options.block, options.rounds, options.seed
            )
        finally:
            jobs.stop()
    results = [
        Speedup(
            variant.name,
            *found,
            processor[0],
            prediction,
            variant.imbalance,
            measured_imbalance(variant, tokens),
            variant.experts,
        )
        for variant, found, processor, prediction, tokens in zip(
            variants,
            compare(rounds[:, :, 0]),
            compare(rounds[:, :, 1]),
            predicted,
            counted,
            strict=True,
        )
    ]
    print(
        f"{hardware.name}; {len(rounds)} rounds of {options.block} iterations; loads: {options.loads}; "
        f"load average {os.getloadavg()[0]:.1f}"
    )
    print(format_table(results))
    if not narrow(compare(rounds[:, :, 0])):
        print(
            "NOT narrow enough: an interval reaches further than 3 % from its median; more --minutes"
        )
    if options.json:
        report = {"loads": options.loads, "rounds": rounds.tolist(), "hardware": text}
        report["results"] = [asdict(item) for item in results]
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def parse_options(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--loads", choices=("natural", "published"), default="natural")
    parser.add_argument("--minutes", type=float, default=3.5, help="of rounds (default: 3.5)")
    parser.add_argument("--rounds", type=int, default=FEWEST_ROUNDS, help="at least so many")
    parser.add_argument("--block", type=int, default=2, help="iterations that count (default: 2)")
    parser.add_argument(
        "--hardware", type=Path, help="file of laep calibrate, instead of measuring"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of the variants")
    parser.add_argument("--json", type=Path, help="all rounds, and the hardware file")
    options = parser.parse_args(words)
    for name in ("rounds", "block"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.hardware and not options.hardware.is_file():
        parser.error(f"--hardware {options.hardware}: there is no such file")
    return options


if __name__ == "__main__":
    sys.exit(main())
