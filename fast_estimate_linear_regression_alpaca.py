"""Stage 3, instruction tuning: estimate the loss of every target after fine-tuning on each of many subsets.

Reads   gradients/<run>/, sampled_tasks/<run>.txt (drawn and written when it is not there)
Writes  results/<name>/estimates.csv, a row per subset

    python fast_estimate_linear_regression_alpaca.py --train_instruction --number_of_subsets 1000 --subset_size 0.5 \\
        --model_key TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T \\
        --train_lora --lora_rank 128 --lora_alpha 512 --project_dim 400 --run 0
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from src import cli
from src.estimation import DEFAULT_RHO, ESTIMATORS

STAGE_2 = "fast_estimate_eval_approximation_alpaca.py --compute_pretrained_outputs with the same data and model flags"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The script's flags."""
    parser = cli.Parser(__doc__)
    cli.add_instruction_data(parser)
    cli.add_model(parser, model_key="TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T")
    cli.add_meta_init(parser)
    cli.add_projection(parser)
    cli.add_estimation(parser, ESTIMATORS, DEFAULT_RHO)
    cli.add_hardware(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Estimate every subset of sources."""
    from src import estimates

    estimates.estimate_subsets(args, STAGE_2)


if __name__ == "__main__":
    cli.run_stage(main, parse_args())
