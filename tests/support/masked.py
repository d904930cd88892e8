"""Stock Megatron with experts masked out: python tests/support/masked.py SCRIPT ARGS.

MASK names an expert map's JSON file. Nothing is pruned: the router's logits of the experts that the map drops are
minus infinity, so that no token is ever routed to them.

Muon takes a router's matrix as a whole: its steps of the kept rows also depend on what it remembers of the others. A
pruned model remembers nothing of them, so that the masked one has to forget it, too (``_forget``).
"""

from __future__ import annotations

import json
import math
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_laep import cpu


def mask_routers(*map_files: str) -> Callable[[], None]:
    """Masks the experts that a map's file drops, in every router; returns what takes the masks away.

    Of several maps, all from the original model, the last one counts whose iteration is over. What Megatron works out
    from the number of experts, a capacity or the quantiles and their mean, it works out from those that are kept.
    """
    import torch
    from megatron.core.transformer.moe import moe_utils, router, token_dispatcher
    from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
    from megatron.training import get_args, training

    pruned = {}
    for map_file in map_files:
        expert_map = json.loads(Path(map_file).read_text())
        pruned[expert_map["iteration"]] = {
            layer["layer_number"]: layer["kept"] for layer in expert_map["layers"]
        }
    # A function of the same name hides the module in its package.
    finalize_model_grads = sys.modules["megatron.core.distributed.finalize_model_grads"]
    seams = (
        (router.TopKRouter, "gating"),
        (router, "qb_dual_update"),
        (finalize_model_grads, "_update_router_qb_beta"),
        (finalize_model_grads, "_update_router_expert_bias"),
        (moe_utils, "get_capacity"),
        (token_dispatcher, "get_capacity"),
        (MultiTokenPredictionLayer, "__init__"),
        (training, "train_step"),
    )
    stock = [getattr(owner, name) for owner, name in seams]
    gating, qb_dual_update, update_qb_beta, update_expert_bias, get_capacity, *_ = stock
    init_mtp, train_step = stock[-2:]
    routing = None  # the router that has run last: its tokens are sent before another one runs

    def kept(layer_router) -> list[int]:
        number = getattr(layer_router, "layers_before", 0) + layer_router.layer_number
        done = [iteration for iteration in pruned if iteration <= get_args().curr_iteration]
        # Before the first map's iteration nothing is masked.
        return pruned[max(done)][number] if done else range(layer_router.num_experts)

    def init_numbered_mtp(self, *more, mtp_layer_pattern=None, **named) -> None:
        """Its routers learn what comes before the layers that they count from 1 again."""
        init_mtp(self, *more, mtp_layer_pattern=mtp_layer_pattern, **named)
        modules_before = 0 if mtp_layer_pattern is None else self.layer_number - 1
        for module in self.modules():
            if isinstance(module, router.TopKRouter):
                module.layers_before = self.config.num_layers + modules_before * len(
                    mtp_layer_pattern or ""
                )

    def forgetful_train_step(forward_step, data, model, optimizer, *more, iteration, **named):
        if iteration in pruned:
            _forget(kept, model, optimizer)
        return train_step(forward_step, data, model, optimizer, *more, iteration=iteration, **named)

    def masked_gating(self, tokens: torch.Tensor) -> torch.Tensor:
        nonlocal routing
        routing = self
        logits = gating(self, tokens)
        mask = torch.ones(logits.shape[-1], dtype=torch.bool)
        mask[list(kept(self))] = False
        if self.expert_bias is not None:
            # Else a bias could lift an expert whose score is zero.
            self.expert_bias.masked_fill_(mask, float("-inf"))
        return logits.masked_fill(mask, float("-inf"))

    def masked_quantiles(scores, k, beta, update_beta=True):
        experts = torch.tensor(list(kept(routing)))
        rows = len(scores) - len(scores) % (len(experts) // math.gcd(len(experts), k))
        indices, _ = qb_dual_update(scores[:, experts], k, beta[experts], False)
        quantile = beta.clone()
        if update_beta:
            _, quantile[experts] = qb_dual_update(scores[:rows, experts], k, beta[experts], True)
        return experts[indices], quantile

    def masked_update(update, vector: str, accumulated: str, others: tuple[str, ...] = ()):
        """Each router's kept experts by themselves: `update` sees their entries, and no others."""

        def update_kept(model, *more, **named):
            for layer_router in (m for chunk in model for m in chunk.modules()):
                if getattr(layer_router, vector, None) is None:
                    continue
                experts = list(kept(layer_router))
                of_kept = SimpleNamespace(
                    training=layer_router.training,
                    **{
                        name: getattr(layer_router, name)[experts] for name in (vector, accumulated)
                    },
                    **{name: getattr(layer_router, name) for name in others},
                )
                update([SimpleNamespace(modules=lambda of_kept=of_kept: [of_kept])], *more, **named)
                getattr(layer_router, vector)[experts] = getattr(of_kept, vector)

        return update_kept

    def masked_capacity(num_tokens, num_experts, *more, **named):
        return get_capacity(num_tokens, len(kept(routing)), *more, **named)

    def put(functions) -> None:
        for (owner, name), function in zip(seams, functions, strict=True):
            setattr(owner, name, function)

    put(
        (
            masked_gating,
            masked_quantiles,
            masked_update(update_qb_beta, "qb_beta", "qb_beta_accum", ("qb_beta_count",)),
            masked_update(update_expert_bias, "expert_bias", "local_tokens_per_expert"),
            masked_capacity,
            masked_capacity,
            init_numbered_mtp,
            forgetful_train_step,
        )
    )
    return lambda: put(stock)


def _forget(kept: Callable[[Any], Any], model: list[Any], optimizer: Any) -> None:
    """Clears Muon's momentum of the pruned experts' rows of every router, where it is kept."""
    from megatron.core.optimizer.emerging_optimizers import OrthogonalizedOptimizer
    from megatron.core.transformer.moe.router import TopKRouter

    routers = [m for chunk in model for m in chunk.modules() if isinstance(m, TopKRouter)]
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(getattr(part, "optimizer", None), OrthogonalizedOptimizer):
            for router in routers:
                weight = getattr(router.weight, "main_param", router.weight)
                if weight in part.optimizer.state:
                    momentum = part.optimizer.state[weight]["momentum_buffer"]
                    gone = sorted(set(range(len(momentum))) - set(kept(router)))
                    momentum[gone] = 0


if __name__ == "__main__":
    cpu.enable()
    mask_routers(os.environ["MASK"])
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
