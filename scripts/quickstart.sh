#!/usr/bin/env bash
# The main job on a small built-in world: bash scripts/quickstart.sh [cot|real] [--seed N]
set -euo pipefail
if [ "${1:-}" = real ]; then
    EXTRA="${EXTRA:-} real"
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}
else
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # models as small as these lose more than they gain by a second thread
fi
source "$(dirname "$0")/environment.sh"
exec .venv/bin/python -m scripts.quickstart "$@"
