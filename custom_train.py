"""Stages 1 and 5, chain of thought: train on all tasks, or fine-tune the base model on chosen subsets.

Reads   <data_dir>/dataset/, <data_dir>/split/, <saved_dir>/completion_data/, the base model of --model_key; fine-tuning
        takes what is not typed from the run of --save_name, or the last that fits
Writes  external_lightning_logs/<run>/   checkpoints on the way and at the best validation loss (all tasks)
        <saved_dir>/completion_data/     the model's own completions of the validation questions
        results/<name>/results.csv       losses and accuracies, a row per subset (--subset_file, --task_weights, --task_idxes)
        results/<name>/models/           the model, where one subset is fine-tuned on

    python custom_train.py --dataset_key strategy_qa --model_key flan_t5_base --train_key ft_cot \\
        --preset_key ft_cot_t70_64aug --devices 1 --batch_size 8 --inference_batch_size 32 --train_lora --lora_rank 16 \\
        --lora_alpha 128 --runs 8
    python custom_train.py --load_clusters --subset_file sampled_tasks/<name>_forward_selection.txt
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from src import config, console

SHOWN = (
    config.CotData, config.RowsConfig, config.ModelConfig, config.TrainingConfig,
    config.MetaTrainingConfig, config.ChosenTasks, config.RunsConfig, config.ClustersConfig, config.NameConfig,
    config.HardwareConfig,
)  # fmt: skip
DEFAULTS: dict[str, Any] = {"model_key": "flan_t5_base", "lr": 3e-4, "batch_size": 8, "epochs": 20}


def parse_args(argv: Sequence[str] | None = None) -> Any:
    """The flags that were typed."""
    also = config.CotFiles, config.StatesConfig, config.StepsConfig, config.ProjectionConfig
    return config.stage_parser(__doc__, SHOWN, also=also, **DEFAULTS).parse_args(argv)


def main(args: Any) -> None:
    """Train."""
    with console.loading_libraries():
        from src import stage_train

    typed = config.typed_flags(args)
    training, clusters = config.for_training(typed, **DEFAULTS), None
    if training.load_clusters:
        from src.stage_estimate import clustered

        clusters = clustered(training, typed)
    stage_train.train(training, clusters)


if __name__ == "__main__":
    console.run_stage(main, parse_args())
