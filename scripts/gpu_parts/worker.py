"""One rank of scripts/gpu_smoke.py and scripts/gpu_bench.py: runs a list of tasks in one process.

    torchrun --nproc-per-node N scripts/gpu_parts/worker.py TASKS.json RESULT.json

A task is a dict with a ``kind``, which names a function below, and that function's arguments; the
result, which rank 0 writes, has for each task what each rank returned. Between two training jobs
Megatron is taken down as at a rebuild. Needs torch and megatron-core; TransformerEngine where it is.
With MEGATRON_LAEP_PLATFORM=cpu everything runs on gloo processes.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import resource
import runpy
import signal
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "scripts" / "pretrain_gpt.py"
# What a step tells the host to wait for, as torch's profiler names it on a GPU and on a CPU.
SYNCHRONIZING = (
    "Memcpy DtoH (Device -> Pageable)",
    "Memcpy DtoH (Device -> Pinned)",
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "aten::_local_scalar_dense",
)


class Watch:
    """Takes the place of Megatron's ``train_step`` and ``training_log``, for good: notes what they see.

    losses: ``float.hex()`` by iteration, on the ranks that know them. steps: for each iteration its
    seconds, the rank's parameters and bytes that are allocated after it.
    """

    def __init__(self) -> None:
        from megatron.training import training

        self._train_step, self._training_log = training.train_step, training.training_log
        training.train_step, training.training_log = self._step, self._log
        self.switch: Any = None
        self.clear()

    def clear(self) -> None:
        self.losses: dict[int, str] = {}
        self.steps: dict[int, dict[str, float]] = {}

    def _step(self, forward_step, data, model, *args, **named):
        import torch

        number = named.get("iteration", 0) + 1
        if self.switch is not None:
            return self.switch(number, model, self._train_step, forward_step, data, *args, **named)
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = self._train_step(forward_step, data, model, *args, **named)
        torch.cuda.synchronize()
        self.steps[number] = {
            "seconds": time.perf_counter() - start,
            "parameters": sum(p.numel() for chunk in model for p in chunk.parameters()),
            "allocated_bytes": torch.cuda.memory_allocated(),
        }
        return result

    def _log(self, losses, total, learning_rate, iteration, *args, **named):
        for value in losses.values():
            value = value[0] / value[1] if getattr(value, "numel", lambda: 1)() == 2 else value
            self.losses[iteration] = float(value).hex()
        return self._training_log(losses, total, learning_rate, iteration, *args, **named)


_watch: Watch | None = None


def train(
    arguments: list[str],
    laep: bool = True,
    masked: str | None = None,
    die_after_commit: bool = False,
    switch: Any = None,
) -> dict[str, Any]:
    """A training job; what `Watch` noted, by iteration.

    laep: under megatron_laep. masked: file of an expert map; the router never chooses the experts that
    it drops. die_after_commit: this rank kills itself when the pruning's checkpoint is complete.
    """
    global _watch
    import megatron_laep
    from megatron_laep.mcore import rebuild

    _watch = _watch or Watch()
    _watch.clear()
    _watch.switch = switch
    sys.argv = [str(SCRIPT), *arguments]
    if laep:
        megatron_laep.install()
    try:
        with _masked_routers(masked), _killed(die_after_commit):
            megatron_laep.run(lambda: runpy.run_path(str(SCRIPT), run_name="__main__"))
    except SystemExit as leaving:
        if leaving.code:
            raise
    finally:
        if laep:
            megatron_laep.uninstall()
    rebuild.tear_down()
    return {"losses": _watch.losses, "steps": _watch.steps}


@contextmanager
def _masked_routers(map_file: str | None):
    """Logits of the experts that a map drops are minus infinity, for softmax and sigmoid scores."""
    if map_file is None:
        yield
        return
    import torch
    from megatron.core.transformer.moe.router import TopKRouter

    layers = json.loads(Path(map_file).read_text())["layers"]
    kept = {layer["layer_number"]: layer["kept"] for layer in layers}
    gating = TopKRouter.gating

    def masked_gating(self, *inputs, **named):
        logits = gating(self, *inputs, **named)
        gone = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
        gone[kept[self.layer_number]] = False
        return logits.masked_fill(gone, float("-inf"))

    TopKRouter.gating = masked_gating
    try:
        yield
    finally:
        TopKRouter.gating = gating


@contextmanager
def _killed(after_commit: bool):
    """kill -9 of this rank, when the checkpoint with the pending map is complete."""
    if after_commit:
        from megatron_laep.loop import commit

        original = commit.commit

        def commit_and_die(*inputs, **named):
            original(*inputs, **named)
            sys.stdout.flush()
            # As when the machine goes: Megatron's checkpoint writers would outlive this process.
            for child in multiprocessing.active_children():
                child.kill()
            os.kill(os.getpid(), signal.SIGKILL)

        commit.commit = commit_and_die
    yield


def count_synchronizations(arguments: list[str]) -> dict[str, Any]:
    """A job in which counting and Megatron's own routing take turns: for each, in each iteration behind
    the first two, what the host waits for, by torch's profiler, and the tokens that were counted.
    """
    found: dict[str, list[dict[str, Any]]] = {"stock": [], "counting": []}

    def step(number, model, train_step, forward_step, data, *more, **named):
        from megatron.core.transformer.moe.moe_layer import MoELayer
        from torch.profiler import ProfilerActivity, profile

        from megatron_laep.mcore.moe_layer import LaepMoELayer, find_layers

        layers = find_layers(model)
        counting = LaepMoELayer.route
        activities = [ProfilerActivity.CPU]
        if on_gpu():
            activities.append(ProfilerActivity.CUDA)
        before = sum(int(layer.laep_tokens_per_expert.sum()) for layer in layers.values())
        stock = number % 2 == 1
        LaepMoELayer.route = MoELayer.route if stock else counting
        try:
            with profile(activities=activities) as profiler:
                result = train_step(forward_step, data, model, *more, **named)
        finally:
            LaepMoELayer.route = counting
        after = sum(int(layer.laep_tokens_per_expert.sum()) for layer in layers.values())
        if number > 2:  # the first two warm up
            names = Counter(event.name for event in profiler.events())
            found["stock" if stock else "counting"].append(
                {
                    "waits": {name: names[name] for name in SYNCHRONIZING},
                    "routings": names["aten::topk"],
                    "tokens": after - before,
                }
            )
        return result

    train(arguments, switch=step)
    return found


def remake_groups(times: int, expert_parallel: int) -> dict[str, Any]:
    """Makes Megatron's groups, uses each, and takes them down, so many times.

    Returns for each time, after the taking down: process groups that are alive, bytes of this
    process, of the device (0 on a CPU), and open files.
    """
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_laep.mcore import rebuild

    if not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu() else "gloo")
    rows: dict[str, list[int]] = {"groups": [], "host_bytes": [], "device_bytes": [], "files": []}
    for _ in range(times):
        parallel_state.initialize_model_parallel(expert_model_parallel_size=expert_parallel)
        for group in parallel_state._global_process_group_list or []:
            if group is not None:
                gloo = dist.get_backend(group) == "gloo"
                device = "cpu" if gloo else torch.cuda.current_device()
                dist.all_reduce(torch.ones(1, device=device), group=group)
        torch.cuda.synchronize()
        rebuild.tear_down()
        gc.collect()
        rows["groups"].append(len(dist.distributed_c10d._world.pg_map))
        rows["host_bytes"].append(_resident_bytes())
        rows["device_bytes"].append(_device_bytes_used())
        rows["files"].append(len(os.listdir("/proc/self/fd")))
    return rows


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _device_bytes_used() -> int:
    """Of the whole device: communicators are not the allocator's."""
    import torch

    if not on_gpu():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def expert_times(
    hidden: int, ffn: int, numbers: list[int], tokens: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Seconds of a forward and backward pass of a rank's experts, for each of some numbers of them at
    equal tokens: one expert after the other, and by TransformerEngine's grouped GEMM where it is.
    """
    import torch

    from megatron_laep.measure import operations as ops

    place = ops.Place("cuda" if on_gpu() else "cpu", torch.bfloat16 if on_gpu() else torch.float32)
    splits = [[tokens // n + (i < tokens % n) for i in range(n)] for n in numbers]
    names = list(map(str, numbers))
    experts = [ops.Experts(place, hidden, ffn, True, split) for split in splits]
    times = ops.times(place, experts, rounds)
    found = {"one after the other": dict(zip(names, times, strict=True))}
    if on_gpu() and facts()["transformer_engine"] is not None:
        times = ops.times(place, [_grouped(hidden, ffn, split) for split in splits], rounds)
        found["TransformerEngine's grouped GEMM"] = dict(zip(names, times, strict=True))
    return found


def _grouped(hidden: int, ffn: int, split: list[int]):
    """A forward and a backward pass of experts with SwiGLU as TransformerEngine groups them."""
    import torch
    from transformer_engine.pytorch import GroupedLinear

    named = {"bias": False, "params_dtype": torch.bfloat16, "device": "cuda"}
    first = GroupedLinear(len(split), hidden, 2 * ffn, **named)
    second = GroupedLinear(len(split), ffn, hidden, **named)
    tokens = torch.randn(
        sum(split), hidden, dtype=torch.bfloat16, device="cuda", requires_grad=True
    )

    def run() -> None:
        gate, up = first(tokens, split).chunk(2, dim=-1)
        output = second(torch.nn.functional.silu(gate) * up, split)
        output.backward(torch.ones_like(output))
        for parameter in (tokens, *first.parameters(), *second.parameters()):
            parameter.grad = None

    return run


def facts() -> dict[str, Any]:
    """What this runs on."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    try:
        engine = version("transformer-engine")
    except PackageNotFoundError:
        engine = None
    return {
        "torch": torch.__version__,
        "megatron_core": version("megatron-core"),
        "transformer_engine": engine,
        "device": torch.cuda.get_device_name() if on_gpu() else "cpu",
        "cuda": torch.version.cuda if on_gpu() else None,
    }


def on_gpu() -> bool:
    return not os.environ.get("MEGATRON_LAEP_PLATFORM", "").startswith("cpu")


KINDS = {
    function.__name__: function
    for function in (train, count_synchronizations, remake_groups, expert_times, facts)
}


def prepare() -> None:
    """The platform, and what a bare wheel lacks; before anything imports Megatron."""
    sys.path.insert(0, str(REPOSITORY))
    sys.path.insert(0, str(SCRIPT.parent))
    if not on_gpu():
        from megatron_laep import cpu

        cpu.enable()
        # Torch's own, as on a GPU without TransformerEngine and apex.
        import torch
        from megatron.core import optimizer

        optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = torch.optim.AdamW, True
    if on_gpu():
        import torch

        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def main() -> None:
    tasks, result_file = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    prepare()
    import torch.distributed as dist

    results = []
    for task in tasks:
        kind = task.pop("kind")
        print(f"===== {kind} =====", flush=True)
        mine = KINDS[kind](**task)
        ranks = [mine]
        if dist.is_initialized():
            ranks = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, mine)
        results.append(ranks)
        if os.environ.get("RANK", "0") == "0":
            result_file.write_text(json.dumps(results))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
