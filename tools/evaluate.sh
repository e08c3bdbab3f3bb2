#!/usr/bin/env bash
# tools/evaluate.sh CONFIG CHECKPOINT [OUTPUT_DIR] [flags of scripts/evaluate.py and key=value ...]
# rFID, IS, PSNR, SSIM, LPIPS -> OUTPUT_DIR/metrics.json. NUM_GPUS > 1 starts that many processes.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
usage() { echo "usage: tools/evaluate.sh CONFIG CHECKPOINT [OUTPUT_DIR] [flags of scripts/evaluate.py]"; }
case "${1:-}" in -h|--help) usage; exec "$PYTHON" "$ROOT/scripts/evaluate.py" --help;; esac
[ $# -ge 2 ] || { echo "error: $(usage)" >&2; exit 2; }
CONFIG="$1"; CHECKPOINT="$2"; shift 2
OUTPUT="outputs/evaluate"
if [ $# -ge 1 ] && [[ "$1" != -* && "$1" != *=* ]]; then OUTPUT="$1"; shift; fi
LAUNCH=("$PYTHON")
if [ "${NUM_GPUS:-1}" -gt 1 ]; then LAUNCH=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$NUM_GPUS"); fi
exec "${LAUNCH[@]}" "$ROOT/scripts/evaluate.py" --config "$CONFIG" --checkpoint "$CHECKPOINT" --output_dir "$OUTPUT" "$@"
