"""Runs a script or a module, and logs the losses and gradient norms of its training exactly.

    EXACT_LOG=FILE python tests/support/exact_log.py SCRIPT ARGS
    EXACT_LOG=FILE python tests/support/exact_log.py -m MODULE ARGS

Megatron prints seven digits of a loss and three of a gradient norm. This appends to FILE, for each
call of its ``training_log`` on a rank that knows the loss, one JSON line: {"iteration": 3,
"losses": {"lm loss": "0x1.8p+2"}, "grad_norm": "0x1.0p-1"}. Megatron is not imported here, so that
what is run may do it when it is ready; as soon as it is, sums get their fixed order (`fixed_order`).
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import json
import os
import runpy
import sys
from types import ModuleType
from typing import Any

TRAINING_MODULE = "megatron.training.training"


def _hex(number: Any) -> str:
    """Exact text of a float, of a tensor of one, or of Megatron's [sum, count] of a loss."""
    if hasattr(number, "numel") and number.numel() == 2:
        number = number[0] / number[1]
    return float(number).hex()


def wrap(training: ModuleType) -> None:
    """Logs what ``training_log`` of Megatron's training module gets."""
    from megatron.core.transformer import multi_token_prediction

    training_log = training.training_log

    @functools.wraps(training_log)
    def logged(
        loss_dict: dict,
        total_loss_dict: dict,
        learning_rate: Any,
        iteration: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if loss_dict:
            # training_log(..., loss_scale, report_memory_flag, skipped_iter, grad_norm, ...)
            grad_norm = kwargs["grad_norm"] if "grad_norm" in kwargs else args[3]
            losses = {name: _hex(loss) for name, loss in loss_dict.items()}
            # Of multi-token prediction: this rank's sum over micro-batches, before it is reduced.
            tracked = multi_token_prediction.MTPLossLoggingHelper.tracker.get("loss_values", ())
            losses |= {f"mtp_{i} loss": _hex(loss) for i, loss in enumerate(tracked, start=1)}
            line = {
                "iteration": iteration,
                "losses": losses,
                "grad_norm": None if grad_norm is None else _hex(grad_norm),
            }
            with open(os.environ["EXACT_LOG"], "a") as log:
                log.write(json.dumps(line) + "\n")
        return training_log(loss_dict, total_loss_dict, learning_rate, iteration, *args, **kwargs)

    training.training_log = logged


def _start_result_queue() -> None:
    """Starts the process that checkpoint writers report to, as a fork. Megatron would spawn it at the
    first save, and the new Python would import torch first: some seconds in each of many short runs.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import (
        get_write_results_queue,
    )

    get_write_results_queue("fork")


class _TrainingFinder(importlib.abc.MetaPathFinder):
    """Finds the training module as usual, and wraps it once it is loaded."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != TRAINING_MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            exec_module = spec.loader.exec_module

            def exec_and_wrap(module: ModuleType) -> None:
                from tests.support import (
                    fixed_order,
                )  # imports torch, which must not come before the CPU platform

                exec_module(module)
                wrap(module)
                fixed_order.install()
                _start_result_queue()

            spec.loader.exec_module = exec_and_wrap
        return spec


def run(words: list[str]) -> None:
    """Runs ``SCRIPT ARGS`` or ``-m MODULE ARGS``, logged."""
    training = sys.modules.get(TRAINING_MODULE)
    if training is None:
        sys.meta_path.insert(0, _TrainingFinder())
    else:  # in a fork of the process that has Megatron, and the result queue
        from tests.support import fixed_order

        wrap(training)
        fixed_order.install()
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    run(sys.argv[1:])
