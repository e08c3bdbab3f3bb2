#!/usr/bin/env bash
# Everything: sets up .venv when there is none, gets the demo's pictures and frozen networks, trains the three stages on the CPU, measures,
# draws. tools/demo.sh [--fast|--full] [--data DIR] [--kind stamps|shapes] [--output DIR] [key=value ...]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$ROOT/tools/setup_env.sh"
setup_env "$ROOT/requirements.txt" "$ROOT/requirements-demo.txt"
cd "$ROOT"
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
exec "$PYTHON" scripts/demo.py "$@"
