#!/usr/bin/env bash
# The teachers of all verticals, one an array task; each saves, is requeued and continues by itself.
#
#   mkdir -p /shared/logs && cd /shared/logs
#   sbatch --array=0-19 --gpus-per-node=1 /path/to/launch/slurm/teacher_array.sh workdir=/shared/eft base=timm base.name=resnet50
#
# Task N trains the N-th vertical of WORKDIR/shards/taxonomy.json (VERTICALS="birds cars" gives others) in
# WORKDIR/teachers/VERTICAL: what has finished returns at once, so the whole array may be submitted again.
#SBATCH --job-name=teacher
#SBATCH --output=%x-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --cpus-per-task=8
told=
trap told=USR1 USR1 # before all else; run_step asks for it
trap told=TERM TERM
set -euo pipefail
here=${CONCENTRATION_LAUNCH:-}
if [ -z "$here" ]; then
    called=$(scontrol show job "$SLURM_JOB_ID" | sed -n '0,/^ *Command=/s/^ *Command=//p') # this script, and its arguments
    here=$(dirname "${called%" $*"}")
fi
source "$here/environment.sh"
source "$here/run_step.sh"

workdir=runs/demo
for argument in "$@"; do
    [[ $argument == workdir=* ]] && workdir=${argument#workdir=}
done
mistake() { # mistake WHAT: tells it and ends this script
    echo "teacher_array.sh: $*" >&2
    exit 2
}
if [ -n "${VERTICALS:-}" ]; then
    read -ra verticals <<<"$VERTICALS"
else
    taxonomy=$workdir/shards/taxonomy.json
    [ -e "$taxonomy" ] || mistake "$taxonomy: not there (in $PWD); run \`concentrate prepare\` first, or correct workdir=$workdir"
    names=$(python -c '
import json, sys
print(*dict.fromkeys(c["vertical"] for c in json.load(open(sys.argv[1]))["classes"]), sep="\n")
' "$taxonomy")
    mapfile -t verticals <<<"$names"
fi
tasks=--array=0-$((${#verticals[@]} - 1))
[ -n "${SLURM_ARRAY_TASK_ID:-}" ] || mistake "no task of an array; submit it with $tasks, a task for each vertical"
vertical=${verticals[$SLURM_ARRAY_TASK_ID]:-}
[ -n "$vertical" ] || mistake "task $SLURM_ARRAY_TASK_ID: no vertical of this number; submit it with $tasks"

# As Hydra takes any name for a text: 1.5, a,b and café.
quoted=$(python -c 'import sys; from concentration.schema import quote; print(quote(sys.argv[1]))' "$vertical")
run_step --ntasks=1 -- teacher "vertical=$quoted" "trainer=${TRAINER:-gpu}" "$@"
