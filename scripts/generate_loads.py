#!/usr/bin/env python3
"""Synthetic loads for a model of which only the kept experts per layer are published.

    scripts/generate_loads.py configs/yuan3-ultra-103l-64e-1515b.yaml OUTPUT.json [--spread S] [--seed N]

The loads are NOT measured: nobody has published those of the 1515B model. What is published of them
is how many experts Algorithm 1 keeps in each layer, and that the busiest expert of a layer gets up to
nearly 500 times the tokens of the least busy one. This is the rule that they are drawn by. It was
written down before any speed was worked out from it, and no number of it was changed afterwards:

1. The n experts of a layer that are kept get loads exp(S z), z ~ N(0, 1). S, the spread of the kept
   experts, is published nowhere: it is an argument, and results are to be shown over a range of it.
2. The experts that are pruned lie between 1/500 of the busiest expert's load, which one of them has,
   and a ceiling, evenly distributed in the logarithm. The ceiling is the highest, up to the
   lightest kept expert, with which Algorithm 1 prunes all of them: alpha, beta and multiple are
   those of the model file.
3. If Algorithm 1 would prune kept ones as well, the lightest kept expert is drawn again. So is the
   busiest one if it had more tokens than there are: a token chooses an expert once.

Expert ids are in random order, as in a model that was never rearranged. That Algorithm 1 keeps the
published counts is checked with the function that a job uses.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from megatron_laep.plan.pruning import experts_to_keep
from megatron_laep.settings.rules import AlphaSpec

HOTTEST_OVER_COLDEST = 500
DEFAULT_SPREAD = 0.5
WINDOW = 100  # iterations, the default of --laep-window
_MAX_REDRAWS = 10_000
_HALVINGS = 20


def draw_layer(
    generator: np.random.Generator,
    *,
    kept: int,
    num_experts: int,
    top_k: int,
    tokens: int,
    spread: float,
    alpha: float,
    beta: float,
    multiple: int,
) -> np.ndarray:
    """Loads [E], int64, of `tokens` tokens, of which Algorithm 1 keeps `kept`, as described above.

    Errors: ValueError if no such loads are found.
    """
    busy_K = np.exp(spread * generator.standard_normal(kept))
    # Where the pruned experts lie between the coldest load (0) and the ceiling (1).
    heights_P = generator.random(num_experts - kept)
    heights_P[:1] = 0

    def loads_at(ceiling: float) -> np.ndarray:
        coldest = busy_K.max() / HOTTEST_OVER_COLDEST
        idle_P = coldest * (max(ceiling, coldest) / coldest) ** heights_P
        shares_E = np.concatenate([busy_K, idle_P])
        loads_E = np.rint(shares_E * (tokens * top_k / shares_E.sum())).astype(np.int64)
        # Rounded down, the coldest load would break the limit by one part in its tokens.
        return np.maximum(loads_E, -(-loads_E.max() // HOTTEST_OVER_COLDEST))

    def left(ceiling: float) -> int:
        """How many Algorithm 1 keeps, in floating point: only to find the ceiling."""
        loads_E = np.sort(loads_at(ceiling))
        individual = np.searchsorted(loads_E, alpha * loads_E.mean(), side="right")
        cumulative = np.searchsorted(np.cumsum(loads_E), beta * loads_E.sum(), side="left")
        remaining = max(num_experts - min(individual, cumulative), top_k)
        return -(-remaining // multiple) * multiple

    for _ in range(_MAX_REDRAWS):
        low, high = busy_K.max() / HOTTEST_OVER_COLDEST, busy_K.min()
        if left(high) > kept:
            for _ in range(_HALVINGS):
                middle = (low * high) ** 0.5
                low, high = (middle, high) if left(middle) <= kept else (low, middle)
        else:
            low = high
        loads_E = loads_at(low)
        if loads_E.max() > tokens:
            busy_K[busy_K.argmax()] = np.exp(spread * generator.standard_normal())
            continue
        rule = {"alpha": alpha, "beta": beta, "multiple": multiple, "minimum": top_k}
        if experts_to_keep(loads_E, **rule).tolist() == list(range(kept)):
            return generator.permutation(loads_E)
        busy_K[busy_K.argmin()] = np.exp(spread * generator.standard_normal())
    raise ValueError(
        f"no loads with spread {spread:g} were found of which Algorithm 1 with alpha {alpha:g} and "
        f"beta {beta:g} keeps {kept} of {num_experts} experts, in {_MAX_REDRAWS} draws"
    )


def generate(description: dict, seed: int, spread: float = DEFAULT_SPREAD) -> dict:
    """The content of the output file, from the content of a model file (a dict)."""
    model, rules, job = description["model"], description["laep"], description["parallelism"]
    kept = description["published"]["experts_kept"]
    if len(kept) != model["num_layers"]:
        raise ValueError(f"experts_kept has {len(kept)} counts for {model['num_layers']} layers")
    samples = job["data"] * job["micro_batch_size"] * job["micro_batches"]
    tokens = WINDOW * samples * model["sequence_length"]
    alpha = AlphaSpec.parse(rules["alpha"])
    generator = np.random.default_rng(seed)
    rows = [
        draw_layer(
            generator,
            kept=count,
            num_experts=model["num_experts"],
            top_k=model["top_k"],
            tokens=tokens,
            spread=spread,
            alpha=alpha.for_layer(layer_number),
            beta=rules["beta"],
            multiple=rules["expert_multiple"],
        )
        for layer_number, count in enumerate(kept, start=1)
    ]
    return {
        "about": "SYNTHETIC loads, not measured: made by scripts/generate_loads.py such that "
        "Algorithm 1 keeps the published number of experts in every layer.",
        "seed": seed,
        "spread": spread,
        "iteration": WINDOW,
        "window": WINDOW,
        "layer_numbers": list(range(1, len(kept) + 1)),
        "tokens": [row.tolist() for row in rows],
    }


def write(content: dict, path: Path) -> None:
    """JSON with one line for each layer's tokens, so that a difference can be read."""
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()]
    rows = ",\n  ".join(json.dumps(row) for row in content["tokens"])
    lines[-1] = f' "tokens": [\n  {rows}\n ]'
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("model", type=Path, help="model file (YAML) with published.experts_kept")
    parser.add_argument("output", type=Path, help="file to write (JSON)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--spread",
        type=float,
        default=DEFAULT_SPREAD,
        help="standard deviation of the logarithm of the kept experts' loads (default: %(default)s)",
    )
    arguments = parser.parse_args()
    import yaml

    try:
        description = yaml.safe_load(arguments.model.read_text(encoding="utf-8"))
        content = generate(description, arguments.seed, arguments.spread)
    except (OSError, KeyError, ValueError) as error:
        print(f"generate_loads: {arguments.model}: {error!r}", file=sys.stderr)
        return 2
    write(content, arguments.output)
    print(f"{arguments.output}: {len(content['tokens'])} layers, seed {arguments.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
