"""The momentum of SGD, which Megatron saves and cannot load: found out and repaired for ``upstream_bugs``.

A checkpoint is loaded into state that the optimizer has already, so that Megatron keeps with each
optimizer a function that makes it. For SGD it keeps None, and every load calls that.
"""

from typing import Any

import torch


def is_lost() -> bool:
    """Asks for an SGD optimizer, and for what makes its momentum.

    Raises:
        RuntimeError: that makes something else.
    """
    from megatron.core import optimizer as module

    parameter = torch.nn.Parameter(torch.zeros(2))
    config = module.OptimizerConfig(optimizer="sgd", lr=1.0)
    make = module._get_megatron_optimizer_based_on_param_groups
    before = module.SGD
    module.SGD = torch.optim.SGD  # TransformerEngine's would take a device
    try:
        sgd, init = make(config, [], [{"params": [parameter]}], skip_megatron_wrapping=True)
    finally:
        module.SGD = before
    lost = init is None
    (init_momentum if lost else init)(sgd, config)
    seen = {key: value.tolist() for key, value in sgd.state[parameter].items()}
    if seen != {"momentum_buffer": [0.0, 0.0]}:
        raise RuntimeError(f"the state of SGD with momentum is made as {seen}")
    return lost


def init_momentum(optimizer: torch.optim.Optimizer, _config: Any = None) -> None:
    """Makes the state that a checkpoint of SGD holds; what is there already stays."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter].setdefault(
                "momentum_buffer", torch.zeros_like(parameter.data)
            )


def with_state(original):
    """Replaces the function that makes Megatron's optimizers."""

    def get_megatron_optimizer_based_on_param_groups(config, *more, **named):
        optimizer = original(config, *more, **named)
        if config.optimizer == "sgd" and getattr(optimizer, "init_state_fn", ()) is None:
            optimizer.init_state_fn = init_momentum
        return optimizer

    return get_megatron_optimizer_based_on_param_groups
