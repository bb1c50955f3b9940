#!/usr/bin/env bash
# Train on machines any of which may be lost, and come back. Start the meeting place once, on a machine that stays (it
# takes no part in the training, and next to nothing of the machine); then give the same line on each machine that trains:
#
#   scripts/launch/elastic.sh meet 29500
#   MEET=login01:29500 NNODES=3:4 RUN_ID=a1 scripts/launch/elastic.sh train.py --output-dir /shared/runs/a
#
#   MEET              host:port of the meeting place
#   NNODES            MIN:MAX machines: the job begins, and goes on, with any number from MIN to MAX
#   RUN_ID            a name for this job at this meeting place, the same on all machines; another one for each job
#   NPROC_PER_NODE    processes on each (auto: one for each GPU; without GPUs, one for each CPU core)
#   MAX_RESTARTS      how often this machine's own processes may fail before it gives up (100)
#   SHUTDOWN_TIMEOUT  seconds that a process gets to end by itself when the job is stopped (60)
#   LAST_CALL         seconds to wait for more machines once MIN are there, at each restart (15)
#   GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME   the network interface between the machines, where the guess is wrong
#
# The run directory must be on a file system that all machines share, and the command must resume by itself, as one with
# resume_from_checkpoint="auto" does. docs/elastic.md tells what happens when a machine is lost, and what each setting is for.
set -euo pipefail
usage() {
    sed -n '2,/^set/{/^#/!d;s/^# \{0,1\}//;p}' "$0"
}
if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    usage
    exit 0
fi
if [[ "${1:-}" == meet && $# == 2 ]]; then
    exec python3 - "$2" <<'PYTHON'
import signal
import sys

from torch.distributed import TCPStore

store = TCPStore("0.0.0.0", int(sys.argv[1]), is_master=True, wait_for_workers=False)
print(f"elastic.sh: agents may meet at port {store.port}; stop this when the job has ended", flush=True)
signal.sigwait({signal.SIGINT, signal.SIGTERM})
PYTHON
fi
if (($# == 0)) || [[ -z "${MEET:-}" || -z "${NNODES:-}" || -z "${RUN_ID:-}" ]]; then
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

# is_host      no agent holds the meeting place, so the job outlives each of them.
# last_call    each restart with fewer than MAX machines waits this long for more; the default is 30 s.
# keep_alive   3 x 2 s: a lost machine is noticed after 6 s; the default is 15 s.
# join         how long to wait for MIN machines; nodes may boot slowly.
rendezvous="is_host=0,join_timeout=600,last_call_timeout=${LAST_CALL:-15}"
rendezvous+=",keep_alive_interval=2,keep_alive_max_attempt=3"

# When a machine is lost, the processes of the others fail too, and that counts as a failure of their own: so
# MAX_RESTARTS must not be small.
# SIGUSR1 is not among torchrun's defaults: a scheduler that sends it would end the agent and leave its workers running.
exec torchrun \
    --nnodes="$NNODES" \
    --nproc-per-node="${NPROC_PER_NODE:-auto}" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$MEET" \
    --rdzv-id="$RUN_ID" \
    --rdzv-conf="$rendezvous" \
    --max-restarts="${MAX_RESTARTS:-100}" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    "$@"
