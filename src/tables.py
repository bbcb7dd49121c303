"""Tables of results: CSV files with a row for a subset and run, beside a JSON file that says what made them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src.artifacts import atomic_write, check_manifest, described, shorten, write_json
from src.data import require_file

ESTIMATE, CALIBRATED, LOW, HIGH = "estimate", "calibrated", "low", "high"
# what takes the place of ESTIMATE in columns, and in tables and figures, where estimates are not losses
SCORE, RANKING_ONLY = "score", "score (ranking only)"
# prefixes of the columns <prefix>/<target>
VALIDATION_LOSS, TEST_LOSS, TEST_ACCURACY = "validation_loss", "test_loss", "test_accuracy"


def subset_text(subset: Sequence[int]) -> str:
    """A subset as a CSV cell: task ids separated by spaces; empty for the base model."""
    return " ".join(str(task) for task in sorted(subset))


def parse_subset(text: str) -> tuple[int, ...]:
    """The subset of a CSV cell."""
    return tuple(int(task) for task in text.split())


class ResultsTable:
    """A CSV that grows by whole rows; `facts`, what every row depends on, stand beside it as `<stem>.json`. ValueError: the
    table there was made from something else, with the `repair`."""

    def __init__(self, path: Path, facts: Mapping[str, Any], repair: str) -> None:
        self.path, self.frame, manifest = path, pd.DataFrame(), path.with_suffix(".json")
        if path.is_file():
            check_manifest(path, described(path.parent, manifest.name, repair), facts, repair)
            self.frame = read_table(path, of_subsets=True)
        else:
            write_json(manifest, facts)

    def has(self, subset: Sequence[int], run: int) -> bool:
        """Whether the row of this subset and run is there."""
        frame, text = self.frame, subset_text(subset)
        return bool(len(frame) and ((frame["subset"] == text) & (frame["run"] == run)).any())

    def append(self, subset: Sequence[int], run: int, values: Mapping[str, Any]) -> None:
        """Add one row; the file is replaced atomically."""
        row = pd.DataFrame([{"subset": subset_text(subset), "run": run, **values}])
        self.frame = pd.concat([self.frame, row], ignore_index=True)
        write_table(self.path, self.frame)


def write_table(path: Path, frame: pd.DataFrame) -> None:
    """Write a CSV atomically."""
    with atomic_write(path) as temporary:
        frame.to_csv(temporary, index=False, na_rep="nan")


def write_result(path: Path, frame: pd.DataFrame, **facts: Any) -> None:
    """Write a table, and beside it as `<stem>.json` what is worth knowing about it."""
    write_table(path, frame)
    write_json(path.with_suffix(".json"), facts)


def read_table(path: Path, of_subsets: bool = False) -> pd.DataFrame:
    """Read a table; the column `subset` stays text.

    A table of subsets, whoever wrote it, has the columns `subset` (ids of the tasks separated by spaces, in any order;
    empty for the base model), `run` (the number of the repetition, which is its seed), and for every target
    `validation_loss/<target>` in nats per token, `test_loss/…` and `test_accuracy/…` where they are known, or `estimate/…`.

    ValueError: it is no table, or, with `of_subsets`, one of `subset` and `run` is missing or a cell is wrong.
    """
    require_file(path, "the stage that writes it has not run yet")
    # the parser's default is off by a last digit, so that a table that goes on would not be what one run writes
    options = {"keep_default_na": False, "na_values": ["nan"], "float_precision": "round_trip", "encoding": "utf-8-sig"}
    try:
        table = pd.read_csv(path, dtype={"subset": str}, **options)
    except (ValueError, pd.errors.ParserError) as error:  # among them wrong encodings and empty files
        raise ValueError(f"{path} cannot be read as a table ({str(error).splitlines()[0]}); make it again") from error
    table.attrs["path"] = str(path)
    if not of_subsets:
        return table
    if missing := [name for name in ("subset", "run") if name not in table.columns]:
        found = f"(its first line is {shorten(','.join(table.columns))!r})"
        raise ValueError(f"{path}: no column {missing[0]!r}; expected commas between columns {found}")
    for name in ("subset", *(name for name in table.columns if name == "run" or "/" in name)):
        if name == "subset":
            wrong, expected = ~table[name].str.fullmatch(r"\s*(\d+(\s+\d+)*)?\s*"), "task ids separated by spaces"
        else:
            wrong, expected = pd.to_numeric(table[name], errors="coerce").isna() & table[name].notna(), "a number"
        if wrong.any():
            row = int(np.argmax(wrong))
            raise ValueError(f"{path}, line {row + 2}: {name} is {str(table[name][row])!r}, expected {expected}")
    table["subset"] = [subset_text(parse_subset(text)) for text in table["subset"]]
    return table


def columns_of(frame: pd.DataFrame, prefix: str) -> list[str]:
    """Targets that the table has columns `<prefix>/<target>` for."""
    return [name.removeprefix(f"{prefix}/") for name in frame.columns if name.startswith(f"{prefix}/")]


def estimate_prefix(frame: pd.DataFrame) -> str:
    """Prefix of the columns of stage 3's estimates: `ESTIMATE`, or `SCORE` where they are not losses."""
    return ESTIMATE if columns_of(frame, ESTIMATE) else SCORE


def mean_over_targets(frame: pd.DataFrame, prefix: str, targets: Sequence[str]) -> np.ndarray:
    """Mean of the columns `<prefix>/<target>`, (rows,). ValueError: the table has no such target."""
    available, table = columns_of(frame, prefix), frame.attrs.get("path", "the table")
    if unknown := [target for target in targets if target not in available]:
        has = ", ".join(available) or "none of this kind"
        raise ValueError(f"{table}: no column {prefix}/{unknown[0]}; it has {has}")
    return frame[[f"{prefix}/{target}" for target in targets]].to_numpy(float).mean(axis=1)


def own_targets(targets: Sequence[str], tasks: Sequence[str]) -> list[str]:
    """The targets that are not training tasks (the tasks of `--target_files`), or all where every target is one."""
    return [name for name in targets if name not in tasks] or list(targets)


def names_of(subset: Sequence[int], tasks: Sequence[str], shown: int = 15) -> str:
    """Names of a subset's tasks, the first few of many."""
    more = f" and {len(subset) - shown} more" if len(subset) > shown else ""
    return ", ".join(tasks[task] for task in subset[:shown]) + more


def fine_tuned_values(truth: pd.DataFrame, metric: str, targets: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The subsets but the empty one that all runs of a results table have, as texts, and their values, (subsets, targets,
    runs), lower is better. ValueError: the table has no such target, or no subset."""
    values = np.stack([mean_over_targets(truth, metric, [target]) for target in targets], axis=1)
    frame = pd.DataFrame(lower_is_better(values, metric), truth["subset"])
    tables = [table[~table.index.duplicated()] for _, table in frame.groupby(truth["run"].to_numpy())]
    subsets = [text for text in tables[0].index if text and all(text in table.index for table in tables)]
    if not subsets:
        raise ValueError("the table holds no fine-tuned subset (custom_train*.py --subset_file writes them)")
    return subsets, np.stack([table.loc[subsets].to_numpy() for table in tables], axis=2)


def lower_is_better(values: pd.DataFrame | np.ndarray, metric: str) -> np.ndarray:
    """Values of a metric, of any shape; of an accuracy, 1 - accuracy."""
    numbers = np.asarray(values, float)
    return 1 - numbers if metric.endswith("accuracy") else numbers
