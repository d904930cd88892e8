#!/usr/bin/env bash
# A job on several nodes under Slurm, one torchrun a node. From the repository's root:
#
#     sbatch --nodes=1 configs/slurm-torchrun.sh mixtral-like-12l-64e-8gpu RUN_FOLDER \
#         --data-path PREFIX --tokenizer-type HuggingFaceTokenizer --tokenizer-model MODEL
#     NODES_AFTER=64 sbatch --nodes=128 configs/slurm-torchrun.sh deepseek-v3-like-61l-256e-1024gpu RUN_FOLDER ...
#
# A node that fails, or a crash, queues the job again, MAX_RESTARTS times (10); a refusal does not. With
# --laep-exit-after-prune among its flags, the job that was pruned is submitted anew with NODES_AFTER nodes.
#SBATCH --job-name=laep
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:-.}"
source configs/job.sh
read_job "$@"
look "$SLURM_JOB_NUM_NODES"
move_if_pruned configs/slurm-torchrun.sh "$@"

export CUDA_DEVICE_MAX_CONNECTIONS=1
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
log="$RUN/attempt-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}.log"
code=0
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$GPUS_PER_NODE" \
    --rdzv-backend c10d --rdzv-endpoint "${hosts[0]}:29500" --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    -m megatron_laep "$SCRIPT" "${FLAGS[@]}" 2>&1 | tee "$log" || code=$?
finish "$(code_of_torchrun "$code" "$log")" configs/slurm-torchrun.sh "$@"
