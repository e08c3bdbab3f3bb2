# Sourced by the launchers: the project's root, its Python, and `launch`, which runs a command or with DRY_RUN=1 prints it.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ -n "${MUSE_PYTHON:-}" ]; then PYTHON="$MUSE_PYTHON"
elif [ -x "$ROOT/.venv/bin/python" ]; then PYTHON="$ROOT/.venv/bin/python"
else PYTHON="$(command -v python3)" || { echo "error: no Python found; set MUSE_PYTHON" >&2; exit 2; }; fi
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

# The command in place of this shell; with DRY_RUN=1 one line on stdout instead, quoted so that a shell reads the same words.
launch() {
  if [ "${DRY_RUN:-0}" = 1 ]; then printf '%q ' "$@"; echo; exit 0; fi
  exec "$@"
}
