#!/usr/bin/env bash
# tools/segment_probe.sh muse|baseline --config C --checkpoint K --train-url U --val-url U [flags of scripts/segment_probe.py]
# Quote patterns ('ade-{000000..000020}.tar'): they are handed on as they are. NUM_GPUS > 1 starts that many processes.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
case "${1:-}" in
  muse|baseline) MODE="$1"; shift ;;
  -h|--help) exec "$PYTHON" "$ROOT/scripts/segment_probe.py" --help ;;
  *) echo "error: usage: tools/segment_probe.sh muse|baseline --config C --checkpoint K --train-url U --val-url U" >&2; exit 2 ;;
esac
LAUNCH=("$PYTHON")
if [ "${NUM_GPUS:-1}" -gt 1 ]; then LAUNCH=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$NUM_GPUS"); fi
exec "${LAUNCH[@]}" "$ROOT/scripts/segment_probe.py" --mode "$MODE" "$@"
