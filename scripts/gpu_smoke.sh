#!/usr/bin/env bash
# Does it work on these GPUs? Everything is said in scripts/gpu_smoke.py, which this runs with the Python
# that has torch and megatron-core: $PYTHON, or python3. Nothing is installed or downloaded.
#
#     scripts/gpu_smoke.sh [--device cpu] [--processes N] [--json FILE]
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec "${PYTHON:-python3}" "$here/gpu_smoke.py" "$@"
