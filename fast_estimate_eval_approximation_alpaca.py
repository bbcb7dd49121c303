"""Stage 2, instruction tuning: project the gradient of every training and validation sample.

Without --compute_pretrained_outputs, for either track: how far outputs at displaced weights are from their first-order
approximation.

Reads   the files of --data_files / --target_files, the checkpoints of meta-training
Writes  gradients/<run>/<checkpoint>/  projected.npy (rows, d), outputs.npy, samples.npz, manifest.json
        or results/<name>/approximation_error.csv and .png

    python fast_estimate_eval_approximation_alpaca.py --compute_pretrained_outputs --train_instruction \\
        --model_key TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T --max_length 256 \\
        --train_lora --lora_rank 128 --lora_alpha 512 --project_gradients --project_dim 400 --run 0

    python fast_estimate_eval_approximation_alpaca.py --dataset_key strategy_qa --preset_key ft_cot_t70_64aug \\
        --model_key flan_t5_base --train_lora --lora_rank 16 --lora_alpha 128 --project_dim 100 --scale 0.02 0.05 0.1
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from src import cli

STAGE_2 = (
    "fast_estimate_eval_approximation_alpaca.py --compute_pretrained_outputs or fast_estimate_compute_gradients.py with "
    "the same data and model flags"
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The script's flags."""
    parser = cli.Parser(__doc__)
    cli.add_cot_data(parser, or_instruction=True)
    cli.add_instruction_data(parser)
    cli.add_model(parser, model_key="TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T")
    cli.add_meta_init(parser)
    cli.add_gradients(parser)
    cli.add_approximation(parser)
    cli.add_hardware(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Take the gradients, or measure how good the first order is."""
    from src import estimates, stages

    if args.compute_pretrained_outputs:
        stages.collect(args)
    else:
        estimates.approximation_error(args, STAGE_2)


if __name__ == "__main__":
    cli.run_stage(main, parse_args())
