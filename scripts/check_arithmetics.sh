#!/usr/bin/env bash
# Runs the tests that two runs are equal (marker `equality`) under several arithmetics: what matrix
# kernels and vector registers another processor would use. Each is one pytest run, in one process
# environment. Ends with a table, and with exit code 1 if one of them failed.
#
#     scripts/check_arithmetics.sh                                # all
#     scripts/check_arithmetics.sh mkl-avx2 aten-default          # some
#     scripts/check_arithmetics.sh --long                         # with those that take minutes
#     scripts/check_arithmetics.sh mkl-avx2 -- -x tests/oracles/test_uneven_experts.py -k masked
#
# What follows `--` goes to pytest; another -m there takes the place of the markers. The MKL_CBWR ones
# differ from the default where torch has MKL, on x86.
set -euo pipefail

ALL=(processor aten-default aten-avx2 mkl-compatible mkl-avx2 shape-dependent)

settings_of() {
    case $1 in
        processor) ;;
        aten-default) echo ATEN_CPU_CAPABILITY=default ;;
        aten-avx2) echo ATEN_CPU_CAPABILITY=avx2 ;;
        mkl-compatible) echo MKL_CBWR=COMPATIBLE ;;
        mkl-avx2) echo MKL_CBWR=AVX2 ;;
        # Coarse sums that depend on a matrix's shape (tests/support/shape_dependent.py): a proof that rests on
        # a kernel fails here on every processor.
        shape-dependent) echo MKL_CBWR=COMPATIBLE SHAPE_DEPENDENT_SUMS=1 ;;
        *) return 1 ;;
    esac
}

names=() markers="equality and not long"
while [ $# -gt 0 ]; do
    case $1 in
        --) shift && break ;;
        --long) markers="equality" ;;
        *)
            settings_of "$1" >/dev/null || {
                printf 'check_arithmetics.sh: got %s, wanted --long or some of: %s\n' "$1" "${ALL[*]}" >&2
                exit 2
            }
            names+=("$1")
            ;;
    esac
    shift
done
[ ${#names[@]} -gt 0 ] || names=("${ALL[@]}")

scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
log=$(mktemp)
trap 'rm -f "$log"' EXIT
table="" status=0
for name in "${names[@]}"; do
    read -ra settings < <(settings_of "$name" && echo)
    printf '\n#### arithmetic %s: %s\n' "$name" "${settings[*]:-as it is}"
    only=$markers result=passed
    # Of runs whose sums differ, coarse ones differ coarsely.
    [ "$name" != shape-dependent ] || only+=" and not drift"
    env -u ATEN_CPU_CAPABILITY -u MKL_CBWR -u SHAPE_DEPENDENT_SUMS "${settings[@]}" \
        bash "$scripts/test.sh" -m "$only" "$@" 2>&1 | tee "$log" || result=FAILED status=1
    summary=$(grep -aE '^=* ?[0-9]+ (passed|failed|error|deselected).* in ' "$log" | tail -1 | tr -d '=') || true
    table+=$(printf '%-16s %-42s %-7s %s' "$name" "${settings[*]:-}" "$result" "${summary:-no tests}")$'\n'
done

printf '\n#### arithmetics on %s\n%s' "$(sed -n 's/^model name[[:space:]]*: //p' /proc/cpuinfo | head -1)" "$table"
exit "$status"
