#!/usr/bin/env bash
# One stage: tools/train_stage.sh STAGE [muse_1b|muse_3b|muse_tiny|CONFIG.yaml] [--recipe paper|release] [key=value ...]
# Without a variant it is muse_1b. --num-gpus N and --master-port P are as NUM_GPUS and MASTER_PORT.
# From the environment: NUM_GPUS (processes on this machine; CPU processes where there is no GPU), BATCH_SIZE (per process), NUM_WORKERS;
# on several machines, started once on each, NUM_NODES, NODE_RANK (0 on the first), MASTER_ADDR, MASTER_PORT;
# ACCELERATE_CONFIG (a YAML of accelerate, such as configs/accelerate/fsdp.yaml), LAUNCHER=accelerate|torchrun (accelerate on GPUs),
# MIXED_PRECISION (bf16|fp16|no; otherwise the configuration's), DRY_RUN=1 (print the command and end).
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
usage() { fail "usage: tools/train_stage$1.sh [muse_1b|muse_3b|muse_tiny|CONFIG.yaml] [--recipe paper|release] [key=value ...]"; }
[ $# -ge 1 ] || usage ""
STAGE="$1"; shift
FILE="$ROOT/scripts/train_stage$STAGE.py"
[ -f "$FILE" ] || FILE="$ROOT/scripts/train_$STAGE.py"  # such as generator
[ -f "$FILE" ] || FILE="$ROOT/scripts/train.py"  # a stage of one's own needs no script
take_flags "$@"
set -- ${WORDS[@]+"${WORDS[@]}"}
VARIANT=muse_1b
case "${1:-}" in
  -h|--help) VARIANT="$1" ;;
  ""|-*) ;;
  *=*) if [ -f "$1" ]; then VARIANT="$1"; shift; fi ;;  # an override, or a file with such a name
  *) VARIANT="$1"; shift ;;
esac
case "$VARIANT" in
  -h|--help) exec "$PYTHON" "$FILE" --help ;;
  *.yaml) CONFIG="$VARIANT" ;;
  *) CONFIG="$ROOT/configs/$VARIANT/stage$STAGE.yaml"; [ -f "$CONFIG" ] || usage "$STAGE" ;;
esac
OVERRIDES=()
[ -n "${BATCH_SIZE:-}" ] && OVERRIDES+=("training.per_gpu_batch_size=$BATCH_SIZE")
[ -n "${NUM_WORKERS:-}" ] && OVERRIDES+=("dataset.params.num_workers_per_gpu=$NUM_WORKERS")
[ -n "${MIXED_PRECISION:-}" ] && OVERRIDES+=("training.mixed_precision=$MIXED_PRECISION")

GPUS="$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')"
NODES="${NUM_NODES:-1}"; RANK="${NODE_RANK:-0}"; PORT="${MASTER_PORT:-29500}"
PER_NODE="${NUM_GPUS:-$(( GPUS > 0 ? GPUS : 1 ))}"
for name in NODES RANK PORT PER_NODE; do
  [[ "${!name}" =~ ^[0-9]+$ ]] || fail "NUM_NODES, NODE_RANK, MASTER_PORT and NUM_GPUS must be whole numbers, got '${!name}'"
done
(( NODES >= 1 && PER_NODE >= 1 )) || fail "NUM_NODES and NUM_GPUS must be at least 1"
(( RANK < NODES )) || fail "NODE_RANK=$RANK with NUM_NODES=$NODES: ranks run from 0 to NUM_NODES - 1"
(( NODES == 1 )) || [ -n "${MASTER_ADDR:-}" ] || fail "NUM_NODES=$NODES needs MASTER_ADDR: the first machine's name or address"
[ -z "${ACCELERATE_CONFIG:-}" ] || [ -f "$ACCELERATE_CONFIG" ] || fail "ACCELERATE_CONFIG=$ACCELERATE_CONFIG: no such file"
TOTAL=$(( PER_NODE * NODES ))
SCRIPT=("$FILE" --config "$CONFIG" ${OVERRIDES[@]+"${OVERRIDES[@]}"} "$@")
if [ "$TOTAL" -eq 1 ] && [ -z "${ACCELERATE_CONFIG:-}" ]; then launch "$PYTHON" "${SCRIPT[@]}"; fi

# Both launchers pass Ctrl-C and SIGTERM on to the training processes, and kill those that have not ended after 30 seconds. A save of a
# large model may take longer.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
LAUNCHER="${LAUNCHER:-$([ "$GPUS" -eq 0 ] && [ -z "${ACCELERATE_CONFIG:-}" ] && echo torchrun || echo accelerate)}"
case "$LAUNCHER" in
  torchrun)
    [ -z "${ACCELERATE_CONFIG:-}" ] || fail "ACCELERATE_CONFIG is read by LAUNCHER=accelerate alone"
    if [ "$GPUS" -eq 0 ]; then
      # accelerate's launcher starts one process where it is told --cpu; torchrun starts as many as asked, joined over gloo.
      export ACCELERATE_USE_CPU=true OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( $(nproc) / PER_NODE > 0 ? $(nproc) / PER_NODE : 1 ))}"
    fi
    launch "$PYTHON" -m torch.distributed.run --nproc_per_node "$PER_NODE" --nnodes "$NODES" --node_rank "$RANK" \
      --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "$PORT" "${SCRIPT[@]}" ;;
  accelerate)
    LAUNCH=(--num_processes "$TOTAL" --num_machines "$NODES" --machine_rank "$RANK" --main_process_port "$PORT")
    if [ -n "${ACCELERATE_CONFIG:-}" ]; then LAUNCH=(--config_file "$ACCELERATE_CONFIG" "${LAUNCH[@]}")
    else LAUNCH+=(--multi_gpu --dynamo_backend no --mixed_precision no); fi
    [ -n "${MASTER_ADDR:-}" ] && LAUNCH+=(--main_process_ip "$MASTER_ADDR")
    launch "$PYTHON" -m accelerate.commands.launch "${LAUNCH[@]}" "${SCRIPT[@]}" ;;
  *) fail "LAUNCHER must be accelerate or torchrun, got '$LAUNCHER'" ;;
esac
