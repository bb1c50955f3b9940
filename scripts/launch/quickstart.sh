#!/usr/bin/env bash
# A first look, on a machine with nothing but Python 3.11 or newer: trains a small model, kills it in the middle of a
# save, resumes, and shows that nothing was lost. Writes only inside the repository: the environment, and runs/quickstart.
#
#   scripts/launch/quickstart.sh
#
#   VENV    the virtual environment to make or reuse (.venv-quickstart)
#   PYTHON  the interpreter to make it with (python3)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

VENV="${VENV:-.venv-quickstart}"
PYTHON="${PYTHON:-python3}"
OUT=runs/quickstart

export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
export TMPDIR="$PWD/.tmp" XDG_CACHE_HOME="$PWD/.tmp/cache" CUDA_CACHE_PATH="$PWD/.tmp/cuda"
mkdir -p "$TMPDIR"

fail() {
    printf '\nquickstart.sh failed: %s\n' "$1" >&2
    exit 1
}

head_line() {
    printf '\n== %s\n' "$1"
}

# Show a command, then run it.
run() {
    printf '$ %s\n' "$*"
    "$@"
}

# ---- 1

head_line "1/8  The environment: $VENV"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "it needs Python 3.11 or newer, which $PYTHON is not; name one with PYTHON=python3.12"
if [[ ! -x "$VENV/bin/pip" ]]; then
    "$PYTHON" -m venv "$VENV" || fail "no virtual environment could be made (on Debian: apt install python3-venv)"
fi
VENV="$(cd "$VENV" && pwd)"
PATH="$VENV/bin:$PATH"

wanted="$(cat pyproject.toml constraints.txt)"
installed="$VENV/forgather-ckpt-quickstart"
if [[ "$(cat "$installed" 2>/dev/null)" == "$wanted" ]]; then
    echo "reused as it is"
else
    echo "installing the versions of constraints.txt; torch is large, so this may take minutes"
    run python -m pip install --quiet -c constraints.txt -e . || fail "the installation failed; pip says above why"
    printf '%s\n' "$wanted" >"$installed"
fi

SECONDS=0
# As many threads in every run: another number adds floats in another order.
export OMP_NUM_THREADS=1
# Two processes on one machine: the loopback interface will do, and no name server need be asked for its name.
export GLOO_SOCKET_IFNAME=lo RES_OPTIONS=attempts:0 TORCH_CPP_LOG_LEVEL=ERROR
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

facts="$(python -c 'import torch; print(torch.__version__, torch.cuda.device_count())')" || fail "torch does not start"
num_gpus="${facts#* }"
echo "torch ${facts% *}, GPUs: $num_gpus"
case "$num_gpus" in
    0) device=(--device cpu) ;;
    1) device=(--device cuda:0 --backend gloo) ;; # NCCL refuses two processes on one GPU
    *) device=(--device cuda) ;;
esac

if [[ -e "$OUT" ]]; then
    [[ -e "$OUT/made-by-quickstart" ]] || fail "$OUT exists and is not from this script; move it away"
    rm -rf "$OUT"
fi
mkdir -p "$OUT"
touch "$OUT/made-by-quickstart"

launch=(torchrun --standalone --local-addr=127.0.0.1 --nproc-per-node=2 -m forgather_ckpt.demo "${device[@]}")

# What training prints goes to the terminal and to a log; what torchrun says of processes that ended, only to the log.
train() {
    local log="$OUT/$1.log"
    shift
    run "${launch[@]}" "$@" 2>"$log" | tee -a "$log"
}

train_to_the_end() {
    train "$@" || fail "this training was to go through; see $OUT/$1.log"
}

log_says() {
    grep -q -- "$2" "$OUT/$1.log" || fail "$3; see $OUT/$1.log"
}

# ---- 2

head_line "2/8  Train, and kill one of the two processes while it writes the checkpoint of step 40"
command=(--auto-resume --output-dir "$OUT/run" --kill-in-save 40)
if train killed "${command[@]}"; then
    fail "the process was to be killed, but the training went through; see $OUT/killed.log"
fi
log_says killed 'exitcode  : -9' "no process died of SIGKILL"
[[ -e "$OUT/run/checkpoint-20/checkpoint_manifest.json" ]] || fail "checkpoint-20 is not there any more"
[[ ! -e "$OUT/run/checkpoint-40" ]] || fail "checkpoint-40 is there, though its save was not finished"
echo "killed by SIGKILL in mid-save: checkpoint-20 is whole, checkpoint-40 is not there (torchrun's words: $OUT/killed.log)"

# ---- 3

head_line "3/8  The same command again: it resumes by itself"
train_to_the_end resumed "${command[@]}"
log_says resumed 'resumed from .*checkpoint-20 at step 20' "it did not resume from checkpoint-20"

# ---- 4

head_line "4/8  For comparison, the same training undisturbed"
train_to_the_end undisturbed --output-dir "$OUT/undisturbed"

# ---- 5

head_line "5/8  Compare: did being killed change anything?"
compare=(python -m forgather_ckpt.demo.compare "$OUT/run" "$OUT/undisturbed")
run "${compare[@]}" || fail "the two runs differ"

# ---- 6

head_line "6/8  What is on disk"
run fgckpt ls "$OUT/run"
run fgckpt show latest -d "$OUT/run"
run fgckpt verify --all -d "$OUT/run" || fail "a checkpoint is damaged, and should not be"

# ---- 7

head_line "7/8  Damage one byte of the newest checkpoint"
damage="$(python -m forgather_ckpt.demo.damage "$OUT/run/checkpoint-60")" || fail "the damage could not be done"
echo "$damage"
code=0
found="$(run fgckpt verify --all -d "$OUT/run" 2>&1)" || code=$?
echo "$found"
file="$(grep -o '[^/ ]*\.safetensors' <<<"$damage")"
tensor="$(sed "s/.*the tensor '\([^']*\)'.*/\1/" <<<"$damage")"
[[ "$code" == 1 && "$found" == *"$file"* && "$found" == *"$tensor"* ]] ||
    fail "verify was to name $file and $tensor and to return 1; it returned $code"

# ---- 8

head_line "8/8  Resume: it passes over the damaged checkpoint, and trains its steps again"
train_to_the_end fallback "${command[@]}"
log_says fallback 'checkpoint-60 is passed over' "the damaged checkpoint was not noticed"
log_says fallback 'resumed from .*checkpoint-40 at step 40' "it did not fall back to checkpoint-40"
run "${compare[@]}" || fail "the two runs differ after the fallback"
run fgckpt verify --all -d "$OUT/run" || fail "a checkpoint is damaged, and should not be"

cat <<END

All went as it should, in $SECONDS s after the installation. The runs are in $OUT. Next:

  source ${VENV#"$PWD/"}/bin/activate
  python -m forgather_ckpt.demo --help      the options of this training
  forgather_ckpt/demo/__main__.py           its script, to copy and change
  scripts/launch/README.md                  one node, several nodes, Slurm
  fgckpt --help                             more to ask of checkpoints
END
