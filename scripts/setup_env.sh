# shellcheck shell=bash
# The environment of scripts/quickstart.sh, scripts/test.sh and scripts/lint.sh. To be sourced, not run:
#
#     source scripts/setup_env.sh
#     setup_env quickstart       # or: setup_env test, setup_env dev; sets VENV_PYTHON
#
# The environment is .venv in the repository: made when it is not there, reused when it is complete,
# made anew when its Python does not run. To use an environment of your own instead, set
# MEGATRON_LAEP_VENV to its directory: nothing is installed into it, and what it lacks is listed.
#
#     use_megatron 0.18.2        # after setup_env: another Megatron than that of the environment
#
# The caller has `set -euo pipefail`.

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# What Megatron on the CPU needs. One thread a process: two processes share the machine's cores.
export MEGATRON_LAEP_PLATFORM=cpu CUDA_DEVICE_MAX_CONNECTIONS=1 OMP_NUM_THREADS=1
# A line of the training log must be seen when it is written, also through `tee`.
export PYTHONUNBUFFERED=1

say() { printf '\n== %s\n' "$*"; }

fail() {
    printf 'ERROR: %s\n' "$*" >&2
    exit 1
}

# Prints why "$1" cannot be the base of the environment; prints nothing when it can. Each candidate
# is executed: a command that is found may still be a shim that refuses to run.
python_refusal() {
    local answer
    command -v "$1" >/dev/null 2>&1 || { echo "no such command"; return; }
    if ! answer=$("$1" -c '
import sys
if sys.version_info < (3, 12):
    print("is Python %d.%d" % sys.version_info[:2])
else:
    try:
        import ensurepip, ssl, venv
    except ImportError as error:
        print("%s (Debian and Ubuntu: apt install python%d.%d-venv)" % (
            (error,) + sys.version_info[:2]))
' 2>/dev/null </dev/null); then
        echo "does not run"
        return
    fi
    echo "$answer"
}

# One candidate a line, best first.
python_candidates() {
    [ -z "${PYTHON:-}" ] || echo "$PYTHON"
    printf '%s\n' python3.12 python3.13 python3
    # pyenv's versions, whether or not its command is on the PATH.
    local root pattern version
    root=${PYENV_ROOT:-}
    if [ -z "$root" ]; then root=$(pyenv root 2>/dev/null || echo "${HOME:-/root}/.pyenv"); fi
    for pattern in "3.12" "3.13" "3"; do
        for version in "$root"/versions/"$pattern"*/bin/python; do
            [ ! -x "$version" ] || echo "$version"
        done
    done
}

# Sets BASE_PYTHON, or ends the script with a message that lists what was tried.
find_python() {
    local candidate refusal tried=""
    while IFS= read -r candidate; do
        refusal=$(python_refusal "$candidate")
        if [ -z "$refusal" ]; then
            BASE_PYTHON=$candidate
            return
        fi
        tried+="    $candidate: $refusal"$'\n'
        if [ "$candidate" = "${PYTHON:-}" ]; then
            echo "PYTHON=$PYTHON is passed over: $refusal" >&2
        fi
    done < <(python_candidates)
    fail "no usable Python >= 3.12 was found. Tried:
${tried}Install one (for example: apt install python3.12 python3.12-venv, or pyenv install 3.12),
or say where it is: PYTHON=/path/to/python3.12 $0"
}

# The stamp says that pip came to its end, for these requirements and in this place (scripts inside
# an environment name its directory, so a moved one is installed again). Whether an extra is there
# is not its business but check_environment.py's: after `test`, `quickstart` needs no installation.
environment_stamp() {
    "$1" - "$REPOSITORY" <<'PYTHON_CODE'
import hashlib, json, pathlib, sys, tomllib
repository = sys.argv[1]
declared = tomllib.loads(pathlib.Path(repository, "pyproject.toml").read_text())["project"]
print(hashlib.sha256(json.dumps([declared, repository]).encode()).hexdigest())
PYTHON_CODE
}

# install LOG COMMAND...: runs pip. All that it says goes to LOG; what takes long is a line here, and
# where it fails, its last lines are.
install() {
    local log=$1 start=$SECONDS
    shift
    if ! "$@" </dev/null 2>&1 | tee "$log" | awk '
        /^ *(Downloading|Using cached) .*\([0-9.]+ [kMG]B\)/ {
            size = $0; sub(/.*\(/, "", size); sub(/\).*/, "", size)
            name = $0; sub(/^ *(Downloading|Using cached) /, "", name); sub(/.*\//, "", name); sub(/-[0-9].*/, "", name)
            split(size, part, " ")
            if (part[2] == "GB" || (part[2] == "MB" && part[1] >= 50)) {
                print "   " ($0 ~ /Using cached/ ? "have " : "downloading ") name ", " size; fflush()
            }
        }
        /^Installing collected packages:/ { print "   installing " NF - 3 " packages"; fflush() }'; then
        tail -n 20 "$log" >&2
        return 1
    fi
    echo "   done in $((SECONDS - start)) s"
}

use_own_environment() {
    local extra=$1 gaps
    VENV_PYTHON=$MEGATRON_LAEP_VENV/bin/python
    # ensurepip and venv are not needed here, only a Python that runs and is new enough.
    "$VENV_PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1 ||
        fail "MEGATRON_LAEP_VENV=$MEGATRON_LAEP_VENV: bin/python there does not run, or is older" \
            "than 3.12. Point it at a virtual environment, or unset it to have .venv made."
    if ! gaps=$("$VENV_PYTHON" "$REPOSITORY/scripts/check_environment.py" "$extra"); then
        fail "MEGATRON_LAEP_VENV=$MEGATRON_LAEP_VENV lacks what extra '$extra' asks for:
$gaps
Nothing is installed into an environment that is not this repository's own: install these, or unset
MEGATRON_LAEP_VENV to have .venv made."
    fi
    # The package itself is taken from this tree, whatever copy the environment may hold.
    export PYTHONPATH=$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}
    say "environment: $MEGATRON_LAEP_VENV (MEGATRON_LAEP_VENV)"
}

# setup_env EXTRA (of pyproject.toml): makes or reuses the environment and sets VENV_PYTHON.
setup_env() {
    local extra=$1 venv=$REPOSITORY/.venv stamp_file stamp
    if [ -n "${MEGATRON_LAEP_VENV:-}" ]; then
        use_own_environment "$extra"
        return
    fi
    VENV_PYTHON=$venv/bin/python
    if [ -e "$venv" ] && ! "$VENV_PYTHON" -m pip --version >/dev/null 2>&1; then
        say "environment: $venv is broken (its Python or pip does not run), it is made anew"
        rm -rf "$venv"
    fi
    if [ ! -e "$venv" ]; then
        find_python
        say "environment: making $venv with $BASE_PYTHON ($("$BASE_PYTHON" --version 2>&1))"
        "$BASE_PYTHON" -m venv "$venv"
    fi
    stamp=$(environment_stamp "$VENV_PYTHON")
    stamp_file=$venv/.complete
    if [ "$(cat "$stamp_file" 2>/dev/null)" = "$stamp" ] &&
        "$VENV_PYTHON" "$REPOSITORY/scripts/check_environment.py" "$extra" >/dev/null; then
        say "environment: $venv is complete, reused"
        return
    fi
    say "environment: installing PyTorch, Megatron-Core and what else [$extra] needs into $venv"
    echo "   some 6 GB, minutes; pip's own words go to $venv/pip.log"
    rm -f "$stamp_file"
    # --use-pep517: an old pip would otherwise run setup.py itself once setuptools is installed.
    install "$venv/pip.log" "$VENV_PYTHON" -m pip install --progress-bar off --use-pep517 \
        --editable "${REPOSITORY}[$extra]" ||
        fail "pip could not install megatron-laep[$extra]: see its last lines above, and" \
            "$venv/pip.log. A second start goes on from here; delete $venv to start over."
    "$VENV_PYTHON" "$REPOSITORY/scripts/check_environment.py" "$extra" ||
        fail "pip reported success, yet the lines above are missing: delete $venv and start again"
    echo "$stamp" >"$stamp_file"
}

# use_megatron VERSION|TREE, after setup_env: what is run from here on imports that Megatron, with the
# environment's torch. A version is unpacked into .megatron/VERSION, where nothing else is.
use_megatron() {
    local wanted=$1 folder
    if [ -d "$wanted" ]; then
        folder=$(cd "$wanted" && pwd)
        [ -d "$folder/megatron/core" ] && [ -d "$folder/megatron/training" ] ||
            fail "$wanted has no megatron/core and megatron/training: name a source tree of" \
                "Megatron-LM, or a version of megatron-core such as 0.18.2"
        compgen -G "$folder/megatron/core/datasets/helpers_cpp*.so" >/dev/null ||
            fail "$wanted has no compiled data helpers, which a wheel has: run" \
                "make -C $wanted/megatron/core/datasets (with pybind11)"
    else
        [[ $wanted =~ ^[0-9]+\.[0-9]+(\.[0-9a-z.]+)?$ ]] ||
            fail "$wanted is neither a folder nor a version of megatron-core such as 0.18.2"
        folder=$REPOSITORY/.megatron/$wanted
        if [ ! -d "$folder" ]; then
            say "megatron-core $wanted: installing it into $folder, without a torch of its own"
            mkdir -p "${folder%/*}"
            rm -rf "$folder.part"
            install "$folder.log" "$VENV_PYTHON" -m pip install --progress-bar off --no-deps \
                --target "$folder.part" "megatron-core==$wanted" ||
                fail "pip could not install megatron-core $wanted: see its last lines above"
            mv "$folder.part" "$folder"
        fi
    fi
    # Before the environment's own: megatron is a namespace package, so its folders stay reachable, too.
    export PYTHONPATH=$folder${PYTHONPATH:+:$PYTHONPATH}
    say "megatron: $folder"
}
