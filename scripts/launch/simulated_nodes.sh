#!/usr/bin/env bash
# Several nodes on this one machine: an agent for each, which meet as they would over a network. For trying out what a
# job of several nodes does, for one: end an agent and its processes, and see the others restart.
#
#   scripts/launch/simulated_nodes.sh -m forgather_ckpt.demo --auto-resume --output-dir runs/a
#   NNODES=1:2 MAX_RESTARTS=3 scripts/launch/simulated_nodes.sh train.py --output-dir runs/b
#
#   NNODES            how many nodes, or MIN:MAX, of which MAX are started (2)
#   NPROC_PER_NODE    processes of each (1)
#   MAX_RESTARTS      how often a node's processes may fail before it gives up (3)
#   SHUTDOWN_TIMEOUT  seconds that a process gets to end by itself when the job is stopped (10)
#
# Uses GPUs if there is one for each process, else CPUs. Returns the exit code of the first node that failed, or 0;
# leaves no process behind.
set -euo pipefail
usage() {
    sed -n '2,/^set/{/^#/!d;s/^# \{0,1\}//;p}' "$0"
}
if (($# == 0)); then
    usage >&2
    exit 2
fi
if [[ "$1" == -h || "$1" == --help ]]; then
    usage
    exit 0
fi

NNODES="${NNODES:-2}"
num_nodes="${NNODES#*:}"
num_procs="${NPROC_PER_NODE:-1}"
shutdown_timeout="${SHUTDOWN_TIMEOUT:-10}"

# Restarts of several agents meet addresses of dead processes without it, and fail.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# A variable, as torchrun 2.11 does not have the option --shutdown-timeout, and waits 30 s whatever it says.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="$shutdown_timeout"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"

num_gpus="$({ nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true)"
port="$(python3 -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')"
rendezvous="join_timeout=60,last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"

# Agents end their own processes, each of which is in a session of its own; so they are asked before they are killed.
# The shell's job list names only what this script started and what still runs.
stop_agents() {
    local pid deadline=$((SECONDS + shutdown_timeout + 5))
    for pid in $(jobs -pr); do
        kill -TERM "$pid" 2>/dev/null || true
    done
    while [[ -n "$(jobs -pr)" ]] && ((SECONDS < deadline)); do
        sleep 0.1
    done
    for pid in $(jobs -pr); do
        kill -KILL "$pid" 2>/dev/null || true
    done
    wait
}
trap stop_agents EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

agents=()
for ((node = 0; node < num_nodes; node++)); do
    if ((num_gpus >= num_nodes * num_procs)); then
        export CUDA_VISIBLE_DEVICES
        CUDA_VISIBLE_DEVICES="$(seq -s, $((node * num_procs)) $((node * num_procs + num_procs - 1)))"
    else
        export CUDA_VISIBLE_DEVICES=""
    fi
    torchrun \
        --nnodes="$NNODES" \
        --nproc-per-node="$num_procs" \
        --rdzv-backend=c10d \
        --rdzv-endpoint="127.0.0.1:$port" \
        --rdzv-id="simulated-$port" \
        --rdzv-conf="$rendezvous" \
        --local-addr=127.0.0.1 \
        --max-restarts="${MAX_RESTARTS:-3}" \
        "$@" &
    agents+=($!)
    echo "simulated_nodes.sh: node $node of $num_nodes is process $!" >&2
done

# Agents end by themselves, also when another one has failed: at the latest when nobody came to the next rendezvous.
failed=0
for pid in "${agents[@]}"; do
    code=0
    wait "$pid" || code=$?
    if ((failed == 0)); then
        failed=$code
    fi
done
exit "$failed"
