#!/usr/bin/env bash
# The main job on the embedded default: bash scripts/quickstart.sh [--seed N]
set -euo pipefail
source "$(dirname "$0")/environment.sh"
exec .venv/bin/python -m scripts.quickstart "$@"
