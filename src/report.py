"""What people look at: result tables and figures.

A table is a CSV with named columns, a row per subset and run, beside a JSON file that says what the rows were
made from. Rows are appended as they finish; a table made from something else is refused.

Letters: m subsets, n tasks, k targets.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd

from src.evaluation import AVERAGE, MEAN, linear_datamodeling_score
from src.paths import atomic_write, check_manifest, shorten, write_json

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib import font_manager, ticker

BLUE, ORANGE, GREEN, GREY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#7F7F7F",
)  # Okabe-Ito: safe for colour-blind readers

plt.rcParams.update(
    {
        "figure.dpi": 150,
        "figure.constrained_layout.use": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "font.size": 10,
        # names of tasks may be in any script; of these fonts those count that are installed
        "font.family": ["DejaVu Sans", *sorted({"Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Noto Emoji"}
                                               & set(font_manager.get_font_names()))],
    }
)  # fmt: skip

ESTIMATE, CALIBRATED, LOW, HIGH = "estimate", "calibrated", "low", "high"
SCORE, RANKING_ONLY = "score", "score (ranking only)"
"""What takes the place of `ESTIMATE` in columns, and in tables and figures, where estimates are no losses."""
VALIDATION_LOSS, TEST_LOSS, TEST_ACCURACY = "validation_loss", "test_loss", "test_accuracy"
"""Prefixes of the columns `<prefix>/<target>`."""
OURS = ("forward selection", "forward selection, refined", "backward elimination", "random ensemble", "mixture weights")
"""Methods of this project in the selection benchmark; the others are baselines."""


def subset_text(subset: Sequence[int]) -> str:
    """A subset as a CSV cell: task ids separated by spaces; empty for the base model."""
    return " ".join(str(task) for task in sorted(subset))


def parse_subset(text: str) -> tuple[int, ...]:
    """The subset of a CSV cell."""
    return tuple(int(task) for task in text.split())


class ResultsTable:
    """A CSV that grows by whole rows.

    Args:
        path: The CSV; the facts stand beside it as `<stem>.json`.
        facts: What every row depends on.
        repair: What to do about a table made from something else.

    Raises:
        ValueError: the table there was made from something else.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], repair: str) -> None:
        self.path = path
        manifest = path.with_suffix(".json")
        if path.is_file():
            try:
                found = json.loads(manifest.read_text(encoding="utf-8"))
            except (FileNotFoundError, ValueError) as error:
                raise ValueError(
                    f"{manifest}, which says what the rows of {path.name} were made from, cannot be read ({error}). {repair}"
                ) from error
            check_manifest(path, found, facts, repair)
            self.frame = read_table(path, of_subsets=True)
        else:
            self.frame = pd.DataFrame()
            write_json(manifest, facts)

    def has(self, subset: Sequence[int], run: int) -> bool:
        """Whether the row of this subset and run is there."""
        frame = self.frame
        return bool(len(frame) and ((frame["subset"] == subset_text(subset)) & (frame["run"] == run)).any())

    def append(self, subset: Sequence[int], run: int, values: Mapping[str, Any]) -> None:
        """Add one row; the file is replaced as a whole, so that no reader meets half a row."""
        row = pd.DataFrame([{"subset": subset_text(subset), "run": run, **values}])
        self.frame = pd.concat([self.frame, row], ignore_index=True)
        write_table(self.path, self.frame)


def write_table(path: Path, frame: pd.DataFrame) -> None:
    """Write a CSV atomically."""
    with atomic_write(path) as temporary:
        frame.to_csv(temporary, index=False, na_rep="nan")


def read_table(path: Path, of_subsets: bool = False) -> pd.DataFrame:
    """Read a table; the `subset` column stays text.

    A table of subsets, whoever wrote it, has these columns, separated by commas:

    - `subset`: ids of the tasks separated by spaces, in any order; empty for the base model.
    - `run`: the number of the repetition, which is its seed; of the same subset several make a mean.
    - `validation_loss/<target>` for every target: nats per token. Also `test_loss/<target>` and `test_accuracy/<target>`,
      where they are known; `estimate/<target>` in a table of estimates.

    `num_rows` and `seconds` are for the reader.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no table, or, with `of_subsets`, has no column `subset` or `run`, or a cell is not what it should be.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no table {path}; the stage that writes it has not run yet")
    # the parser's default is off by a last digit, so that a table that goes on would not be what one run writes
    options = {"keep_default_na": False, "na_values": ["nan"], "float_precision": "round_trip", "encoding": "utf-8-sig"}
    try:
        table = pd.read_csv(path, dtype={"subset": str}, **options)
    except (ValueError, pd.errors.ParserError) as error:  # among them wrong encodings and empty files
        raise ValueError(f"{path} cannot be read as a table ({str(error).splitlines()[0]}); make it again") from error
    if of_subsets:
        if missing := [name for name in ("subset", "run") if name not in table.columns]:
            raise ValueError(
                f"{path} has no column {missing[0]!r}; expected a table that a stage wrote, with commas between columns "
                f"(its first line is {shorten(','.join(table.columns))!r})"
            )
        _check_cells(path, table)
    table.attrs["path"] = str(path)
    return table


def _check_cells(path: Path, table: pd.DataFrame) -> None:
    """Refuse a table of subsets with a cell that is not what its column has; subsets are sorted."""
    for name in ("subset", *(name for name in table.columns if name == "run" or "/" in name)):
        if name == "subset":
            wrong, expected = ~table[name].str.fullmatch(r"\s*(\d+(\s+\d+)*)?\s*"), "task ids separated by spaces"
        else:
            wrong, expected = pd.to_numeric(table[name], errors="coerce").isna() & table[name].notna(), "a number"
        if wrong.any():
            row = int(np.argmax(wrong))
            raise ValueError(f"{path}, line {row + 2}: {name} is {str(table[name][row])!r}, expected {expected}")
    table["subset"] = [subset_text(parse_subset(text)) for text in table["subset"]]


def columns_of(frame: pd.DataFrame, prefix: str) -> list[str]:
    """Targets that the table has columns `<prefix>/<target>` for."""
    return [name.removeprefix(f"{prefix}/") for name in frame.columns if name.startswith(f"{prefix}/")]


def estimate_prefix(frame: pd.DataFrame) -> str:
    """What the columns of stage 3's estimates begin with: `ESTIMATE`, or `SCORE` where they are no losses."""
    return ESTIMATE if columns_of(frame, ESTIMATE) else SCORE


def mean_over_targets(frame: pd.DataFrame, prefix: str, targets: Sequence[str]) -> np.ndarray:
    """Mean of the columns `<prefix>/<target>`, (rows,).

    Raises:
        ValueError: the table has no such target.
    """
    available = columns_of(frame, prefix)
    if unknown := [target for target in targets if target not in available]:
        raise ValueError(f"no {prefix} of a target {unknown[0]!r} in the table; it has: {', '.join(available)}")
    return frame[[f"{prefix}/{target}" for target in targets]].to_numpy(float).mean(axis=1)


def own_targets(targets: Sequence[str], tasks: Sequence[str]) -> list[str]:
    """The targets that are no training task (the tasks of `--target_files`), or all where there is none."""
    return [name for name in targets if name not in tasks] or list(targets)


def names_of(subset: Sequence[int], tasks: Sequence[str], shown: int = 15) -> str:
    """Names of a subset's tasks, the first few of many."""
    more = f" and {len(subset) - shown} more" if len(subset) > shown else ""
    return ", ".join(tasks[task] for task in subset[:shown]) + more


def markdown_table(frame: pd.DataFrame) -> str:
    """A frame as a Markdown table; numbers with four significant digits."""
    cells = [[str(name) for name in frame.columns], ["---"] * len(frame.columns)]
    for row in frame.itertuples(index=False):
        cells.append([f"{value:.4g}" if isinstance(value, float) else str(value) for value in row])
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def fine_tuned_values(truth: pd.DataFrame, metric: str, targets: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The fine-tuned values of every subset that all runs of a table have; lower is better.

    Args:
        truth: A results table: columns `subset`, `run`, `<metric>/<target>`.
        metric: Prefix of the columns; of an accuracy, 1 - accuracy is taken.
        targets: k names.

    Returns:
        The subsets' texts, and their values (subsets, k, runs). The empty subset is left out: nothing was trained.

    Raises:
        ValueError: the table has no such target, or no subset.
    """
    if unknown := [target for target in targets if target not in columns_of(truth, metric)]:
        raise ValueError(
            f"{truth.attrs.get('path', 'the table')}: no column {metric}/{unknown[0]}; it has "
            f"{', '.join(columns_of(truth, metric)) or 'none of this kind'}"
        )
    columns = [f"{metric}/{target}" for target in targets]
    tables = [rows.drop_duplicates("subset").set_index("subset")[columns] for _, rows in truth.groupby("run")]
    subsets = [text for text in tables[0].index if text and all(text in table.index for table in tables)]
    if not subsets:
        raise ValueError("the table holds no fine-tuned subset (custom_train*.py --subset_file writes them)")
    return subsets, np.stack([lower_is_better(table.loc[subsets], metric) for table in tables], axis=2)


def lower_is_better(values: pd.DataFrame, metric: str) -> np.ndarray:
    """Values of a metric, (rows, k); of an accuracy, 1 - accuracy."""
    numbers = values.to_numpy(float)
    return 1 - numbers if metric.endswith("accuracy") else numbers


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Write a JSON summary atomically."""
    write_json(path, summary)


# --- figures -------------------------------------------------------------------------------------------------


def save_figure(figure: plt.Figure, path: Path) -> None:
    """Write a PNG atomically and free the figure."""
    with atomic_write(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in a script that no font here has: boxes
        figure.savefig(temporary, format="png")
    plt.close(figure)


def estimates_figure(
    estimates: np.ndarray,
    fine_tuned: np.ndarray,
    path: Path,
    *,
    selected: Mapping[str, tuple[float, float]] | None = None,
    target: str = "target",
) -> None:
    """Estimate against fine-tuned loss, a point per random subset, chosen subsets marked.

    Args:
        estimates: (m,).
        fine_tuned: (m,), same unit.
        path: The PNG.
        selected: Name -> (estimate, fine-tuned value) of subsets to mark.
        target: What the loss is of.
    """
    figure, axes = plt.subplots(figsize=(5.6, 4.4))
    score = linear_datamodeling_score(estimates, fine_tuned)
    axes.scatter(estimates, fine_tuned, color=BLUE, s=28, label=f"random subset (Spearman {score:.2f})")
    for (name, (estimate, value)), marker, color in zip(
        (selected or {}).items(), "*DsP", (ORANGE, GREEN, GREY, BLUE), strict=False
    ):
        axes.scatter(
            [estimate],
            [value],
            color=color,
            marker=marker,
            s=110,
            edgecolor="black",
            linewidth=0.6,
            label=name,
        )
    axes.set_xlabel(estimate_label())
    axes.set_ylabel("loss after fine-tuning (nats per token)")
    axes.set_title(f"Validation loss of {target}, {len(estimates)} random subsets")
    axes.legend(loc="best", frameon=True, fontsize=8)
    save_figure(figure, path)


def estimate_label(ranks_only: bool = False) -> str:
    """What an axis of estimates is called."""
    return f"{RANKING_ONLY}, lower is better" if ranks_only else "estimated loss (nats per token)"


def comparison_figure(
    estimates: np.ndarray,
    fine_tuned: np.ndarray,
    table: pd.DataFrame,
    predictor: str,
    path: Path,
    *,
    ranks_only: bool = False,
) -> None:
    """Estimates against fine-tuned values of the mean over targets; of several targets, also the score of each.

    Args:
        estimates: (m, k).
        fine_tuned: (m, k), same unit.
        table: What `evaluation.comparison` gives.
        predictor: Which of its predictors the estimates are.
        path: The PNG.
        ranks_only: The estimates are no losses.
    """
    rows = table[(table["predictor"] == predictor) & ~table["target"].isin([AVERAGE, MEAN])].sort_values("lds")
    several = len(rows) > 1
    size = (10.5, max(4.4, 0.19 * len(rows))) if several else (5.6, 4.4)
    figure, panels = plt.subplots(1, 1 + several, figsize=size, squeeze=False)
    means = estimates.mean(axis=1), fine_tuned.mean(axis=1)
    left = panels[0, 0]
    left.scatter(*means, color=BLUE, s=28)
    left.set_xlabel(estimate_label(ranks_only))
    left.set_ylabel("loss after fine-tuning (nats per token)")
    what = f"Mean over {len(rows)} targets" if several else shorten(rows["target"].iloc[0], 40)
    left.set_title(f"{what}: Spearman {linear_datamodeling_score(*means):.2f} over {len(estimates)} subsets")
    if several:
        _scores_of_targets(panels[0, 1], rows)
    save_figure(figure, path)


def _scores_of_targets(axes: plt.Axes, rows: pd.DataFrame) -> None:
    """The score of every target with its interval, beside the attainable maximum where it is known."""
    positions = np.arange(len(rows))
    interval = np.abs(rows[["lds_low", "lds_high"]].to_numpy(float).T - rows["lds"].to_numpy(float))
    axes.errorbar(rows["lds"], positions, xerr=interval, fmt="o", color=BLUE, ecolor=GREY, markersize=4,
                  label="score, 90 % bootstrap interval")  # fmt: skip
    if rows["attainable"].notna().any():
        axes.hlines(positions, rows["attainable_low"], rows["attainable_high"], color=ORANGE, alpha=0.5)
        axes.scatter(rows["attainable"], positions, marker="|", color=ORANGE, s=60, label="attainable maximum, 90 %")
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_yticks(positions, _names(rows["target"]), fontsize=7)
    axes.set_xlabel("linear datamodeling score (Spearman over subsets)")
    lowest = float(np.nanmin([rows["lds_low"].min(), rows["attainable_low"].min(), 0.0]))
    axes.set_xlim(lowest - 0.05, 1.05)
    axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2)


def _names(names: Iterable[str], length: int = 36) -> list[str]:
    """Names of tasks for an axis: one line each, long ones cut."""
    return [shorten(" ".join(str(name).split()), length) for name in names]


def benchmark_figure(table: pd.DataFrame, path: Path) -> None:
    """The score of every estimator in every world, beside the attainable maximum with its interval.

    Args:
        table: Columns `world`, `estimator`, `lds`, `lds_low`, `attainable`, `attainable_low`, `attainable_high`.
        path: The PNG.
    """
    worlds, estimators = (table[column].drop_duplicates().tolist() for column in ("world", "estimator"))
    figure, axes = plt.subplots(figsize=(8.4, 1.2 + 0.62 * len(worlds)))
    markers, colors = "osD^vP*X<>", (ORANGE, BLUE, GREEN, GREY, "#CC79A7", "#E69F00", "#56B4E9", "#000000")
    positions = np.arange(len(worlds))
    for index, estimator in enumerate(estimators):
        scores = table[table["estimator"] == estimator].set_index("world")["lds"].reindex(worlds).astype(float)
        if scores.isna().all():  # a constant has no ranking
            continue
        axes.scatter(scores, positions, marker=markers[index % len(markers)], color=colors[index % len(colors)],
                     s=46, alpha=0.85, label=estimator, zorder=2 + len(estimators) - index)  # fmt: skip
    names = ["attainable", "attainable_low", "attainable_high"]
    attainable = table.groupby("world")[names].first().reindex(worlds).astype(float)
    axes.hlines(positions, attainable["attainable_low"], attainable["attainable_high"], color="black", alpha=0.4)
    axes.scatter(
        attainable["attainable"], positions, marker="|", s=160, color="black", label="attainable maximum, 90 %"
    )
    axes.set_yticks(positions, worlds, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(right=1.02)
    axes.set_xlabel("linear datamodeling score (Spearman over random half-size subsets)")
    axes.set_title("Estimators against really fine-tuned values")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    save_figure(figure, path)


def regret_figure(table: pd.DataFrame, path: Path) -> None:
    """What each method's selection costs in test loss over the oracle's, by world, as a share of the gap from the oracle
    to training on all tasks.

    Args:
        table: Columns `world`, `method`, `regret`.
        path: The PNG.
    """
    worlds, methods = (table[column].drop_duplicates().tolist() for column in ("world", "method"))
    regrets = table.pivot(index="method", columns="world", values="regret").loc[methods, worlds]
    figure, axes = plt.subplots(figsize=(8.4, 1.2 + 0.32 * len(methods)))
    positions = np.arange(len(methods))
    axes.barh(positions, regrets.mean(axis=1), color=[BLUE if m in OURS else GREY for m in methods], alpha=0.55)
    for marker, world in zip("osD^vP*X", worlds, strict=False):
        axes.scatter(regrets[world], positions, marker=marker, s=26, color="black", label=world, zorder=2)
    axes.axvline(0, color=ORANGE, linewidth=1.2)
    axes.axvline(1, color=GREY, linewidth=0.8, linestyle="--")
    axes.set_yticks(positions, methods, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("regret in test loss: 0 = oracle (orange line), 1 = all tasks (dashed)")
    axes.set_title("What a method's selection costs; bars are means over worlds")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    save_figure(figure, path)


def selection_figure(
    steps: pd.DataFrame,
    names: Sequence[str],
    path: Path,
    *,
    title: str,
    references: Mapping[str, float],
    ranks_only: bool = False,
) -> None:
    """The estimate along a search, each step labelled with the task it took.

    Args:
        steps: Columns `step`, `task`, `estimate` (or `score`, with `ranks_only`), `selected`.
        names: Task names by id.
        path: The PNG.
        title: Above the figure.
        references: Label -> estimate, for lines to compare with.
        ranks_only: The estimates are no losses.
    """
    figure, axes = plt.subplots(figsize=(max(5.6, 0.3 * len(steps) + 1.5), 4.8))
    value = SCORE if ranks_only else ESTIMATE
    axes.plot(steps["step"], steps[value], color=GREY, zorder=1)
    taken = steps[steps["selected"]]
    passed = steps[~steps["selected"]]
    axes.scatter(taken["step"], taken[value], color=ORANGE, zorder=2, label="selected")
    if len(passed):
        label = "tried, no improvement"
        axes.scatter(passed["step"], passed[value], color=GREY, marker="X", s=44, zorder=2, label=label)
    axes.set_xticks(steps["step"], _names(names[task] for task in steps["task"]), rotation=60, ha="right", fontsize=8)
    for (label, level), style in zip(references.items(), ("--", ":"), strict=False):
        axes.axhline(level, color=BLUE, linestyle=style, linewidth=1, label=label)
    axes.set_ylabel(estimate_label(ranks_only))
    axes.set_xlabel("task of each step")
    axes.set_title(title)
    axes.legend(fontsize=8)
    save_figure(figure, path)


def affinity_figure(
    affinity: np.ndarray, tasks: Sequence[str], targets: Sequence[str], path: Path, *, ranks_only: bool = False
) -> None:
    """How much each task alone lowers each target's loss, as a heat map around zero.

    Args:
        affinity: (n, k), in nats per token.
        tasks: Names (n,).
        targets: Names (k,).
        path: The PNG.
        ranks_only: The estimates are no losses.
    """
    size = (max(5.0, 0.28 * len(targets) + 3.2), max(3.6, 0.2 * len(tasks) + 1.4))
    figure, axes = plt.subplots(figsize=size)
    limit = float(np.abs(affinity).max()) or 1.0
    image = axes.imshow(affinity, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    axes.set_xticks(range(len(targets)), _names(targets), rotation=60, ha="right", fontsize=7)
    axes.set_yticks(range(len(tasks)), _names(tasks), fontsize=7)
    axes.grid(visible=False)
    axes.set_xlabel("target")
    axes.set_ylabel("task trained on")
    axes.set_title("What each task alone does", fontsize=10)
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label(f"fall of the {RANKING_ONLY}" if ranks_only else "estimated fall of the loss (nats per token)")
    save_figure(figure, path)


def scores_figure(
    scores: np.ndarray,
    errors: np.ndarray,
    selected: Sequence[int],
    names: Sequence[str],
    convergence: tuple[np.ndarray, np.ndarray],
    path: Path,
    *,
    target: str,
    ranks_only: bool = False,
) -> None:
    """Sorted random-ensemble scores with their standard errors, selected tasks marked, and how soon they settle.

    Args:
        scores: T_j (n,), lower is better.
        errors: Standard errors (n,).
        selected: Task ids.
        names: Task names by id.
        convergence: Of `selection.ranking_convergence`.
        path: The PNG.
        target: What is estimated.
        ranks_only: The estimates are no losses.
    """
    order = np.argsort(scores)
    positions, is_selected = np.arange(len(order)), np.isin(order, list(selected))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, max(3.8, 0.2 * len(order))), width_ratios=(1.5, 1))
    left.errorbar(
        scores[order], positions, xerr=errors[order], fmt="none", ecolor=GREY, zorder=1, label="standard error"
    )
    for chosen, color, marker, label in ((is_selected, ORANGE, "o", "selected"), (~is_selected, GREY, "X", "left out")):
        left.scatter(scores[order][chosen], positions[chosen], c=color, marker=marker, s=30, zorder=2, label=label)
    left.set_yticks(positions, _names(names[task] for task in order), fontsize=7)
    left.invert_yaxis()
    left.set_xlabel(f"mean over the subsets with the task: {estimate_label(ranks_only)}", fontsize=9)
    left.set_title(f"Random-ensemble scores for {target}")
    left.legend(fontsize=8)
    sizes, correlations = convergence
    right.plot(sizes, correlations, color=BLUE, marker="o", markersize=4)
    right.set_xscale("log")
    right.xaxis.set_minor_locator(ticker.NullLocator())
    right.set_xticks(sizes[:: max(1, len(sizes) // 5)], [f"{size:,}" for size in sizes[:: max(1, len(sizes) // 5)]])
    right.set_xlabel("number of subsets")
    right.set_ylabel("Spearman with the final ranking")
    right.set_title("How soon the ranking settles")
    save_figure(figure, path)


def approximation_figure(frame: pd.DataFrame, path: Path, *, title: str) -> None:
    """First-order and zero-order approximation error by relative distance: every seed, and their mean.

    Args:
        frame: Columns `scale`, `seed`, `first_order`, `zero_order`.
        path: The PNG.
        title: Above the figure.
    """
    columns = ["first_order", "zero_order"]
    means, num_seeds = frame.groupby("scale")[columns].mean(), frame["seed"].nunique()
    of = f", mean of {num_seeds} seeds" if num_seeds > 1 else ""
    figure, axes = plt.subplots(figsize=(5.6, 4.4))
    for column, color, marker, label in (
        ("first_order", ORANGE, "o", f"first order: outputs(w*) + g·δ{of}"),
        ("zero_order", GREY, "s", f"zero order: outputs(w*){of}"),
    ):
        axes.plot(means.index, means[column], color=color, marker=marker, label=label)
        if num_seeds > 1:
            axes.scatter(frame["scale"], frame[column], color=color, marker=marker, s=12, alpha=0.4)
    axes.set_yscale("log")
    axes.set_xlabel("length of the displacement, |δ| / |w*|")
    axes.set_ylabel("relative squared error of the outputs")
    axes.set_title(shorten(title, 64), fontsize=10)
    axes.legend(fontsize=8)
    save_figure(figure, path)


def histogram_figure(groups: Mapping[str, np.ndarray], title: str, path: Path) -> None:
    """Distributions of random-ensemble scores of several groups of tasks, on one axis.

    Args:
        groups: Label -> scores.
        title: Above the figure.
        path: The PNG.
    """
    figure, axes = plt.subplots(figsize=(5.6, 4.0))
    edges = np.histogram_bin_edges(np.concatenate(list(groups.values())), bins=40)
    for (label, scores), color in zip(groups.items(), (BLUE, ORANGE, GREEN, GREY), strict=False):
        axes.hist(scores, bins=edges, color=color, alpha=0.6, label=f"{label} ({len(scores)})")
    axes.set_xlabel("mean estimated loss of the subsets with the sample (nats per token)")
    axes.set_ylabel("samples")
    axes.set_title(title)
    axes.legend()
    save_figure(figure, path)
