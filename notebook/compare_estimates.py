"""How good the estimates are, either track: stage 3's table against really fine-tuned values of the same subsets.

For every target Spearman's correlation over subsets (the linear datamodeling score) with a bootstrap interval, Pearson's,
the mean relative and the squared relative error, each beside a constant, the base model and training on all tasks (where the truth has
them), the predictor that only knows whether the target's own task is in the subset, and the attainable
maximum: how well any estimate could rank the mean of the runs, as far as these differ.

Reads   results/<name>/estimates.csv, results/<name>/results.csv
Writes  comparison.csv and comparison.png beside the estimates

    python notebook/compare_estimates.py results/<name>/estimates.csv results/<name>/results.csv
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from src import cli


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The script's flags."""
    parser = cli.Parser(__doc__, "ESTIMATES.csv TRUTH.csv")
    cli.add_comparison(parser)
    cli.add_targets(parser, "targets to judge (default: the tasks of --target_files, else all that both tables have)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Compare."""
    from src import estimates

    estimates.compare(args)


if __name__ == "__main__":
    cli.run_stage(main, parse_args())
