#!/usr/bin/env bash
# tools/reproduce.sh tokenizer|probe|segmentation|generation|multimodal|ablation [--long] [--output_dir DIR] [--device D]
# A table of the paper: runs the cells for which weights and data are there, names what is missing. docs/reproduce.md has all commands.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
set_up requirements.txt requirements-demo.txt
launch "$PYTHON" scripts/reproduce.py "$@"
