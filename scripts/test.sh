#!/usr/bin/env bash
# Lint and tests: bash scripts/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "$0")/environment.sh"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
HF_HUB_OFFLINE=1 exec .venv/bin/python -m pytest -q "$@"
