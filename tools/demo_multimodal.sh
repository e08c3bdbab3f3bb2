#!/usr/bin/env bash
# The multimodal model from a fresh clone, on a CPU: makes .venv if there is none, makes the demo's pictures, edits and questions, trains a
# small language model on their words, then projector and stages 1 to 3 on a trained tokenizer, and measures prompts, edits and answers.
# tools/demo_multimodal.sh [--fast|--full] [--tokenizer DIR] [--kind stamps|shapes] [--output DIR] [key=value ...]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
set_up requirements.txt requirements-demo.txt
launch "$PYTHON" scripts/demo_multimodal.py "$@"
