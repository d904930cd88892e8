"""What the drop-in classes cost: one training job in which they and Megatron's own take turns.

    python scripts/bench_overhead.py                              # two gloo processes on a CPU
    python scripts/bench_overhead.py --of dispatcher
    torchrun --nproc-per-node 8 scripts/bench_overhead.py --platform gpu --config FILE

A stock Megatron job on mock data, under megatron_laep. Blocks of iterations with and without
alternate in the same processes, in an order that is drawn for each pair of blocks: whatever else
the machine does falls on both alike. Unknown arguments go to Megatron. What takes turns:

counting    ``LaepMoELayer.route``, which counts tokens, and Megatron's ``MoELayer.route``.
dispatcher  the token dispatcher for unequal numbers of experts on the ranks, here with equal ones,
            and Megatron's. (A pruned layer with equal counts gets Megatron's.)

Also measured, on the same processes: one layer's routing, or its dispatcher's bookkeeping, alone;
and the reading of all counters that ends a window.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import runpy
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "scripts" / "pretrain_gpt.py"
RESAMPLES = 2000


@dataclass(frozen=True)
class Comparison:
    """Measured pairs, in the unit of the input.

    Attributes:
        off, on: median and both quartiles of Megatron's own and of the drop-in.
        ratio: median with over median without.
        ratio_interval: where 95 % of the ratios lie if whole pairs are drawn again (bootstrap).
        pairwise: median and quartiles of with / without in each pair.
        difference: median of with - without in each pair.
        difference_interval: as `ratio_interval`.
    """

    off: tuple[float, float, float]
    on: tuple[float, float, float]
    ratio: float
    ratio_interval: tuple[float, float]
    pairwise: tuple[float, float, float]
    difference: float
    difference_interval: tuple[float, float]


def compare(off: np.ndarray, on: np.ndarray, seed: int) -> Comparison:
    """Compares paired measurements [pairs]; more is worse."""
    drawn = np.random.default_rng(seed).integers(len(off), size=(RESAMPLES, len(off)))
    ratios = np.median(on[drawn], axis=1) / np.median(off[drawn], axis=1)
    differences = np.median((on - off)[drawn], axis=1)
    return Comparison(
        off=_quartiles(off),
        on=_quartiles(on),
        ratio=float(np.median(on) / np.median(off)),
        ratio_interval=_interval(ratios),
        pairwise=_quartiles(on / off),
        difference=float(np.median(on - off)),
        difference_interval=_interval(differences),
    )


def _quartiles(values: np.ndarray) -> tuple[float, float, float]:
    return tuple(float(q) for q in np.percentile(values, [50, 25, 75]))


def _interval(values: np.ndarray) -> tuple[float, float]:
    return tuple(float(q) for q in np.percentile(values, [2.5, 97.5]))


def verdict(comparison: Comparison, target: float) -> str:
    """Says no more than the interval allows."""
    low, high = comparison.ratio_interval
    if high < 1:
        return "not measured: faster than Megatron's own, the machine was too restless; try again"
    if high <= target:
        return "met"
    if low > target:
        return "MISSED"
    side = "met" if comparison.ratio <= target else "missed"
    return f"{side} by the median, but the interval holds both: take more --pairs"


def draw_schedule(pairs: int, block: int, seed: int) -> list[bool]:
    """Which of the two is on in each measured iteration; pairs of blocks, in an order drawn for each."""
    order = random.Random(seed)
    schedule = []
    for _ in range(pairs):
        first = order.random() < 0.5
        schedule += [first] * block + [not first] * block
    return schedule


def paired(values: list[float], schedule: list[bool], block: int) -> tuple[np.ndarray, np.ndarray]:
    """Means of the blocks of Megatron's own and of the drop-in, each [pairs]."""
    means = np.reshape(values, (-1, 2, block)).mean(axis=2)
    counting = np.reshape(schedule, (-1, 2, block))[:, :, 0]
    return means[~counting], means[counting]


class Counting:
    """Switches between Megatron's routing and the one that counts."""

    off, on, part, part_off, part_on = (
        "without counting",
        "with counting",
        "routing",
        "stock",
        "counting",
    )
    baseline = "with Megatron's own MoELayer.route"
    target = 1.01

    def __init__(self, model: list) -> None:
        from megatron.core.transformer.moe.moe_layer import MoELayer

        from megatron_laep.mcore.moe_layer import LaepMoELayer, find_layers

        self._class = LaepMoELayer
        self._routes = {False: MoELayer.route, True: LaepMoELayer.route}
        self.layers = find_layers(model)

    def switch(self, on: bool) -> None:
        self._class.route = self._routes[on]

    def run_part(self, on: bool, layer: Any, hidden_states: Any) -> None:
        self._routes[on](layer, hidden_states)


class Dispatcher:
    """Switches between Megatron's token dispatcher and the one for unequal counts."""

    off, on, part, part_off, part_on = (
        "Megatron's",
        "in slots",
        "preprocess",
        "Megatron's",
        "in slots",
    )
    baseline = "with Megatron's own token dispatcher"
    target = 1.0

    def __init__(self, model: list) -> None:
        from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

        from megatron_laep.mcore.moe_layer import find_layers
        from megatron_laep.mcore.slot_table import SlotTable
        from megatron_laep.mcore.token_dispatcher import DISPATCHERS

        self.layers = find_layers(model)
        self._dispatchers = []
        for layer in self.layers.values():
            table = SlotTable((layer.num_local_experts,) * layer.ep_group.size())
            in_slots = DISPATCHERS[layer.config.moe_token_dispatcher_type](
                table, layer.config, get_default_pg_collection()
            )
            self._dispatchers.append((layer, {False: layer.token_dispatcher, True: in_slots}))

    def switch(self, on: bool) -> None:
        for layer, dispatchers in self._dispatchers:
            layer.token_dispatcher = dispatchers[on]

    def run_part(self, on: bool, layer: Any, hidden_states: Any) -> None:
        _, routing_map = layer.route(hidden_states)
        dispatchers = next(d for other, d in self._dispatchers if other is layer)
        dispatchers[on].preprocess(routing_map)


SUBJECTS = {"counting": Counting, "dispatcher": Dispatcher}


class Bench:
    """Takes the place of Megatron's ``train_step``: switches and takes the times."""

    def __init__(self, options: argparse.Namespace, train_step: Callable) -> None:
        self.options = options
        self.schedule = draw_schedule(options.pairs, options.block, options.seed)
        self.iterations = options.warmup + len(self.schedule) + 1
        self._train_step = train_step
        self._marks: list[tuple[float, float]] = []
        self.report: dict[str, Any] = {}

    def __call__(self, forward_step, data, model, *args, iteration, **kwargs):
        import torch

        if iteration == 0:
            self._subject = SUBJECTS[self.options.of](model)
        torch.cuda.synchronize()
        measured = iteration - self.options.warmup
        if measured >= 0:
            self._marks.append((time.perf_counter(), time.process_time()))
        if measured == len(self.schedule):
            self._subject.switch(True)
            self._finish(model)
        else:
            # Both warm up.
            self._subject.switch(bool(iteration % 2) if measured < 0 else self.schedule[measured])
        return self._train_step(forward_step, data, model, *args, iteration=iteration, **kwargs)

    def _finish(self, model: list) -> None:
        """A collective: the times of all ranks, the microbenchmarks, the report."""
        import torch

        ranks: list = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(ranks, np.diff(self._marks, axis=0))
        # An iteration ends when its last rank does; processor time is what all of them used.
        wall = np.max([times[:, 0] for times in ranks], axis=0)
        processor = np.sum([times[:, 1] for times in ranks], axis=0)
        block, seed = self.options.block, self.options.seed
        self.report = describe(model, self.options) | {
            "iteration": compare(*paired(wall, self.schedule, block), seed),
            "processor": compare(*paired(processor, self.schedule, block), seed),
            **measure_parts(self._subject, self.options),
        }


def measure_parts(subject: Counting | Dispatcher, options: argparse.Namespace) -> dict:
    """One layer's part of the step, both ways, and the reading of the counters. A collective.

    On ranks without a MoE layer the part is missing.
    """
    import torch
    from megatron.core import parallel_state
    from megatron.training import get_args

    from megatron_laep.statistics.routing_stats import RoutingStats

    def seconds(function: Callable, *arguments: object) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        function(*arguments)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    args = get_args()
    layers = subject.layers
    stats = RoutingStats(
        {number: layer.laep_tokens_per_expert for number, layer in layers.items()},
        stage=parallel_state.get_pipeline_model_parallel_rank(),
    )
    start_LE = stats.snapshot()
    readings = [seconds(stats.advance, start_LE) for _ in range(50)]
    parts: dict[str, Any] = {"reading": _quartiles(np.array(readings))}
    if layers:
        layer = next(iter(layers.values()))
        length = args.seq_length // args.context_parallel_size
        if args.sequence_parallel:
            length //= args.tensor_model_parallel_size
        hidden_states = torch.randn(
            length,
            args.micro_batch_size,
            args.hidden_size,
            dtype=args.params_dtype,
            device=torch.cuda.current_device(),
        )
        calls = draw_schedule(options.calls, 1, options.seed)
        times = [seconds(subject.run_part, on, layer, hidden_states) for on in calls]
        parts["part"] = compare(*paired(times, calls, 1), options.seed)
    return parts


def describe(model: list, options: argparse.Namespace) -> dict[str, Any]:
    """What was measured, and where."""
    from importlib.metadata import version

    import torch
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.training import get_args

    from megatron_laep.mcore.layer_numbers import moe_layer_numbers

    args = get_args()
    return {
        "hardware": _processor() if options.platform == "cpu" else torch.cuda.get_device_name(),
        "load_average": os.getloadavg()[0],
        "software": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"megatron-core {version('megatron-core')}, {args.distributed_backend}",
        "config": options.config.name,
        "layers": args.num_layers,
        "moe_layers": len(moe_layer_numbers(args)),
        "experts": args.num_experts,
        "top_k": args.moe_router_topk,
        "hidden": args.hidden_size,
        "sequence": args.seq_length,
        "parameters_per_rank": sum(p.numel() for chunk in model for p in chunk.parameters()),
        "processes": args.world_size,
        "expert_parallel": args.expert_model_parallel_size,
        "micro_batch": args.micro_batch_size,
        "micro_batches": get_num_microbatches(),
        "seed": args.seed,
        "warmup": options.warmup,
        "pairs": options.pairs,
        "block": options.block,
        "schedule_seed": options.seed,
        "of": options.of,
        "target": options.target,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{os.cpu_count()} x {name}"


def format_report(report: dict[str, Any]) -> str:
    """The report for people."""
    whole, processor = report["iteration"], report["processor"]
    subject = SUBJECTS[report["of"]]
    rows = [
        ("hardware", f"{report['hardware']}; load average {report['load_average']:.1f}"),
        ("software", report["software"]),
        (
            "model",
            (
                f"{report['layers']} layers, {report['moe_layers']} with {report['experts']} "
                f"experts, top-{report['top_k']}, hidden {report['hidden']}, sequence "
                f"{report['sequence']}, {report['parameters_per_rank'] / 1e6:.1f} M parameters a "
                f"rank ({report['config']})"
            ),
        ),
        (
            "job",
            (
                f"{report['processes']} processes, expert-parallel {report['expert_parallel']}, "
                f"{report['micro_batches']} micro-batch(es) of {report['micro_batch']} a rank, mock "
                f"data, seed {report['seed']}"
            ),
        ),
        ("baseline", f"the same job in the same processes, {subject.baseline}"),
        (
            "schedule",
            (
                f"{report['warmup']} iterations to warm up, then {report['pairs']} pairs of blocks "
                f"of {report['block']}, order drawn with seed {report['schedule_seed']}"
            ),
        ),
        ("", ""),
        (subject.off, _times(whole.off, 1e3, "ms an iteration")),
        (subject.on, _times(whole.on, 1e3, "ms an iteration")),
        ("ratio of medians", _with_interval(whole.ratio, whole.ratio_interval, "{:.4f}")),
        ("ratios of pairs", "{:.4f}, quartiles {:.4f} to {:.4f}".format(*whole.pairwise)),
        ("processor time", _with_interval(processor.ratio, processor.ratio_interval, "{:.4f}")),
        ("target", f"at most {report['target']}: {verdict(whole, report['target'])}"),
    ]
    if "part" in report:
        part = report["part"]
        calls = report["moe_layers"] * report["micro_batches"]
        share = calls * part.difference / whole.off[0]
        interval = [bound * 1e6 for bound in part.difference_interval]
        unit = "us a layer and micro-batch"
        rows += [
            ("", ""),
            (subject.part, ""),
            (f"  {subject.part_off}", _times(part.off, 1e6, unit)),
            (f"  {subject.part_on}", _times(part.on, 1e6, unit)),
            ("  added", _with_interval(part.difference * 1e6, interval, "{:.1f}") + " us"),
            ("  in an iteration", f"x {calls} = {share:.3%} of the one {subject.baseline}"),
        ]
    rows.append(("reading counters", _times(report["reading"], 1e6, "us at the end of a window")))
    return "\n".join(f"{name:<18} {text}".rstrip() for name, text in rows)


def _times(quartiles: tuple[float, float, float], scale: float, unit: str) -> str:
    median, low, high = (value * scale for value in quartiles)
    return f"{median:.1f} {unit}, quartiles {low:.1f} to {high:.1f}"


def _with_interval(value: float, interval: tuple | list, form: str) -> str:
    low, high = (form.format(bound) for bound in interval)
    return f"{form.format(value)}, 95 % interval {low} to {high}"


def parse_options(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--of", choices=SUBJECTS, default="counting", help="what takes turns")
    parser.add_argument("--pairs", type=int, default=100, help="of blocks, with and without")
    parser.add_argument("--block", type=int, default=1, help="iterations in a block")
    parser.add_argument("--warmup", type=int, default=10, help="iterations before the first pair")
    parser.add_argument("--calls", type=int, default=500, help="of one layer's part, each way")
    parser.add_argument("--seed", type=int, default=0, help="of the schedule and the bootstrap")
    parser.add_argument("--target", type=float, help="for the ratio of medians")
    parser.add_argument("--processes", type=int, default=2, help="unless torchrun starts them")
    parser.add_argument("--platform", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument(
        "--config",
        type=Path,
        default=REPOSITORY / "configs" / "gpt-moe-4l-32e-cpu-2proc.args",
        help="file with Megatron's flags",
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    options, rest = parser.parse_known_args(words)
    for name in ("pairs", "block", "warmup", "calls", "processes"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.target is None:
        options.target = SUBJECTS[options.of].target
    if not options.config.is_file():
        parser.error(f"--config {options.config}: there is no such file")
    return options, rest


def start_processes(options: argparse.Namespace) -> int:
    """This script again, in as many processes as asked for; their exit code."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_DEVICE_MAX_CONNECTIONS="1")
    run = "torch.distributed.run"
    command = [sys.executable, "-m", run, "--standalone", "--nproc-per-node", options.processes]
    return subprocess.run(
        [*map(str, command), __file__, *sys.argv[1:]],
        env=environment,
        stdin=subprocess.DEVNULL,
        check=False,
    ).returncode


def main() -> int:
    options, rest = parse_options(sys.argv[1:])
    if "RANK" not in os.environ:
        return start_processes(options)
    sys.path.insert(0, str(REPOSITORY))
    if options.platform == "cpu":
        from megatron_laep import cpu

        cpu.enable()
    from megatron.training import training

    import megatron_laep

    megatron_laep.install()
    bench = Bench(options, training.train_step)
    training.train_step = bench
    flags = shlex.split(options.config.read_text(), comments=True)
    # Nothing is logged, saved or evaluated on the way: it would fall on one side only.
    never = str(bench.iterations + 1)
    flags += ["--mock-data", "--train-iters", str(bench.iterations), "--lr-decay-iters", never]
    flags += ["--log-interval", never, "--eval-interval", never, "--eval-iters", "0"]
    sys.argv = [str(SCRIPT), *flags, *rest]
    megatron_laep.run(lambda: runpy.run_path(str(SCRIPT), run_name="__main__"))
    if os.environ["RANK"] == "0":
        print(format_report(bench.report))
        if options.json:
            values = {
                name: asdict(value) if isinstance(value, Comparison) else value
                for name, value in bench.report.items()
            }
            options.json.write_text(json.dumps(values, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
