"""The CPU platform: lets stock Megatron-Core train on gloo processes, without a GPU.

Switched on explicitly, before anything imports Megatron, and only in processes that have no GPU: by
the launcher when ``MEGATRON_LAEP_PLATFORM=cpu`` is set, or by calling :func:`enable`. A GPU run
never imports this package. Everything it changes is changed for the whole process, and for the rest
of its life.
"""

from __future__ import annotations

import os

from megatron_laep.checks import Refusal

ENVIRONMENT_VARIABLE = "MEGATRON_LAEP_PLATFORM"
"""Environment variable: ``cpu``, ``cpu-force`` (also beside a visible GPU), ``gpu`` or not set."""

_PLATFORMS = ("", "gpu", "cpu", "cpu-force")

_CPU_ARGUMENTS = (
    "--distributed-backend", "gloo",
    "--transformer-impl", "local",
    "--attention-backend", "unfused",
    "--disable-jit-fuser",
    "--no-persist-layer-norm",
    "--no-masked-softmax-fusion",
    "--no-bias-swiglu-fusion",
    "--no-rope-fusion",
    "--no-gradient-accumulation-fusion",
    "--num-workers", "0",
)  # fmt: skip

_enabled = False


def _platform() -> str:
    """The platform the environment asks for; ValueError for a name that does not exist."""
    platform = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if platform not in _PLATFORMS:
        raise Refusal(
            f"environment variable {ENVIRONMENT_VARIABLE}: got {platform!r}, wanted one of "
            f"{', '.join(_PLATFORMS[1:])}: correct it or unset it"
        )
    return platform


def requested() -> bool:
    """True if ``MEGATRON_LAEP_PLATFORM`` asks for the CPU platform (``cpu`` or ``cpu-force``)."""
    return _platform().startswith("cpu")


def is_enabled() -> bool:
    """True once :func:`enable` has done its work in this process."""
    return _enabled


def cpu_arguments() -> list[str]:
    """The Megatron flags that training on the CPU needs, as words of a command line.

    They select gloo, the local layer spec and the unfused kernels; the model stays the same.
    """
    return list(_CPU_ARGUMENTS)


def enable(force: bool = False) -> None:
    """Turn this process into one where stock Megatron-Core runs on the CPU.

    Process-wide and not undone: torch functions and Megatron modules are replaced in place
    (``platform`` and ``norm`` say which, and who needs each). Imports Megatron as its last step. A
    second call does nothing.

    Args:
        force: also where a GPU is visible, which then stays unused.
            ``MEGATRON_LAEP_PLATFORM=cpu-force`` does the same.

    Raises:
        ValueError: Megatron was imported before; or a GPU is visible and neither form of force was
            given.
    """
    global _enabled
    if _enabled:
        return
    from megatron_laep.cpu import platform

    platform.check_process(force=force or _platform() == "cpu-force")
    platform.patch_torch()
    platform.patch_megatron()
    _enabled = True
