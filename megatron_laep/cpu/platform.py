"""What is replaced in torch and in Megatron so that Megatron, written for GPUs, runs on the CPU.

Called by ``megatron_laep.cpu.enable``: first `check_process`, then `patch_torch` while Megatron is
not imported yet (its modules bind ``torch.compile`` and ``torch.cuda._lazy_call`` at import), then
`patch_megatron`, which imports the few modules it changes. A ``device="cuda"`` is translated at the
functions that make or move tensors and not by a ``TorchFunctionMode``: a mode taxes every torch
call and attribute look-up, and is bound to one thread.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from megatron_laep.checks import Refusal

logger = logging.getLogger(__name__)

_WANTED = "megatron-core>=0.18.2,<0.20"

_CPU = torch.device("cpu")

# What is replaced here has types of its own, which the replacements do not keep to.
_TENSOR: Any = torch.Tensor
_MODULE: Any = torch.nn.Module

COMPUTE_CAPABILITY = (8, 0)
"""What the CPU answers when asked for its CUDA generation: enough for `--moe-grouped-gemm`, and old
enough for Megatron to insist on the ordered kernel queue that a CPU always has."""


# --------------------------------------------------------------------------------------------------
# Is this a process for the CPU platform?


def check_process(force: bool) -> None:
    """Refuse a process in which the platform would come too late, or would hide a GPU.

    Raises:
        ValueError: Megatron is imported already; or a GPU is visible and `force` is False.
    """
    imported = sorted(
        name for name in sys.modules if name == "megatron" or name.startswith("megatron.")
    )
    if imported:
        raise Refusal(
            f"megatron_laep.cpu.enable(): {imported[0]} is already imported, and the CPU platform "
            "has to be there "
            "before Megatron: call enable() first, or start the script through `python -m "
            "megatron_laep` with "
            "MEGATRON_LAEP_PLATFORM=cpu"
        )
    if torch.cuda.is_available() and not force:
        raise Refusal(
            f"megatron_laep.cpu.enable(): {torch.cuda.device_count()} GPU(s) are visible, wanted "
            "none, because the "
            "CPU platform would leave them unused: unset MEGATRON_LAEP_PLATFORM to train on them, "
            "hide them with "
            'CUDA_VISIBLE_DEVICES="", or insist with MEGATRON_LAEP_PLATFORM=cpu-force'
        )


# --------------------------------------------------------------------------------------------------
# Devices: "cuda" means the CPU


def _on_cpu(device: Any) -> Any:
    """The CPU in the place of a GPU, named or as an index; any other `device` unchanged."""
    if isinstance(device, torch.device):
        return _CPU if device.type == "cuda" else device
    if isinstance(device, str):
        return _CPU if device == "cuda" or device.startswith("cuda:") else device
    if isinstance(device, int) and not isinstance(device, bool):
        return _CPU
    return device


def _with_device_keyword(function: Callable) -> Callable:
    """`function` with its ``device`` keyword translated."""

    @functools.wraps(function)
    def translated(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None:
            kwargs["device"] = _on_cpu(device)
        return function(*args, **kwargs)

    return translated


def _patch_devices() -> None:
    """Translate the device wherever a tensor is made or moved.

    Needed by: every buffer that Megatron makes on ``torch.cuda.current_device()`` or on ``"cuda"``.
    """
    from torch.utils import _device

    # torch keeps this set of constructors for `with torch.device(...)`; it has to hold the
    # functions that the dispatcher sees, so it must be filled (it is cached) before they are
    # wrapped.
    constructors = _device._device_constructors()
    like = (
        "empty_like",
        "zeros_like",
        "ones_like",
        "full_like",
        "rand_like",
        "randn_like",
        "randint_like",
    )
    for namespace in (torch, torch.fft):
        for name in dir(namespace):
            function = getattr(namespace, name)
            if name in like or (callable(function) and _is_member(function, constructors)):
                setattr(namespace, name, _with_device_keyword(function))

    for name in (
        "new_empty",
        "new_empty_strided",
        "new_zeros",
        "new_ones",
        "new_full",
        "new_tensor",
    ):
        setattr(torch.Tensor, name, _with_device_keyword(getattr(torch.Tensor, name)))

    tensor_to = _TENSOR.to

    @functools.wraps(tensor_to)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args:
            args = (_on_cpu(args[0]), *args[1:])
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return tensor_to(self, *args, **kwargs)

    _TENSOR.to = to

    torch_load: Any = torch.load

    @functools.wraps(torch_load)
    def load(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        return torch_load(f, _on_cpu(map_location), *args, **kwargs)

    # TransformerEngine's extra states are read back with map_location="cuda".
    torch.load = load


def _is_member(function: Any, functions: set) -> bool:
    """Set membership that holds for the unhashable things in torch's namespace, too."""
    try:
        return function in functions
    except TypeError:
        return False


# --------------------------------------------------------------------------------------------------
# Tensors and modules


def _same_object(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Stands for a copy to the GPU, to a stream, or to pinned memory: it is there already."""
    return self


def _patch_tensors() -> None:
    tensor_type = _TENSOR.type

    @functools.wraps(tensor_type)
    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return tensor_type(self).replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.", 1)
        return tensor_type(self, dtype, *args, **kwargs)

    # The optimizers sort parameters by this string: 'torch.cuda.FloatTensor', HalfTensor,
    # BFloat16Tensor.
    _TENSOR.type = type_
    # The MoE token dispatcher turns split sizes into Python integers only if they come from a GPU.
    _TENSOR.is_cuda = property(lambda self: self.device.type == "cpu")
    # Batches, and the model before it is wrapped.
    _TENSOR.cuda = _same_object
    _MODULE.cuda = _same_object
    # The token dispatcher and the pipeline's asynchronous transfers.
    _TENSOR.record_stream = lambda self, stream: None
    # Offloaded parameters, data loaders.
    _TENSOR.pin_memory = _same_object


# --------------------------------------------------------------------------------------------------
# torch.cuda


class _Stream:
    """A stream on a device that has only one: whatever was queued is done."""

    def __init__(self, device: Any = None, priority: int = 0, **kwargs: Any) -> None:
        self.device = _CPU
        self.cuda_stream = 0

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: _Event | None = None) -> _Event:
        event = _Event() if event is None else event
        event.record(self)
        return event


class _Event:
    """An event on such a stream: it keeps the time of its recording, when all work was done."""

    def __init__(self, enable_timing: bool = False, **kwargs: Any) -> None:
        self._recorded_at = 0.0

    def record(self, stream: Any = None) -> None:
        self._recorded_at = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        """Milliseconds between this event and `end`."""
        return (end._recorded_at - self._recorded_at) * 1000.0

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands for a call that has nothing to do on the CPU."""


def _zero(*args: Any, **kwargs: Any) -> int:
    """Stands for an amount of GPU memory."""
    return 0


def _patch_cuda() -> None:
    cuda: Any = torch.cuda
    stream = _Stream()
    generator = torch.default_generator

    # Start-up: `initialize_megatron` asserts a GPU and counts them; its RNG tracker queues calls
    # until CUDA is up.
    cuda.is_available = lambda: True
    cuda.is_initialized = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.set_device = _nothing
    cuda._lazy_init = _nothing
    cuda._lazy_call = lambda function, **kwargs: function()
    cuda.device = lambda device: contextlib.nullcontext()

    # Argument validation (`--moe-grouped-gemm`, CUDA_DEVICE_MAX_CONNECTIONS) and logs.
    cuda.get_device_capability = lambda device=None: COMPUTE_CAPABILITY
    cuda.get_device_name = lambda device=None: "CPU"
    cuda.get_device_properties = lambda device=None: SimpleNamespace(
        name="CPU",
        major=COMPUTE_CAPABILITY[0],
        minor=COMPUTE_CAPABILITY[1],
        multi_processor_count=os.cpu_count() or 1,
        total_memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )

    # Overlap of communication: gradient buffers, token dispatcher, pipeline, timers.
    cuda.Stream = _Stream
    cuda.Event = _Event
    cuda.current_stream = lambda device=None: stream
    cuda.default_stream = lambda device=None: stream
    cuda.set_stream = _nothing
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.synchronize = _nothing
    cuda.is_current_stream_capturing = lambda: False

    # Memory reports of the training loop.
    cuda.empty_cache = _nothing
    cuda.memory_stats = lambda device=None: defaultdict(int)
    for name in (
        "memory_allocated",
        "memory_reserved",
        "max_memory_allocated",
        "max_memory_reserved",
    ):
        setattr(cuda, name, _zero)
    cuda.device_memory_used = _zero

    # Random numbers: the GPU's generator is the CPU's, in the tracker, in checkpoints, in
    # activation recompute. Not torch.manual_seed, which would call back.
    cuda.default_generators = (generator,)
    for module in (cuda, cuda.random):
        module.manual_seed = lambda seed: generator.manual_seed(int(seed))
        module.manual_seed_all = module.manual_seed
        module.get_rng_state = lambda device="cuda": generator.get_state()
        module.set_rng_state = lambda new_state, device="cuda": generator.set_state(new_state)

    # Ranges for the profiler, set around every module's forward.
    cuda.nvtx.range_push = _nothing
    cuda.nvtx.range_pop = _nothing
    cuda.nvtx.range = lambda message, *args, **kwargs: contextlib.nullcontext()


def _patch_compiler() -> None:
    """``torch.compile`` hands its function back.

    Needed by: `megatron.core.jit`, which makes it the default "fuser" at import;
    ``--disable-jit-fuser`` comes too late for the functions that are decorated at import, and each
    would cost minutes in the C++ compiler.
    """

    def compile_(model: Callable | None = None, **kwargs: Any) -> Callable:
        return (lambda function: function) if model is None else model

    torch.compile = compile_


def _patch_accelerator() -> None:
    """There is no accelerator, although ``torch.cuda.is_available()`` now says so.

    Needed by: every ``torch.optim`` step, which would otherwise ask the GPU's current stream
    whether it is captured; data loaders, which would pin memory; `torch.distributed.checkpoint`.
    """
    accelerator: Any = torch.accelerator
    accelerator.is_available = lambda: False
    accelerator.current_accelerator = lambda check_available=False: None
    accelerator.device_count = lambda: 0
    # For callers that ask without looking for an accelerator first.
    accelerator.current_stream = lambda device=None: SimpleNamespace(is_capturing=lambda: False)


class _AllDone:
    """The handle of several collectives."""

    def __init__(self, works: list[Any]) -> None:
        self._works = works

    def wait(self, timeout: Any = None) -> bool:
        for work in self._works:
            work.wait()
        return True


def _patch_collectives() -> None:
    """``all_gather`` of ranks that give differently many numbers, as NCCL has it and gloo has not.

    Needed by: the layer-wise distributed optimizer, whose ranks hold different parameters.
    """
    distributed = torch.distributed
    all_gather = distributed.all_gather

    @functools.wraps(all_gather)
    def all_gather_of_any_sizes(
        tensor_list: list[torch.Tensor],
        tensor: torch.Tensor,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if len({part.shape for part in tensor_list}) <= 1:
            return all_gather(tensor_list, tensor, group=group, async_op=async_op)
        rank = distributed.get_rank(group)
        if tensor_list[rank].data_ptr() != tensor.data_ptr():
            tensor_list[rank].copy_(tensor)
        # The sizes are the same lists on all ranks, so all send and expect the same parts.
        done = _AllDone(
            [
                distributed.broadcast(part, group=group, group_src=source, async_op=True)
                for source, part in enumerate(tensor_list)
                if part.numel()
            ]
        )
        if async_op:
            return done
        done.wait()
        return None

    distributed.all_gather = all_gather_of_any_sizes


def patch_torch() -> None:
    """Replace what Megatron uses of CUDA in torch, before it is imported.

    Process-wide; to be called once.
    """
    # Every torch.optim optimizer imports it anyway, and it makes a table of torch's functions by
    # name and identity: it has to see the originals.
    import torch._dynamo  # noqa: F401

    _patch_devices()
    _patch_tensors()
    _patch_cuda()
    _patch_compiler()
    _patch_accelerator()
    _patch_collectives()
    # Megatron wants it set for tensor parallelism; on the CPU there is one queue anyway.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if "OMP_NUM_THREADS" not in os.environ:
        # Several processes share the cores: more threads in each are slower, and sums would depend
        # on their number.
        torch.set_num_threads(1)


# --------------------------------------------------------------------------------------------------
# Megatron


class _SharedGeneratorFilter(logging.Filter):
    """Drops the tracker's warning that a GPU draw moved the CPU's generator: they are one here."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


def patch_megatron() -> None:
    """Import the Megatron modules that need more than a patched torch, and change them.

    Process-wide; to be called once.

    Raises:
        ValueError: Megatron, or psutil, is not installed; or a symbol is not where Megatron-Core
            0.18 and newer have it.
    """
    try:
        import psutil  # noqa: F401
    except ImportError as error:
        raise Refusal(
            "megatron_laep.cpu.enable(): psutil is not installed, and Megatron needs it to save "
            "torch_dist "
            "checkpoints: pip install psutil"
        ) from error
    try:
        import megatron.core.datasets.utils as dataset_utils
        import megatron.core.optimizer as optimizer
        import megatron.core.optimizer.distrib_optimizer as distrib_optimizer
        import megatron.core.tensor_parallel.random as tracker
    except ImportError as error:
        raise Refusal(
            f"megatron_laep.cpu.enable(): Megatron-Core cannot be imported ({error}): "
            f"pip install '{_WANTED}'"
        ) from error
    from megatron_laep.cpu import norm
    from megatron_laep.cpu.fused_adam import FusedAdam

    # The wheel ships the compiled helper and no Makefile: `initialize_megatron` would exit when
    # `make` fails.
    _replace(dataset_utils, "compile_helpers", _nothing)
    # torch's AdamW keeps `step` beside each parameter, where a distributed optimizer's checkpoint
    # has no place.
    _replace(optimizer, "Adam", FusedAdam)
    _replace(optimizer, "USING_PYTORCH_OPTIMIZER", False)
    _replace(distrib_optimizer, "Adam", FusedAdam)
    _replace(distrib_optimizer, "HAVE_APEX_OR_TE", True)
    _replace(distrib_optimizer, "USING_TE_OPTIMIZER", True)
    logging.getLogger(tracker.__name__).addFilter(_SharedGeneratorFilter())
    norm.install()
    logger.info(
        "event=cpu_platform_enabled torch=%s threads=%d", torch.__version__, torch.get_num_threads()
    )


def _replace(module: Any, name: str, value: Any) -> None:
    """Set ``module.name``, which must exist: a symbol that has moved must not go unnoticed."""
    if not hasattr(module, name):
        raise Refusal(
            f"megatron_laep.cpu.enable(): {module.__name__} has no {name!r}, which {_WANTED} "
            "has: install such a version"
        )
    setattr(module, name, value)
