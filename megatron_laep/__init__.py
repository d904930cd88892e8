"""LAEP for Megatron-Core: prune and re-place the experts of a MoE pre-training run while it runs.

The folder, in the order in which a run passes through it:

* ``config``, ``alpha``, ``schedule``: the ``--laep-*`` flags; the windows before a pruning.
* ``validation``, ``resumption``: the checks of flags and checkpoint before a model is built.
* ``moe_layer``, ``routing_stats``, ``metrics``: count the tokens of each expert, close windows, log.
* ``slot_table``, ``token_dispatcher``, ``sharding``: layers whose ranks hold different numbers of
  experts: who holds what, how tokens get there, where it lies in a checkpoint.
* ``trigger``, ``decision_log``: a job's windows, and what it decides on their stability.
* ``recording``, ``load_recorder``, ``load_log``, ``window_parts``, ``json_text``: the loads of a
  whole run in a file, and its reader.
* ``stability``, ``pruning``, ``placement``, ``balancing``, ``stage_placement``, ``planning``,
  ``expert_map``, ``summary``: the pure part, loads in and an expert map out; numpy only.
* ``lineage``, ``checkpoint``, ``optimizer_state``, ``upstream_bugs``: maps inside the checkpoint, loading
  through one, and the repairs that this takes, each only where Megatron shows that it needs it.
* ``training``, ``job``, ``parallel``: the hooks in Megatron's loop, the state machine that they
  drive, the rebuild; with ``hooks``, ``events`` (log lines), ``agreement`` (rank 0 decides) and
  ``model_size``.
* ``__main__``: the launcher, ``torchrun ... -m megatron_laep SCRIPT ARGS``.
* ``tools``, ``training_log``, ``cost_inputs``, ``cost_model``: the ``laep`` command, offline.
* ``cpu``: lets stock Megatron train on gloo processes without a GPU; never imported on a GPU run.
"""

from megatron_laep.config import LaepConfig
from megatron_laep.expert_map import ExpertMap, LayerMap

__version__ = "0.1.0"

__all__ = ["ExpertMap", "LaepConfig", "LayerMap", "install", "run", "uninstall"]


def __getattr__(name: str):
    # install, uninstall and run pull in torch and Megatron; the planning tools need neither, and the
    # CPU platform has to come before Megatron. So they are looked up only when somebody asks.
    if name in ("install", "run", "uninstall"):
        from megatron_laep import training

        return getattr(training, name)
    raise AttributeError(f"module 'megatron_laep' has no attribute {name!r}")
