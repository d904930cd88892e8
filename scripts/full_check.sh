#!/usr/bin/env bash
# Everything that can be checked without a GPU, also what takes hours: each step once for a commit, so
# that a run that was stopped goes on where it was. Ends with a table, which docs/full_check.md shows.
#
#     scripts/full_check.sh                # all steps that this commit has not passed yet
#     scripts/full_check.sh tests long     # some
#     scripts/full_check.sh --table        # the table of this commit as Markdown, nothing is run
#
# What it keeps lies in runs/full-check/COMMIT: a log and a result for each step.
set -euo pipefail

# shellcheck source=scripts/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
cd "$REPOSITORY"

STEPS=(lint tests long core-0.18.2 core-0.19.0 fuzz arithmetics crashes overhead uneven published scale quickstart)

words_of() {
    case $1 in
        lint) echo "scripts/lint.sh" ;;
        tests) echo "scripts/test.sh" ;;
        long) echo "scripts/test.sh -m long -n 2 --dist loadfile" ;;
        fuzz) echo "LAEP_FUZZ_EXAMPLES=1000 scripts/test.sh tests/tools/test_hostile_files.py --timeout 3600" ;;
        core-*) echo "scripts/test.sh --megatron ${1#core-}" ;;
        arithmetics) echo "scripts/check_arithmetics.sh --long" ;;
        crashes) echo "$VENV_PYTHON scripts/crash_matrix.py" ;;
        overhead) echo "$VENV_PYTHON scripts/bench_overhead.py" ;;
        uneven) echo "$VENV_PYTHON scripts/bench_uneven.py" ;;
        published) echo "$VENV_PYTHON scripts/simulate_published.py" ;;
        scale) echo "$VENV_PYTHON -W ignore scripts/bench_scale.py" ;;
        quickstart) echo "scripts/quickstart.sh --run-dir runs/full-check-quickstart --fresh" ;;
        *) return 1 ;;
    esac
}

commit=$(git rev-parse --short=12 HEAD)
[ -z "$(git status --porcelain --untracked-files=no)" ] || commit+="-changed"
folder=runs/full-check/$commit

print_table() {
    printf 'Commit %s, %s, %s cores, %s.\n\n' "$commit" \
        "$(sed -n 's/^model name[[:space:]]*: //p' /proc/cpuinfo | head -1)" "$(nproc)" \
        "$("$VENV_PYTHON" -c 'from importlib.metadata import version as v
print("torch", v("torch") + ", megatron-core", v("megatron-core"))')"
    printf '| step | result | minutes | its last line |\n|---|---|---|---|\n'
    local step
    for step in "${STEPS[@]}"; do
        if [ -e "$folder/$step.result" ]; then
            cat "$folder/$step.result"
        else
            printf '| %s | not run | | |\n' "$step"
        fi
    done
}

names=() only_table=""
for word in "$@"; do
    if [ "$word" = --table ]; then
        only_table=yes
    elif [[ " ${STEPS[*]} " == *" $word "* ]]; then
        names+=("$word")
    else
        fail "full_check.sh: got $word, wanted --table or some of: ${STEPS[*]}"
    fi
done
[ ${#names[@]} -gt 0 ] || names=("${STEPS[@]}")
setup_env dev >&2
if [ -n "$only_table" ]; then
    print_table
    exit 0
fi

mkdir -p "$folder"
status=0
for step in "${names[@]}"; do
    if grep -qs '| passed |' "$folder/$step.result"; then
        say "$step: passed before"
        continue
    fi
    say "$step: $(words_of "$step")"
    start=$SECONDS result=passed
    bash -c "$(words_of "$step")" </dev/null 2>&1 | tee "$folder/$step.log" || result=FAILED status=1
    last=$(grep -av '^[[:space:]]*$' "$folder/$step.log" | tail -1 | tr -d '|' | cut -c1-120)
    printf '| %s | %s | %d | %s |\n' "$step" "$result" "$(((SECONDS - start + 30) / 60))" "$last" \
        >"$folder/$step.result"
done
say "full check"
print_table
exit "$status"
