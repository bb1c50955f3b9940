#!/usr/bin/env bash
# Lint and types. Uses the tools of $VENV if given, else those on PATH.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ -n "${VENV:-}" ]]; then
    PATH="$(cd "$VENV" && pwd)/bin:$PATH"
fi
ruff check .
mypy
