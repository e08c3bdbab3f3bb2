#!/usr/bin/env bash
# tools/evaluate.sh CONFIG CHECKPOINT [OUTPUT_DIR] [flags of scripts/evaluate.py and key=value ...]
# rFID, IS, PSNR, SSIM, LPIPS -> OUTPUT_DIR/metrics.json. NUM_GPUS > 1, or --num-gpus N, starts that many processes.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
USAGE="usage: tools/evaluate.sh CONFIG CHECKPOINT [OUTPUT_DIR] [flags of scripts/evaluate.py]"
case "${1:-}" in -h|--help) echo "$USAGE"; exec "$PYTHON" "$ROOT/scripts/evaluate.py" --help;; esac
take_flags "$@"
set -- ${WORDS[@]+"${WORDS[@]}"}
[ $# -ge 2 ] || fail "$USAGE"
CONFIG="$1"; CHECKPOINT="$2"; shift 2
OUTPUT="outputs/evaluate"
if [ $# -ge 1 ] && [[ "$1" != -* && "$1" != *=* ]]; then OUTPUT="$1"; shift; fi
launch_processes "$ROOT/scripts/evaluate.py" --config "$CONFIG" --checkpoint "$CHECKPOINT" --output_dir "$OUTPUT" "$@"
