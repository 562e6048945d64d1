# Read by the job scripts: runs `concentrate ARGUMENTS` as a step of this job, and requeues the job when it was asked to stop.
#
# SLURM tells the step of a preemption (SIGTERM) and this script of the time limit (SIGUSR1, by `--signal=B:`); the step saves
# at the end of its batch, and leaves a file where CONCENTRATION_PREEMPTED points. That file decides, not srun's exit code.
# A job that makes room and then exits with 0 would count as COMPLETED, and what waits for it by `afterok` would start.

run_step() { # run_step SRUN_OPTION... -- ARGUMENT...
    local options=() told="" code=0 job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}
    job=${job:-$SLURM_JOB_ID}
    while [ "$1" != -- ]; do options+=("$1"); shift; done
    shift
    export CONCENTRATION_PREEMPTED=${LOG_DIRECTORY:-$PWD}/.preempted-$job
    rm -f "$CONCENTRATION_PREEMPTED"
    trap 'told=USR1; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1   # scancel signals the steps, not this script
    trap 'told=TERM; scancel --signal=TERM "$SLURM_JOB_ID"' TERM
    # The shell in between ignores signals until Python notes them: in its first moments they would kill it unnoted.
    # One task that dies takes the others with it, which would otherwise wait for it in a collective.
    srun --kill-on-bad-exit=1 "${options[@]}" bash -c 'trap "" TERM USR1; exec concentrate "$@"' concentrate "$@" &
    local step=$!
    while true; do # a signal ends `wait`, not the step
        code=0
        wait "$step" || code=$?
        kill -0 "$step" 2>/dev/null || break
    done
    trap : USR1 TERM # no step is left to be told; with the traps from above, a requeue would take as long as SLURM's KillWait
    if [ -e "$CONCENTRATION_PREEMPTED" ] || { [ -n "$told" ] && [ "$code" != 0 ]; }; then
        if [ "${SLURM_RESTART_COUNT:-0}" -lt "$MAX_RESTARTS" ]; then
            echo "asked to stop, requeued (restart $((${SLURM_RESTART_COUNT:-0} + 1)) of at most $MAX_RESTARTS)"
            rm -f "$CONCENTRATION_PREEMPTED"
            scontrol requeue "$job"
            sleep 60 # until SLURM ends this script: whatever it exits with would count as the job's end
            return 75
        fi
        echo "asked to stop after ${SLURM_RESTART_COUNT:-0} restarts, not requeued; submit it again and it continues" >&2
        return 75
    fi
    return "$code"
}
