"""Stage 2, instruction tuning: project the gradient of every training and validation sample.

Reads   the files of --data_files / --target_files, the checkpoints of meta-training
Writes  gradients/<run>/<checkpoint>/  projected.npy (rows, d), outputs.npy, samples.npz, manifest.json

    python fast_estimate_eval_approximation_alpaca.py --compute_pretrained_outputs --train_instruction \\
        --model_key TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T --max_length 256 \\
        --train_lora --lora_rank 128 --lora_alpha 512 --project_gradients --project_dim 400 --run 0
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from src import cli


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The script's flags."""
    parser = cli.parser(__doc__)
    cli.add_instruction_data(parser)
    cli.add_model(parser, model_key="TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T")
    cli.add_meta_init(parser)
    cli.add_gradients(parser)
    parser.add_argument("--compute_pretrained_outputs", action="store_true", help="compute outputs and gradients at "
                        "the checkpoints (stage 2)")  # fmt: skip
    cli.add_hardware(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Load the data and take the gradients."""
    from src import stages
    from src.instruction import load_instruction

    if not args.compute_pretrained_outputs:
        raise ValueError("pass --compute_pretrained_outputs to take the gradients")
    cli.quiet_libraries()
    data = load_instruction(cli.instruction_files(args), args.target_files, args.heldout_share, args.max_heldout)
    stages.collect(args, data)


if __name__ == "__main__":
    cli.run_stage(main, parse_args())
