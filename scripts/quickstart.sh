#!/usr/bin/env bash
# Everything on a fresh machine, in one command: environment, corpus, a tiny byte-level MoE model
# trained on two CPU processes, pruned half-way inside the running job, a summary of the run, and a
# report on it to open in a browser.
#
#     scripts/quickstart.sh [--iterations N] [--prune-iteration N] [--run-dir DIR] [--fresh]
#
#     --iterations N        iterations in all (300, or $QUICKSTART_ITERATIONS)
#     --prune-iteration N   prune after this one (half of them, or $QUICKSTART_PRUNE_ITERATION)
#     --run-dir DIR         checkpoints, log and JSON go here (runs/quickstart)
#     --fresh               start over: delete what an earlier start left in the run directory
#
# A second start reuses what is there: a finished run is not repeated, its summary and report are made again;
# an interrupted one is continued from its last checkpoint. The environment is .venv in the
# repository, or an environment of your own named by MEGATRON_LAEP_VENV; $PYTHON names the Python to
# make .venv with.
set -euo pipefail

# shellcheck source=scripts/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

CONFIG=$REPOSITORY/configs/gpt-moe-4l-32e-cpu-2proc.args
DATA_PREFIX=$REPOSITORY/data/stdlib

iterations=${QUICKSTART_ITERATIONS:-300}
prune_iteration=${QUICKSTART_PRUNE_ITERATION:-}
run_dir=$REPOSITORY/runs/quickstart
fresh=false

usage() { sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; }

while [ $# -gt 0 ]; do
    case $1 in
        --iterations | --prune-iteration | --run-dir)
            [ $# -ge 2 ] || fail "$1 needs a value: see $0 --help"
            case $1 in
                --iterations) iterations=$2 ;;
                --prune-iteration) prune_iteration=$2 ;;
                --run-dir) run_dir=$2 ;;
            esac
            shift 2
            ;;
        --fresh) fresh=true && shift ;;
        -h | --help) usage && exit 0 ;;
        *) fail "unknown argument $1: see $0 --help" ;;
    esac
done

[[ $iterations =~ ^[1-9][0-9]*$ ]] ||
    fail "--iterations must be a whole number of at least 1, got '$iterations'"
prune_iteration=${prune_iteration:-$((iterations / 2))}
if ! [[ $prune_iteration =~ ^[1-9][0-9]*$ ]] || ((prune_iteration >= iterations)); then
    fail "--prune-iteration must be at least 1 and less than --iterations, which is $iterations," \
        "got '$prune_iteration'"
fi

prepare_corpus() {
    if [ -s "$DATA_PREFIX.bin" ] && [ -s "$DATA_PREFIX.idx" ]; then
        say "corpus: $DATA_PREFIX.bin is there, reused"
        return
    fi
    say "corpus: the Python standard library's own sources, as bytes"
    # Megatron warns at import about GPU kernels that a CPU has no use for.
    PYTHONWARNINGS=ignore "$VENV_PYTHON" "$REPOSITORY/scripts/prepare_data.py" --stdlib --output-prefix "$DATA_PREFIX"
}

# The run directory holds one run: what it was started with is written there, and compared. The file
# also marks the directory as the quickstart's own: no other is written into, or deleted by --fresh.
claim_run_dir() {
    local wanted="iterations=$iterations prune_iteration=$prune_iteration" found
    local settings=$run_dir/quickstart.settings
    if [ -n "$(ls -A "$run_dir" 2>/dev/null)" ]; then
        [ -f "$settings" ] ||
            fail "$run_dir is not empty and was not made by this script: choose another --run-dir"
        found=$(cat "$settings")
        if [ "$fresh" = true ]; then
            rm -rf "$run_dir"
        elif [ "$found" != "$wanted" ]; then
            fail "$run_dir holds a run with $found, and $wanted is asked for: add --fresh to" \
                "delete that run, or --run-dir DIR to keep it"
        fi
    fi
    mkdir -p "$run_dir"
    echo "$wanted" >"$settings"
}

train() {
    local checkpoint=$run_dir/latest_checkpointed_iteration.txt config_flags run_flags
    if [ -s "$checkpoint" ]; then
        say "training: continuing from iteration $(cat "$checkpoint") of $iterations"
    else
        say "training: $iterations iterations on two processes, pruning after $prune_iteration;" \
            "all output goes to $run_dir/train.log"
        # A log without a checkpoint is of a run that was stopped before its first one.
        rm -f "$run_dir/train.log"
    fi
    # One flag with its values a line, '#' starts a comment; xargs understands quotes.
    mapfile -t config_flags < <(sed 's/#.*//' "$CONFIG" | xargs -n 1)
    run_flags=(
        --train-iters "$iterations"
        --lr-decay-iters "$iterations"
        --data-path "$DATA_PREFIX"
        --save "$run_dir"
        --load "$run_dir"
        --save-interval 100
        --eval-interval "$((iterations + 1))" # once, at the end
        --eval-iters 10
        --log-interval 5
        --laep-prune-iteration "$prune_iteration"
        # Ten windows before the pruning tell whether the loads are stable.
        --laep-window "$(((prune_iteration + 9) / 10))"
        --laep-record-interval 10
    )
    # torch.distributed.run is torchrun: started as a module it is surely the environment's own.
    "$VENV_PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 \
        -m megatron_laep "$REPOSITORY/scripts/pretrain_gpt.py" \
        "${config_flags[@]}" "${run_flags[@]}" </dev/null 2>&1 |
        "$VENV_PYTHON" "$REPOSITORY/scripts/follow_log.py" "$run_dir/train.log" ||
        fail "the training ended with an error: see above, or $run_dir/train.log. A second start" \
            "continues from the last checkpoint."
    touch "$run_dir/quickstart.finished"
}

setup_env quickstart
claim_run_dir
if [ -e "$run_dir/quickstart.finished" ]; then
    say "training: $run_dir holds the finished run, it is not repeated (--fresh starts over)"
else
    prepare_corpus
    train
fi
say "summary of $run_dir"
"$VENV_PYTHON" -m megatron_laep.tools summary "$run_dir"
say "report"
"$VENV_PYTHON" -m megatron_laep.tools report "$run_dir"
