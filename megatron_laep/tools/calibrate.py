"""`laep calibrate`: measures, on the machine at hand, the hardware file that `laep simulate` takes.

Reads a model file, for the sizes that matter; times the operations of `measure` in this process, or in
all that torchrun has started; fits the cost model's figures to the times, and says how well they fit.
Needs torch; for the picture plotly.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_laep.measure.fit import Fit, fit_experts, fit_transfer
from megatron_laep.simulate.cost_inputs import Hardware, ModelShape, Parallelism
from megatron_laep.tools.model_files import make, read_mapping

_MOST_PARAMETERS = 2**26
"""That the optimizer's pass is measured with: half a GiB of moments."""

_FAST = 1e9
"""In the place of a rate, GB/s, whose cost did not show."""


@dataclass(frozen=True)
class Calibration:
    """The hardware, and the fits that it rests on, by what they are of."""

    hardware: Hardware
    fits: dict[str, Fit]
    not_measured: tuple[str, ...]


def add_parser(subparsers) -> argparse.ArgumentParser:
    """Adds the subcommand `calibrate`; its `run` default takes the parsed arguments."""
    text = "Measure this machine for `laep simulate`: makes its hardware file."
    more = (
        " In several processes: torchrun --nproc-per-node N -m megatron_laep.tools calibrate ..., one "
        "for each expert-parallel rank of the machine."
    )
    parser = subparsers.add_parser("calibrate", help=text, description=text + more)
    parser.add_argument(
        "model", type=Path, metavar="MODEL.yaml", help="shape and parallelism, as for simulate"
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="hardware file to write"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where torch sees a GPU"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="times of each operation (default: 5)"
    )
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="HTML: measured against fitted times"
    )
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Measures, writes, prints; exit code 0. Errors: ValueError, one sentence."""
    try:
        import torch
    except ImportError:
        raise ValueError("laep calibrate measures with torch, which is not installed") from None
    if args.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {args.rounds}")
    description = read_mapping(args.model)
    shape = make(ModelShape, description.get("model"), f"{args.model}: model")
    parallelism = make(Parallelism, description.get("parallelism"), f"{args.model}: parallelism")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if shape.num_experts < ranks:
        raise ValueError(
            f"{ranks} processes were started for {shape.num_experts} experts: start fewer"
        )
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if ranks > 1:
        torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        found = calibrate(shape, parallelism, device, ranks, args.rounds)
    finally:
        if ranks > 1:
            torch.distributed.destroy_process_group()
    if os.environ.get("RANK", "0") == "0":
        args.output.write_text(as_yaml(found, args.model, ranks), encoding="utf-8")
        if args.picture is not None:
            draw(found, args.picture)
        for name, fit in found.fits.items():
            print(
                f"{name}: {len(fit.measured)} times, the worst {100 * fit.worst:.1f} % off the fit"
            )
        print(f"wrote {args.output}: use it with laep simulate --hardware {args.output}")
    return 0


def calibrate(
    shape: ModelShape, parallelism: Parallelism, device: str, ranks: int, rounds: int
) -> Calibration:
    """Measures. A collective of all processes."""
    import torch

    from megatron_laep.measure import operations as ops

    wide = parallelism.weight_bytes >= 4
    place = ops.Place(device, torch.float32 if wide else torch.bfloat16, ranks)
    torch.manual_seed(1)
    found: dict[str, Fit] = {}

    # Experts: few and many, of two sizes, with few and many tokens.
    samples = []
    most = shape.num_experts // ranks
    tokens = shape.sequence_length * parallelism.micro_batch_size * shape.top_k
    cases = [
        (count, total, ffn)
        for count in sorted({max(1, most // 4), max(1, most // 2), most})
        for total in (tokens // 2, tokens)
        for ffn in sorted({max(1, shape.expert_ffn // 2), shape.expert_ffn})
    ]
    # One case at a time is in memory: the largest may fill a device.
    for count, total, ffn in cases:
        split = [total // count + (expert < total % count) for expert in range(count)]
        experts = ops.Experts(place, shape.hidden, ffn, shape.swiglu, split)
        seconds = ops.times(place, [experts], rounds)[0]
        samples.append((count, total, shape.ffn_matrices * shape.hidden * ffn, seconds))
        del experts
    found["experts"] = fit_experts(samples)
    coefficients = found["experts"].coefficients

    # The peak is the best that was reached by any product, so that all shares are at most 1.
    sizes = (512, 1024, 2048) if device == "cpu" else (2048, 4096, 8192)
    products = ops.times(place, [ops.product(place, size) for size in sizes], rounds)
    rates = [2 * size**3 / seconds for size, seconds in zip(sizes, products, strict=True)]
    if coefficients["flop"] > 0:
        rates.append(1 / coefficients["flop"])
    dense_seconds = ops.times(place, [ops.DenseBlock(place, shape)], rounds)[0]
    attention = 2 * shape.sequence_length * shape.attention_heads * shape.head_dim
    flops = 2 * (shape.attention_parameters - shape.extra_parameters_per_layer) + attention
    dense_rate = 3 * shape.sequence_length * flops / dense_seconds
    peak = max(*rates, dense_rate)

    copied = (32 if device == "cpu" else 512) * 2**20
    memory = 2 * copied / ops.times(place, [ops.copy(place, copied)], rounds)[0]
    layers = max(1, len(shape.moe_layers) // parallelism.pipeline)
    matrix = shape.hidden * shape.expert_ffn
    # As many as a rank holds, since large amounts pass no cache; and not more than fits anywhere.
    number = min(shape.ffn_matrices * most * layers, max(1, _MOST_PARAMETERS // matrix))
    parameters = [matrix] * number
    touched = 2 * parallelism.optimizer_bytes + parallelism.gradient_bytes
    touched += parallelism.weight_bytes
    seconds = ops.times(place, [ops.OptimizerPass(place, parameters)], rounds)[0]
    optimizer = sum(parameters) * touched / seconds

    # Moved for an expert in a forward and a backward pass, as the cost model has it.
    moved = 2 * parallelism.weight_bytes + 2 * parallelism.gradient_bytes
    weight = coefficients["weight"]
    hardware: dict[str, Any] = {
        "name": _name(device),
        "peak_tflops": peak / 1e12,
        "dense_efficiency": dense_rate / peak,
        "grouped_gemm_efficiency": min(1.0, 1 / (coefficients["flop"] * peak))
        if coefficients["flop"]
        else 1.0,
        "memory_gib": _memory_gib(device, ranks),
        "memory_gb_per_s": memory / 1e9,
        "expert_overhead_us": 1e6 * coefficients["expert"],
        "expert_gb_per_s": moved / weight / 1e9 if weight else _FAST,
        "optimizer_gb_per_s": optimizer / 1e9,
        "all_to_all_gb_per_s": memory / 1e9,
        "all_to_all_latency_us": 0.0,
        "network_gb_per_s": memory / 1e9,
        "tensor_parallel_gb_per_s": memory / 1e9,
    }
    not_measured: tuple[str, ...] = (
        "all_to_all_gb_per_s",
        "all_to_all_latency_us",
        "network_gb_per_s",
        "tensor_parallel_gb_per_s",
    )
    if ranks > 1:
        not_measured = ()
        crossing = (ranks - 1) / ranks
        rows = [max(ranks, tokens * share // 4) for share in (1, 2, 4, 8)]
        exchanges = [ops.exchange(place, number, shape.hidden) for number in rows]
        seconds_of = ops.times(place, exchanges, rounds, together=True)
        row_bytes = shape.hidden * place.dtype.itemsize * crossing
        found["all-to-all"] = fit_transfer(
            [(number * row_bytes, s) for number, s in zip(rows, seconds_of, strict=True)]
        )
        per_byte = found["all-to-all"].coefficients["byte"]
        hardware["all_to_all_gb_per_s"] = 1e-9 / per_byte if per_byte else _FAST
        hardware["all_to_all_latency_us"] = 1e6 * found["all-to-all"].coefficients["call"]
        sums = [2**20, 2**22, 2**24] if device == "cpu" else [2**22, 2**25, 2**28]
        seconds_of = ops.times(
            place, [ops.reduction(place, size) for size in sums], rounds, together=True
        )
        # A reduction scatters and gathers: each byte crosses twice.
        found["all-reduce"] = fit_transfer(
            [(2 * size * crossing, s) for size, s in zip(sums, seconds_of, strict=True)]
        )
        per_byte = found["all-reduce"].coefficients["byte"]
        for name in ("network_gb_per_s", "tensor_parallel_gb_per_s"):
            hardware[name] = 1e-9 / per_byte if per_byte else _FAST
    return Calibration(Hardware(**hardware), found, not_measured)


def _name(device: str) -> str:
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} thread(s) a process"


def _memory_gib(device: str, ranks: int) -> float:
    import torch

    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory / 2**30
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30 / ranks


def as_yaml(found: Calibration, model: Path, ranks: int) -> str:
    """The hardware file."""
    lines = [
        f"# Measured by `laep calibrate {model.name}` in {ranks} process(es), "
        f"{datetime.now(UTC):%Y-%m-%d}. Shares are of the best",
        "# matrix product that was seen. How well the cost model's form fits the times:",
    ]
    lines += [f"#   {name}: worst {100 * fit.worst:.1f} %" for name, fit in found.fits.items()]
    for name in Hardware.__dataclass_fields__:
        value = getattr(found.hardware, name)
        if value is None:
            continue
        if isinstance(value, str):
            text = json.dumps(value)
        else:
            # YAML takes 1e+09 for a text: its numbers with an exponent have a point.
            text = f"{value:.4g}"
            text = text.replace("e", ".0e") if "e" in text and "." not in text else text
        note = "  # not measured: one process" if name in found.not_measured else ""
        lines.append(f"{name}: {text}{note}")
    return "\n".join(lines) + "\n"


def draw(found: Calibration, path: Path) -> None:
    """The picture: measured against fitted seconds, one trace for each fit, the diagonal."""
    try:
        import plotly.graph_objects as go
    except ImportError:
        raise ValueError(
            "--picture needs plotly, which is not installed: pip install 'megatron-laep[report]'"
        ) from None
    figure = go.Figure()
    everything: list[float] = []
    for name, fit in found.fits.items():
        figure.add_scatter(x=fit.fitted, y=fit.measured, mode="markers", name=name)
        everything += [*fit.fitted, *fit.measured]
    ends = [min(everything), max(everything)]
    figure.add_scatter(x=ends, y=ends, mode="lines", name="as fitted")
    figure.update_layout(title=f"{found.hardware.name}: measured against fitted times")
    figure.update_xaxes(title="fitted, s", type="log")
    figure.update_yaxes(title="measured, s", type="log")
    figure.write_html(path, include_plotlyjs=True)
