#!/usr/bin/env bash
# Train on every GPU of one node, or of several: run this on each of them.
#
#   bash nodes.sh                                        one node
#   NODES=2 HEAD=node-a bash nodes.sh                    on node-a and on the other one
#   MODEL=microsoft/phi-4 bash nodes.sh max_steps=1000   more settings, then other options of "phi3lora train"
#
# DATA and OUTPUT_DIR are on a file system that all nodes see. HEAD is the name that `hostname` prints on one of them.
set -euo pipefail

exec torchrun --nnodes="${NODES:-1}" --nproc-per-node="${GPUS:-gpu}" --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-endpoint="${HEAD:-localhost}:${PORT:-29500}" --rdzv-id="${JOB:-phi3lora}" \
    -m phi3lora train --model "${MODEL:-microsoft/Phi-3-mini-4k-instruct}" --data "${DATA:-chats.jsonl}" \
    --set output_dir="${OUTPUT_DIR:-runs/nodes}" resume_from_checkpoint=auto save_strategy=steps save_steps=100 "$@"
