#!/usr/bin/env bash
# The paper's ablations on the demo's data, from a fresh clone: trains and measures every variant with three seeds, writes ablation.md and
# ablation.json. After an interruption the same command goes on. About two hours on two cores.
# tools/ablate.sh [--fast|--short|--full] [--variants a,b] [--seeds N] [--jobs N] [--data DIR] [--kind stamps|shapes] [--output DIR] [key=value ...]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
set_up requirements.txt requirements-demo.txt
launch "$PYTHON" scripts/ablate.py "$@"
