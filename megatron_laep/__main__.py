"""The launcher: ``torchrun ... -m megatron_laep SCRIPT ARGS`` runs an unmodified Megatron script.

A thin layer over ``entry``, ``install`` and ``run``.
``MEGATRON_LAEP_PLATFORM=cpu`` runs it without a GPU.
"""

import os
import sys

from megatron_laep.entry import launch

_USAGE = """\
usage: python -m megatron_laep SCRIPT [ARGUMENTS OF THE SCRIPT] [--laep-... flags]

Runs a Megatron-Core training script (megatron-core 0.18.2 or newer, a script that ends in
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
    # As 'python SCRIPT' would have it: the script's own name and folder.
    sys.argv = sys.argv[1:]
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    launch(script)


if __name__ == "__main__":
    main()
