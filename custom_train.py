"""Stages 1 and 5, chain of thought: train on all rows, or fine-tune the base model on chosen tasks.

Reads   data/dataset/, data/split/, saved/completion_data/, the base model of --model_key
Writes  external_lightning_logs/<run>/   checkpoints on the way and at the best validation loss (all rows)
        results/<name>/results.csv       loss and accuracy, a row per subset (--subset_file, --task_weights, --task_idxes)
        results/<name>/models/           the model, where one subset is fine-tuned on
        saved/completion_data/B_<model>__C_ft_cot/   the model's own completions of the validation rows

    python custom_train.py --dataset_key strategy_qa --model_key flan_t5_base --train_key ft_cot \\
        --preset_key ft_cot_t70_64aug --devices 1 --batch_size 8 --inference_batch_size 32 \\
        --train_lora --lora_rank 16 --lora_alpha 128 --runs 8
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from src import cli


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The script's flags."""
    parser = cli.Parser(__doc__)
    cli.add_cot_data(parser)
    cli.add_model(parser, model_key="flan_t5_base")
    cli.add_start(parser)
    cli.add_training(parser, batch_size=8, lr=3e-4, epochs=20)
    cli.add_meta_training(parser)
    cli.add_generation(parser)
    cli.add_truth(parser)
    cli.add_clusters(parser)
    cli.add_run(parser)
    cli.add_projection(parser)
    cli.add_hardware(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Train on chain-of-thought rows."""
    from src import stages

    stages.train(args)


if __name__ == "__main__":
    cli.run_stage(main, parse_args())
