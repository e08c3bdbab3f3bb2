#!/usr/bin/env bash
# Generation from a fresh clone, on a CPU: makes .venv if there is none, makes the demo's pictures, encodes them with a trained tokenizer,
# trains the same generator on its latents, on an untrained tokenizer's and on small pixels, samples, measures, draws.
# tools/demo_generation.sh [--fast|--full] [--tokenizer DIR] [--data DIR] [--output DIR] [key=value ...]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
set_up requirements.txt requirements-demo.txt
launch "$PYTHON" scripts/demo_generation.py "$@"
