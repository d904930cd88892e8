"""The measured operations compute what they say."""

import pytest
import torch

from megatron_laep.measure import operations as ops
from megatron_laep.simulate.cost_inputs import ModelShape

CPU = ops.Place("cpu", torch.float32)
SHAPE = ModelShape(
    num_layers=1,
    hidden=8,
    num_experts=4,
    top_k=2,
    expert_ffn=16,
    attention_heads=2,
    head_dim=4,
    kv_heads=1,
    vocab=10,
    sequence_length=6,
)


@pytest.mark.parametrize("gated", [True, False])
def test_experts_add_up_the_gradients_of_their_own_tokens(gated):
    torch.manual_seed(0)
    experts = ops.Experts(CPU, hidden=4, ffn=3, gated=gated, tokens=[2, 0, 5])
    experts()
    once = [total.clone() for pair in experts.sums for total in pair]
    experts()
    twice = [total for pair in experts.sums for total in pair]
    torch.testing.assert_close(twice, [2 * total for total in once])
    # An expert without tokens has no gradient; of the others the output bias-free sum of rows.
    assert [bool(total.any()) for total in once] == [True, True, False, False, True, True]
    tokens, first = experts.tokens_TH[:2].detach(), experts.weights[0][0]
    inner = torch.nn.functional.linear(tokens, first.detach())
    if gated:
        inner = torch.nn.functional.silu(inner[:, :3]) * inner[:, 3:]
    else:
        inner = torch.nn.functional.gelu(inner)
    # The output's gradient is 1 everywhere: each row of the second matrix gets the sum of the inner rows.
    torch.testing.assert_close(once[1], inner.sum(dim=0).expand(4, 3))
    assert first.grad is None


def test_the_dense_block_attends_to_the_past_only():
    torch.manual_seed(0)
    block = ops.DenseBlock(CPU, SHAPE)
    block()
    assert all(weight.grad is None for weight in block.weights.values())
    assert block.masked.sum() == 15  # of 36 pairs those in which the key comes later


def test_the_optimizer_pass_changes_every_parameter_and_empties_the_gradients():
    step = ops.OptimizerPass(CPU, [5, 3])
    step()
    assert all((parameter != 0).all() for parameter in step.parameters)
    assert all((gradient == 0).all() for gradient in step.gradients)


def test_times_are_medians_of_rounds_in_turns():
    calls = []
    found = ops.times(CPU, [lambda: calls.append("a"), lambda: calls.append("b")], rounds=3)
    assert calls == ["a", "b"] * 4
    assert len(found) == 2 and all(seconds > 0 for seconds in found)
