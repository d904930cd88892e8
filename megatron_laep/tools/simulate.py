"""`laep simulate`: what a plan would bring on a cluster, from recorded loads and the cost model.

Reads a model file, a hardware file and loads; makes the expert map as the job would (or takes a
given one); prints step time, TFLOPS per GPU and memory per rank of the full model, of the same with
equal loads on all ranks (what an auxiliary loss would bring at best), of the pruned, and of the
pruned and rearranged one. Needs neither torch nor Megatron; PyYAML unless the files are JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path

from megatron_laep.checks import shown
from megatron_laep.plan.expert_map import ExpertMap
from megatron_laep.plan.layout import ModelLayout
from megatron_laep.plan.loads import checked_loads
from megatron_laep.plan.make_map import check_plan, make_expert_map
from megatron_laep.records import load_log
from megatron_laep.records.load_log import LoadLog
from megatron_laep.settings.rules import PLACEMENTS, PruningRules
from megatron_laep.simulate.cost_inputs import (
    Hardware,
    ModelShape,
    Parallelism,
    balanced_placements,
    full_placements,
    pruned_placements,
)
from megatron_laep.simulate.cost_model import calibrate, estimate
from megatron_laep.tools.model_files import make, read_mapping, read_text

VARIANTS = ("full", "balanced", "pruned", "pruned and rearranged")


def add_parser(subparsers) -> argparse.ArgumentParser:
    """Adds the subcommand `simulate`; its `run` default takes the parsed arguments."""
    text = "Step time, TFLOPS per GPU and memory before and after pruning, from a cost model."
    parser = subparsers.add_parser("simulate", help=text, description=text)
    parser.add_argument(
        "model", type=Path, metavar="MODEL.yaml", help="shape, parallelism and default rules"
    )
    parser.add_argument(
        "loads",
        type=Path,
        metavar="LOADS",
        help="recorded loads: a log (loads-*.bin) or the folder that holds it, a job's "
        "laep/iter_*/loads.json, or JSON of windows",
    )
    parser.add_argument(
        "--hardware",
        required=True,
        metavar="FILE|NAME",
        help="a hardware file, or NAME for hardware-NAME.yaml beside the model file",
    )
    parser.add_argument(
        "--windows",
        type=int,
        metavar="N",
        help="for loads with windows: use the sum of the last N (default: 1, or all that the job "
        "decided on whose loads.json it is)",
    )
    parser.add_argument("--alpha", metavar="SPEC", help="as --laep-alpha (default: MODEL.yaml's)")
    parser.add_argument("--beta", type=float, metavar="X", help="as --laep-beta")
    parser.add_argument(
        "--expert-multiple", type=int, metavar="M", help="as --laep-expert-multiple"
    )
    parser.add_argument("--placement", choices=PLACEMENTS, help="as --laep-placement")
    parser.add_argument(
        "--ep",
        type=int,
        metavar="E",
        help="expert-parallel size after pruning (default: as before)",
    )
    parser.add_argument(
        "--plan", type=Path, metavar="FILE", help="an expert map (JSON) instead of these rules"
    )
    parser.add_argument(
        "--calibrate",
        type=float,
        metavar="TFLOPS",
        help="scale the hardware's two efficiencies by one factor so that the full model reaches "
        "this many TFLOPS per GPU (a measured number)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Prints the result and returns exit code 0. Errors: ValueError, one sentence."""
    result = simulate(args)
    print(json.dumps(result, indent=1, allow_nan=False) if args.json else format_result(result))
    return 0


def simulate(args: argparse.Namespace) -> dict[str, object]:
    """The result as a JSON-able dict. Errors: ValueError."""
    description = read_mapping(args.model)
    unknown = sorted(set(description) - {"model", "parallelism", "laep", "published"})
    if unknown:
        raise ValueError(f"{args.model}: unknown sections {', '.join(map(str, unknown))}")
    shape = make(ModelShape, description.get("model"), f"{args.model}: model")
    parallelism = make(Parallelism, description.get("parallelism"), f"{args.model}: parallelism")
    hardware_file = _find_hardware(args.hardware, args.model)
    hardware = make(Hardware, read_mapping(hardware_file), f"{hardware_file}: hardware")
    log = load_log.read(args.loads)
    windows = log.decision_windows if args.windows is None else args.windows
    loads = total_loads(log, windows)
    _check_loads(loads, shape, args.loads)
    expert_map = _expert_map(args, description.get("laep"), shape, parallelism, log, windows)
    placements = dict(
        zip(
            VARIANTS,
            (
                full_placements(loads, parallelism.expert),
                balanced_placements(
                    {number: len(row) for number, row in loads.items()}, parallelism.expert
                ),
                pruned_placements(expert_map, loads, rearranged=False),
                pruned_placements(expert_map, loads, rearranged=True),
            ),
            strict=True,
        )
    )
    if args.calibrate is not None:
        hardware = calibrate(shape, hardware, parallelism, placements["full"], args.calibrate)
    estimates = {
        name: estimate(shape, hardware, parallelism, placement)
        for name, placement in placements.items()
    }
    for name, value in estimates.items():
        if not 0 < value.step_seconds < math.inf or not 0 < value.tflops_per_gpu < math.inf:
            raise ValueError(
                f"the {name} model would take {value.step_seconds:g} s a step at "
                f"{value.tflops_per_gpu:g} TFLOPS per GPU: a number in {args.model} or "
                f"{hardware_file} is far from any real one"
            )
    return {
        "model": str(args.model),
        "loads": str(args.loads),
        "expert_map_hash": expert_map.hash,
        "calibrated_on_tflops_per_gpu": args.calibrate,
        "gpus": parallelism.gpus,
        "model_flops_per_token": shape.model_flops_per_token,
        "hardware": dataclasses.asdict(hardware),
        "published_tflops_per_gpu": _published(description.get("published"), args.model),
        "variants": {
            name: {
                **dataclasses.asdict(value),
                "fits_memory": value.memory_bytes <= hardware.memory_gib * 2**30,
            }
            for name, value in estimates.items()
        },
    }


def total_loads(log: LoadLog, windows: int) -> dict[int, list[int]]:
    """Tokens per expert by layer number, of the last windows together.

    Errors: ValueError for fewer windows, or a layer without a token.
    """
    loads = {}
    for number, row in zip(log.layer_numbers, log.last(windows), strict=True):
        try:
            loads[number] = checked_loads(row).tolist()
        except ValueError as error:
            raise ValueError(f"{log.source}: layer {number}: {error}") from None
    return loads


def _check_loads(loads: Mapping[int, list[int]], shape: ModelShape, path: Path) -> None:
    if set(loads) != set(shape.moe_layers):
        raise ValueError(
            f"{path}: the loads are of layers {_span(loads)}, the model has experts in layers "
            f"{_span(shape.moe_layers)}: they belong to another model"
        )
    for number, row in loads.items():
        if len(row) != shape.num_experts:
            raise ValueError(
                f"{path}: layer {number} has loads of {len(row)} experts, the model has "
                f"{shape.num_experts}: they belong to another model"
            )


def _span(numbers) -> str:
    """3-7 for five layers in a row, else all of them."""
    ordered = sorted(numbers)
    whole = ordered == list(range(ordered[0], ordered[-1] + 1)) and len(ordered) > 1
    return f"{ordered[0]}-{ordered[-1]}" if whole else ", ".join(map(str, ordered))


def _expert_map(
    args: argparse.Namespace,
    section: object,
    shape: ModelShape,
    parallelism: Parallelism,
    log: LoadLog,
    windows: int,
) -> ExpertMap:
    """The map that the job would make of the loads by these rules, or the given plan."""
    names = ("alpha", "beta", "expert_multiple", "placement")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.plan is not None:
        if given or args.ep is not None:
            raise ValueError(
                "--plan is a finished map: leave out --alpha, --beta, --expert-multiple, "
                "--placement and --ep"
            )
        text = read_text(args.plan)
        try:
            expert_map = ExpertMap.from_json(text)
        except ValueError as error:
            raise ValueError(f"{args.plan}: {error}") from None
        layout = _layout(shape, parallelism, expert_map.expert_parallel_size_after)
        check_plan(expert_map, layout, source=str(args.plan))
        return expert_map
    defaults = _checked_section(section, set(names), f"{args.model}: laep")
    if "alpha" in defaults:
        defaults["alpha"] = str(defaults["alpha"])  # YAML reads 0.4 as a number
    rules = PruningRules(**{**defaults, **given})
    rules.validate()
    ranks = parallelism.expert if args.ep is None else args.ep
    if ranks < 1:
        raise ValueError(f"--ep must be at least 1, got {ranks}")
    layout = _layout(shape, parallelism, ranks)
    return make_expert_map(
        log.parts(windows), layout, rules, iteration=int(log.last_iterations[-1])
    )


def _layout(shape: ModelShape, parallelism: Parallelism, ranks_after: int) -> ModelLayout:
    """The model of the files, and so many expert-parallel ranks after pruning."""
    return ModelLayout.of(
        dict.fromkeys(shape.moe_layers, shape.num_experts),
        top_k=shape.top_k,
        expert_parallel_size_before=parallelism.expert,
        expert_parallel_size_after=ranks_after,
        stages={
            number: stage
            for stage, numbers in enumerate(parallelism.stages(shape.num_layers))
            for number in numbers
            if number in shape.moe_layers
        },
    )


def _published(section: object, path: Path) -> dict[str, float] | None:
    published = _checked_section(section, {"tflops_per_gpu", "experts_kept"}, f"{path}: published")
    values = published.get("tflops_per_gpu")
    if values is None:
        return None
    if (
        not isinstance(values, list)
        or len(values) != len(VARIANTS)
        or not all(type(value) in (int, float) and 0 < value < 1e9 for value in values)
    ):
        raise ValueError(
            f"{path}: published: tflops_per_gpu must be a list of four numbers above 0, got "
            f"{shown(values)}"
        )
    return dict(zip(VARIANTS, values, strict=True))


def _checked_section(section: object, known: set[str], where: str) -> dict:
    if section is None:
        return {}
    if not isinstance(section, dict) or set(section) - known:
        raise ValueError(
            f"{where} may have the fields {', '.join(sorted(known))}, got {shown(section)}"
        )
    return dict(section)


def _find_hardware(name: str, model: Path) -> Path:
    if Path(name).is_file():
        return Path(name)
    beside = model.parent / f"hardware-{name}.yaml"
    if beside.is_file():
        return beside
    known = sorted(
        path.stem.removeprefix("hardware-") for path in model.parent.glob("hardware-*.yaml")
    )
    raise ValueError(
        f"--hardware {name}: neither a file nor one of those beside {model}: "
        f"{', '.join(known) or 'there are none'}"
    )


def format_result(result: dict) -> str:
    """The table as text, then what it rests on; from the dict that `simulate` returns."""
    from tabulate import tabulate

    variants = [result["variants"][name] for name in VARIANTS]
    base = variants[0]["tflops_per_gpu"]

    def row(label: str, text) -> list[str]:
        return [label, *(text(variant) for variant in variants)]

    def stage_ms(label: str, *parts: str) -> list[str]:
        return row(label, lambda v: f"{1e3 * sum(v['stage_time'][part] for part in parts):.1f}")

    rows = [
        row("parameters, B", lambda v: f"{v['parameters'] / 1e9:.0f}"),
        row("step, s", lambda v: f"{v['step_seconds']:.1f}"),
        row("TFLOPS per GPU", lambda v: f"{v['tflops_per_gpu']:.2f}"),
        row("against full", lambda v: f"{100 * (v['tflops_per_gpu'] / base - 1):+.1f} %"),
    ]
    published = result["published_tflops_per_gpu"]
    if published:
        rows.append(["published TFLOPS", *(f"{published[name]:.2f}" for name in VARIANTS)])
    rows += [
        row("memory of the fullest rank, GiB", lambda v: f"{v['memory_bytes'] / 2**30:.1f}"),
        row("of it weights, gradients, optimizer", lambda v: f"{v['state_bytes'] / 2**30:.1f}"),
        row("busiest rank / mean, all layers", lambda v: f"{v['imbalance_mean']:.3f}"),
        row("busiest rank / mean, worst layer", lambda v: f"{v['imbalance_max']:.3f}"),
        row("slowest stage, from 0", lambda v: str(v["slowest_stage"])),
        row("its micro batch, ms", lambda v: f"{1e3 * sum(v['stage_time'].values()):.1f}"),
        stage_ms("dense, with output layer", "dense", "tensor_parallel"),
        stage_ms("grouped GEMM", "grouped_gemm"),
        stage_ms("expert weights", "expert_weights"),
        stage_ms("all-to-all", "all_to_all"),
        row("mean stage, ms", lambda v: f"{1e3 * v['mean_stage_seconds']:.1f}"),
    ]
    hardware = result["hardware"]
    lines = [
        tabulate(rows, headers=("", *VARIANTS), disable_numparse=True, stralign="right"),
        "",
        f"{result['gpus']} GPUs ({hardware['name']}), matrix products at "
        f"{100 * hardware['dense_efficiency']:.1f} % (dense) and "
        f"{100 * hardware['grouped_gemm_efficiency']:.1f} % (grouped) of "
        f"{hardware['peak_tflops']:g} TFLOPS"
        + (", calibrated on the full model" if result["calibrated_on_tflops_per_gpu"] else ""),
        f"expert map {result['expert_map_hash'][:12]}",
    ]
    lines += [
        f"warning: {name} does not fit into {hardware['memory_gib']:g} GiB"
        for name, variant in zip(VARIANTS, variants, strict=True)
        if not variant["fits_memory"]
    ]
    return "\n".join(lines)
