#!/usr/bin/env bash
# The main job on a small built-in world: bash scripts/quickstart.sh [cot] [--seed N]
set -euo pipefail
source "$(dirname "$0")/environment.sh"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # models as small as these lose more than they gain by a second thread
exec .venv/bin/python -m scripts.quickstart "$@"
