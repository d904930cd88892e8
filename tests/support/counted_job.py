"""A training job in the forks of `in_megatron`, with each expert's tokens counted a second time.

    ranks = on_ranks(2, counted_job, tiny_arguments(...))

The product counts where tokens are *routed*, in the forward passes that it takes for training. The
reference counts what the experts *get*, and only when a gradient comes back through them: a token
that is trained on passes its experts' backward once, however often the forward runs (activation
recompute), and a token that is evaluated never does.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

from tests.support.runs import PRETRAIN_GPT

Counts = dict[int, list[int]]
"""Layer number -> tokens of each expert."""


def counted_job(arguments: list[str]) -> dict[int, tuple[Counts, Counts]]:
    """Runs the GPT script under megatron_laep, to its end, on this rank.

    Returns:
        For each iteration, of the tokens since the iteration before (so also of what was evaluated
        in between): what the product counted, for all ranks and stages; and what the experts of
        this rank got, 0 for the others.
    """
    from megatron.training import training

    import megatron_laep

    recorder = Recorder(training.train_step)
    training.train_step = recorder
    megatron_laep.install()
    run_script(arguments)
    return recorder.counts


def run_script(arguments: list[str]) -> None:
    """The GPT script as the launcher would run it; returns when it ends or exits with code 0."""
    import megatron_laep

    sys.argv = [str(PRETRAIN_GPT), *map(str, arguments)]
    try:
        megatron_laep.run(lambda: runpy.run_path(str(PRETRAIN_GPT), run_name="__main__"))
    except SystemExit as ending:
        if ending.code:
            raise


class Recorder:
    """Takes the place of Megatron's ``train_step``; reads both counts after each step."""

    def __init__(self, train_step: Any) -> None:
        self.counts: dict[int, tuple[Counts, Counts]] = {}
        self._train_step = train_step
        self._arrivals: Counts = {}
        self._stats: Any = None
        self._start_LE: Any = None

    def __call__(self, forward_step, data, model, *args, iteration, **kwargs):
        from megatron.core import parallel_state

        from megatron_laep.mcore.moe_layer import find_layers, token_counters
        from megatron_laep.statistics.routing_stats import RoutingStats

        if self._stats is None:
            layers = find_layers(model)
            for number, layer in layers.items():
                self._arrivals[number] = [0] * layer.config.num_moe_experts
                count_arrivals(layer, self._arrivals[number])
            stage = parallel_state.get_pipeline_model_parallel_rank()
            self._stats = RoutingStats(token_counters(model), stage=stage)
            self._start_LE = self._stats.snapshot()
        result = self._train_step(forward_step, data, model, *args, iteration=iteration, **kwargs)
        tokens_LE, self._start_LE = self._stats.advance(self._start_LE)
        tokens = [tokens_E.tolist() for tokens_E in tokens_LE]
        self.counts[iteration + 1] = (
            dict(zip(self._stats.layer_numbers, tokens, strict=True)),
            {number: list(counts) for number, counts in self._arrivals.items()},
        )
        for counts in self._arrivals.values():
            counts[:] = [0] * len(counts)
        return result


def count_arrivals(layer: Any, arrivals: list[int]) -> None:
    """Lets every gradient that reaches the layer's experts add their tokens to `arrivals`."""

    def after_forward(_experts, inputs, outputs):
        rows, tokens_per_expert = inputs[0].shape[0], inputs[1].tolist()
        assert rows == sum(tokens_per_expert), (rows, tokens_per_expert)

        def on_gradient(_gradient):
            for expert, tokens in zip(layer.local_expert_indices, tokens_per_expert, strict=True):
                arrivals[expert] += tokens

        if outputs[0].requires_grad:
            outputs[0].register_hook(on_gradient)

    layer.experts.register_forward_hook(after_forward)
