# Shared by the scripts here that start a job on several nodes; sourced by them, from the repository's root.
# Says with `laep check` what the next start would do, and what its end means.

REFUSED=78   # a job that is refused, on every rank: the same command would be refused again
PYTHON=${PYTHON:-python3}
SCRIPT=${SCRIPT:-scripts/pretrain_gpt.py}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}

# FLAGS: those of a job's file, its folder, and what else was given.
read_job() {   # JOB FOLDER [FLAGS]
    [ $# -ge 2 ] || { echo "usage: $0 JOB RUN_FOLDER [MORE FLAGS]; JOB is a name in configs/" >&2; exit 2; }
    local file="configs/$1.args"
    RUN=$2
    [ -f "$file" ] || { echo "$0: there is no $file" >&2; exit 2; }
    mapfile -t FLAGS < <(sed 's/#.*//' "$file" | xargs -n 1)
    shift 2
    FLAGS+=(--save "$RUN" --load "$RUN" "$@")
    mkdir -p "$RUN"
}

# PRUNED: how many prunings the model has behind it. Ends the script where the job would be refused, before a
# GPU is touched.
look() {   # NODES
    local code=0 found
    found=$("$PYTHON" -m megatron_laep.tools check --ranks $(($1 * GPUS_PER_NODE)) --json -- "${FLAGS[@]}") || code=$?
    if [ "$code" -ne 0 ]; then
        printf '%s\nlaep check: exit code %s, so the job is not started\n' "$found" "$code" >&2
        exit "$REFUSED"
    fi
    PRUNED=$("$PYTHON" -c 'import json, sys; print(len(json.load(sys.stdin)["pruned_at"]))' <<<"$found")
}

# torchrun ends with 1, whatever its workers ended with; what it writes of them tells.
code_of_torchrun() {   # CODE LOG
    if [ "$1" -ne 0 ] && grep -q '^ *exitcode *: 78 ' "$2"; then echo "$REFUSED"; else echo "$1"; fi
}

# In a batch job of Slurm: begins again on fewer nodes where the model was pruned meanwhile.
move_if_pruned() {   # BATCH_SCRIPT and its arguments
    if [ "$PRUNED" -gt 0 ] && [ "${NODES_AFTER:-$SLURM_JOB_NUM_NODES}" -ne "$SLURM_JOB_NUM_NODES" ]; then
        echo "pruned $PRUNED times: goes on with $NODES_AFTER nodes"
        sbatch --nodes="$NODES_AFTER" "$@"
        exit 0
    fi
}

# In a batch job of Slurm: what follows its end.
finish() {   # CODE BATCH_SCRIPT and its arguments
    local code=$1 before=$PRUNED
    shift
    if [ "$code" -eq 0 ]; then
        look "$SLURM_JOB_NUM_NODES"
        if [ "$PRUNED" -gt "$before" ]; then
            echo "the model was pruned: goes on with ${NODES_AFTER:-$SLURM_JOB_NUM_NODES} nodes"
            sbatch --nodes="${NODES_AFTER:-$SLURM_JOB_NUM_NODES}" "$@"
        fi
    elif [ "$code" -ne "$REFUSED" ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "${MAX_RESTARTS:-10}" ]; then
        echo "ended with $code: queued again"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$code"
}
