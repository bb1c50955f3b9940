#!/usr/bin/env bash
# Train on this machine. A job that fails is started again, and goes on from its newest good checkpoint if the
# training command resumes by itself, as the demo does.
#
#   scripts/launch/one_node.sh -m forgather_ckpt.demo --auto-resume --output-dir runs/a
#   NPROC_PER_NODE=4 scripts/launch/one_node.sh train.py --output-dir runs/b
#
#   NPROC_PER_NODE    processes (auto: one for each GPU; without GPUs, one for each CPU core)
#   MAX_RESTARTS      how often a failed job is started again (3)
#   SHUTDOWN_TIMEOUT  seconds that a process gets to end by itself when the job is stopped (60)
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

# Without it the agent and the workers share a store: after a restart they would find addresses of dead processes in
# it, wait for those, and fail.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# A variable, as torchrun 2.11 does not have the option --shutdown-timeout, and waits 30 s whatever it says.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${SHUTDOWN_TIMEOUT:-60}"
# The number of threads decides the order in which floats are added: a resume is exact only with as many as before.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

exec torchrun \
    --standalone \
    --nproc-per-node="${NPROC_PER_NODE:-auto}" \
    --max-restarts="${MAX_RESTARTS:-3}" \
    "$@"
