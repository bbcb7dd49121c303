"""A selection that lowers one target's loss does not raise others by more than is allowed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from src.config import EstimationConfig
from src.selection import forward_selection
from src.stage_estimate import Estimator, stored
from src.subsets import membership_matrix, read_subsets
from tests.commands import run_script
from tests.conftest import write_sources

SELECT = "fast_estimate_forward_selection.py"


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_path_is_the_greedy_one_within_the_limit(seed: int, direction: str) -> None:
    """Step by step: the lowest estimate of those within the limit; refused are those that are lower still."""
    rng = np.random.default_rng(seed)
    table, rise = rng.standard_normal((2, 64))
    powers, forward = 1 << np.arange(6), direction == "forward"
    found = forward_selection(lambda m: np.stack([table[m @ powers], rise[m @ powers] - 0.3], axis=1), 6,
                              direction=direction, past_best=100)  # fmt: skip
    current = set() if forward else set(range(6))
    for step in found.steps:
        options = {task: current ^ {task} for task in range(6) if (task in current) != forward}
        values = {task: (table[sum(1 << t for t in s)], rise[sum(1 << t for t in s)]) for task, s in options.items()}
        within = {task: value for task, (value, rises) in values.items() if rises <= 0.3}
        best = min(within, key=within.__getitem__)
        assert (step.task, step.estimate) == (best, within[best])
        assert step.refused == tuple(sorted(t for t, (v, _) in values.items() if t not in within and v < within[best]))
        current = set(step.subset)
        assert current == options[best]
    assert not any((rise[sum(1 << t for t in current ^ {task})] <= 0.3) for task in range(6)
                   if (task in current) != forward and (forward or len(current) > 1))  # fmt: skip


def test_no_task_within_the_limit_is_an_error() -> None:
    with pytest.raises(ValueError, match="no task fits into max_tasks, budget_rows and tolerance_keep"):
        forward_selection(lambda m: np.ones((len(m), 2)), 3)


def test_a_start_beyond_the_limit_is_no_answer() -> None:
    """It is estimated lowest, and raises what is to be kept; with one task more it does not."""
    found = forward_selection(lambda m: np.stack([m.sum(1), 1.0 - m[:, 1]], axis=1), 3, start_from=[0])
    assert found.start == (0,) and found.selected == (0, 1)


@pytest.fixture
def run(workspace: Path, model_folders: dict[str, str]) -> list[str]:
    """A run with four sources and two target files."""
    write_sources(workspace / "sources.jsonl", {"up": 16, "down": 16, "left": 16, "right": 16})
    write_sources(workspace / "targets.jsonl", {"goal": 16, "other": 16})
    run_script("custom_train_alpaca.py", "--data_files", "sources.jsonl", "--target_files", "targets.jsonl", "--model_key",
               model_folders["llama"], "--train_lora", "--lora_rank", "4", "--epochs", "2", "--batch_size", "8", "--lr",
               "1e-2", "--checkpoint_at", "0", "0.5", "--save_name", "toy")  # fmt: skip
    run_script("fast_estimate_eval_approximation_alpaca.py", "--compute_pretrained_outputs", "--save_name", "toy",
               "--project_dim", "32")  # fmt: skip
    return [SELECT, "--save_name", "toy"]


def test_kept_targets_stay_within_their_tolerance(run: list[str], capsys: pytest.CaptureFixture) -> None:
    """The limit lies between the rises of the free search's steps: it binds, and what is refused is shown."""
    settings, store = stored(EstimationConfig, {"save_name": "toy"})
    estimator = Estimator(settings, store)
    goal, other = estimator.targets.index("goal"), estimator.targets.index("other")

    def rise(texts: pd.Series) -> np.ndarray:
        subsets = [tuple(map(int, str(text).split())) for text in texts]
        return estimator(membership_matrix(subsets, 4), [other])[:, 0] - estimator.levels.base[other]

    run_script(*run, "--target_task", "goal", "--results_name", "free")
    free = pd.read_csv("results/free/selection.csv", dtype={"subset": str})
    singles = rise(pd.Series(["0", "1", "2", "3"]))
    limit = (np.sort(singles)[0] + np.sort(singles)[1]) / 2  # one task alone is allowed
    capsys.readouterr()
    run_script(*run, "--keep_task", "other", "--tolerance_keep", str(limit), "--refine", "0", "--results_name", "kept")
    path = pd.read_csv("results/kept/selection.csv", dtype={"subset": str})
    np.testing.assert_allclose(path["worst_rise"], rise(path["subset"]), atol=1e-6)
    assert (path["worst_rise"] <= limit).all() and int(path["task"][0]) == singles.argmin()
    assert pd.notna(path["refused"][0]) == (free["task"][0] != singles.argmin())
    assert path["target"].eq("goal").all()
    said = capsys.readouterr().out
    assert "Kept, in nats per token above the base model's loss" in said and "other " in said
    assert Path("results/kept/tradeoff.png").is_file()
    assert goal != other


def test_what_is_kept_is_so_when_really_fine_tuned(run: list[str], capsys: pytest.CaptureFixture) -> None:
    """The lowest estimate whose measured losses hold, of one subset at a time; where none do, that is an error."""
    command = [*run, "--keep_task", "other", "--tolerance_keep", "9", "--results_name", "kept"]
    file, loss = Path("results/kept/results.csv"), "validation_loss/other"

    def measured() -> pd.DataFrame:
        return pd.read_csv(file, dtype={"subset": str})

    run_script(*command)
    steps = pd.read_csv("results/kept/selection.csv", dtype={"subset": str}).sort_values("estimate")["subset"].tolist()
    assert len(steps) > 1 and measured()["subset"].tolist() == steps[:1]
    base = json.loads(Path("results/kept/selection.json").read_text())["levels"]["base"]["other"]
    said = f"measured at subset 1 of {len(steps)}: {loss} {measured()[loss][0] - base:+.3g}."
    assert said in capsys.readouterr().out
    measured().assign(**{loss: base + 9.01}).to_csv(file, index=False)
    run_script(*command)
    assert measured()["subset"].tolist() == steps[:2]
    (chosen,) = read_subsets(Path("sampled_tasks/kept_forward_selection.txt"), 4)
    assert chosen == tuple(map(int, steps[1].split()))
    run_script(*command, "--refine", "9")
    measured().assign(**{loss: base + 9.01}).to_csv(file, index=False)
    with pytest.raises(
        ValueError, match=f"each of the {len(steps)} subsets of the search raises a loss of other by more"
    ):
        run_script(*command)


def test_targets_that_cannot_be_kept_are_refused(run: list[str]) -> None:
    for flags, message in (
        (["--keep_task", "law"], "--keep_task law: the targets are "),
        (["--keep_task", "goal", "other"], "--keep_task names every target"),
    ):
        with pytest.raises(ValueError, match=message):
            run_script(*run, *flags)


def test_each_target_is_drawn_against_the_others(run: list[str]) -> None:
    run_script(*run, "--per_target", "--results_name", "each")
    path = pd.read_csv("results/each/selection.csv")
    assert path["worst_rise"].notna().all() and Path("results/each/tradeoff.png").is_file()
