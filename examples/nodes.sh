#!/bin/bash
# One to four machines without a scheduler. Give the same command on each of them; FIRST is the name of one that stays.
#   FIRST=node1 ./nodes.sh resnet50 --data /shared/imagenet --minibatch 8k --out /shared/runs/imagenet-8k
# A machine that is lost, or comes later, stops the run for a moment; it then goes on at its last checkpoint with the
# machines that are there, and the minibatch, the rate and the samples stay what they were. Only FIRST must not be lost:
# then give the command again. Processes per machine: PROCESSES, or one for each GPU. A start waits LAST_CALL seconds
# for more machines; ADDRESS and GLOO_SOCKET_IFNAME help where a machine has several networks.

# Without this a machine that comes later waits in vain for the others (torch 2.13), and restarts may not come back.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun \
    --nnodes "${NODES:-1:4}" \
    --nproc-per-node "${PROCESSES:-gpu}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "${FIRST:?the name of the first machine}:${PORT:-29500}" \
    --rdzv-id "${JOB:-onehour}" \
    --rdzv-conf "last_call_timeout=${LAST_CALL:-30}" \
    --max-restarts "${RESTARTS:-100}" \
    ${ADDRESS:+--local-addr "$ADDRESS"} \
    -m onehour train "$@"
