#!/usr/bin/env bash
# Train on several machines: give the same line on each of them, in any order. The run directory must be on a file
# system that all of them share. (For Slurm there is slurm.sbatch.)
#
#   HEAD=node01:29500 NNODES=2 RUN_ID=a scripts/launch/several_nodes.sh -m forgather_ckpt.demo --auto-resume --output-dir /shared/runs/a
#
#   HEAD              host:port of one of the machines, where the agents meet; the port must be free there
#   NNODES            how many machines, or MIN:MAX: the job goes on with what is left, and takes in who joins
#   RUN_ID            a name for this job, the same on all machines (default)
#   NPROC_PER_NODE    processes on each (auto: one for each GPU; without GPUs, one for each CPU core)
#   MAX_RESTARTS      how often this machine's processes may fail before it gives up (3)
#   SHUTDOWN_TIMEOUT  seconds that a process gets to end by itself when the job is stopped (60)
#   LAST_CALL         with MIN:MAX, seconds to wait for more machines once MIN are there (15)
#   GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME   the network interface between the machines, where the guess is wrong
#
# When a machine is lost, the others restart from the newest good checkpoint. When it is HEAD that is lost, all agents
# end with an error, because it holds the rendezvous: start the job again, with another HEAD.
set -euo pipefail
usage() {
    sed -n '2,/^set/{/^#/!d;s/^# \{0,1\}//;p}' "$0"
}
if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    usage
    exit 0
fi
if (($# == 0)) || [[ -z "${HEAD:-}" || -z "${NNODES:-}" ]]; then
    usage >&2
    exit 2
fi

# Without it, agents and workers share a store over restarts: the workers find addresses of dead processes in it, wait
# for those, and fail. This is what makes restarts of several agents work.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# A variable, as torchrun 2.11 does not have the option --shutdown-timeout, and waits 30 s whatever it says.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${SHUTDOWN_TIMEOUT:-60}"
# The number of threads decides the order in which floats are added: a resume is exact only with as many as before.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# keep_alive   3 x 2 s: a lost machine is noticed after 6 s; the default is 15 s, and NCCL itself may wait 10 minutes.
# last_call    each restart waits this long for more machines (MIN:MAX only); the default is 30 s.
# join         how long the first machine waits for the others; nodes may boot slowly.
rendezvous="join_timeout=600,last_call_timeout=${LAST_CALL:-15},keep_alive_interval=2,keep_alive_max_attempt=3"

# SIGUSR1 is not among torchrun's defaults: a scheduler that sends it would end the agent and leave its workers running.
exec torchrun \
    --nnodes="$NNODES" \
    --nproc-per-node="${NPROC_PER_NODE:-auto}" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$HEAD" \
    --rdzv-id="${RUN_ID:-default}" \
    --rdzv-conf="$rendezvous" \
    --max-restarts="${MAX_RESTARTS:-3}" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    "$@"
