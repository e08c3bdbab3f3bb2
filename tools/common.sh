# Sourced by the launchers: the project's root and its Python.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ -n "${MUSE_PYTHON:-}" ]; then PYTHON="$MUSE_PYTHON"
elif [ -x "$ROOT/.venv/bin/python" ]; then PYTHON="$ROOT/.venv/bin/python"
else PYTHON="$(command -v python3)" || { echo "error: no Python found; set MUSE_PYTHON" >&2; exit 2; }; fi
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
