#!/usr/bin/env bash
# As slurm-torchrun.sh, without torchrun: srun starts each rank, which takes its number from Slurm's variables, and
# whose exit code srun hands on, also that of a refusal.
#
#     NODES_AFTER=64 sbatch --nodes=128 configs/slurm-srun.sh deepseek-v3-like-61l-256e-1024gpu RUN_FOLDER ...
#
#SBATCH --job-name=laep
#SBATCH --ntasks-per-node=8
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
move_if_pruned configs/slurm-srun.sh "$@"

export CUDA_DEVICE_MAX_CONNECTIONS=1
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts[0]} MASTER_PORT=29500 PYTHON
code=0
# shellcheck disable=SC2016  # the variables are those of each rank
srun bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec "$PYTHON" -m megatron_laep "$@"' rank "$SCRIPT" "${FLAGS[@]}" || code=$?
finish "$code" configs/slurm-srun.sh "$@"
