"""Stock Megatron with experts masked out: python tests/support/masked.py SCRIPT ARGS.

MASK names an expert map's JSON file. Nothing is pruned: the router's logits of the experts that the map drops are
minus infinity, so that no token is ever routed to them.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_laep import cpu


def mask_routers(*map_files: str) -> Callable[[], None]:
    """Masks the experts that a map's file drops, in every router; returns what takes the masks away.

    Of several maps, all from the original model, the last one counts whose iteration is over.
    """
    import torch
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
    from megatron.training import get_args

    pruned = {}
    for map_file in map_files:
        expert_map = json.loads(Path(map_file).read_text())
        pruned[expert_map["iteration"]] = {
            layer["layer_number"]: sorted(set(range(layer["experts_before"])) - set(layer["kept"]))
            for layer in expert_map["layers"]
        }
    gating, init_mtp = TopKRouter.gating, MultiTokenPredictionLayer.__init__

    def init_numbered_mtp(self, *more, mtp_layer_pattern=None, **named) -> None:
        """Its routers learn what comes before the layers that they count from 1 again."""
        init_mtp(self, *more, mtp_layer_pattern=mtp_layer_pattern, **named)
        modules_before = 0 if mtp_layer_pattern is None else self.layer_number - 1
        for module in self.modules():
            if isinstance(module, TopKRouter):
                module.layers_before = self.config.num_layers + modules_before * len(
                    mtp_layer_pattern or ""
                )

    def masked_gating(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = gating(self, tokens)
        mask = torch.zeros(logits.shape[-1], dtype=torch.bool)
        done = get_args().curr_iteration
        number = getattr(self, "layers_before", 0) + self.layer_number
        mask[pruned[max(i for i in pruned if i <= done)][number]] = True
        return logits.masked_fill(mask, float("-inf"))

    def unmask() -> None:
        TopKRouter.gating, MultiTokenPredictionLayer.__init__ = gating, init_mtp

    MultiTokenPredictionLayer.__init__ = init_numbered_mtp
    TopKRouter.gating = masked_gating
    return unmask


if __name__ == "__main__":
    cpu.enable()
    mask_routers(os.environ["MASK"])
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
