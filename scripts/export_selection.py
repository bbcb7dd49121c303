"""The selected rows as files that other trainers take.

Reads   the data, and a subset (--subset_file, --task_idxes) or task weights (--task_weights)
Writes  results/<name>/selected.jsonl (or .parquet): a row per training row, with prompt, completion, task, sample_index
        results/<name>/mixture.json: rows and sampling weight of each source

    python scripts/export_selection.py --data_files data/synthetic/flan.jsonl --model_key data/synthetic/model \\
        --subset_file sampled_tasks/mine_forward_selection.txt --results_name mine
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from src import cli


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The script's flags."""
    parser = cli.Parser(__doc__)
    cli.add_cot_data(parser, or_instruction=True)
    cli.add_instruction_data(parser)
    cli.add_model(parser, model_key="flan_t5_base")
    cli.add_run(parser)
    cli.add_projection(parser)
    cli.add_clusters(parser)
    cli.add_exported(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Select and write."""
    from src import stages

    stages.export(args)


if __name__ == "__main__":
    cli.run_stage(main, parse_args())
