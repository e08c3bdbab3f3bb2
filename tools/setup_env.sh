# Sourced after common.sh by demo.sh and test.sh: `.venv` with everything installed, made when there is none, reused when there is.
# `setup_env FILE...` installs requirement files; nothing is asked of the network when they are already met.
setup_env() {
  if [ -n "${MUSE_PYTHON:-}" ]; then PYTHON="$MUSE_PYTHON"; return; fi
  if [ ! -x "$ROOT/.venv/bin/python" ]; then
    echo "making .venv"
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed" >&2; exit 2; }
    python3 -m venv "$ROOT/.venv"
  fi
  PYTHON="$ROOT/.venv/bin/python"
  local stamp="$ROOT/.venv/.muse-installed" wanted
  wanted="$(cat "$@" "$ROOT/setup.py" | cksum) $*"
  if ! grep -qxF "$wanted" "$stamp" 2>/dev/null; then
    echo "installing packages (once; torch alone is some GB)"
    local flags=(); for file in "$@"; do flags+=(-r "$file"); done
    "$PYTHON" -m pip install -qq --disable-pip-version-check "${flags[@]}"
    "$PYTHON" -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e "$ROOT" 2>/dev/null \
      || echo "$ROOT" > "$("$PYTHON" -c 'import site; print(site.getsitepackages()[0])')/muse.pth"
    echo "$wanted" >> "$stamp"
  fi
}
