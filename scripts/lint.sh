#!/usr/bin/env bash
# Looks at the code without running it: ruff's checks and its format, mypy (strict on settings, plan and
# records). .ci/run starts with it.
#
#     scripts/lint.sh          # exit code 0 if there is nothing to say
#     scripts/lint.sh --fix    # also puts right what ruff can: imports, format
#
# The environment is that of scripts/test.sh with the extra `dev`.
set -euo pipefail

# shellcheck source=scripts/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

case ${1:-} in
    "") check=() format=(--check) ;;
    --fix) check=(--fix) format=() ;;
    *) fail "unknown argument $1: scripts/lint.sh [--fix]" ;;
esac
setup_env dev
say "lint"
cd "$REPOSITORY"
status=0
"$VENV_PYTHON" -m ruff check "${check[@]}" . || status=1
"$VENV_PYTHON" -m ruff format "${format[@]}" . || status=1
"$VENV_PYTHON" -m mypy || status=1
exit "$status"
