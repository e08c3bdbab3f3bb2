#!/usr/bin/env bash
# Run the commands of README and docs that no test runs: tools/check_docs.sh [--list] [--all] [--limit SECONDS] [README.md:30 ...]
# Without names: the blocks marked *Takes …*. Those marked *Needs …* are named, and run with --all or by name.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ ! -d "$(dirname "$PYTHON")" ] || export PATH="$(cd "$(dirname "$PYTHON")" && pwd):$PATH" # `python`, `muse` and `pip` of a block
launch "$PYTHON" "$ROOT/tools/doc_blocks.py" "$@"
