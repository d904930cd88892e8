"""LAEP for Megatron-Core: prune and re-place the experts of a MoE pre-training run while it runs.

The folders, from those that need nothing to those that run the job; none imports one below it:

* ``settings``: what the user asked for: the ``--laep-*`` flags, rules, times, thresholds.
* ``plan``: loads in, expert map out; pure functions on numpy values.
* ``records``: the files that a run leaves, for people and for ``laep``.
* ``statistics``: counters on the device, the windows between two readings, what is logged of them.
* ``mcore``: all that knows Megatron-Core: the layer that counts, dispatchers, checkpoints, rebuild.
* ``loop``: one run, from its arguments to the next pruning.
* ``simulate``: what a plan would bring on a cluster, from a stated cost model.
* ``cpu``: lets stock Megatron train on gloo processes without a GPU; never imported on a GPU run.
* ``measure``: how fast this machine does what the cost model counts.
* ``tools``: the ``laep`` command.

``__main__`` is the launcher, ``torchrun ... -m megatron_laep SCRIPT ARGS``; ``entry`` does the same for
scripts that call it. ``docs/architecture.md`` has the other modules here.
"""

from megatron_laep.checks import Refusal
from megatron_laep.entry import enter
from megatron_laep.plan.expert_map import ExpertMap, LayerMap
from megatron_laep.settings.config import LaepConfig

__version__ = "0.2.0"

__all__ = [
    "ExpertMap",
    "LaepConfig",
    "LayerMap",
    "Refusal",
    "enter",
    "install",
    "install_once",
    "run",
    "uninstall",
]


def __getattr__(name: str):
    # These pull in torch and Megatron; the planning tools need neither, and the
    # CPU platform has to come before Megatron. So they are looked up only when somebody asks.
    if name in ("install", "install_once", "run", "uninstall"):
        from megatron_laep.mcore import symbols

        # Before the import of modules that import Megatron's names: a Megatron that lacks some is
        # refused in a sentence.
        symbols.check_megatron()
        from megatron_laep.loop import launch

        return getattr(launch, name)
    raise AttributeError(f"module 'megatron_laep' has no attribute {name!r}")
