"""What SLURM 22.05's `scontrol --oneliner show job` was seen to say of jobs that were asked to stop."""

_LINE = (
    "JobId=9 JobName=student UserId=me(1000) GroupId=me(1000) Priority=1 Nice=0 JobState={state} Reason={reason} "
    "Dependency=(null) Requeue=1 Restarts={restarts} BatchFlag=1 Reboot=0 ExitCode=0:0 RunTime=00:00:03 TimeLimit=00:05:00 "
    "PreemptEligibleTime=2026-11-25T22:58:52 PreemptTime={preempted} SuspendTime=None"
)
#: Makes room, or has had the signal before its time limit.
RUNNING = _LINE.format(state="RUNNING", reason="None", restarts=0, preempted="2026-11-25T22:58:54")
#: By `scancel`, once.
CANCELLED = _LINE.format(state="COMPLETING", reason="None", restarts=0, preempted="None")
OUT_OF_TIME = _LINE.format(state="COMPLETING", reason="TimeLimit", restarts=0, preempted="None")
#: By `scontrol requeue`: the restart is counted when it is asked for.
REQUEUED = _LINE.format(state="COMPLETING", reason="None", restarts=1, preempted="None")
