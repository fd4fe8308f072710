#!/usr/bin/env bash
# The same set-up as quickstart.sh, then the linter and the tests, on as many cores as there are, at most 8.
# Arguments go to pytest, for example -m "not slow", or -n 0 to run all in one process.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
scripts/install_slurm.sh || echo "SLURM's programs are not here: the tests on a real cluster will be skipped" >&2
.venv/bin/ruff check .
.venv/bin/ruff format --check .
workers=$(($(nproc) < 8 ? $(nproc) : 8))
HF_HUB_OFFLINE=1 .venv/bin/python -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder "$@"
