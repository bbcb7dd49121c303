"""Stage 2, chain of thought: project the gradient of every training and validation sample.

Reads   data/dataset/, data/split/, saved/completion_data/, the checkpoints of meta-training
Writes  gradients/<run>/<checkpoint>/  projected.npy (rows, d), outputs.npy, samples.npz, manifest.json

    python fast_estimate_compute_gradients.py --dataset_key strategy_qa --model_key flan_t5_base \\
        --preset_key ft_cot_t70_64aug \\
        --load_model_dir flan_t5_base_strategy_qa_ft_cot_t70_64aug_lora_r_16_run_0/epoch_epoch=17 \\
        --train_lora --lora_rank 16 --lora_alpha 128 --run 0 --project_dim 100 --device 2
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
    cli.add_meta_init(parser)
    cli.add_gradients(parser)
    cli.add_hardware(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Take the gradients of chain-of-thought rows."""
    from src import stages

    stages.collect(args)


if __name__ == "__main__":
    cli.run_stage(main, parse_args())
