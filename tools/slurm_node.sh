#!/usr/bin/env bash
# One node's launcher under Slurm; slurm_train.sh starts it through srun: tools/slurm_node.sh STAGE VARIANT [key=value ...]
# Passes SIGUSR1 on to the training processes. Depending on its settings, Slurm signals this shell alone or every process of the step. The
# launchers in between would end on SIGUSR1 and take the training with them, so they are started with the signal ignored.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
export NODE_RANK="$SLURM_NODEID"

descendants() { local child; for child in $(pgrep -P "$1" || true); do echo "$child"; descendants "$child"; done; }
SIGNALS=0
forward() {
  SIGNALS=$(( SIGNALS + 1 ))
  local pid
  for pid in $(descendants "$CHILD"); do
    # Training processes and their data workers, which ignore it; not what these have started in turn, such as a download.
    if tr '\0' ' ' < "/proc/$pid/cmdline" 2>/dev/null | grep -q "scripts/train"; then kill -USR1 "$pid" 2>/dev/null || true; fi
  done
  kill -USR1 "$CHILD" 2>/dev/null || true  # a single process has no launcher above it
}
(trap '' USR1; exec bash "$ROOT/tools/train_stage.sh" "$@") & CHILD=$!
trap forward USR1
wait_for_child
exit "$CODE"
