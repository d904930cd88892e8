"""Runs a training script from its beginning, under LAEP; and the end of a job that is refused.

The launcher begins here, and so does a script that calls ``megatron_laep.enter`` itself, as those of a
patched Megatron tree do (``patches/``). Nothing of Megatron is imported before the CPU platform is there.
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


def enter(name: str, script: str) -> None:
    """Runs the script that calls it from its beginning, again after each pruning; ends the process.

    For the first lines of a script, before it imports Megatron::

        import megatron_laep

        megatron_laep.enter(__name__, __file__)

    The script then runs as under ``python -m megatron_laep``: the ``--laep-*`` flags are known, and a
    job that is refused ends with `REFUSED`. Does nothing where the script is imported, and in a script
    that runs inside ``megatron_laep.run`` already: in the run that this call begins, and under the
    launcher.

    Args:
        name: the script's ``__name__``.
        script: the script's ``__file__``.
    """
    if name != "__main__" or _inside_run():
        return
    launch(script)
    sys.exit()


def _inside_run() -> bool:
    # Whoever is inside run() has loaded it. To import it here would come before the CPU platform.
    session = sys.modules.get("megatron_laep.loop.session")
    return session is not None and session.session.inside_run


def launch(script: str) -> None:
    """Runs a script with the hooks in, and again after each pruning; ``sys.argv`` is the script's.

    Returns when the script does; a job that is refused ends this process.
    """
    try:
        _run(script)
    except Refusal as refusal:
        sentence = str(refusal)
    else:
        return
    # Outside of the handler: what ends the process is not "another exception" during the first.
    end_refused(sentence)


def _run(script: str) -> None:
    if not os.path.isfile(script):
        raise Refusal(f"the script {script} does not exist")
    # Looked up here, not in the platform's package, so that a GPU run does not even import it.
    if os.environ.get("MEGATRON_LAEP_PLATFORM", "") not in ("", "gpu"):
        from megatron_laep import cpu

        if cpu.requested():
            cpu.enable()

    import megatron_laep

    megatron_laep.install()
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
