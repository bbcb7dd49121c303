#!/usr/bin/env bash
# First-order approximation error by relative distance from the meta-initialization: bash scripts/tables/approximation_error.sh [--smoke] [--dry_run]
source "$(dirname "$0")/common.sh"
for set in "${sets[@]}"; do
    choose "$set"
    meta_train
    take_gradients
    run fast_estimate_eval_approximation_alpaca.py "${data[@]}" "${store[@]}" --results_name "$results/$set" \
        --scale 0.02 0.04 0.06 0.08 0.10 --seed 0 1 2
done
render "${sets[@]}"
