#!/usr/bin/env bash
# Everything that must pass, on a machine with nothing but Python: environment, lint, types, tests.
# Writes only inside the repository (and $VENV). Arguments go to pytest: scripts/test.sh -k manifest -x
#
#   VENV    the virtual environment to make or reuse (.venv-test)
#   PYTHON  the interpreter to make it with (python3)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV="${VENV:-.venv-test}"
PYTHON="${PYTHON:-python3}"
export OMP_NUM_THREADS=1
export PIP_NO_CACHE_DIR=1
export TMPDIR="${TMPDIR:-$PWD/.tmp}"
mkdir -p "$TMPDIR"

if [[ ! -x "$VENV/bin/python" ]]; then
    "$PYTHON" -m venv "$VENV"
fi
VENV="$(cd "$VENV" && pwd)"
export VENV

# What was installed last; the same again needs no network.
wanted="$(cat pyproject.toml constraints.txt)"
installed="$VENV/forgather-ckpt-installed"
if [[ "$(cat "$installed" 2>/dev/null)" != "$wanted" ]]; then
    "$VENV/bin/python" -m pip install --disable-pip-version-check --quiet -c constraints.txt -e ".[test]"
    printf '%s\n' "$wanted" >"$installed"
fi

scripts/check.sh
"$VENV/bin/python" -m pytest -n 2 --dist worksteal "$@"
