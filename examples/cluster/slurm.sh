#!/usr/bin/env bash
# Train on several nodes of a Slurm cluster, and go on from the newest checkpoint when the job is queued again.
#
#   DATA=/shared/chats.jsonl OUTPUT_DIR=/shared/runs/a sbatch slurm.sh
#   DATA=... sbatch --nodes=8 slurm.sh max_steps=5000    more settings, then other options of "phi3lora train"
#
# Slurm queues the job again after a preemption or a lost node. Three minutes before the time limit this script asks the
# processes to stop, which they do after a step with a checkpoint, and queues the job itself.
#SBATCH --job-name=phi3lora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
set -uo pipefail

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=150 # seconds that torchrun gives its processes for a step and a checkpoint

out_of_time=0
trap 'out_of_time=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1 # its steps, not this shell

# This shell runs on the job's first node.
srun --kill-on-bad-exit=1 \
    torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="$SLURM_GPUS_ON_NODE" --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-endpoint="$(hostname):$((20000 + SLURM_JOB_ID % 10000))" --rdzv-id="$SLURM_JOB_ID" \
    -m phi3lora train --model "${MODEL:-microsoft/Phi-3-mini-4k-instruct}" --data "$DATA" \
    --set output_dir="$OUTPUT_DIR" resume_from_checkpoint=auto save_strategy=steps save_steps=100 "$@" &
step=$!
wait "$step" # ends early when USR1 comes
wait "$step"
status=$?

if ((out_of_time && status)); then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
