"""Stock Megatron with experts masked out: python tests/support/masked.py SCRIPT ARGS.

MASK names an expert map's JSON file. Nothing is pruned: the router's logits of the experts that the map drops are
minus infinity, so that no token is ever routed to them. Before the map's iteration nothing is masked.

Muon takes a router's matrix as a whole: its steps of the kept rows also depend on what it remembers of the others. A
pruned model remembers nothing of them, so that the masked one has to forget it, too (``_forget``).
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_laep import cpu


def mask_routers(*map_files: str) -> Callable[[], None]:
    """Masks the experts that a map's file drops, in every router; returns what takes the masks away.

    Of several maps, all from the original model, the last one counts whose iteration is over.
    """
    import torch
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.training import get_args, training

    pruned = {}
    for map_file in map_files:
        expert_map = json.loads(Path(map_file).read_text())
        pruned[expert_map["iteration"]] = {
            layer["layer_number"]: sorted(set(range(layer["experts_before"])) - set(layer["kept"]))
            for layer in expert_map["layers"]
        }
    gating, train_step = TopKRouter.gating, training.train_step

    def masked_gating(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = gating(self, tokens)
        mask = torch.zeros(logits.shape[-1], dtype=torch.bool)
        done = [iteration for iteration in pruned if iteration <= get_args().curr_iteration]
        if done:
            mask[pruned[max(done)][self.layer_number]] = True
        return logits.masked_fill(mask, float("-inf"))

    def forgetful_train_step(forward_step, data, model, optimizer, *more, iteration, **named):
        if iteration in pruned:
            _forget(pruned[iteration], model, optimizer)
        return train_step(forward_step, data, model, optimizer, *more, iteration=iteration, **named)

    def unmask() -> None:
        TopKRouter.gating, training.train_step = gating, train_step

    TopKRouter.gating, training.train_step = masked_gating, forgetful_train_step
    return unmask


def _forget(pruned: dict[int, list[int]], model: list[Any], optimizer: Any) -> None:
    """Clears Muon's momentum of the pruned experts' rows of every router, where it is kept."""
    from megatron.core.optimizer.emerging_optimizers import OrthogonalizedOptimizer
    from megatron.core.transformer.moe.router import TopKRouter

    routers = [m for chunk in model for m in chunk.modules() if isinstance(m, TopKRouter)]
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, OrthogonalizedOptimizer):
            for router in routers:
                weight = getattr(router.weight, "main_param", router.weight)
                if weight in part.optimizer.state:
                    momentum = part.optimizer.state[weight]["momentum_buffer"]
                    momentum[pruned[router.layer_number]] = 0


if __name__ == "__main__":
    cpu.enable()
    mask_routers(os.environ["MASK"])
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
