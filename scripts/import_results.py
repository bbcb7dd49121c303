"""Losses of models that another trainer fine-tuned, as the table that comparison and calibration take.

Reads   a CSV with a line for each model and target: `subset` (names of the tasks separated by commas, or their ids separated
        by spaces; empty for the base model, `all` for every task), `target`, `loss` (validation loss in nats per token), and,
        where a subset was trained several times, `run`; the names of tasks and targets from the run's gradients
Writes  results/<name>/results.csv

    python scripts/import_results.py measured.csv --save_name law
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from src import artifacts, config, console, tables
from src.artifacts import RESULTS_FILE
from src.subsets import parse_line


def parse_args(argv: Sequence[str] | None = None) -> Any:
    """The script's flags."""
    parser = console.Parser(__doc__)
    parser.add_argument("table", help="CSV with the columns subset, target, loss, and run where there are several")
    config.add_flags(parser, config.NameConfig)
    return parser.parse_args(argv)


def results_table(path: Path, tasks: Sequence[str], targets: Sequence[str]) -> pd.DataFrame:
    """The CSV as a table of `tables.read_table`, a row for each subset and run.

    ValueError: a column, a number or a target is missing, a name is unknown, or a value stands there twice.
    """
    frame = tables.read_table(path)
    if missing := {"subset", "target", "loss"} - set(frame.columns):
        raise ValueError(
            f"{path}: no column {min(missing)!r}; expected columns subset, target, loss and, where needed, run"
        )
    for line, row in enumerate(frame.itertuples(), start=2):
        if row.target not in targets:
            raise ValueError(f"{path}, line {line}: target {row.target!r}; the gradients have {', '.join(targets)}")
    losses = pd.to_numeric(frame["loss"], errors="coerce")
    if losses.isna().any():
        wrong = int(losses.isna().argmax())
        raise ValueError(f"{path}, line {wrong + 2}: loss is {str(frame['loss'][wrong])!r}, expected a number")
    everything = " ".join(map(str, range(len(tasks))))
    frame["loss"] = losses
    frame["subset"] = [
        tables.subset_text(
            parse_line(everything if text == config.ALL_TASKS else text, len(tasks), tasks, f"{path}, line {line}")
        )
        for line, text in enumerate(frame["subset"].str.strip(), start=2)
    ]
    frame["run"] = frame["run"] if "run" in frame.columns else 0
    keys = ["subset", "run", "target"]
    if (twice := frame.duplicated(keys)).any():
        line = int(twice.argmax()) + 2
        raise ValueError(
            f"{path}, line {line}: a value of this subset and target stands above; number them in a column run"
        )
    table = frame.set_index(keys)["loss"].unstack("target")
    for (subset, run), row in table.iterrows():
        if row.isna().any():
            names = tables.names_of(tables.parse_subset(subset), tasks) or "the base model"
            raise ValueError(
                f"{path}: no loss of target {row.index[row.isna().argmax()]} for {names}, run {run}; add it"
            )
    return table.add_prefix(f"{tables.VALIDATION_LOSS}/").reset_index().assign(seconds=float("nan"))  # not known


def main(args: Any) -> None:
    """Read, check, write."""
    with console.loading_libraries():
        from src.stage_estimate import Estimator, stored

    typed = config.typed_flags(args)
    path = Path(typed.pop("table"))
    settings, store = stored(config.EstimationConfig, typed)
    estimator, written = Estimator(settings, store), artifacts.results_dir(settings.results) / RESULTS_FILE
    if written.exists():
        raise ValueError(f"{written} is there already; choose another --results_name, or move it away")
    table = results_table(path, estimator.tasks, estimator.targets)
    tables.write_result(written, table, imported_from=str(path), command=console.command_typed())
    models = f"{console.counted(len(table), 'model')}, {console.counted(len(table.columns) - 3, 'target')}"
    print(
        f"Wrote {written}: losses of {models}. Next: python notebook/compare_estimates.py "
        f"{written.with_name(artifacts.ESTIMATES_FILE)} {written}, or stage 3 with --calibrate {written}"
    )


if __name__ == "__main__":
    console.run_stage(main, parse_args())
