"""Of everything that was fine-tuned the best on validation rows, and how sure that is, in words; tables that people edit."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_rel

from src.artifacts import losses_file
from src.evaluation import best_fine_tuned
from src.tables import ResultsTable, parse_subset, read_table
from tests.commands import refused

TASKS = ["law", "medicine", "poetry"]


def fine_tuned(folder: Path, losses: dict[str, list[np.ndarray]], keep_rows: bool = True) -> None:
    """A results folder with the losses of validation rows of the target "goal", for each subset and run."""
    rows = []
    for text, of_runs in losses.items():
        for run, values in enumerate(of_runs):
            means = {"validation_loss/goal": values.mean(), "validation_loss/law": 0.1 * len(text)}
            rows.append({"subset": text, "run": run, "num_rows": 1, **means, "seconds": 1.0})
            frame = pd.DataFrame({"sample_index": np.arange(len(values)), "target": "goal", "loss": values})
            path = losses_file(folder, parse_subset(text), run)
            path.parent.mkdir(parents=True, exist_ok=True)
            if keep_rows:
                frame.sample(frac=1, random_state=run).to_csv(path, index=False)
    pd.DataFrame(rows).to_csv(folder / "results.csv", index=False)


def noise(seed: int, size: int = 40, scale: float = 0.02) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, size)


def test_the_base_model_may_be_best(tmp_path):
    """Then nothing helps, whatever the selections say; of equal losses too."""
    base = 1 + noise(0, scale=0.5)
    fine_tuned(tmp_path, {"0 1 2": [base + 2], "1": [base + 1 + noise(1)], "": [base]})
    answer = best_fine_tuned(tmp_path, TASKS, {"1": "random ensemble"})
    assert answer.subset == () and answer.lines[0] == "Nothing here helps: keep the base model."
    assert "lower than that of medicine by 1.0" in answer.lines[1]
    fine_tuned(tmp_path, {"0 1 2": [base], "1": [base], "": [base]})
    assert best_fine_tuned(tmp_path, TASKS).subset == ()


def test_rows_are_compared_in_pairs(tmp_path):
    """Losses differ more from row to row than from subset to subset: the pairs tell. The interval is that of a paired t."""
    base = 3 + noise(0, scale=2.0)
    losses = {"": [base], "0 1 2": [base - 0.5 + noise(1)], "0 2": [base - 0.501 + noise(2)], "1": [base + 1]}
    fine_tuned(tmp_path, losses)
    headline, found, basis = best_fine_tuned(tmp_path, TASKS, {"0 2": "forward selection"}).lines
    assert headline == "Train on: law, poetry (2 of 3 sources, by forward selection)."
    assert "lower than that of the base model by 0.5" in found and "no difference from all 3 sources is shown" in found
    interval = ttest_rel(base, losses["0 2"][0]).confidence_interval(0.9)
    assert f"(90 % interval {interval.low:.3f} to {interval.high:.3f})" in found
    assert basis.startswith("Intervals are over 40 validation rows; what another seed would change is not in them ")


def test_seeds_count(tmp_path):
    """Two seeds that disagree take the certainty that rows seem to give, with or without the losses of rows."""
    base = 3 + noise(0)
    losses = {"": [base, base], "1": [base - 0.9 + noise(1), base + 0.5 + noise(2)]}
    for keep_rows in (True, False):
        folder = tmp_path / str(keep_rows)
        fine_tuned(folder, losses, keep_rows)
        answer = best_fine_tuned(folder, TASKS)
        assert answer.subset == (1,) and "no difference from the base model is shown: 0.2" in answer.lines[1]
        assert answer.lines[2] == f"Intervals are over {'40 validation rows and ' if keep_rows else ''}2 seeds."


def test_what_is_not_known_is_said(tmp_path):
    """One seed and no losses of rows; and no base model in the table."""
    fine_tuned(tmp_path, {"0 1 2": [np.array([2.0])], "1": [np.array([1.0])]}, keep_rows=False)
    _, found, basis = best_fine_tuned(tmp_path, TASKS).lines
    assert "the base model is not among them" in found and "interval" not in found
    assert re.match("How sure this is cannot be said of one seed", basis)


def test_a_rival_without_losses_of_rows_takes_no_interval_from_the_others(tmp_path):
    """Random subsets in a file of many keep none."""
    fine_tuned(tmp_path, {"": [3 + noise(0)], "1": [1 + noise(1)]}, keep_rows=True)
    table = pd.read_csv(tmp_path / "results.csv", keep_default_na=False)
    other = table.iloc[[-1]].assign(subset="0 2")
    columns = [name for name in table if name.startswith("validation_loss/")]
    other[columns] = 1.5
    pd.concat([table, other]).to_csv(tmp_path / "results.csv", index=False)
    _, found, basis = best_fine_tuned(tmp_path, TASKS).lines
    assert (
        "90 % interval" in found
        and found.endswith("(one seed).")
        and basis.startswith("Intervals are over 40 validation rows")
    )


def test_targets_count_the_same(tmp_path):
    """Of two targets the mean is compared, with the variance of both."""
    base, losses = noise(0, 60, 1.0), noise(1, 60, 0.3) - 0.05
    target, rows = np.where(np.arange(60) % 2, "a", "b"), []
    for text, values in (("", base), ("1", base + losses)):
        path = losses_file(tmp_path, parse_subset(text), 0)
        path.parent.mkdir(exist_ok=True)
        frame = pd.DataFrame({"sample_index": np.arange(60), "target": target, "loss": values})
        frame.to_csv(path, index=False)
        means = frame.groupby("target")["loss"].mean().add_prefix("validation_loss/")
        rows.append({"subset": text, "run": 0, **means})
    pd.DataFrame(rows).to_csv(tmp_path / "results.csv", index=False)
    low, high = map(float, re.findall(r"interval (\S+) to (\S+)\)", best_fine_tuned(tmp_path, TASKS).lines[1])[0])
    variance = np.mean([losses[target == name].var(ddof=1) for name in "ab"]) / 60
    assert (high - low) / 2 == pytest.approx(1.67 * np.sqrt(variance), rel=0.02)


GOOD = "subset,run,validation_loss/goal,seconds\n0 1,0,0.5,3\n,0,0.75,1\n"
BAD_TABLES = [
    (GOOD.replace(",", ";"), r"no column 'subset'; .* commas between columns \(its first line is 'subset;run"),
    (GOOD.replace("run,", "seed,"), r"no column 'run'"),
    (GOOD.replace("0 1", "0-1"), r"line 2: subset is '0-1', expected task ids separated by spaces"),
    (GOOD.replace("0.75", "0.7O"), r"line 3: validation_loss/goal is '0\.7O', expected a number"),
    (GOOD.replace("0.75", ""), r"line 3: validation_loss/goal is '', expected a number"),
    ("\udcff" + GOOD, r"cannot be read as a table"),
]


def test_tables_that_another_editor_saves_are_read_and_bad_cells_named(tmp_path):
    """Byte order mark, line ends, ids in another order, no columns that nobody needs."""
    path = tmp_path / "results.csv"
    path.write_bytes(b"\xef\xbb\xbfsubset,run,validation_loss/goal\r\n 1  0,0,0.5\r\n,0,nan\r\n")
    table = read_table(path, of_subsets=True)
    assert table["subset"].tolist() == ["0 1", ""] and table["validation_loss/goal"].isna().tolist() == [False, True]
    for text, message in BAD_TABLES:
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        refused(rf"results\.csv.*{message}", read_table, path, of_subsets=True)


def test_a_table_that_goes_on_needs_its_facts(tmp_path):
    """What its rows were made from stands beside it; without, no row is added."""
    path, repair = tmp_path / "results.csv", "Choose another name."
    path.write_text(GOOD)
    refused("lr: found None, expected 1. Choose another", ResultsTable, path, {"lr": 1}, repair)
    path.with_suffix(".json").write_text("{half")
    refused(r"results\.json cannot be read .* Choose another", ResultsTable, path, {"lr": 1}, repair)
