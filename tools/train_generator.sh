#!/usr/bin/env bash
# A generator on latents: tools/train_generator.sh imagenet256_xl|imagenet256_b|tiny|CONFIG.yaml [key=value ...]
# The environment is train_stage.sh's: NUM_GPUS, BATCH_SIZE, NUM_WORKERS, NUM_NODES, ACCELERATE_CONFIG, DRY_RUN ...
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
usage() { fail "usage: tools/train_generator.sh imagenet256_xl|imagenet256_b|tiny|CONFIG.yaml [key=value ...]"; }
[ $# -ge 1 ] || usage
case "$1" in
  -h|--help) exec "$PYTHON" "$ROOT/scripts/train_generator.py" --help ;;
  *.yaml) CONFIG="$1" ;;
  *) CONFIG="$ROOT/configs/generation/$1.yaml"; [ -f "$CONFIG" ] || usage ;;
esac
shift
if [ -n "${NUM_WORKERS:-}" ]; then set -- "latents.num_workers_per_gpu=$NUM_WORKERS" "$@"; unset NUM_WORKERS; fi
exec bash "$ROOT/tools/train_stage.sh" generator "$CONFIG" "$@"
