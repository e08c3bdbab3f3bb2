#!/usr/bin/env bash
# tools/segment_probe.sh muse|baseline --config C --checkpoint K --train-url U --val-url U [flags of scripts/segment_probe.py]
# --num-gpus N and --master-port P are as NUM_GPUS and MASTER_PORT.
# Quote patterns ('ade-{000000..000020}.tar'), which the script expands itself. NUM_GPUS > 1 starts that many processes.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
case "${1:-}" in
  muse|baseline) MODE="$1"; shift ;;
  -h|--help) exec "$PYTHON" "$ROOT/scripts/segment_probe.py" --help ;;
  *) fail "usage: tools/segment_probe.sh muse|baseline --config C --checkpoint K --train-url U --val-url U" ;;
esac
take_flags "$@"
launch_processes "$ROOT/scripts/segment_probe.py" --mode "$MODE" ${WORDS[@]+"${WORDS[@]}"}
