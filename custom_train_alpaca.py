"""Stages 1 and 5, instruction tuning: train on all tasks, or fine-tune the base model on chosen subsets.

Reads   the files of --data_files / --target_files (or data/alpaca_data/), the base model of --model_key; fine-tuning
        takes what is not typed from the run of --save_name, or the last that fits
Writes  external_lightning_logs/<run>/   checkpoints on the way and at the best validation loss (all tasks)
        results/<name>/results.csv       losses of every target, a row per subset (--subset_file, --task_weights, --task_idxes)
        results/<name>/models/           the model, where one subset is fine-tuned on

    python custom_train_alpaca.py --data_files my --target_files my/goal.jsonl --model_key my/model --train_lora --lr 1e-3 \\
        --batch_size 16 --epochs 3 --save_name law
    python custom_train_alpaca.py --save_name law --subset_file sampled_tasks/law_forward_selection.txt
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from src import config, console

SHOWN = (
    config.InstructionData, config.RowsConfig, config.ModelConfig, config.TrainingConfig, config.MetaTrainingConfig,
    config.StatesConfig, config.ChosenTasks, config.RunsConfig, config.NameConfig, config.HardwareConfig,
)  # fmt: skip


def parse_args(argv: Sequence[str] | None = None) -> Any:
    """The flags that were typed."""
    also = config.StepsConfig, config.ClustersConfig, config.ProjectionConfig
    return config.stage_parser(__doc__, SHOWN, also=also).parse_args(argv)


def main(args: Any) -> None:
    """Train."""
    with console.loading_libraries():
        from src import stage_estimate, stage_train

    typed = config.typed_flags(args)
    training = config.for_training(typed)
    stage_train.train(training, stage_estimate.clustered(training, typed) if training.load_clusters else None)


if __name__ == "__main__":
    console.run_stage(main, parse_args())
