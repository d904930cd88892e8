"""The table of the study: which configurations are trained, with which seeds, in which order.

A row is a configuration: what it adds to the flags of the setting. A run is a row with a seed.
Runs of one seed read the same data in the same order: Megatron's --seed decides it.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "gpt-moe-4l-16e-cpu-1proc.args"

BASE = "base"
DEFAULT = "laep-alpha0.4-beta0.1"
SEEDS = (1, 2, 3)
MORE_SEEDS = (1, 2, 3, 4, 5)  # of BASE and DEFAULT

# Plans of the controls, see `plans`.
RANDOM, BUSIEST, SMALL = "random", "busiest", "small"


@dataclass(frozen=True)
class Setting:
    """What all runs share.

    iterations: of a run, `learning_warmup` of them with a rising learning rate. prune_at: the
    iteration after which a row is pruned that does not say otherwise. warmup: iterations in which
    only the router learns, in the row that asks for it.
    window: iterations whose loads decide. evaluate: batches of the validation and of the test set
    at the end; of the validation set in between, every `evaluate_every` iterations, `evaluate_few`.
    """

    iterations: int = 2000
    learning_warmup: int = 200
    prune_at: int = 500
    warmup: int = 50
    window: int = 50
    evaluate: int = 120
    evaluate_every: int = 100
    evaluate_few: int = 8
    save_every: int = 250
    log_every: int = 10

    def moment(self, share: float) -> int:
        """The iteration after this share of the training, a multiple of the logging interval."""
        return max(1, round(self.iterations * share / self.log_every)) * self.log_every

    @cached_property
    def flags(self) -> tuple[str, ...]:
        """Of the configuration file."""
        return tuple(shlex.split(CONFIG.read_text(), comments=True))

    def flag(self, name: str) -> int:
        """An integer of the configuration file."""
        return int(self.flags[self.flags.index(name) + 1])


@dataclass(frozen=True)
class Row:
    """A configuration.

    group: which question it answers. flags: added to those of the setting. plan: the control that
    its experts come from, made from the DEFAULT run of the same seed. launch: flags of
    `study_parts/train.py` that it needs; () runs `-m megatron_laep`. longer: its iterations, as a
    multiple of the setting's.
    """

    name: str
    group: str
    flags: tuple[str, ...] = ()
    plan: str | None = None
    launch: tuple[str, ...] = ()
    longer: float = 1.0
    seeds: tuple[int, ...] = SEEDS


@dataclass(frozen=True)
class Run:
    row: Row
    seed: int

    @property
    def name(self) -> str:
        return f"{self.row.name}-seed{self.seed}"

    @property
    def needs(self) -> str | None:
        """The run that must have ended before this one can start."""
        return f"{DEFAULT}-seed{self.seed}" if self.row.plan else None


def laep(*at: int, alpha: str = "0.4", beta: float = 0.1) -> tuple[str, ...]:
    iterations = tuple(map(str, at))
    # One process: a layer keeps exactly the experts that the rule keeps.
    return (
        *("--laep-prune-iteration", *iterations, "--laep-alpha", alpha),
        *("--laep-beta", str(beta), "--laep-expert-multiple", "1"),
    )


def balanced(kind: str, coefficient: str) -> tuple[str, ...]:
    return ("--moe-router-load-balancing-type", kind, "--moe-aux-loss-coeff", coefficient)


def rows(setting: Setting) -> tuple[Row, ...]:
    """The table, the most important rows first."""
    at = setting.prune_at
    layers = setting.flag("--num-layers")
    mixed = f"0.2:1,0.4:2-{layers - 1},0.2:{layers}"
    # Megatron offers the expert bias with sigmoid scores only.
    sigmoid = ("--moe-router-score-function", "sigmoid")
    bias = ("--moe-router-enable-expert-bias", "--moe-router-bias-update-rate", "1e-3")
    # Three prunings that leave as many tokens untouched as one with beta 0.1: 1 - (1 - b)^3 = 0.1.
    third = round(1 - 0.9 ** (1 / 3), 4)
    steps = [setting.moment(at / setting.iterations * f) for f in (0.6, 1.0, 1.4)]
    given = laep(at)
    return (
        Row(BASE, "table 1", seeds=MORE_SEEDS),
        Row(DEFAULT, "table 1", given, seeds=MORE_SEEDS),
        Row("aux-1e-4", "table 1", balanced("aux_loss", "1e-4")),
        Row("aux-1e-2", "table 1", balanced("aux_loss", "1e-2")),
        Row("deepseek", "table 1", (*sigmoid, *bias, *balanced("seq_aux_loss", "1e-4"))),
        Row("base-sigmoid", "table 1", sigmoid),
        *(
            Row(f"laep-beta{beta}", "table 1", laep(at, alpha="inf", beta=beta))
            for beta in (0.05, 0.1, 0.2)
        ),
        *(
            Row(f"laep-alpha{alpha}-beta0.1", "table 2", laep(at, alpha=alpha))
            for alpha in ("0.2", "0.6")
        ),
        Row("laep-mixed-beta0.1", "table 2", laep(at, alpha=mixed)),
        Row("control-random", "which experts", given, plan=RANDOM),
        Row("control-busiest", "which experts", given, plan=BUSIEST),
        Row("control-small", "which experts", plan=SMALL),
        *(
            Row(f"moment-{share:.0%}".rstrip("%"), "moment", laep(setting.moment(share)))
            for share in (0.1, 0.5, 0.75)
        ),
        Row("three-steps", "moment", laep(*steps, beta=third)),
        Row("without-moments", "resume", given, launch=("--forget-moments",)),
        Row("router-warmup", "resume", given, launch=("--router-warmup", str(setting.warmup))),
        Row("longer-10", "equal compute", given, longer=1.1),
    )


def runs(table: tuple[Row, ...]) -> tuple[Run, ...]:
    """All runs in the order of the queue: BASE and DEFAULT with all seeds, then each other row with
    its first seed, with its second, with its third: a study that is stopped says something.
    """
    first = [row for row in table if row.name in (BASE, DEFAULT)]
    later = [row for row in table if row not in first]
    queue = []
    for group in (first, later):
        for seed in sorted({seed for row in group for seed in row.seeds}):
            queue += [Run(row, seed) for row in group if seed in row.seeds]
    return tuple(queue)
