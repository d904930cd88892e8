"""Runs a training script on the CPU platform.

    python tests/support/run_on_cpu.py SCRIPT ARGS

Stands for the launcher in tests that are about stock Megatron.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from megatron_laep import cpu

    cpu.enable()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
