#!/usr/bin/env bash
# Sets up .venv when there is none and runs the whole test suite; further arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$ROOT/tools/setup_env.sh"
setup_env "$ROOT/requirements-dev.txt"
cd "$ROOT"
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
exec "$PYTHON" -m pytest -q "$@" tests
