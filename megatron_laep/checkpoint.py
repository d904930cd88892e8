"""Where checkpoints of version 0.1.0 look for what they have pickled; ``mcore.checkpoint`` is the module.

Runs that were begun then must resume: this file stays, and nothing else is in it.
"""

from megatron_laep.pruned_checkpoint import relaunch_with_python_m_megatron_laep

__all__ = ["relaunch_with_python_m_megatron_laep"]
