#!/usr/bin/env bash
# Stage 0: tools/train_stage0.sh [muse_1b|muse_3b|muse_tiny] [--recipe paper|release] [key=value ...]; see train_stage.sh for what the environment sets.
exec bash "$(dirname "${BASH_SOURCE[0]}")/train_stage.sh" 0 "$@"
