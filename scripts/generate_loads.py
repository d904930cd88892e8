#!/usr/bin/env python3
"""Synthetic loads for a model of which only the kept experts per layer are published.

    scripts/generate_loads.py configs/yuan3-ultra-103l-64e-1515b.yaml OUTPUT.json [--seed N]

The loads are NOT measured: nobody has published those of the 1515B model. They are drawn from a
simple model of a router, and one number per layer, its dispersion, is searched for such that
LAEP's own rule keeps what was published:

1. Each expert of a layer has an affinity z ~ N(0, 1), drawn once. With dispersion s, the first
   choice of a token falls on expert i with p_i = exp(s z_i) / sum(exp(s z)): lognormal loads.
2. A top-2 router picks a second, other expert, by the same p without the first one:
   load_i = tokens * p_i (1 + sum over j != i of p_j / (1 - p_j)). So no expert gets more than one
   choice of each token, however large s is.
3. s runs over a grid. Where Algorithm 1, with the alpha and beta of the model file and rounding to
   its multiple, keeps the published number, s fits. The middle of all fitting values is taken, so
   that the layer is neither at one edge of its count nor at the other. If none fits, z is drawn
   again (the output tells how often that was needed).

Expert ids are in random order, as in a model that was never rearranged. The kept counts are
results of the rule on the loads; they are nowhere written into the loads. What the loads do imply
and no publication confirms is everything else: the shape of the distribution, the busiest expert,
which experts share a rank.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from megatron_laep.plan.pruning import experts_to_keep
from megatron_laep.settings.rules import AlphaSpec

DISPERSIONS = np.round(np.arange(0.05, 8.0, 0.05), 2)
MAX_DRAWS = 200
WINDOW = 100  # iterations, the default of --laep-window


def expected_loads(affinities_E: np.ndarray, dispersion: float, top_k: int, tokens: int):
    """Integer loads [E] of `tokens` tokens with top-1 or top-2 routing, as described above."""
    weights = np.exp(dispersion * (affinities_E - affinities_E.max()))
    first = weights / weights.sum()
    chosen = first
    if top_k == 2:
        # 1 - p, as a sum of the others: for p close to one, the subtraction would cancel
        others = 1 - np.eye(first.size)
        odds = first / (others * first).sum(axis=1)
        chosen = first * (1 + (others * odds).sum(axis=1))
    return np.rint(chosen * tokens).astype(np.int64)


def fit_layer(
    generator: np.random.Generator,
    *,
    wanted: int,
    num_experts: int,
    top_k: int,
    tokens: int,
    alpha: float,
    beta: float,
    multiple: int,
) -> tuple[np.ndarray, float, int]:
    """Loads of which the rule keeps `wanted` experts, their dispersion, and the draws it took.

    Errors: ValueError if no dispersion does it in MAX_DRAWS draws.
    """
    for draw in range(1, MAX_DRAWS + 1):
        affinities = generator.standard_normal(num_experts)
        fitting = []
        for dispersion in DISPERSIONS:
            loads = expected_loads(affinities, float(dispersion), top_k, tokens)
            kept = experts_to_keep(loads, alpha=alpha, beta=beta, multiple=multiple, minimum=top_k)
            if kept.size == wanted:
                fitting.append((float(dispersion), loads))
        if fitting:
            dispersion, loads = fitting[len(fitting) // 2]
            return loads, dispersion, draw
    raise ValueError(
        f"no dispersion between {DISPERSIONS[0]} and {DISPERSIONS[-1]} makes Algorithm 1 with "
        f"alpha {alpha:g} and beta {beta:g} keep {wanted} of {num_experts} experts, in "
        f"{MAX_DRAWS} draws"
    )


def generate(description: dict, seed: int) -> dict:
    """The content of the output file, from the content of a model file (a dict)."""
    model, rules, job = description["model"], description["laep"], description["parallelism"]
    kept = description["published"]["experts_kept"]
    if model["top_k"] > 2:
        raise ValueError(
            f"the load model is for top_k 1 and 2, the model file has {model['top_k']}"
        )
    if len(kept) != model["num_layers"]:
        raise ValueError(f"experts_kept has {len(kept)} counts for {model['num_layers']} layers")
    samples = job["data"] * job["micro_batch_size"] * job["micro_batches"]
    tokens = WINDOW * samples * model["sequence_length"]
    alpha = AlphaSpec.parse(rules["alpha"])
    generator = np.random.default_rng(seed)
    fitted = [
        fit_layer(
            generator,
            wanted=wanted,
            num_experts=model["num_experts"],
            top_k=model["top_k"],
            tokens=tokens,
            alpha=alpha.for_layer(layer_number),
            beta=rules["beta"],
            multiple=rules["expert_multiple"],
        )
        for layer_number, wanted in enumerate(kept, start=1)
    ]
    return {
        "about": "SYNTHETIC loads, not measured: made by scripts/generate_loads.py such that "
        "Algorithm 1 keeps the published number of experts in every layer.",
        "seed": seed,
        "iteration": WINDOW,
        "window": WINDOW,
        "dispersion": [dispersion for _, dispersion, _ in fitted],
        "draws": [draws for _, _, draws in fitted],
        "layer_numbers": list(range(1, len(kept) + 1)),
        "tokens": [loads.tolist() for loads, _, _ in fitted],
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
    arguments = parser.parse_args()
    import yaml

    try:
        content = generate(
            yaml.safe_load(arguments.model.read_text(encoding="utf-8")), arguments.seed
        )
    except (OSError, KeyError, ValueError) as error:
        print(f"generate_loads: {arguments.model}: {error!r}", file=sys.stderr)
        return 2
    write(content, arguments.output)
    print(f"{arguments.output}: {len(content['tokens'])} layers, seed {arguments.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
