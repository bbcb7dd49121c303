"""The training rows of a selection, and how often each source is to be drawn, as files for other trainers.

Reads   the data of a run; the subset or the weights
Writes  results/<name>/selected.jsonl (prompt, completion, task, sample_index) and mixture.json; with --for
        results/<name>/export_<trainer>/: a shuffled file for each source, what the trainer reads them by, mixture.json

    python scripts/export_selection.py --save_name law --subset_file sampled_tasks/law_forward_selection.txt

    python scripts/export_selection.py --save_name law --task_weights sampled_tasks/law_weights.csv --for llamafactory
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from src import config, console


def parse_args(argv: Sequence[str] | None = None) -> Any:
    """The flags that were typed."""
    shown = (config.ChosenTasks, config.NameConfig, config.ClustersConfig)
    parser = config.stage_parser(__doc__, shown, (config.DataConfig, config.ModelConfig, config.TrainingConfig))
    group = parser.add_argument_group("another trainer")
    group.add_argument(
        "--for", metavar="TRAINER",
        help="axolotl, llamafactory, trl, open-instruct, ms-swift or torchtune (default: files that belong to none)")  # fmt: skip
    group.add_argument(
        "--total_rows", type=config.COUNT, metavar="N",
        help="with --for: rows of an epoch, in the shares of --task_weights where it is named (default: the training rows "
        "of the sources)")  # fmt: skip
    group.add_argument(
        "--max_repeat", type=config.number(float, 1), metavar="X",
        help="with --for: most times that a row is taken; what this leaves goes to the other sources by their shares "
        "(default: 4)")  # fmt: skip
    group.add_argument(
        "--seed", type=config.number(int, 0), metavar="N",
        help="with --for: which rows are taken, and their order (default: 0)")  # fmt: skip
    group.add_argument(
        "--trainer_samples", action="store_true", default=None,
        help="with --for: write every row once, and the number to draw in the trainer's own keys (default: files hold "
        "rows as often as they are trained on)")  # fmt: skip
    return parser.parse_args(argv)


def main(args: Any) -> None:
    """Export."""
    with console.loading_libraries():
        from src import export

    typed = config.typed_flags(args)
    names = ("total_rows", "max_repeat", "seed", "trainer_samples")
    trainer, sampling = typed.pop("for", None), {name: typed.pop(name) for name in names if name in typed}
    if sampling and trainer is None:
        raise ValueError(f"--{next(iter(sampling))} has no effect without --for; name a trainer, or leave it out")
    chosen = config.for_training(typed)
    data = None
    if chosen.load_clusters:
        from src.stage_estimate import clustered

        data = clustered(chosen, typed)
    export.export(chosen, data, trainer, **sampling)


if __name__ == "__main__":
    console.run_stage(main, parse_args())
