"""A script as ``python SCRIPT ARGS`` runs it, killed: python tests/support/killed_after_save.py ITERATION SCRIPT ARGS.

Every rank kills itself behind the save of that iteration, with SIGKILL.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys

from megatron_laep import cpu

if __name__ == "__main__":
    cpu.enable()
    from megatron.training import training

    iteration, save = int(sys.argv[1]), training.save_checkpoint_and_time

    def save_and_die(now: int, *more, **named) -> None:
        save(now, *more, **named)
        if now == iteration:
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    training.save_checkpoint_and_time = save_and_die
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
