"""Stages 1 and 5, instruction tuning: train on all tasks, or fine-tune the base model on chosen subsets.

Reads   the files of --data_files / --target_files (or data/alpaca_data/), the base model of --model_key
Writes  external_lightning_logs/<run>/   checkpoints on the way and at the best validation loss (all tasks)
        results/<name>/results.csv       losses of every target, a row per subset (--subset_file, --task_weights, --task_idxes)
        results/<name>/models/           the model, where one subset is fine-tuned on

    python custom_train_alpaca.py --train_instruction --model_key TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T \\
        --lr 2e-5 --batch_size 128 --max_length 256 --epochs 10 --train_lora --lora_rank 128 --lora_alpha 512 \\
        --strategy fsdp --devices 0 1 2 3 --runs 1 --precision bf16 --accumulate 1
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from src import cli


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The script's flags."""
    parser = cli.Parser(__doc__)
    cli.add_instruction_data(parser)
    cli.add_model(parser, model_key="TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T")
    cli.add_start(parser)
    cli.add_training(parser, batch_size=128, lr=2e-5, epochs=10)
    cli.add_meta_training(parser)
    cli.add_truth(parser)
    cli.add_hardware(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Train on instruction rows."""
    from src import stages

    stages.train(args)


if __name__ == "__main__":
    cli.run_stage(main, parse_args())
