# Read by the job scripts: runs `concentrate ARGUMENTS` as a step of this job, and requeues the job when it was asked to stop.
#
# SLURM tells the step of a preemption (SIGTERM) and this script of the time limit (SIGUSR1, by `--signal=B:`), which may be
# while the environment is set up: the job scripts begin with a trap that sets `told`. The step saves at the end of its batch,
# and leaves a file where CONCENTRATION_PREEMPTED points. That file decides, not srun's exit code.
# A job that makes room and then exits with 0 would count as COMPLETED, and what waits for it by `afterok` would start.

run_step() { # run_step SRUN_OPTION... -- ARGUMENT...
    local options=() code=143 job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}} # 143: ended by SIGTERM
    job=${job:-$SLURM_JOB_ID} # SLURM_JOB_ID of an array's last task is that of the whole array
    while [ "$1" != -- ]; do options+=("$1"); shift; done
    shift
    export CONCENTRATION_PREEMPTED=${LOG_DIRECTORY:-$PWD}/.preempted-$job
    rm -f "$CONCENTRATION_PREEMPTED"
    if [ -z "$told" ]; then
        # One task that dies takes the others with it, which would otherwise wait for it in a collective.
        srun --kill-on-bad-exit=1 "${options[@]}" concentrate "$@" &
        local step=$!
        while kill -0 "$step" 2>/dev/null; do
            # scancel signals the steps, not this script. Again and again: a step that is only just starting does not hear it.
            [ -z "$told" ] || scancel --signal="$told" "$job" || true
            sleep 5 &
            wait -n || true # until the step has ended, or a signal was noted, or it is time to look again
        done
        code=0
        wait "$step" || code=$?
    fi
    trap : USR1 TERM
    # The step notes these signals: one that they have killed was in its first moments.
    if [ -e "$CONCENTRATION_PREEMPTED" ] || { [ -n "$told" ] && [ "$code" != 0 ]; } || [ "$code" = 143 ] || [ "$code" = 138 ]; then
        rm -f "$CONCENTRATION_PREEMPTED"
        if is_cancelled "$job"; then
            echo "ended by scancel, not requeued; submit it again and it continues" >&2
            return 143
        fi
        if [ "${SLURM_RESTART_COUNT:-0}" -lt "$MAX_RESTARTS" ]; then
            echo "asked to stop, requeued (restart $((${SLURM_RESTART_COUNT:-0} + 1)) of at most $MAX_RESTARTS)"
            scontrol requeue "$job"
            sleep 60 # until SLURM ends this script: whatever it exits with would count as the job's end
            return 75
        fi
        echo "asked to stop after ${SLURM_RESTART_COUNT:-0} restarts, not requeued; submit it again and it continues" >&2
        return 75
    fi
    return "$code"
}

is_cancelled() { # is_cancelled JOB, which was asked to stop: by scancel?
    # One that makes room or nears its limit is still RUNNING. Of one that SLURM itself has requeued, the restart is counted.
    local said
    said=$(scontrol --oneliner show job "$1") || return 1
    [[ $said == *" JobState=COMPLETING "* && $said == *" Restarts=${SLURM_RESTART_COUNT:-0} "* &&
        $said != *" Reason=TimeLimit "* && $said != *" PreemptTime=2"* ]]
}
