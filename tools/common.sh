# Sourced by every launcher: the project's root, its Python, and the functions that several launchers need.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fail() { echo "error: $1" >&2; exit 2; }

if [ -n "${MUSE_PYTHON:-}" ]; then PYTHON="$MUSE_PYTHON"
elif [ -x "$ROOT/.venv/bin/python" ]; then PYTHON="$ROOT/.venv/bin/python"
else PYTHON="$(command -v python3)" || fail "no Python found; set MUSE_PYTHON"; fi
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
# Threads wait without spinning, so that a busy machine does not stop a run (muse/utils/threads.py), where the user has not chosen.
if [ -z "${OMP_WAIT_POLICY+x}${GOMP_SPINCOUNT+x}${KMP_BLOCKTIME+x}" ]; then export OMP_WAIT_POLICY=PASSIVE; fi

# Replace this shell by a command. With DRY_RUN=1 print it instead, quoted so that a shell reads the same words.
launch() {
  if [ "${DRY_RUN:-0}" = 1 ]; then printf '%q ' "$@"; echo; exit 0; fi
  exec "$@"
}

# Read the flags that the authors' launchers take: --num-gpus N and --master-port P win over NUM_GPUS and MASTER_PORT. The other
# words stay in WORDS.
take_flags() {
  WORDS=()
  while [ $# -gt 0 ]; do
    local word="$1" name value
    shift
    name="${word%%=*}"
    case "${name//_/-}" in
      --num-gpus|--master-port)
        if [[ "$word" = *=* ]]; then value="${word#*=}"
        else [ $# -ge 1 ] || fail "$word needs a number"; value="$1"; shift; fi
        [[ "$value" =~ ^[0-9]+$ ]] || fail "$name needs a number, got '$value'"
        if [ "${name//_/-}" = --num-gpus ]; then NUM_GPUS="$value"; else MASTER_PORT="$value"; fi ;;
      *) WORDS+=("$word") ;;
    esac
  done
}

# Run a Python file with its arguments in NUM_GPUS processes (default: 1) on this machine, which meet at MASTER_PORT (default: any).
launch_processes() {
  [[ "${NUM_GPUS:-1}" =~ ^[0-9]+$ ]] || fail "NUM_GPUS must be a whole number, got '$NUM_GPUS'"
  if [ "${NUM_GPUS:-1}" -gt 1 ]; then
    local meet=(--standalone)
    [ -z "${MASTER_PORT:-}" ] || meet=(--master_addr 127.0.0.1 --master_port "$MASTER_PORT")
    launch "$PYTHON" -m torch.distributed.run "${meet[@]}" --nproc_per_node "$NUM_GPUS" "$@"
  fi
  launch "$PYTHON" "$@"
}

# Prepare for a command that works from a fresh clone: `.venv` with the requirements of FILE..., then the project's root as working
# directory. Makes `.venv` if there is none, installs only what changed, and leaves a MUSE_PYTHON as it is.
set_up() {
  cd "$ROOT"
  export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
  if [ -n "${MUSE_PYTHON:-}" ] || [ "${DRY_RUN:-0}" = 1 ]; then return; fi
  if [ ! -x .venv/bin/python ]; then
    echo "making .venv"
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "Python 3.10 or newer is needed"
    python3 -m venv .venv
  fi
  PYTHON="$ROOT/.venv/bin/python"
  local stamp=.venv/.muse-installed wanted flags=() file
  wanted="$(cat "$@" setup.py | cksum) $*"
  if grep -qxF "$wanted" "$stamp" 2>/dev/null; then return; fi
  echo "installing packages (once; torch alone is some GB)"
  for file in "$@"; do flags+=(-r "$file"); done
  "$PYTHON" -m pip install -qq --disable-pip-version-check "${flags[@]}"
  "$PYTHON" -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e "$ROOT" 2>/dev/null \
    || echo "$ROOT" > "$("$PYTHON" -c 'import site; print(site.getsitepackages()[0])')/muse.pth"
  echo "$wanted" >> "$stamp"
}

# Wait for the process $CHILD and put its exit code into CODE. A trapped signal ends `wait`, but not the child; the trap must count
# its signals in SIGNALS, so that this function knows to wait again.
wait_for_child() {
  local before=-1 next
  CODE=0
  while [ "$before" != "$SIGNALS" ]; do
    before=$SIGNALS; next=0
    wait "$CHILD" || next=$?
    [ "$next" -eq 127 ] || CODE=$next  # 127: the child had ended before
  done
}
