#!/usr/bin/env bash
# Test accuracy (chain of thought) and test loss by method of selection: bash scripts/tables/fine_tuned.sh [--smoke] [--dry_run]
source "$(dirname "$0")/common.sh"
for set in "${sets[@]}"; do
    choose "$set"
    meta_train
    take_gradients
    estimation=("${data[@]}" "${store[@]}" "${tasks[@]}" --results_name "$results/$set")
    run $regression "${estimation[@]}" --number_of_subsets "$subsets" --sampled_tasks "sampled_tasks/$results-$set.txt"
    run fast_estimate_forward_selection.py "${estimation[@]}"
    run notebook/select_random_ensemble.py "results/$results/$set"
    tuning=(run $train "${data[@]}" "${tasks[@]}" ${tasks:+"${store[@]}"} "${training[@]}" --results_name "$results/$set")
    "${tuning[@]}" --task_idxes
    "${tuning[@]}" --task_idxes all
    "${tuning[@]}" --subset_file "sampled_tasks/${results/\//-}-${set}_forward_selection.txt"
    "${tuning[@]}" --subset_file "sampled_tasks/${results/\//-}-${set}_random_ensemble.txt"
done
render "${sets[@]}"
