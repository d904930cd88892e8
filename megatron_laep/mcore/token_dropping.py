"""What a router chose, where Megatron drops tokens beyond an expert's capacity before it says so.

``TopKRouter.routing`` returns the map of what is left. An expert that is asked for more often than its
capacity allows would look like any other that is full, and one that is padded to its capacity like a
busy one. So the map is noted on its way into the dropping; ``LaepMoELayer.route`` asks for it.
"""

import torch

_noted: list[torch.Tensor] = []


def note_choice(original):
    """Hook of ``apply_router_token_dropping``, which has no seam around it that a subclass could use."""

    def apply_router_token_dropping(routing_probs, routing_map, *more, **named):
        _noted[:] = [routing_map]
        return original(routing_probs, routing_map, *more, **named)

    return apply_router_token_dropping


def forget() -> None:
    """Before a router runs, so that no other layer's map is taken for its own."""
    _noted.clear()


def chosen(routing_map: torch.Tensor | None) -> torch.Tensor | None:
    """What the router chose that has just returned ``routing_map``: bool [tokens, E], no copy.

    ``routing_map`` itself where nothing was dropped. Forgets it.
    """
    return _noted.pop() if _noted else routing_map
