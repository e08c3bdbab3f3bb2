#!/usr/bin/env bash
# The whole demo from a fresh clone: makes .venv if there is none, downloads the pictures and frozen networks, trains the stages on the CPU,
# measures, and writes a report. tools/demo.sh [--fast|--full] [--encoder muse_tiny|scratch] [--steps N,N,N] [--data DIR]
# [--kind everything|stamps|shapes] [--output DIR] [key=value ...]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
set_up requirements.txt requirements-demo.txt
launch "$PYTHON" scripts/demo.py "$@"
