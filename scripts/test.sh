#!/usr/bin/env bash
# Sets up the environment with what the tests need, and runs them. All arguments go to pytest; without
# any, two files are tested at a time, since a test of one process leaves a core idle:
#
#     scripts/test.sh                         # what CI runs: some 13 minutes on two quiet cores
#     scripts/test.sh -m "long or not long"   # everything, as scripts/full_check.sh does
#     scripts/test.sh -x -k expert_map
#     scripts/test.sh --megatron 0.18.2       # the core suite on another Megatron than the newest
#     scripts/test.sh --megatron ~/Megatron-LM -m short
#
# --megatron comes first and names a version, which is then installed into .megatron/VERSION, beside the
# one torch, or a source tree. Unless -m says otherwise, the core suite runs (tests/core_suite.py).
#
# The environment is .venv in the repository, or your own, named by MEGATRON_LAEP_VENV; $PYTHON
# names the Python to make .venv with.
set -euo pipefail

# shellcheck source=scripts/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

megatron=""
if [ "${1:-}" = --megatron ]; then
    megatron=${2:?"--megatron VERSION or --megatron TREE"}
    shift 2
fi
[ $# -gt 0 ] || set -- -n 2 --dist loadfile

setup_env test
if [ -n "$megatron" ]; then
    use_megatron "$megatron"
    set -- -m core "$@"
fi
say "tests"
# From the repository, so that pyproject.toml holds; paths in the arguments are relative to it.
cd "$REPOSITORY"
exec "$VENV_PYTHON" -m pytest "$@" </dev/null
