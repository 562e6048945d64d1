#!/usr/bin/env bash
# One student on several machines, a task a GPU; preempted or out of time, it saves, is requeued and continues.
#
#   mkdir -p /shared/logs && cd /shared/logs
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 /path/to/launch/slurm/student.sh workdir=/shared/eft name=student
#
# Its run directory is WORKDIR/students/NAME, by its name and never by the time: submitted again, with as many machines as
# you like, it goes on from its last checkpoint with the same global batches.
#SBATCH --job-name=student
#SBATCH --output=%x-%j.log
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

# All GPUs of a machine are shown to all its tasks (not --gpus-per-task): each takes the one of its number.
run_step -- student "trainer=${TRAINER:-multi_node}" "$@"
