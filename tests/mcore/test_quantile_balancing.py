"""Quantiles of layers whose experts do not divide the routed tokens."""

import pytest

from tests.support.forks import in_megatron, on_ranks


def dual_update(tokens: int, experts: int, k: int, pruned: bool = True) -> tuple[list, list, list]:
    """Scores, chosen experts of each token and quantiles of random scores, biased by their experts' numbers."""
    import torch
    from megatron.core.transformer.moe.moe_utils import qb_dual_update

    from megatron_laep.mcore.quantile_balancing import with_any_experts

    update = with_any_experts(qb_dual_update, lambda: pruned)
    generator = torch.Generator().manual_seed(tokens)
    scores = torch.randn(tokens, experts, generator=generator)
    beta = torch.arange(experts) / experts
    indices, quantile = update(scores, k, beta)
    evaluated, unchanged = update(scores, k, beta, False)
    assert torch.equal(indices, evaluated) and torch.equal(unchanged, beta)
    return (scores - beta).tolist(), (scores.tolist()), [indices.tolist(), quantile.tolist()]


@pytest.mark.parametrize(
    ("tokens", "experts", "k", "whole"),
    [(12, 6, 2, 12), (13, 6, 2, 12), (14, 6, 4, 12), (13, 5, 2, 10), (7, 7, 3, 7), (13, 7, 3, 7)],
)
def test_the_quantile_is_of_the_tokens_that_divide(tokens, experts, k, whole):
    biased, scores, (chosen, quantile) = in_megatron(dual_update, tokens, experts, k).result()
    ranked = [sorted(range(experts), key=row.__getitem__, reverse=True) for row in biased]
    assert [set(row) for row in chosen] == [set(row[:k]) for row in ranked]
    # A token's threshold is its best biased score that was not chosen; whole * k / experts tokens of
    # the first `whole` lie above an expert's quantile, with their scores above the thresholds.
    alphas = [row[order[k]] for row, order in zip(biased, ranked, strict=True)]
    assert whole * k % experts == 0
    for expert in range(experts):
        above = sorted((scores[t][expert] - alphas[t] for t in range(whole)), reverse=True)
        assert quantile[expert] == pytest.approx(above[whole * k // experts], abs=1e-6)


def test_all_experts_chosen():
    _, _, (chosen, quantile) = in_megatron(dual_update, 5, 3, 3).result()
    assert [sorted(row) for row in chosen] == [[0, 1, 2]] * 5
    assert quantile == [0.0] * 3


def test_the_full_model_keeps_megatrons_rule():
    outcome = in_megatron(dual_update, 13, 6, 2, pruned=False)
    assert outcome.error == "AssertionError" and "divisible by 6 experts" in outcome.message


def torn_down() -> tuple[int, int]:
    """Routers that replay, before and after Megatron is taken down."""
    from megatron.core.transformer.moe.router_replay import RouterReplay

    from megatron_laep.mcore.rebuild import tear_down

    RouterReplay()
    before = len(RouterReplay.global_router_replay_instances)
    tear_down()
    return before, len(RouterReplay.global_router_replay_instances)


def test_no_router_of_the_old_model_is_left_to_replay():
    for outcome in on_ranks(1, torn_down):
        assert outcome.result() == (1, 0)
