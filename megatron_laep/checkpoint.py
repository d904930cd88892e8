"""Where checkpoints look that are older than ``pruned_checkpoint``; ``mcore.checkpoint`` is the module.

Runs that were begun before must resume: this file stays, and nothing else is in it.
"""

from megatron_laep.pruned_checkpoint import relaunch_with_python_m_megatron_laep

__all__ = ["relaunch_with_python_m_megatron_laep"]
