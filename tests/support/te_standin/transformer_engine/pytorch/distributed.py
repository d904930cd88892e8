"""Names that Megatron imports, and uses only with flags that the tests do not give."""

import contextlib

activation_recompute_forward = contextlib.nullcontext


class CudaRNGStatesTracker:
    pass
