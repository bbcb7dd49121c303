"""Stage 3, chain of thought: estimate the loss after fine-tuning on each of many subsets of tasks.

Reads   gradients/<run>/, sampled_tasks/<run>.txt (drawn and written when it is not there)
Writes  results/<name>/estimates.csv, a row per subset; clusters beside the gradients on first use

    python fast_estimate_linear_regression.py --dataset_key strategy_qa --model_key flan_t5_base \\
        --preset_key ft_cot_t70_64aug \\
        --load_model_dir flan_t5_base_strategy_qa_ft_cot_t70_64aug_lora_r_16_run_0/epoch_epoch=17 \\
        --train_lora --lora_rank 16 --lora_alpha 128 --run 0 --project_dim 100 --device 1 \\
        --load_clusters --num_clusters 100 --number_of_subsets 1000 --subset_size 0.5 \\
        --evaluate displaced --scale 0.4
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from src import cli
from src.estimation import DEFAULT_RHO, ESTIMATORS

STAGE_2 = "fast_estimate_compute_gradients.py with the same data and model flags"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The script's flags."""
    parser = cli.Parser(__doc__)
    cli.add_cot_data(parser)
    cli.add_model(parser, model_key="flan_t5_base")
    cli.add_meta_init(parser)
    cli.add_projection(parser)
    cli.add_clusters(parser)
    cli.add_estimation(parser, ESTIMATORS, DEFAULT_RHO)
    cli.add_generation(parser)
    cli.add_hardware(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Estimate every subset of clusters or other tasks."""
    from src import estimates

    estimates.estimate_subsets(args, STAGE_2)


if __name__ == "__main__":
    cli.run_stage(main, parse_args())
