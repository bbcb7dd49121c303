"""The training rows of a selection, and how often each source is to be drawn, as files for other trainers.

Reads   the data of a run; the subset or the weights
Writes  results/<name>/selected.jsonl (prompt, completion, task, sample_index) and mixture.json

    python scripts/export_selection.py --save_name law --subset_file sampled_tasks/law_forward_selection.txt
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from src import config, console


def parse_args(argv: Sequence[str] | None = None) -> Any:
    """The flags that were typed."""
    shown = (config.ChosenTasks, config.NameConfig, config.ClustersConfig)
    return config.stage_parser(
        __doc__, shown, (config.DataConfig, config.ModelConfig, config.TrainingConfig)
    ).parse_args(argv)


def main(args: Any) -> None:
    """Export."""
    from src import stage_estimate, stage_train

    typed = config.typed_flags(args)
    chosen = config.for_training(typed)
    stage_train.export(chosen, stage_estimate.clustered(chosen, typed) if chosen.load_clusters else None)


if __name__ == "__main__":
    console.run_stage(main, parse_args())
