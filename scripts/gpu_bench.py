#!/usr/bin/env python3
"""The first figures from a GPU: cost of counting, experts before and after a pruning, hardware file.

    scripts/gpu_bench.py --out FOLDER                  # all GPUs of this machine, about ten minutes
    scripts/gpu_bench.py --out FOLDER --processes 1
    scripts/gpu_bench.py --out FOLDER --device cpu --quick   # that it works, without one

NOT RUN ON A GPU SO FAR by its authors, who had none. Needs what scripts/gpu_smoke.sh
needs, downloads nothing, trains on mock data. TransformerEngine is used where it is installed. FOLDER gets

    result.json         everything that was measured, with versions, devices and date
    counting.json       scripts/bench_overhead.py: a job in which counting takes turns with none
    hardware.yaml       laep calibrate, for laep simulate --hardware

Run scripts/gpu_smoke.sh first: this one measures, and checks nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpu_smoke import REPOSITORY, WORKER, model_flags, visible_gpus

# Experts of a rank with the whole model and after a pruning by a third, as in the published model.
NUMBERS = [16, 11]


def run(command: list[str], options: argparse.Namespace, processes: int = 1) -> str:
    """Runs Python with these words, under torchrun where they begin with a script; its output.

    Errors: SystemExit with the end of the output if it fails.
    """
    environment = {**os.environ, "CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1"}
    environment["MEGATRON_LAEP_PLATFORM"] = "cpu" if options.device == "cpu" else "gpu"
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(REPOSITORY), environment.get("PYTHONPATH", "")]
    )
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [sys.executable, *launcher, *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=options.timeout,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(
            f"{' '.join(command)} ended with exit code {done.returncode}:\n{done.stdout[-4000:]}"
        )
    return done.stdout


def work(tasks: list[dict[str, Any]], options: argparse.Namespace) -> list[Any]:
    """The worker's tasks in one process; what it returned."""
    tasks_file, result_file = options.out / "tasks.json", options.out / "tasks-result.json"
    tasks_file.write_text(json.dumps(tasks))
    run([str(WORKER), str(tasks_file), str(result_file)], options)
    result = [ranks[0] for ranks in json.loads(result_file.read_text())]
    tasks_file.unlink()
    result_file.unlink()
    return result


def count(options: argparse.Namespace, engine: bool) -> dict[str, Any]:
    """The cost of counting, by scripts/bench_overhead.py."""
    config, target = options.out / "counting.args", options.out / "counting.json"
    words = model_flags(options.device, options.processes, bf16=True, engine=engine)
    config.write_text("\n".join(words) + "\n")
    script = str(REPOSITORY / "scripts" / "bench_overhead.py")
    pairs, calls = ("5", "20") if options.quick else ("150", "500")
    run(
        [script, "--platform", options.device, "--config", str(config), "--json", str(target)]
        + ["--pairs", pairs, "--calls", calls],
        options,
        options.processes,
    )
    return json.loads(target.read_text())


def calibrate(options: argparse.Namespace) -> str:
    """The hardware file's text."""
    model = {
        "num_layers": 2,
        "hidden": options.hidden,
        "num_experts": NUMBERS[0] * options.processes,
        "top_k": 2,
        "expert_ffn": options.ffn,
        "attention_heads": options.hidden // 64,
        "head_dim": 64,
        "kv_heads": options.hidden // 64,
        "vocab": 1024,
        "sequence_length": options.tokens // 2,
    }
    job = {"pipeline": 1, "expert": options.processes, "data": options.processes}
    job |= {"micro_batches": 1, "weight_bytes": 4 if options.device == "cpu" else 2}
    model_file, target = options.out / "model.json", options.out / "hardware.yaml"
    model_file.write_text(json.dumps({"model": model, "parallelism": job}, indent=1) + "\n")
    words = ["-m", "megatron_laep.tools", "calibrate", str(model_file), "-o", str(target)]
    words += ["--device", "cpu" if options.device == "cpu" else "cuda"]
    run([*words, "--rounds", "1" if options.quick else "5"], options, options.processes)
    return target.read_text()


def parse_options(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--processes", type=int, help="default: the GPUs of this machine; CPU: 2")
    parser.add_argument("--quick", action="store_true", help="few repetitions: that it works")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for a part")
    options = parser.parse_args(words)
    if options.processes is None:
        options.processes = 2 if options.device == "cpu" else visible_gpus()
    if options.processes < 1:
        parser.error("no GPU is visible: try --device cpu --quick")
    large = options.device == "gpu"
    options.hidden, options.ffn = (2048, 4096) if large else (128, 128)
    options.tokens = 8192 if large else 256
    return options


def main() -> int:
    options = parse_options(sys.argv[1:])
    options.out.mkdir(parents=True, exist_ok=True)
    task = {"kind": "expert_times", "hidden": options.hidden, "ffn": options.ffn}
    task |= {"numbers": NUMBERS, "tokens": options.tokens, "rounds": 2 if options.quick else 30}
    facts, experts = work([{"kind": "facts"}, task], options)
    result = {"date": datetime.now(UTC).isoformat(timespec="seconds"), **facts}
    result |= {"processes": options.processes, "quick": options.quick}
    result["experts"] = {
        "hidden": options.hidden,
        "ffn": options.ffn,
        "tokens": options.tokens,
        "seconds": experts,
    }
    for name, seconds in experts.items():
        full, pruned = (seconds[str(number)] for number in NUMBERS)
        print(
            f"experts, {name}: {NUMBERS[0]} in {1e3 * full:.2f} ms, {NUMBERS[1]} in "
            f"{1e3 * pruned:.2f} ms, the same {options.tokens} tokens ({full / pruned:.3f} times)",
            flush=True,
        )
    result["counting"] = count(options, engine=facts["transformer_engine"] is not None)
    ratio = result["counting"]["iteration"]
    low, high = ratio["ratio_interval"]
    print(f"counting: {ratio['ratio']:.4f} of an iteration ({low:.4f} to {high:.4f})", flush=True)
    result["hardware"] = calibrate(options)
    print(result["hardware"])
    (options.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {options.out / 'result.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
