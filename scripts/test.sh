#!/usr/bin/env bash
# Sets up the environment with what the tests need, and runs them. All arguments go to pytest; without
# any, two files are tested at a time, since a test of one process leaves a core idle:
#
#     scripts/test.sh                         # what CI runs: at most 12 minutes on two quiet cores
#     scripts/test.sh -m "long or not long"   # everything, as scripts/full_check.sh does
#     scripts/test.sh -x -k expert_map
#
# The environment is .venv in the repository, or your own, named by MEGATRON_LAEP_VENV; $PYTHON
# names the Python to make .venv with.
set -euo pipefail

# shellcheck source=scripts/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

setup_env test
say "tests"
# From the repository, so that pyproject.toml holds; paths in the arguments are relative to it.
cd "$REPOSITORY"
[ $# -gt 0 ] || set -- -n 2 --dist loadfile
exec "$VENV_PYTHON" -m pytest "$@" </dev/null
