#!/usr/bin/env bash
# tools/visualize_attention.sh single|batch --config C --checkpoint K [--image I] --output D
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -ge 1 ] || { echo "error: usage: tools/visualize_attention.sh single|batch --config C --checkpoint K [--image I] --output D" >&2; exit 2; }
MODE="$1"; shift
exec "$PYTHON" "$ROOT/scripts/visualize_attention.py" --mode "$MODE" "$@"
