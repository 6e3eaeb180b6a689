#!/bin/bash
# A real Slurm on one machine, without systemd and without cgroups: a controller, and nodes sl1, sl2, … each in network,
# host name, mount and process namespaces of its own, so that Slurm and torch see as many hosts.
#   campaigns/cluster/slurm.sh up FOLDER NODES | down FOLDER | node-down FOLDER NODE | node-up FOLDER NODE
# Needs root, and Debian's slurm-wlm, munge and iproute2. FOLDER holds its configuration, logs and process ids: set
# SLURM_CONF=FOLDER/slurm.conf to use it. `up` first clears away what an earlier cluster has left.
set -u
verb=$1 folder=$2
bridge=ohslurm net=10.79.0

addresses() { # for every node's /etc/hosts
    printf '127.0.0.1 localhost\n::1 localhost\n%s.1 ctl\n' $net
    for i in $(seq "$(cat "$folder/nodes")"); do echo "$net.1$i sl$i"; done
}

configure() {
    mkdir -p "$folder"/{state,log}
    cat > "$folder/slurm.conf" <<C
ClusterName=onehour
SlurmctldHost=ctl($net.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.%n.log
SlurmctldPort=26827
SlurmdPort=26828
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=3,batch_sched_delay=1,sched_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdTimeout=20
KillWait=30
InactiveLimit=0
ReturnToService=2
MpiDefault=none
C
    for i in $(seq "$(cat "$folder/nodes")"); do
        echo "NodeName=sl$i NodeAddr=$net.1$i CPUs=8 State=UNKNOWN" >> "$folder/slurm.conf"
    done
    cat >> "$folder/slurm.conf" <<C
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=40 MaxTime=INFINITE State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
C
    # Nothing uses cgroups; slurmd refuses to start if it has to guess which ones there are.
    echo 'CgroupPlugin=cgroup/v1' > "$folder/cgroup.conf"
}

start() { # NAME COMMAND…: in the background, its id noted
    name=$1
    shift
    setsid "$@" < /dev/null > "$folder/log/$name.out" 2>&1 &
    echo $! > "$folder/$name.id"
}

node_up() {
    node=$1 space=ohslurm-$1 address=$net.1${1#sl}
    ip netns add "$space"
    ip link add "oh$node" type veth peer name eth0 netns "$space"
    ip link set "oh$node" master $bridge up
    ip -n "$space" addr add "$address/24" dev eth0
    ip -n "$space" link set lo up
    ip -n "$space" link set eth0 up
    mkdir -p "/etc/netns/$space"
    addresses > "/etc/netns/$space/hosts"
    # Debian's slurmd knows its node by the host's name. With --kill-child all of a node ends with it.
    start "$node" ip netns exec "$space" unshare -u -m -p -f --kill-child --mount-proc \
        bash -c "hostname $node; exec slurmd -D -f '$folder/slurm.conf'"
}

node_down() { # SPACE: as a power cut; whatever runs there is gone
    ip netns pids "$1" | xargs -r kill -9 2> /dev/null
    ip netns del "$1"
    rm -rf "/etc/netns/$1"
}

kill_noted() { # NAME: a process that `up` has noted, if the id still is that process's
    id=$(cat "$folder/$1.id" 2> /dev/null) || return 0
    grep -qsaF "$folder" "/proc/$id/cmdline" && kill -9 "$id"
}

down() {
    kill_noted "$1"
    ip netns del "$1" 2> /dev/null
    rm -rf "/etc/netns/$1"
}

kill_noted() { # a process that an earlier start has noted, if the id still is that process's
    id=$(cat "$folder/$1.id" 2> /dev/null) || return 0
    grep -qsaF "$folder" "/proc/$id/cmdline" && kill -9 "$id"
    rm -f "$folder/$1.id"
}

down() {
    for space in $(ip netns list | grep -o '^ohslurm-sl[0-9]*'); do node_down "$space"; done
    kill_noted controller
    kill_noted munge
    ip link del $bridge 2> /dev/null
    rm -rf "$folder"
}

case $verb in
    up)
        down
        mkdir -p "$folder"
        chmod 755 "$folder"
        echo "$3" > "$folder/nodes"
        configure
        dd if=/dev/urandom of="$folder/munge.key" bs=1 count=1024 status=none
        chown munge: "$folder/munge.key" && chmod 400 "$folder/munge.key"
        start munge munged --foreground --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
            --pid-file="$folder/munge.pid" --log-file="$folder/log/munge.log" --seed-file="$folder/munge.seed"
        ip link add $bridge type bridge
        ip addr add $net.1/24 dev $bridge
        ip link set $bridge up
        start controller unshare -u bash -c "hostname ctl; exec slurmctld -D -f '$folder/slurm.conf'"
        for i in $(seq "$3"); do node_up "sl$i"; done
        export SLURM_CONF=$folder/slurm.conf
        for _ in $(seq 60); do
            [ "$(sinfo -h -N -p low -t idle -o %N 2> /dev/null | sort -u | wc -l)" = "$3" ] && exit 0
            sleep 1
        done
        echo "Slurm did not come up:" >&2
        tail -n 5 "$folder"/log/* >&2
        exit 1
        ;;
    down) down ;;
    node-down) node_down "ohslurm-$3" ;;
    node-up) node_up "$3" ;;
    *) echo "usage: slurm.sh up FOLDER NODES | down FOLDER | node-down FOLDER NODE | node-up FOLDER NODE" >&2; exit 2 ;;
esac
