# What every job needs before it starts; the job scripts read this file, and it is the one to edit for your cluster.
#
# module load python/3.11 cuda/12
# source /shared/concentration/.venv/bin/activate
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}   # every process computes on a GPU or on one core
export MAX_RESTARTS=${MAX_RESTARTS:-100}       # of a job that was preempted or met its time limit; then it fails with 75
# export NCCL_SOCKET_IFNAME=ib0                # which network the machines meet on
# export WANDB_MODE=offline
