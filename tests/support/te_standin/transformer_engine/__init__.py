"""Stand-in for TransformerEngine, so that Megatron builds its grouped-GEMM experts without a GPU.

With ``tests/te_standin`` on ``PYTHONPATH``, Megatron-Core finds this package, takes it for
TransformerEngine 2.6.0, and ``--transformer-impl transformer_engine`` builds the layers of a real
job, ``TEGroupedMLP`` among them. The classes have the constructors, parameters and extra states of
the real ones, as far as Megatron asks for them, and plain torch inside. Tensor parallel size 1, no
FP8, causal attention without dropout. What is missing here (kernels for permutation, optimizers,
router) Megatron replaces by its own, as it does with an old TransformerEngine.
"""

from transformer_engine import common, pytorch

__all__ = ["common", "pytorch"]
__version__ = "2.6.0"
