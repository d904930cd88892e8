"""`python -m megatron_laep` with one change to what follows on a pruning, for two rows of the study.

    train.py --forget-moments SCRIPT ARGUMENTS       Adam starts anew on the pruned model
    train.py --router-warmup K SCRIPT ARGUMENTS      only the router learns in the next K iterations

LAEP carries Adam's moments through a pruning, and sets --no-load-optim back where it goes on from
its own checkpoint (or a relaunch would lose them). So they are emptied here, after it is loaded.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Iterator

from megatron_laep import cpu

MOMENTS = ("exp_avg", "exp_avg_sq")


def adams(optimizer: object) -> Iterator[object]:
    """The torch optimizers in one of Megatron's."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        yield part.optimizer


def forget_moments(optimizer: object) -> None:
    """Leaves Adam as it is before its first step."""
    for adam in adams(optimizer):
        for group in adam.param_groups:
            group["step"] = 0
        for state in adam.state.values():
            for name in MOMENTS:
                state[name].zero_()


def learn_router_only(optimizer: object, model: list, steps: int) -> None:
    """Lets the next `steps` steps change nothing but routers: other gradients are emptied, so that
    they are not in the norm that is clipped, and other weights and moments are put back.
    """
    names = {id(p): name for chunk in model for name, p in chunk.named_parameters()}
    original = optimizer.step
    left = steps

    def others() -> Iterator[tuple]:
        for adam in adams(optimizer):
            for group in adam.param_groups:
                for parameter in group["params"]:
                    if ".router." not in names[id(parameter)]:
                        yield adam, parameter

    def step(*more, **named):
        nonlocal left
        if not left:
            return original(*more, **named)
        left -= 1
        kept = []
        for adam, parameter in others():
            parameter.main_grad.zero_()
            tensors = [parameter.data]
            tensors += [adam.state[parameter][name] for name in MOMENTS if adam.state[parameter]]
            kept += [(tensor, tensor.clone()) for tensor in tensors]
        result = original(*more, **named)
        for tensor, before in kept:
            tensor.copy_(before)
        return result

    optimizer.step = step


def after_pruning(options: argparse.Namespace) -> None:
    """Changes what Megatron sets up, where that follows on a pruning."""
    from megatron.training import get_args, training

    original = training.setup_model_and_optimizer

    def setup_model_and_optimizer(*more, **named):
        result = original(*more, **named)
        model, optimizer = result[:2]
        args = get_args()
        done = args.iteration - max(args.laep_prune_iteration)
        if done == 0 and options.forget_moments:
            forget_moments(optimizer)
            print("study: Adam's moments are forgotten", flush=True)
        if 0 <= done < (options.router_warmup or 0):
            learn_router_only(optimizer, model, options.router_warmup - done)
            print(f"study: router only for {options.router_warmup - done} iterations", flush=True)
        return result

    training.setup_model_and_optimizer = setup_model_and_optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--forget-moments", action="store_true")
    parser.add_argument("--router-warmup", type=int, metavar="K")
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    if cpu.requested():
        cpu.enable()
    import megatron_laep

    megatron_laep.install()
    after_pruning(options)
    sys.argv = [options.script, *options.arguments]
    megatron_laep.run(lambda: runpy.run_path(options.script, run_name="__main__"))


if __name__ == "__main__":
    main()
