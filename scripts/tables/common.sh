# Sourced by the tables. Default: the paper's data, models and hyperparameters, as arXiv:2409.19458 and the commands of its
# repository give them, on GPUs. --smoke: the same stages on small built-in worlds, minutes on a CPU. --dry_run: print the
# commands of the stages and stop.
set -euo pipefail
name=$(basename "$0" .sh)
root=$(cd "$(dirname "$0")/../.." && pwd)
smoke=false dry_run=false
for word in "$@"; do
    case $word in
    --smoke) smoke=true ;;
    --dry_run) dry_run=true ;;
    *) echo "error: unrecognized argument $word; expected --smoke or --dry_run" >&2 && exit 2 ;;
    esac
done
results=tables/$name

commands=()
run() { # note a stage; `render` runs them all, in one process that imports the libraries once
    commands+=("$(printf '%q ' "$@")")
}

sets=(strategy_qa commonsense_qa instruction)
if $smoke; then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # models as small as these lose more than they gain by a second thread
    world=data/tables_smoke
    run data/make_synthetic.py --output_dir $world/instruction --num_tasks 6 --rows_per_task 20 --pretrain_steps 60 \
        --target_rows 12
    run data/make_synthetic_cot.py --output_dir $world/cot --pretrain_steps 40 --num_questions 40
    sets=(addsub instruction)
fi

# choose SET: flags of a data set into data, store, tasks, training; names of its scripts
choose() {
    if [ "$1" = instruction ]; then
        train=custom_train_alpaca.py gradients="fast_estimate_eval_approximation_alpaca.py --compute_pretrained_outputs"
        regression=fast_estimate_linear_regression_alpaca.py
        tasks=() subsets=1000
        if $smoke; then
            data=(--data_files $world/instruction/flan.jsonl --target_files $world/instruction/target.jsonl
                  --model_key $world/instruction/model --train_lora)
            store=(--project_dim 32) training=(--epochs 1 --lr 2e-3 --batch_size 16) subsets=12 truths=6
        else
            data=(--train_instruction --model_key TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T --max_length 256
                  --train_lora --lora_rank 128 --lora_alpha 512)
            store=(--project_dim 400) training=(--epochs 10 --lr 2e-5 --batch_size 128 --precision 16) truths=50
        fi
    else
        train=custom_train.py gradients=fast_estimate_compute_gradients.py
        regression=fast_estimate_linear_regression.py
        if $smoke; then
            data=(--dataset_key addsub --preset_key ft_cot_t70_4aug --data_dir $world/cot/data --saved_dir $world/cot/saved
                  --model_key $world/cot/model --train_lora)
            store=(--project_dim 32) tasks=(--load_clusters --num_clusters 6) subsets=12 truths=6
            training=(--epochs 1 --lr 2e-3 --batch_size 16 --inference_batch_size 64 --max_new_tokens 16)
        else
            data=(--dataset_key "$1" --preset_key ft_cot_t70_64aug --model_key flan_t5_base --train_lora --lora_rank 16
                  --lora_alpha 128)
            store=(--project_dim 100) tasks=(--load_clusters --num_clusters 100) subsets=1000 truths=50
            training=(--epochs 20 --lr 3e-4 --batch_size 8)
        fi
    fi
}

meta_train() { run $train "${data[@]}" "${training[@]}"; }
take_gradients() { run $gradients "${data[@]}" "${store[@]}"; }

render() { # the table of these data sets, after everything noted before
    run scripts/render_table.py "$name" --results "$@"
    if $dry_run; then
        printf 'python %s\n' "${commands[@]}"
    else
        (source "$root/scripts/environment.sh")
        printf '%s\n' "${commands[@]}" | "$root/.venv/bin/python" "$root/scripts/run_commands.py"
    fi
}
