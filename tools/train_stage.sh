#!/usr/bin/env bash
# One stage through accelerate: tools/train_stage.sh STAGE muse_1b|muse_3b|muse_tiny|CONFIG.yaml [key=value ...]
# From the environment: NUM_GPUS (processes on this machine; CPU processes where there is no GPU), NUM_NODES, NODE_RANK, MASTER_ADDR,
# MASTER_PORT, BATCH_SIZE (per process), NUM_WORKERS.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
usage() { echo "error: usage: tools/train_stage$1.sh muse_1b|muse_3b|muse_tiny|CONFIG.yaml [key=value ...]" >&2; exit 2; }
STAGE="$1"; shift
[ $# -ge 1 ] || usage "$STAGE"
VARIANT="$1"; shift
case "$VARIANT" in
  -h|--help) exec "$PYTHON" "$ROOT/scripts/train_stage$STAGE.py" --help ;;
  *.yaml) CONFIG="$VARIANT" ;;
  *) CONFIG="$ROOT/configs/$VARIANT/stage$STAGE.yaml"; [ -f "$CONFIG" ] || usage "$STAGE" ;;
esac
OVERRIDES=()
[ -n "${BATCH_SIZE:-}" ] && OVERRIDES+=("training.per_gpu_batch_size=$BATCH_SIZE")
[ -n "${NUM_WORKERS:-}" ] && OVERRIDES+=("dataset.params.num_workers_per_gpu=$NUM_WORKERS")

GPUS="$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')"
NODES="${NUM_NODES:-1}"
PER_NODE="${NUM_GPUS:-$(( GPUS > 0 ? GPUS : 1 ))}"
TOTAL=$(( PER_NODE * NODES ))
SCRIPT=("$ROOT/scripts/train_stage$STAGE.py" --config "$CONFIG" ${OVERRIDES[@]+"${OVERRIDES[@]}"} "$@")
if [ "$TOTAL" -eq 1 ]; then exec "$PYTHON" "${SCRIPT[@]}"; fi
if [ "$GPUS" -eq 0 ]; then
  # accelerate starts one process where it is told --cpu; torchrun starts as many as asked, and accelerate finds them over gloo.
  export ACCELERATE_USE_CPU=true OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( $(nproc) / PER_NODE > 0 ? $(nproc) / PER_NODE : 1 ))}"
  exec "$PYTHON" -m torch.distributed.run --nproc_per_node "$PER_NODE" --nnodes "$NODES" --node_rank "${NODE_RANK:-0}" \
    --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${MASTER_PORT:-29500}" "${SCRIPT[@]}"
fi
LAUNCH=(--num_processes "$TOTAL" --num_machines "$NODES" --machine_rank "${NODE_RANK:-0}" --main_process_port "${MASTER_PORT:-29500}"
        --multi_gpu --dynamo_backend no --mixed_precision no)
[ -n "${MASTER_ADDR:-}" ] && LAUNCH+=(--main_process_ip "$MASTER_ADDR")
exec "$PYTHON" -m accelerate.commands.launch "${LAUNCH[@]}" "${SCRIPT[@]}"
