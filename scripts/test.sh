#!/usr/bin/env bash
# Lint, types and tests, on all cores: bash scripts/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "$0")/environment.sh"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# a module's tests stay together (tests/conftest.py says which, and in which order), one thread for each process
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 exec .venv/bin/python -m pytest -q -n "$(nproc)" --dist loadgroup \
    --no-loadscope-reorder "$@"
