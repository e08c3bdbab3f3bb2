#!/usr/bin/env bash
# One stage of the multimodal model: tools/train_umm.sh umm_1b|umm_3b|umm_tiny|CONFIG.yaml [STAGE] [key=value ...]
# STAGE is projector, 1, 2 or 3 (umm_tiny: language, projector, 1, 2 or 3); a CONFIG.yaml is one already.
# The environment is train_stage.sh's: NUM_GPUS, BATCH_SIZE, NUM_WORKERS, NUM_NODES, ACCELERATE_CONFIG, DRY_RUN ...
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
usage() { fail "usage: tools/train_umm.sh umm_1b|umm_3b|umm_tiny projector|language|1|2|3 [key=value ...], or a CONFIG.yaml"; }
[ $# -ge 1 ] || usage
VARIANT="$1"; shift
case "$VARIANT" in
  -h|--help) exec "$PYTHON" "$ROOT/scripts/train_umm.py" --help ;;
  *.yaml) CONFIG="$VARIANT" ;;
  *)
    [ $# -ge 1 ] || usage
    case "$1" in [0-9]) STAGE="stage$1" ;; *) STAGE="$1" ;; esac
    CONFIG="$ROOT/configs/$VARIANT/$STAGE.yaml"; shift
    [ -f "$CONFIG" ] || usage ;;
esac
exec bash "$ROOT/tools/train_stage.sh" umm "$CONFIG" "$@"
