"""Stage 4, either track: random-ensemble scores of the tasks, and the subset of the tasks with the best (lowest) scores.

Reads   results/<name>/estimates.csv
Writes  sampled_tasks/<name>_random_ensemble.txt, results/<name>/scores.csv and scores.png

    python notebook/select_random_ensemble.py results/<name> --top_k 20
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from src import config, console


def parse_args(argv: Sequence[str] | None = None) -> Any:
    """The script's flags."""
    parser = console.Parser(__doc__, "RESULTS")
    parser.add_argument("results", metavar="RESULTS", help="folder of stage 3's estimates, results/<name>")
    config.add_flags(parser, config.TargetConfig)
    group = parser.add_argument_group("threshold").add_mutually_exclusive_group()
    group.add_argument("--top_k", type=config.COUNT, metavar="N", help="number of tasks to keep, lowest scores first "
                       "(default: those with at most the mean score)")  # fmt: skip
    group.add_argument("--ratio", type=config.SHARE, metavar="SHARE", help="share of the tasks to keep (default: those "
                       "with at most the mean score)")  # fmt: skip
    group.add_argument("--threshold", type=float, metavar="X", help="tasks with a score of at most this, in nats per token "
                       "(default: the mean score)")  # fmt: skip
    return parser.parse_args(argv)


def main(args: Any) -> None:
    """Score and select."""
    with console.loading_libraries():
        from src.stage_scores import random_ensemble

    random_ensemble(**config.typed_flags(args))


if __name__ == "__main__":
    console.run_stage(main, parse_args())
