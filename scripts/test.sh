#!/usr/bin/env bash
# The same set-up as quickstart.sh, then the linter and the tests. Arguments go to pytest, for example -m "not slow".
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
HF_HUB_OFFLINE=1 .venv/bin/python -m pytest "$@"
