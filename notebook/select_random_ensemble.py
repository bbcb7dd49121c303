"""Stage 4, either track: random-ensemble scores of the tasks, and the subset of the tasks with the best (lowest) scores.

Reads   results/<name>/estimates.csv
Writes  sampled_tasks/<name>_random_ensemble.txt, results/<name>/scores.csv and scores.png

    python notebook/select_random_ensemble.py results/<name> --top_k 20
"""

# %% arguments
from __future__ import annotations

import argparse
from collections.abc import Sequence

from src import cli


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The script's flags."""
    parser = cli.Parser(__doc__, "RESULTS")
    cli.add_results(parser)
    cli.add_targets(parser)
    cli.add_threshold(parser)
    cli.add_dry_run(parser)
    return parser.parse_args(argv)


# %% scores and selection
def main(args: argparse.Namespace) -> None:
    """Score and select."""
    from src import estimates

    estimates.random_ensemble(args)


if __name__ == "__main__":
    cli.run_stage(main, parse_args())
