#!/usr/bin/env bash
# A SLURM cluster of one node on this machine, for tests: no root, no systemd, no cgroups, no database.
#   cluster.sh start DIR    prints how to reach it: export SLURM_CONF=DIR/slurm.conf
#   cluster.sh stop DIR     ends what `start` began in DIR, and nothing else
# DIR must be short: a socket's path has at most 107 characters.
set -Eeuo pipefail

what=${1:?start or stop} dir=$(realpath -m -- "${2:?a folder}")

stop() {
  local f pid
  export SLURM_CONF=$dir/slurm.conf
  if [ -s "$dir/slurmctld.pid" ]; then          # no job outlives its cluster
    timeout 5 squeue --noheader --format=%A 2>/dev/null | sort -u | xargs -r timeout 5 scancel 2>/dev/null || true
    for _ in $(seq 50); do [ -z "$(timeout 5 squeue --noheader 2>/dev/null)" ] && break; sleep .1; done
  fi
  for f in slurmd.pid slurmctld.pid munged.pid; do
    pid=$(cat "$dir/$f" 2>/dev/null) || continue
    kill "$pid" 2>/dev/null || true
    for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || break; sleep .1; done
    rm -f "$dir/$f"
  done
}

port() { # one that is free now
  python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

start() {
  mkdir -p "$dir/state" "$dir/spool"
  chmod 755 "$dir"
  (umask 077; head -c 128 /dev/urandom > "$dir/munge.key")
  munged --force --socket "$dir/munge.socket" --key-file "$dir/munge.key" --pid-file "$dir/munged.pid" \
    --seed-file "$dir/munged.seed" --log-file "$dir/munged.log"
  local me host node
  me=$(id -un) host=$(hostname -s)
  node=$(slurmd -C | head -n 1)                 # NodeName=… CPUs=… and the rest of what the hardware is
  cat > "$dir/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(port)
SlurmdPort=$(port)
SlurmUser=$me
SlurmdUser=$me
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
KillWait=2
${node} NodeAddr=127.0.0.1 State=UNKNOWN
PartitionName=short Nodes=ALL Default=YES MaxTime=60 State=UP
CONF
  export SLURM_CONF=$dir/slurm.conf
  slurmctld
  slurmd
  for _ in $(seq 100); do
    sinfo --noheader --format=%T 2>/dev/null | grep -q idle && { echo "export SLURM_CONF=$dir/slurm.conf"; return; }
    sleep .2
  done
  tail -n 5 "$dir"/*.log >&2
  return 1
}

case $what in
  start) trap 'stop' ERR; start ;;
  stop) stop ;;
  *) echo "cluster.sh: start or stop, not $what" >&2; exit 2 ;;
esac
