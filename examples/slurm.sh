#!/bin/bash
# ImageNet in an hour under Slurm: two minutes before the time is over, or when the job is preempted, the run saves
# and stops with 75, and this script puts the job back into the queue; the same command then goes on where it was.
#   sbatch slurm.sh resnet50 --data /shared/imagenet --minibatch 8k --out /shared/runs/imagenet-8k
#SBATCH --job-name=onehour
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

# --signal without B: sends the signal to the processes of the step, and not to this shell.
# A process that is lost ends the step, so that the others do not wait for it; when all are asked to stop they leave
# together, after process 0 has saved.
srun --kill-on-bad-exit=1 onehour train "$@"
code=$?

case $code in
    75) exec scontrol requeue "$SLURM_JOB_ID" ;;
    0 | 2 | 4) exit $code ;;
esac
# A process was killed, or a node failed: some attempts more, from the last checkpoint.
if [ "${SLURM_RESTART_COUNT:-0}" -lt 5 ]; then
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
