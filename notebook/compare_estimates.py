"""Compare estimates with fine-tuned values, either track: stage 3's table against measured losses of the same subsets.

For every target Spearman's correlation over subsets (the linear datamodeling score) with a bootstrap interval, Pearson's,
the mean relative and the squared relative error, each beside a constant, the base model and training on all tasks (where
the truth has them), the predictor that only knows whether the target's own task is in the subset, and the attainable
maximum: how well any estimate could rank the mean of the runs, as far as these differ.

Reads   results/<name>/estimates.csv, results/<name>/results.csv
Writes  comparison.csv and comparison.png beside the estimates

    python notebook/compare_estimates.py results/<name>/estimates.csv results/<name>/results.csv
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from src import config, console


def parse_args(argv: Sequence[str] | None = None) -> Any:
    """The script's flags."""
    parser = console.Parser(__doc__, "ESTIMATES.csv TRUTH.csv")
    parser.add_argument("estimates", metavar="ESTIMATES.csv", help="table of stage 3")
    parser.add_argument("truth", metavar="TRUTH.csv", help="results.csv of stage 1's script with --subset_file; with --runs "
                        "2 or more the attainable maximum is known")  # fmt: skip
    parser.add_argument_group("comparison").add_argument("--metric", default="validation_loss", metavar="NAME",
        help="columns of the truth to compare with, for example test_loss or test_accuracy (default: validation_loss)")  # fmt: skip
    config.add_flags(parser, config.TargetConfig)
    return parser.parse_args(argv)


def main(args: Any) -> None:
    """Compare."""
    with console.loading_libraries():
        from src.stage_scores import compare

    compare(Path(args.estimates), Path(args.truth), args.metric, args.target_task)


if __name__ == "__main__":
    console.run_stage(main, parse_args())
