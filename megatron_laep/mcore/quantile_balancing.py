"""Megatron's quantile balancing in layers whose number of experts the batch size does not know.

Each expert has a bias, the quantile of its scores above which lie as many tokens as it should get:
tokens x top-k / experts, which Megatron wants to be whole. A job chooses its sizes so for the full
model; a pruned layer has any number of experts.
"""

import math

import torch


def with_any_experts(original, pruned):
    """Hook of ``qb_dual_update``.

    Where the division has a rest, the quantile is taken over the first tokens of the micro-batch, as
    many as divide: fewer than one for each expert are left out, of the quantile, not of the routing.
    Where all experts are chosen by every token, there is nothing to balance, and no score beneath the
    chosen ones that Megatron could take for its threshold.

    Args:
        original: Megatron's function.
        pruned: () -> bool: whether the model that is built was pruned. The full model is Megatron's.
    """

    def qb_dual_update(scores, k, beta, update_beta=True):
        """[tokens, E] scores, [E] biases -> [tokens, k] expert ids and the quantile, [E]."""
        tokens, experts = scores.shape
        if not pruned():
            return original(scores, k, beta, update_beta)
        if k == experts:
            everyone = torch.arange(experts, device=scores.device).expand(tokens, k)
            return everyone, torch.zeros_like(beta) if update_beta else beta
        rest = tokens % (experts // math.gcd(experts, k))
        if not update_beta or not rest:
            return original(scores, k, beta, update_beta)
        indices, _ = original(scores, k, beta, False)
        return indices, original(scores[: tokens - rest], k, beta, True)[1]

    return qb_dual_update
