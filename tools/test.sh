#!/usr/bin/env bash
# Sets up .venv when there is none and runs the whole test suite, a file a process at a time; further arguments go to pytest (-n 0: one process).
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$ROOT/tools/setup_env.sh"
setup_env "$ROOT/requirements-dev.txt"
cd "$ROOT"
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
WORKERS="$(nproc 2>/dev/null || echo 2)"
exec "$PYTHON" -m pytest -q -n "$(( WORKERS < 8 ? WORKERS : 8 ))" --dist loadfile "$@" tests
