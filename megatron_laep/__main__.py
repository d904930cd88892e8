"""The launcher: ``torchrun ... -m megatron_laep SCRIPT ARGS`` runs an unmodified Megatron script.

A thin layer over ``install`` and ``run``, and the end of a job that is refused.
``MEGATRON_LAEP_PLATFORM=cpu`` runs it without a GPU.
"""

import os
import runpy
import signal
import sys
from datetime import timedelta
from typing import NoReturn

from megatron_laep.checks import Refusal

REFUSED = 78
"""Exit code of a job that is refused, on every rank: sysexits' EX_CONFIG. A crash has another one, and
the same command would be refused again."""

_USAGE = """\
usage: python -m megatron_laep SCRIPT [ARGUMENTS OF THE SCRIPT] [--laep-... flags]

Runs a Megatron-Core training script (megatron-core 0.19, a script that ends in
megatron.training.pretrain) with expert pruning; usually under torchrun:

    torchrun --nproc-per-node 8 -m megatron_laep pretrain_gpt.py ARGUMENTS \\
        --laep-prune-iteration 2000 --laep-alpha 0.4 --laep-beta 0.1

Without a --laep flag the script runs as it would alone. All flags: python -m megatron_laep SCRIPT
--help. MEGATRON_LAEP_PLATFORM=cpu runs on the CPU with gloo. A job that is refused ends with exit
code 78 on every rank.
"""


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(_USAGE, end="")
        sys.exit(0 if len(sys.argv) >= 2 else 2)
    script = sys.argv[1]
    try:
        _launch(script)
    except Refusal as refusal:
        sentence = str(refusal)
    else:
        return
    # Outside of the handler: what ends the process is not "another exception" during the first.
    end_refused(sentence)


def _launch(script: str) -> None:
    if not os.path.isfile(script):
        raise Refusal(f"the script {script} does not exist")
    # Looked up here, not in the platform's package, so that a GPU run does not even import it.
    if os.environ.get("MEGATRON_LAEP_PLATFORM", "") not in ("", "gpu"):
        from megatron_laep import cpu

        if cpu.requested():
            cpu.enable()

    import megatron_laep

    megatron_laep.install()
    # As 'python SCRIPT' would have it: the script's own name and folder.
    sys.argv = sys.argv[1:]
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    megatron_laep.run(lambda: runpy.run_path(script, run_name="__main__"))


def end_refused(sentence: str, patience: float = 20.0) -> NoReturn:
    """Ends this process with exit code `REFUSED`: rank 0 writes the sentence, the others nothing.

    Ranks get here seconds apart, and a launcher stops all of them when the first one ends. So rank 0
    waits until the others are here, and they until it has spoken. A rank that waits in vain is
    refused alone, and writes the sentence itself, with its number.

    Args:
        patience: seconds that a rank waits for the others.
    """
    # The launcher's signal to the others, once the first one has ended, must not change the code.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        _write(sentence)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not _all_ranks_refuse(rank, patience):
        if rank > 0:
            _write(f"rank {rank}, alone: {sentence}")
    sys.exit(REFUSED)


def _write(sentence: str) -> None:
    sys.stdout.flush()
    print(f"megatron_laep: {sentence}", file=sys.stderr, flush=True)


def _all_ranks_refuse(rank: int, patience: float) -> bool:
    """Waits for the other ranks (rank 0), or for rank 0 (the others). False if it was in vain."""
    import torch

    spoken = "megatron_laep/rank 0 has spoken"
    heard = "megatron_laep/heard by {}".format
    world_size = int(os.environ["WORLD_SIZE"])
    try:
        # Not the process group's own: a refusal of arguments comes before there is one.
        store = torch.distributed.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            timeout=timedelta(seconds=patience),
            wait_for_workers=False,
            multi_tenant=True,
        )
        if rank == 0:
            store.set(spoken, "")
            store.wait([heard(other) for other in range(1, world_size)])
        else:
            store.wait([spoken])
            store.set(heard(rank), "")
    except (KeyError, RuntimeError):  # no address, nobody there, or not in time
        return False
    if torch.distributed.is_initialized():
        # Else NCCL writes a warning about it below the sentence.
        torch.distributed.destroy_process_group()
    return True


if __name__ == "__main__":
    main()
