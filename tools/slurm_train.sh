#!/usr/bin/env bash
#SBATCH --job-name=muse
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
# One stage under Slurm: sbatch [--nodes N ...] tools/slurm_train.sh STAGE [muse_1b|muse_3b|CONFIG.yaml] [key=value ...]
# srun starts one launcher on each node (slurm_node.sh, which runs train_stage.sh). Two minutes before the time limit, or when the job is
# preempted, the training processes get SIGUSR1: they save after the running step, the job is queued again, and goes on from there.
# From the environment: what train_stage.sh reads (NUM_GPUS defaults to the job's GPUs on a node), MUSE_ROOT (this checkout; sbatch runs a
# copy of this script, so submit from the checkout or set it), DRY_RUN=1 (print the srun line and what each node would run).
PROJECT="${MUSE_ROOT:-${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}}"
[ -f "$PROJECT/tools/common.sh" ] \
  || { echo "error: $PROJECT holds no tools/common.sh: submit from the project's root, or set MUSE_ROOT" >&2; exit 2; }
source "$PROJECT/tools/common.sh"
USAGE="usage: sbatch tools/slurm_train.sh STAGE [muse_1b|muse_3b|CONFIG.yaml] [--recipe paper|release] [key=value ...]"
[ $# -ge 1 ] && [[ "$1" =~ ^[0-9]$ ]] || fail "$USAGE"
DRY="${DRY_RUN:-0}"
[ -n "${SLURM_JOB_ID:-}" ] || [ "$DRY" = 1 ] || fail "not within a Slurm job: submit this script with sbatch"

if [ -n "${SLURM_JOB_ID:-}" ]; then
  HOSTS="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
  MASTER_ADDR="${MASTER_ADDR:-${HOSTS%%$'\n'*}}"
  NUM_NODES="${SLURM_NNODES:-${SLURM_JOB_NUM_NODES:-1}}"
  NUM_GPUS="${NUM_GPUS:-${SLURM_GPUS_ON_NODE:-}}"
fi
export NUM_NODES="${NUM_NODES:-1}" MASTER_ADDR="${MASTER_ADDR:-FIRST_NODE}"
export MASTER_PORT="${MASTER_PORT:-$(( 20000 + ${SLURM_JOB_ID:-0} % 20000 ))}"  # two jobs on one node get different ports
if [ -n "${NUM_GPUS:-}" ]; then export NUM_GPUS; else unset NUM_GPUS; fi

STEP=(srun --kill-on-bad-exit=1 --nodes="$NUM_NODES" --ntasks="$NUM_NODES" --ntasks-per-node=1)
# srun does not take this over from sbatch by itself; without it all loader workers of a node would share one core.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || STEP+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
STEP+=(bash "$ROOT/tools/slurm_node.sh" "$@")
if [ "$DRY" = 1 ]; then
  printf '%q ' "${STEP[@]}"; echo
  for (( rank = 0; rank < NUM_NODES; rank++ )); do NODE_RANK="$rank" bash "$ROOT/tools/train_stage.sh" "$@"; done
  exit 0
fi

SIGNALS=0
forward() {
  SIGNALS=$(( SIGNALS + 1 ))
  echo "signal: asking the training processes to save and end" >&2
  kill -USR1 "$CHILD" 2>/dev/null || true  # srun passes it on to the step
}
trap forward USR1 TERM
"${STEP[@]}" & CHILD=$!
wait_for_child
if [ "$SIGNALS" -gt 0 ] && [ "$CODE" -eq 0 ]; then
  echo "saved; queued again: the job goes on from the checkpoint" >&2
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$CODE"
