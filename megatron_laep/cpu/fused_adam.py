"""Adam in plain torch operations, with interface and state as TransformerEngine's FusedAdam.

Given to Megatron by ``megatron_laep.cpu.platform`` in the place of TransformerEngine's or Apex's
kernel. The layout is the point: the number of steps lives in the parameter group, and a parameter's
state is ``exp_avg`` and ``exp_avg_sq`` only. Checkpoints of the distributed optimizer rely on it,
and have the same entries here and in a GPU run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from megatron_laep.checks import Refusal


class FusedAdam(torch.optim.Optimizer):
    """Adam (L2) or AdamW (decoupled weight decay), after TransformerEngine's ``FusedAdam``.

    Each operation rounds once (no fused multiply-add), so that a parameter's update depends on its
    own numbers only and not on where in a buffer, inside or behind the last whole SIMD vector, it
    happens to lie. Renumbering experts moves parameters in the distributed optimizer's buffers, and
    must not move their values.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        bias_correction: divide the averages by one minus their decay to the power of the steps.
        betas: decay rates of the averages of the gradient and of its square.
        eps: added to the square root of the second average.
        weight_decay: weight of the decay.
        adam_w_mode: True: decoupled weight decay (AdamW); False: added to the gradient.
        capturable: accepted because Megatron always passes it; must be False.
        set_grad_none: what `zero_grad` does when it is not told.

    Raises:
        ValueError: `capturable`, or an option of TransformerEngine's kernel that this class does
            not have.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        adam_w_mode: bool = True,
        capturable: bool = False,
        set_grad_none: bool = True,
        **unsupported: Any,
    ) -> None:
        if capturable:
            raise Refusal(
                "FusedAdam on the CPU: got capturable=True, and there are no CUDA graphs to "
                "capture: "
                "remove --optimizer-cuda-graph"
            )
        if unsupported:
            raise Refusal(
                f"FusedAdam on the CPU: got {', '.join(sorted(unsupported))}, which only "
                "TransformerEngine's kernel "
                "has: remove --use-precision-aware-optimizer"
            )
        super().__init__(
            params,
            {
                "lr": lr,
                "bias_correction": bias_correction,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
            },
        )
        self.adam_w_mode = adam_w_mode
        self.set_grad_none = set_grad_none

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Clear the gradients as in torch; the constructor's `set_grad_none` is the default."""
        super().zero_grad(self.set_grad_none if set_to_none is None else set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; count a step in groups that are not empty."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["params"]:
                group["step"] = group.get("step", 0) + 1
                self._update(group)
        return loss

    def _update(self, group: dict[str, Any]) -> None:
        params = [param for param in group["params"] if param.grad is not None]
        if not params:
            return
        for param in params:
            state = self.state[param]
            if not state:
                state["exp_avg"] = torch.zeros_like(param)
                state["exp_avg_sq"] = torch.zeros_like(param)
        averages = [self.state[param]["exp_avg"] for param in params]
        squares = [self.state[param]["exp_avg_sq"] for param in params]
        grads: list[torch.Tensor] | tuple[torch.Tensor, ...] = [param.grad for param in params]

        beta1, beta2 = group["betas"]
        lr, weight_decay, step = group["lr"], group["weight_decay"], group["step"]
        correction1 = 1.0 - beta1**step if group["bias_correction"] else 1.0
        correction2 = 1.0 - beta2**step if group["bias_correction"] else 1.0

        if weight_decay and not self.adam_w_mode:
            grads = torch._foreach_add(grads, torch._foreach_mul(params, weight_decay))

        torch._foreach_mul_(averages, beta1)
        torch._foreach_add_(averages, torch._foreach_mul(grads, 1.0 - beta1))
        squared = torch._foreach_mul(grads, grads)
        torch._foreach_mul_(squared, 1.0 - beta2)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_add_(squares, squared)

        denominators = torch._foreach_div(squares, correction2)
        torch._foreach_sqrt_(denominators)
        torch._foreach_add_(denominators, group["eps"])
        updates = torch._foreach_div(averages, correction1)
        torch._foreach_div_(updates, denominators)
        if weight_decay and self.adam_w_mode:
            torch._foreach_add_(updates, torch._foreach_mul(params, weight_decay))
        torch._foreach_mul_(updates, lr)
        torch._foreach_sub_(params, updates)
