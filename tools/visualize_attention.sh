#!/usr/bin/env bash
# tools/visualize_attention.sh single|batch --config C --checkpoint K [--image I] --output D
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -ge 1 ] || fail "usage: tools/visualize_attention.sh single|batch --config C --checkpoint K [--image I] --output D"
MODE="$1"; shift
launch "$PYTHON" "$ROOT/scripts/visualize_attention.py" --mode "$MODE" "$@"
