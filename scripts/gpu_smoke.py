#!/usr/bin/env python3
"""Does it work on these GPUs? Checks in a fixed order; ends with the first that fails.

    scripts/gpu_smoke.sh                          # all GPUs of this machine, about ten minutes
    scripts/gpu_smoke.sh --processes 1 --json result.json
    scripts/gpu_smoke.sh --device cpu             # the same checks on two gloo processes

NOT RUN ON A GPU SO FAR by its authors, who had none: with --device cpu only. Needs torch, megatron-core and
what these and this package import (numpy, tabulate; psutil for Megatron's checkpoints), downloads nothing,
and trains on mock data. TransformerEngine is used
where it is installed, for grouped GEMM; without it experts are computed one after the other.

Exit code 0 if all checks passed, 1 at the first that did not; one JSON document on stdout or in the
file of --json has, for each check, "passed", "failed" or "skipped" and its figures.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
WORKER = REPOSITORY / "scripts" / "gpu_parts" / "worker.py"
ITERATIONS, PRUNE = 8, 4

# Largest relative difference of two losses that should be the same but for the order of sums.
# bf16: a logit may be rounded to the neighbour, u = 2**-8 of it; a token's loss changes by at most twice
# the largest change of a logit, 2u * |logit|, and logits stay below half of the loss (2.8 of 5.6).
BF16 = 2.0**-8
# fp32: with u = 2**-24, twenty products of at most 512 terms, 20 * 512 u = 6e-4 of logits below 2.8,
# if all roundings went one way; they go both ways, so that the root of that number of terms counts,
# 20 * sqrt(512) u = 2.7e-5. Four steps of Adam on gradients so exact add less.
FP32 = 1e-4
# What groups may leave behind once the first three rounds are over, in all the later rounds together.
LEAK_BYTES = 64 * 2**20


class CheckFailed(Exception):
    """What was found, in a sentence."""


def model_flags(device: str, processes: int, *, bf16: bool, engine: bool) -> list[str]:
    """Megatron's flags of the model that all jobs train: two layers, 16 experts, top-2."""
    # On a GPU large enough that what pruning frees is seen beside the libraries' own buffers.
    width, ffn = (64, 64) if device == "cpu" else (512, 2048)
    flags: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": width,
        "num_attention_heads": 4,
        "ffn_hidden_size": ffn,
        "moe_ffn_hidden_size": ffn,
        "seq_length": 64,
        "max_position_embeddings": 64,
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "swiglu": True,
        "disable_bias_linear": True,
        "attention_dropout": 0,
        "hidden_dropout": 0,
        # Experts that are missing, or another's, are to be seen in the loss.
        "init_method_std": 0.8 / math.sqrt(width),
        "num_experts": 16,
        "moe_router_topk": 2,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": processes,
        "tokenizer_type": "NullTokenizer",
        "vocab_size": 257,
        "mock_data": True,
        "micro_batch_size": 2,
        "global_batch_size": 4 * processes,
        "train_iters": ITERATIONS,
        "lr_decay_iters": 2 * ITERATIONS,
        "lr": 1e-3,
        "lr_decay_style": "constant",
        "clip_grad": 100.0,  # never reached: an order of sums in the norm changes nothing
        "eval_iters": 0,
        "eval_interval": 1000,
        "log_interval": 1,
        "seed": 4,
        "bf16": bf16,
        "distributed_backend": "gloo" if device == "cpu" else "nccl",
        "disable_jit_fuser": True,
        "no_persist_layer_norm": True,
        "no_masked_softmax_fusion": True,
        "no_bias_swiglu_fusion": True,
        "no_rope_fusion": True,
        "no_gradient_accumulation_fusion": True,
        "num_workers": 0,
        "ckpt_format": "torch_dist",
        "transformer_impl": "transformer_engine" if engine else "local",
        "attention_backend": "unfused",
        "moe_grouped_gemm": engine,
    }
    words = []
    for name, value in flags.items():
        if value is not False:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


def pruning_flags(folder: Path) -> list[str]:
    """Exact counts and balanced placement: ranks and layers with different numbers of experts."""
    return (
        f"--save {folder} --load {folder} --save-interval 1000 --laep-prune-iteration {PRUNE} "
        f"--laep-window {PRUNE} --laep-alpha 1.0 --laep-beta 0.5 --laep-expert-multiple 1 "
        "--laep-placement balanced"
    ).split()


def pending_copy(folder: Path, target: Path) -> Path:
    """A folder whose latest checkpoint is the pruning's, still with all experts."""
    name = f"iter_{PRUNE:07d}"
    target.mkdir()
    shutil.copytree(folder / name, target / name)
    (target / "latest_checkpointed_iteration.txt").write_text(str(PRUNE))
    return target


def losses_of(ranks: list[dict], after: int = 0) -> dict[int, float]:
    """Losses by iteration, of the rank that knows them."""
    return {
        int(number): float.fromhex(value)
        for rank in ranks
        for number, value in rank["losses"].items()
        if int(number) > after
    }


def largest_difference(one: dict[int, float], other: dict[int, float]) -> float:
    """Relative; the iterations must be the same. Errors: CheckFailed."""
    if not one or set(one) != set(other):
        raise CheckFailed(f"losses of iterations {sorted(one)} and {sorted(other)}")
    if not all(map(math.isfinite, [*one.values(), *other.values()])):
        raise CheckFailed(f"losses that are no numbers: {one} and {other}")
    return max(abs(one[i] - other[i]) / abs(other[i]) for i in one)


def at_most(found: float, limit: float, what: str) -> None:
    if not found <= limit:
        raise CheckFailed(f"{what}: {found:.3g}, wanted at most {limit:.3g}")


class Smoke:
    """The jobs, each run once, and the checks of them."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.options, self.scratch = options, scratch
        self.outputs: list[str] = []
        self.facts: dict[str, Any] = {}
        self.counts: tuple[int, int] = (0, 0)

    def run(self, *tasks: dict[str, Any], dies: bool = False) -> list[list[Any]]:
        """Runs tasks in fresh processes; for each the results of all ranks. Errors: CheckFailed."""
        number = len(self.outputs)
        tasks_file = self.scratch / f"tasks{number}.json"
        result_file = self.scratch / f"result{number}.json"
        tasks_file.write_text(json.dumps(tasks))
        environment = {**os.environ, "CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1"}
        platform = "cpu" if self.options.device == "cpu" else "gpu"
        environment["MEGATRON_LAEP_PLATFORM"] = platform
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(self.options.processes)]
        command += [str(WORKER), str(tasks_file), str(result_file)]
        # A file, not a pipe: what a killed rank has started may hold a pipe open for ever.
        log = self.scratch / f"output{number}.txt"
        with log.open("w") as output:
            done = subprocess.run(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=self.options.timeout,
                check=False,
            )
        self.outputs.append(log.read_text(errors="replace"))
        if (done.returncode == 0) == dies:
            tail = "\n".join(self.outputs[-1].splitlines()[-40:])
            raise CheckFailed(f"the job ended with exit code {done.returncode}:\n{tail}")
        return json.loads(result_file.read_text()) if result_file.exists() else []

    def flags(self, *more: str, bf16: bool = True, engine: bool = False) -> list[str]:
        options = self.options
        return model_flags(options.device, options.processes, bf16=bf16, engine=engine) + list(more)

    def check_environment(self) -> dict[str, Any]:
        """Versions and devices."""
        self.facts = self.run({"kind": "facts"})[0][0]
        return {**self.facts, "processes": self.options.processes}

    def check_counting(self) -> dict[str, Any]:
        """Counting makes the host wait for nothing, and counts every token."""
        arguments = self.flags("--train-iters", "8")
        ranks = self.run({"kind": "count_synchronizations", "arguments": arguments})[0]
        # Two micro-batches of two sequences of 64 a rank; top-2; two layers.
        tokens = 2 * 2 * 64 * 2 * 2
        for rank in ranks:
            stock, counting = rank["stock"], rank["counting"]
            for name in stock[0]["waits"]:
                # Megatron's own waits vary: the fewest with counting against the most without.
                fewest = min(item["waits"][name] for item in counting)
                most = max(item["waits"][name] for item in stock)
                at_most(fewest, most, f"{name} in an iteration that counts")
            found = [item["tokens"] for item in (*stock, *counting)]
            if found != [0] * len(stock) + [tokens] * len(counting):
                raise CheckFailed(
                    f"tokens counted: {found}, wanted 0 in the {len(stock)} iterations without and "
                    f"{tokens} in those with counting"
                )
            if min(item["routings"] for item in (*stock, *counting)) == 0:
                raise CheckFailed("the profiler saw no routing, so it would see no waiting")
        return ranks[0]

    def check_permutation(self) -> dict[str, Any]:
        """A job whose experts are renumbered, moved to other ranks and reloaded goes on as before."""
        plan, folder = self.scratch / "permutation.json", self.scratch / "permuted"
        folder.mkdir()
        plan.write_text(permutation_map(self.options.processes))
        moved = self.flags(
            *f"--save {folder} --load {folder} --save-interval 1000 --laep-plan {plan}".split(),
            *f"--laep-prune-iteration {PRUNE}".split(),
            bf16=False,
        )
        stock, permuted = self.run(
            {"kind": "train", "arguments": self.flags(bf16=False), "laep": False},
            {"kind": "train", "arguments": moved},
        )
        self.expect_rebuild(self.outputs[-1])
        difference = largest_difference(losses_of(permuted), losses_of(stock))
        at_most(difference, FP32, "difference of the losses")
        return {"largest_difference": difference, "tolerance": FP32}

    def check_pruned_equals_masked(self) -> dict[str, Any]:
        """A pruned model computes what the full one does whose router never picks the pruned experts."""
        return self._pruned_and_masked("pruned", engine=False)

    def check_grouped_gemm(self) -> dict[str, Any]:
        """The same with TransformerEngine's grouped GEMM and different counts on the ranks."""
        if self.facts["transformer_engine"] is None:
            return {"skipped": "TransformerEngine is not installed"}
        if self.options.device == "cpu":
            return {"skipped": "TransformerEngine needs a GPU"}
        return self._pruned_and_masked("grouped", engine=True)

    def _pruned_and_masked(self, name: str, *, engine: bool) -> dict[str, Any]:
        folder = self.scratch / name
        folder.mkdir()
        pruned = self.run(
            {"kind": "train", "arguments": self.flags(*pruning_flags(folder), engine=engine)}
        )[0]
        self.expect_rebuild(self.outputs[-1])
        map_file = folder / "laep" / f"iter_{PRUNE:07d}" / "map.json"
        layers = json.loads(map_file.read_text())["layers"]
        counts = [layer["experts_per_rank"] for layer in layers]
        if len({count for row in counts for count in row}) == 1:
            raise CheckFailed(f"the pruning left equal counts everywhere: {counts}")
        task = {"kind": "train", "laep": False}
        loads = []
        for mask in (str(map_file), None):
            copy = pending_copy(folder, self.scratch / f"{name}-{'masked' if mask else 'full'}")
            loads.append(
                {
                    **task,
                    "masked": mask,
                    "arguments": self.flags("--load", str(copy), engine=engine),
                }
            )
        masked, full = self.run(*loads)
        wanted = losses_of(pruned, after=PRUNE)
        difference = largest_difference(losses_of(masked), wanted)
        at_most(difference, BF16, "difference of the losses")
        control = largest_difference(losses_of(full), wanted)
        if control <= BF16:
            raise CheckFailed(
                f"this check sees nothing: unmasked, the losses differ by {control:.3g}"
            )
        if not engine:
            self.pruned = pruned
        return {
            "experts_on_ranks": counts,
            "largest_difference": difference,
            "unmasked": control,
            "tolerance": BF16,
        }

    def expect_rebuild(self, output: str) -> None:
        for event in ("committed", "tear_down", "load_through_map", "build"):
            if f"laep event={event} " not in output:
                raise CheckFailed(f"the job's output has no 'laep event={event}'")
        if "event=old_model_alive" in output:
            raise CheckFailed("the old model's memory was not freed: event=old_model_alive")

    def check_memory(self) -> dict[str, Any]:
        """A rank has fewer parameters after the pruning, and on a GPU as much less memory."""
        rows = []
        for rank in self.pruned:
            before, after = rank["steps"][str(PRUNE)], rank["steps"][str(ITERATIONS)]
            gone = before["parameters"] - after["parameters"]
            freed = before["allocated_bytes"] - after["allocated_bytes"]
            rows.append({"parameters_before": before["parameters"], "parameters_gone": gone})
            rows[-1] |= {"bytes_before": before["allocated_bytes"], "bytes_freed": freed}
            # bf16 weight, fp32 gradient, fp32 master and two moments: 18; a tenth is left for buffers.
            if self.options.device != "cpu" and freed < 0.9 * 18 * gone:
                raise CheckFailed(
                    f"{gone} parameters fewer freed {freed} bytes, wanted 18 for each"
                )
        if sum(row["parameters_gone"] for row in rows) <= 0:
            raise CheckFailed(f"no parameters are gone: {rows}")
        return {"ranks": rows}

    def check_kill_and_resume(self) -> dict[str, Any]:
        """kill -9 behind the pruning's checkpoint; the same command goes on like the job that lived."""
        folder = self.scratch / "killed"
        folder.mkdir()
        task = {"kind": "train", "arguments": self.flags(*pruning_flags(folder))}
        self.run({**task, "die_after_commit": True}, dies=True)
        resumed = losses_of(self.run(task)[0])
        difference = largest_difference(resumed, losses_of(self.pruned, after=PRUNE))
        at_most(difference, BF16, "difference of the losses")
        return {"largest_difference": difference, "tolerance": BF16}

    def check_groups(self) -> dict[str, Any]:
        """Groups that are made, used and destroyed ten times leave nothing behind."""
        task = {"kind": "remake_groups", "times": 10, "expert_parallel": self.options.processes}
        ranks = self.run(task)[0]
        for rank in ranks:
            if len(set(rank["groups"])) > 1:
                raise CheckFailed(f"process groups alive after each round: {rank['groups']}")
            for what in ("host_bytes", "device_bytes"):
                at_most(rank[what][-1] - rank[what][2], LEAK_BYTES, f"{what} left in seven rounds")
            at_most(rank["files"][-1] - rank["files"][2], 0, "files left open in seven rounds")
        return {"ranks": ranks}

    def checks(self) -> dict[str, Callable[[], dict[str, Any]]]:
        return {
            "environment": self.check_environment,
            "counting without synchronisation": self.check_counting,
            "permutation": self.check_permutation,
            "pruned equals masked, uneven counts, rebuild in the job": self.check_pruned_equals_masked,
            "memory before and after": self.check_memory,
            "kill and resume": self.check_kill_and_resume,
            "grouped GEMM with uneven counts": self.check_grouped_gemm,
            "groups made anew ten times": self.check_groups,
        }


def permutation_map(ranks: int) -> str:
    """An expert map that keeps all 16 experts of both layers, each on another rank where there are two."""
    sys.path.insert(0, str(REPOSITORY))
    import numpy as np

    from megatron_laep.plan.layout import ModelLayout
    from megatron_laep.plan.loads import Loads
    from megatron_laep.plan.make_map import make_expert_map
    from megatron_laep.settings.rules import PruningRules

    # Greedy placement of these loads deals the experts out; with beta 0 all stay.
    generator = np.random.default_rng(1)
    loads_LE = [generator.permutation(np.arange(100, 116)).tolist() for _ in range(2)]
    loads = Loads.of_window(loads_LE, [1, 2])
    layout = ModelLayout.of(loads.experts, top_k=2, expert_parallel_size_before=ranks)
    return make_expert_map(loads, layout, PruningRules(beta=0.0), iteration=PRUNE).to_json()


def perform(checks: dict[str, Callable[[], dict[str, Any]]], say: Callable[[str], None]) -> dict:
    """Runs checks until one fails; the report."""
    report: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds")}
    report |= {"passed": True, "checks": {}}
    for name, check in checks.items():
        start = datetime.now(UTC)
        try:
            found = check()
            result = "skipped" if "skipped" in found else "passed"
        except CheckFailed as error:
            found, result = {"reason": str(error)}, "failed"
        except (OSError, subprocess.TimeoutExpired, KeyError, IndexError) as error:
            found, result = {"reason": repr(error)}, "failed"
        seconds = round((datetime.now(UTC) - start).total_seconds(), 1)
        report["checks"][name] = {"result": result, "seconds": seconds, **found}
        more = found.get("reason") or found.get("skipped") or ""
        say(f"{result:8}{seconds:7.1f} s  {name}  {more}")
        if result == "failed":
            report["passed"] = False
            break
    return report


def parse_options(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument(
        "--processes", type=int, help="default: the GPUs of this machine, at most 8; on a CPU 2"
    )
    parser.add_argument("--json", type=Path, help="file for the report (default: stdout)")
    parser.add_argument(
        "--timeout", type=float, default=300, help="seconds for a job (default: 300)"
    )
    options = parser.parse_args(words)
    if options.processes is None:
        options.processes = 2 if options.device == "cpu" else visible_gpus()
    if options.processes not in (1, 2, 4, 8):
        parser.error(
            f"--processes must be 1, 2, 4 or 8, got {options.processes}"
            + ("" if options.processes else ": no GPU is visible, try --device cpu")
        )
    return options


def visible_gpus() -> int:
    """The largest of 8, 4, 2, 1 that this machine has, or 0."""
    import torch

    visible = torch.cuda.device_count()
    return next((number for number in (8, 4, 2, 1) if number <= visible), 0)


def main() -> int:
    options = parse_options(sys.argv[1:])
    with tempfile.TemporaryDirectory(prefix="laep-smoke-") as scratch:
        smoke = Smoke(options, Path(scratch))
        report = perform(smoke.checks(), lambda line: print(line, file=sys.stderr, flush=True))
    text = json.dumps(report, indent=1)
    if options.json:
        options.json.write_text(text + "\n")
    else:
        print(text)
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
