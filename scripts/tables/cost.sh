#!/usr/bin/env bash
# Seconds of meta-training, gradients and estimates of many subsets, beside fine-tuning them: bash scripts/tables/cost.sh [--smoke] [--dry_run]
source "$(dirname "$0")/common.sh"
for set in "${sets[@]}"; do
    choose "$set"
    meta_train
    take_gradients
    run $regression "${data[@]}" "${store[@]}" "${tasks[@]}" --results_name "$results/$set" --number_of_subsets "$subsets" \
        --sampled_tasks "sampled_tasks/$results-$set.txt"
    run $regression "${data[@]}" "${store[@]}" "${tasks[@]}" --results_name "$results/$set-truth" --number_of_subsets 3 \
        --sampled_tasks "sampled_tasks/$results-$set-truth.txt"
    run $train "${data[@]}" "${tasks[@]}" ${tasks:+"${store[@]}"} "${training[@]}" --results_name "$results/$set" \
        --subset_file "sampled_tasks/$results-$set-truth.txt"
done
render "${sets[@]}"
