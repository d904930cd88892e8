"""STAND-IN for the package mamba_ssm: the names that Megatron's Mamba layer needs, in plain torch.

The package's kernels need a GPU. Parameters are Megatron's own, so that what is built and saved here is what
is built and saved with the package; the recurrence is the textbook's, step by step.
"""

__version__ = "2.2.4"
