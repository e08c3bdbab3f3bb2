#!/usr/bin/env bash
# The ablations of the paper on the demo's data: sets up .venv when there is none, trains every variant with three seeds, measures, writes
# ablation.md and ablation.json; interrupted, the same command goes on. About two hours on two cores.
# tools/ablate.sh [--fast|--full] [--variants a,b] [--seeds N] [--jobs N] [--data DIR] [--kind stamps|shapes] [--output DIR] [key=value ...]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$ROOT/tools/setup_env.sh"
setup_env "$ROOT/requirements.txt" "$ROOT/requirements-demo.txt"
cd "$ROOT"
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
exec "$PYTHON" scripts/ablate.py "$@"
