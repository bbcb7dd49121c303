#!/usr/bin/env bash
# Correlation of estimates and fine-tuned values over random halves, by data set: bash scripts/tables/correlation.sh [--smoke] [--dry_run]
source "$(dirname "$0")/common.sh"
for set in "${sets[@]}"; do
    choose "$set"
    meta_train
    take_gradients
    run $regression "${data[@]}" "${store[@]}" "${tasks[@]}" --results_name "$results/$set" --number_of_subsets "$truths" \
        --subset_size 0.5 --sampled_tasks "sampled_tasks/$results-$set.txt"
    run $train "${data[@]}" "${tasks[@]}" ${tasks:+"${store[@]}"} "${training[@]}" --results_name "$results/$set" --runs 2 \
        --subset_file "sampled_tasks/$results-$set.txt"
    run notebook/compare_estimates.py "results/$results/$set/estimates.csv" "results/$results/$set/results.csv"
done
render "${sets[@]}"
