"""Real distributed Megatron runs for tests: gloo processes, their logs, their losses exactly.

result = run_megatron(tiny_arguments(expert_model_parallel_size=2), world_size=2)
result.losses[5]   # '5.803966E+00', as printed
result.exact[5]    # ('0x1.73742c0000000p+2', '0x1.1f25060000000p-1'): loss, gradient norm
"""

from __future__ import annotations

import json
import os
import re
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_laep import cpu
from tests.support.ranks import run_ranks

REPOSITORY = Path(__file__).resolve().parents[2]
SUPPORT = REPOSITORY / "tests" / "support"
PRETRAIN_GPT = REPOSITORY / "scripts" / "pretrain_gpt.py"

ON_CPU = (str(SUPPORT / "run_on_cpu.py"),)
"""Launcher that enables the CPU platform and nothing else: stock Megatron."""

LAEP = ("-m", "megatron_laep")
"""The package's own launcher."""

TINY = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "ffn_hidden_size": 64,
    "seq_length": 64,
    "max_position_embeddings": 64,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "disable_bias_linear": True,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "num_experts": 8,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 32,
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "alltoall",
    "tokenizer_type": "NullTokenizer",
    "vocab_size": 257,
    "mock_data": True,
    "micro_batch_size": 2,
    "global_batch_size": 8,
    "train_iters": 20,
    "lr": 1e-3,
    "lr_decay_style": "constant",
    "eval_iters": 0,
    "eval_interval": 1000,
    "log_interval": 1,
}


def tiny_arguments(**overrides: Any) -> list[str]:
    """Megatron flags of a very small MoE GPT (4 layers, 8 experts, top-2, bytes), the CPU
    platform's included.

    Args:
        overrides: flag names with underscores. True gives a bare flag; False or None removes it; a
            list or tuple gives several values. ``data_path`` takes the place of ``--mock-data``.
    """
    flags = dict(TINY)
    if overrides.get("data_path"):
        flags["mock_data"] = False
    flags.update(overrides)
    arguments = cpu.cpu_arguments()
    for name, value in flags.items():
        if value is None or value is False:
            continue
        arguments.append("--" + name.replace("_", "-"))
        if value is not True:
            arguments.extend(map(str, value if isinstance(value, (list, tuple)) else [value]))
    return arguments


@dataclass
class RunResult:
    """What came out of a run: per iteration, the values as printed and exactly; per rank, code and
    log.
    """

    returncodes: list[int]
    """Exit code of each rank; minus the signal's number if it was killed."""

    logs: list[str]
    """Everything each rank wrote."""

    seconds: float
    timed_out: bool = False
    exact: dict[int, tuple[str, str]] = field(default_factory=dict)
    """Iteration -> (``lm loss``, gradient norm), both as ``float.hex()``."""

    exact_losses: dict[int, dict[str, str]] = field(default_factory=dict)
    """Iteration -> all losses by name, as ``float.hex()``: auxiliary losses, too, where Megatron
    reports them so.
    """

    @property
    def ok(self) -> bool:
        return not self.timed_out and not any(self.returncodes)

    @property
    def output(self) -> str:
        """What the printing ranks wrote: the first one (start-up, checkpoints) and the last one
        (iterations).
        """
        return self.logs[0] if len(self.logs) == 1 else self.logs[0] + self.logs[-1]

    @property
    def losses(self) -> dict[int, str]:
        """Iteration -> ``lm loss`` as Megatron prints it. After a resume it averages the first two
        iterations.
        """
        return self._printed("lm loss")

    @property
    def grad_norms(self) -> dict[int, str]:
        """Iteration -> gradient norm as Megatron prints it."""
        return self._printed("grad norm")

    def _printed(self, name: str) -> dict[int, str]:
        pattern = re.compile(rf"iteration +(\d+)/ *\d+ \|.*?\| *{re.escape(name)}: (\S+) \|")
        return {int(iteration): value for iteration, value in pattern.findall(self.logs[-1])}

    def tail(self, lines: int = 40) -> str:
        """The last lines of each rank's log, with headings."""
        return "\n".join(
            f"----- rank {rank}, exit code {code}{', timed out' if self.timed_out else ''} -----\n"
            + "\n".join(log.splitlines()[-lines:])
            for rank, (code, log) in enumerate(zip(self.returncodes, self.logs, strict=True))
        )


class RunFailed(AssertionError):
    """A run that should have succeeded did not; the message holds the tail of each rank's log."""

    def __init__(self, result: RunResult) -> None:
        super().__init__(f"run failed after {result.seconds:.1f} s\n{result.tail()}")
        self.result = result


def run_megatron(
    args: Sequence[str],
    world_size: int,
    *,
    launcher: Sequence[str] = ON_CPU,
    script: Path | str = PRETRAIN_GPT,
    env: Mapping[str, str] | None = None,
    timeout: float = 120.0,
    check: bool = True,
    log_dir: Path | None = None,
    fresh: bool = False,
    path: str = "",
) -> RunResult:
    """Run `script` on `world_size` gloo processes and collect what they say.

    Args:
        args: the script's command line.
        launcher: what Python is to run before the script: `ON_CPU`, `LAEP`, or another list of
            words.
        env: further environment variables, for all ranks.
        timeout: seconds after which every process is killed. The first rank that fails ends the
            others, too.
        check: raise `RunFailed` unless all ranks exit with 0 in time.
        log_dir: where each rank's log goes; a temporary directory otherwise.
        fresh: start new processes, as a user does, not forks of one that has Megatron already.
        path: a folder whose modules Megatron is to find before all others, such as a stand-in.

    The logs' tails are printed as well, so that pytest shows them with any later failure of the
    test.
    """
    for _ in range(3):
        result = _run_once(
            args, world_size, launcher, script, env or {}, timeout, log_dir, fresh, path
        )
        # Between choosing a free port and using it, somebody else may take it.
        if result.ok or "EADDRINUSE" not in result.logs[0]:
            break
    print(result.tail(12))
    if check and not result.ok:
        raise RunFailed(result)
    return result


def run_batch(
    jobs: Mapping[str, tuple], world_size: int, *, timeout: float = 300.0, path: str = ""
) -> dict[str, RunResult]:
    """Runs jobs one after the other in the same processes (see `batch.py`), and tells them apart by name.

    Args:
        jobs: for each name, whether it runs under megatron_laep, its command line and, to mask the experts that a map
            drops, the map's file.
        timeout: seconds for all of them together.
        path: as of `run_megatron`.

    Returns:
        A result for each name; `exact` is its own, logs and exit codes are those of the whole batch.
    """
    with tempfile.TemporaryDirectory(prefix="megatron-batch-") as scratch:
        listed = Path(scratch) / "jobs.json"
        listed.write_text(
            json.dumps(
                [
                    {
                        "laep": laep,
                        "args": list(map(str, args)),
                        "mask": str(mask[0]) if mask else None,
                    }
                    for laep, args, *mask in jobs.values()
                ]
            )
        )
        whole = run_megatron(
            [PRETRAIN_GPT],
            world_size,
            launcher=(str(SUPPORT / "batch.py"),),
            script=listed,
            env={"EXACT_LOG_BASE": scratch},
            timeout=timeout,
            path=path,
        )
        results = {}
        for number, name in enumerate(jobs):
            results[name] = RunResult(whole.returncodes, whole.logs, whole.seconds)
            for rank in range(world_size):
                _read_exact(Path(scratch) / f"exact{rank}.jsonl.{number}", results[name])
        return results


def _run_once(
    args: Sequence[str],
    world_size: int,
    launcher: Sequence[str],
    script: Path | str,
    env: Mapping[str, str],
    timeout: float,
    log_dir: Path | None,
    fresh: bool,
    path: str,
) -> RunResult:
    with tempfile.TemporaryDirectory(prefix="megatron-run-") as scratch:
        directory = Path(scratch) if log_dir is None else Path(log_dir)
        directory.mkdir(parents=True, exist_ok=True)
        paths = [directory / f"rank{rank}.log" for rank in range(world_size)]
        exact_folder = Path(env.get("EXACT_LOG_BASE", scratch))
        exact_paths = [exact_folder / f"exact{rank}.jsonl" for rank in range(world_size)]
        environment = _environment(world_size) | dict(env)
        started = time.monotonic()
        codes, timed_out = run_ranks(
            [*launcher, script, *args],
            [
                environment
                | {"RANK": str(rank), "LOCAL_RANK": str(rank), "EXACT_LOG": str(exact_paths[rank])}
                for rank in range(world_size)
            ],
            paths,
            timeout=timeout,
            fresh=fresh,
            path=path,
        )
        result = RunResult(
            returncodes=codes,
            logs=[path.read_text(errors="replace") for path in paths],
            seconds=time.monotonic() - started,
            timed_out=timed_out,
        )
        for path in exact_paths:
            _read_exact(path, result)
        return result


def _environment(world_size: int) -> dict[str, str]:
    environment = dict(os.environ)
    environment.update(
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(_free_port()),
        OMP_NUM_THREADS="1",
        CUDA_DEVICE_MAX_CONNECTIONS="1",
        MEGATRON_LAEP_PLATFORM="cpu",
        PYTHONPATH=os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
    )
    return environment


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _read_exact(path: Path, result: RunResult) -> None:
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        record = json.loads(line)
        iteration, losses = record["iteration"], record["losses"]
        result.exact_losses[iteration] = losses
        result.exact[iteration] = (losses["lm loss"], record["grad_norm"])
