#!/usr/bin/env bash
# Style and the whole test suite from a fresh clone: makes .venv if there is none, runs ruff, then pytest with one process for each file at
# a time. Arguments go to pytest (-n 0: one process).
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
set_up requirements-dev.txt
"$PYTHON" -m ruff format --check . || fail "these files are not formatted; run: $PYTHON -m ruff format ."
"$PYTHON" -m ruff check --output-format concise . || fail "ruff found these faults; this corrects some: $PYTHON -m ruff check --fix ."
WORKERS="$(nproc 2>/dev/null || echo 2)"
launch "$PYTHON" -m pytest -q -n "$(( WORKERS < 8 ? WORKERS : 8 ))" --dist loadfile "$@" tests
