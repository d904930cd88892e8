#!/usr/bin/env bash
# A job on several nodes without a scheduler: run on every node, with the same arguments, from the repository's root.
#
#     RDZV=first-node:29500 NNODES=1 configs/torchrun-elastic.sh mixtral-like-12l-64e-8gpu RUN_FOLDER ...
#     RDZV=first-node:29500 NNODES=128 NNODES_AFTER=64:128 configs/torchrun-elastic.sh \
#         deepseek-v3-like-61l-256e-1024gpu RUN_FOLDER ...
#
# NNODES, and NNODES_AFTER once the model is pruned, are a number or MIN:MAX: nodes may come and go then, as far as the
# flags allow (the parallel sizes have to divide the ranks). torchrun starts the ranks again MAX_RESTARTS times (10). A
# node with LEAVE_AFTER_PRUNE=1 ends with the pruning.
set -euo pipefail

source configs/job.sh
read_job "$@"
while :; do
    nnodes=$NNODES
    look "${nnodes#*:}"
    if [ "$PRUNED" -gt 0 ]; then
        [ "${LEAVE_AFTER_PRUNE:-0}" -eq 0 ] || exit 0
        nnodes=${NNODES_AFTER:-$NNODES}
    fi
    before=$PRUNED
    export CUDA_DEVICE_MAX_CONNECTIONS=1
    log="$RUN/attempt-$(hostname)-pruned$PRUNED.log"
    code=0
    torchrun --nnodes "$nnodes" --nproc-per-node "$GPUS_PER_NODE" --max-restarts "${MAX_RESTARTS:-10}" \
        --rdzv-backend c10d --rdzv-endpoint "$RDZV" --rdzv-id "$(basename "$RUN")-$PRUNED" \
        -m megatron_laep "$SCRIPT" "${FLAGS[@]}" 2>&1 | tee "$log" || code=$?
    code=$(code_of_torchrun "$code" "$log")
    [ "$code" -eq 0 ] || exit "$code"
    look "${nnodes#*:}"
    [ "$PRUNED" -gt "$before" ] || exit 0
done
