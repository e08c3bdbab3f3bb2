#!/usr/bin/env bash
# One node's launcher under Slurm, started by slurm_train.sh through srun: tools/slurm_node.sh STAGE VARIANT [key=value ...]
# Hands SIGUSR1 on to the training processes. Slurm, by its settings, signals this shell alone or every process of the step; the launchers
# in between would end on SIGUSR1 and take the training with them, so they inherit that it is ignored.
set -euo pipefail
export NODE_RANK="$SLURM_NODEID"
TOOLS="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

descendants() { local child; for child in $(pgrep -P "$1" || true); do echo "$child"; descendants "$child"; done; }
HEARD=0
forward() {
  HEARD=$(( HEARD + 1 ))
  local pid
  for pid in $(descendants "$CHILD"); do
    # Training processes and their loaders' workers; not what these have started in turn, such as a download.
    if tr '\0' ' ' < "/proc/$pid/cmdline" 2>/dev/null | grep -q "scripts/train_stage"; then kill -USR1 "$pid" 2>/dev/null || true; fi
  done
  kill -USR1 "$CHILD" 2>/dev/null || true  # a single process has no launcher above it
}
(trap '' USR1; exec bash "$TOOLS/train_stage.sh" "$@") & CHILD=$!
trap forward USR1
CODE=0; BEFORE=-1
while [ "$BEFORE" != "$HEARD" ]; do  # a trapped signal ends `wait`, not the launcher: wait again
  BEFORE=$HEARD; NEXT=0
  wait "$CHILD" || NEXT=$?
  [ "$NEXT" -eq 127 ] || CODE=$NEXT
done
exit "$CODE"
