"""Megatron's optimizers besides Adam: which can be pruned, and what each keeps for a parameter.

Their state goes through an expert map like Adam's where it is described by the parameter's own
sharded entry, which Megatron demands of every tensor of it: one of the parameter's shape. Muon and
its kin take every matrix for themselves, the router's included, and leave embeddings, norms and
biases to Adam or Lion; Megatron chains one optimizer for each kind and for dense and expert
parameters, or hands all of them to its layer-wise distributed optimizer.
"""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Tensors of the parameter's shape, in fp32. What Muon and Lion do not take goes to the scalar kind.
_MOMENTS = {"adam": 2, "lion": 1, "muon": 1, "adaptive_muon": 2}


def adaptive_muon_steps() -> bool:
    """Asks Megatron's adaptive Muon for one step on one small matrix. Local.

    Returns:
        Whether it fits the installed emerging-optimizers; True without that package, for which
        Megatron has a sentence of its own.
    """
    import torch
    from megatron.core.optimizer.emerging_optimizers import (
        HAVE_EMERGING_OPTIMIZERS,
        TensorParallelAdaptiveMuon,
    )

    if not HAVE_EMERGING_OPTIMIZERS:
        return True
    parameter = torch.nn.Parameter(torch.eye(2))
    parameter.grad = torch.eye(2)
    try:
        TensorParallelAdaptiveMuon([parameter]).step()
    except AttributeError:
        return False
    return True


def moments(parameter: torch.nn.Parameter, args: Namespace) -> int:
    """fp32 tensors of a parameter's shape that its optimizer keeps, the fp32 master not counted.

    Args:
        parameter: no embedding and no output layer.
        args: Megatron's arguments after its own validation.
    """
    kind = args.optimizer
    if kind == "sgd":
        return int(args.sgd_momentum != 0)
    if kind != "adam" and parameter.dim() != 2:
        kind = args.muon_scalar_optimizer if kind in ("muon", "adaptive_muon") else "adam"
    return _MOMENTS[kind]
