"""Stage 4, either track: forward or backward selection of tasks by their estimates.

Reads   gradients/<run>/
Writes  sampled_tasks/<name>_<method>_selection.txt, results/<name>/selection.csv and selection.png
        affinity.csv and affinity.png (--per_target, no selection.png), sampled_tasks/<name>_weights.csv (--weights)

    python fast_estimate_forward_selection.py --dataset_key strategy_qa --preset_key ft_cot_t70_64aug \\
        --model_key flan_t5_base --train_lora --lora_rank 16 --lora_alpha 128 --project_dim 100 --run 0 \\
        --load_clusters --num_clusters 100
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from src import cli
from src.estimation import DEFAULT_RHO, ESTIMATORS
from src.selection import METHODS

STAGE_2 = (
    "fast_estimate_compute_gradients.py (chain of thought) or fast_estimate_eval_approximation_alpaca.py "
    "--compute_pretrained_outputs (instruction) with the same data and model flags"
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The script's flags."""
    parser = cli.Parser(__doc__)
    cli.add_cot_data(parser, or_instruction=True)
    cli.add_instruction_data(parser)
    cli.add_model(parser, model_key="flan_t5_base")
    cli.add_meta_init(parser)
    cli.add_projection(parser)
    cli.add_clusters(parser)
    cli.add_targets(parser)
    cli.add_estimator(parser, ESTIMATORS, DEFAULT_RHO)
    cli.add_selection(parser, METHODS)
    cli.add_training(parser)
    cli.add_generation(parser)
    cli.add_hardware(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Select."""
    from src import estimates

    estimates.select(args, STAGE_2)


if __name__ == "__main__":
    cli.run_stage(main, parse_args())
