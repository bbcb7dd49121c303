"""The figures of the stages, as PNG files: m subsets, n tasks, k targets; `ranks_only`: the estimates are not losses."""

from __future__ import annotations

import itertools
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd

from src.artifacts import atomic_write, shorten
from src.evaluation import AVERAGE, MEAN
from src.tables import ESTIMATE, RANKING_ONLY, SCORE

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib import font_manager, ticker

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#7F7F7F"  # Okabe-Ito: safe for colour-blind readers
LABELS = {True: f"{RANKING_ONLY}, lower is better", False: "estimated loss (nats per token)"}  # of axes, by ranks_only
plt.rc("figure", **{"dpi": 150, "constrained_layout.use": True})
plt.rc("axes", **{"spines.top": False, "spines.right": False, "grid": True})
plt.rc("grid", alpha=0.25)
# names of tasks may be in any script; of these fonts those count that are installed
FONTS = {"Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Noto Emoji"} & set(font_manager.get_font_names())
plt.rc("font", family=["DejaVu Sans", *sorted(FONTS)])


def save_figure(figure: plt.Figure, path: Path) -> None:
    """Write a PNG atomically and free the figure."""
    with atomic_write(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in a script that no font here has: boxes
        figure.savefig(temporary, format="png")
    plt.close(figure)


def about_run(facts: Mapping[str, Any], target: str = "", *more: str) -> str:
    """The subtitle of a figure: model, data, number of sources, target, and what else is to be said, of `Estimator.facts`."""
    known = [f"model: {str(facts['model_key']).rstrip('/').rpartition('/')[2]}"] if "model_key" in facts else []
    known += [f"data: {shorten(facts['data'], 36)}"] if "data" in facts else []
    known += [f"{len(facts['tasks'])} sources"] if "tasks" in facts else []
    known += [f"target: {shorten(target, 40)}"] if target else []
    known += [f"seed {facts['seed']}"] if "seed" in facts else []
    return ", ".join([*known, *more])


def titled(axes: plt.Axes, title: str, about: str, labels: float = 0.0) -> None:
    """A title, and smaller below it what the figure is about, in as many lines as it needs right of labels so many inches wide."""
    width = axes.figure.get_size_inches()[0] / axes.get_subplotspec().get_gridspec().ncols - labels
    lines = textwrap.wrap(_plain(about), int(15 * width) - 6)
    axes.set_title(_plain(title), loc="left", fontsize=11, pad=6 + 11 * len(lines))
    place = {"xytext": (0, 5), "xycoords": "axes fraction", "textcoords": "offset points", "in_layout": False}
    axes.annotate("\n".join(lines), (0, 1), fontsize=8, color="#555555", **place)


def _plain(text: object) -> str:
    """One line in which dollars are no mathematics."""
    return " ".join(str(text).split()).replace("$", r"\$")


def scatter(axes: plt.Axes, estimates: np.ndarray, values: np.ndarray, ranks_only: bool, label: str = "") -> None:
    """Plot estimates (m,) against fine-tuned losses of some runs (m, r): means, and where there are several runs their standard
    deviation."""
    spread = values.std(axis=1, ddof=1) if values.shape[1] > 1 else None
    style = {"fmt": "o", "color": BLUE, "ecolor": GREY, "markersize": 5}
    axes.errorbar(estimates, values.mean(axis=1), yerr=spread, label=label, **style)
    axes.set(xlabel=LABELS[ranks_only], ylabel="loss after fine-tuning (nats per token)")


def comparison_figure(
    estimates: np.ndarray, fine_tuned: np.ndarray, table: pd.DataFrame, predictor: str, path: Path, *, about: str,
    ranks_only: bool,
) -> None:  # fmt: skip
    """Estimates (m, k) of a `predictor` against fine-tuned values (m, k, r), means over targets; of several targets also the
    score of each, with its interval and the attainable maximum, from the `table` of `accuracy.comparison`."""
    rows = table[(table["predictor"] == predictor) & ~table["target"].isin([AVERAGE, MEAN])].sort_values("lds")
    (num_subsets, _, num_runs), is_one = fine_tuned.shape, len(rows) == 1
    size = (5.6, 4.4) if is_one else (10.5, max(4.4, 0.19 * len(rows)))
    figure, panels = plt.subplots(1, 2 - is_one, figsize=size, squeeze=False)
    scatter(panels[0, 0], estimates.mean(axis=1), fine_tuned.mean(axis=1), ranks_only)
    overall = rows if is_one else table[(table["predictor"] == predictor) & (table["target"] == MEAN)]
    lds, low, high = overall[["lds", "lds_low", "lds_high"]].iloc[0]
    seeds = "1 seed" if num_runs == 1 else f"{num_runs} seeds, bars are their standard deviation"
    of_all = "" if is_one else f", mean over {len(rows)} targets"
    title = f"Spearman {lds:.2f} (90 % interval {low:.2f} to {high:.2f})"
    titled(panels[0, 0], title, f"{about}, {num_subsets} subsets, {seeds}{of_all}")
    for axes in panels[0, 1:]:
        positions, style = np.arange(len(rows)), {"fmt": "o", "color": BLUE, "ecolor": GREY, "markersize": 4}
        interval = np.abs(rows[["lds_low", "lds_high"]].to_numpy(float).T - rows["lds"].to_numpy(float))
        axes.errorbar(rows["lds"], positions, xerr=interval, label="score, 90 % bootstrap interval", **style)
        if rows["attainable"].notna().any():
            axes.hlines(positions, rows["attainable_low"], rows["attainable_high"], color=ORANGE, alpha=0.5)
            style = {"marker": "|", "color": ORANGE, "s": 60, "label": "attainable maximum, 90 %"}
            axes.scatter(rows["attainable"], positions, **style)
        axes.axvline(0, color=GREY, linewidth=0.8)
        axes.set_yticks(positions, _names(rows["target"]), fontsize=7)
        lowest = float(np.nanmin([rows["lds_low"].min(), rows["attainable_low"].min(), 0.0]))
        axes.set(xlabel="linear datamodeling score (Spearman over subsets)", xlim=(lowest - 0.05, 1.05))
        axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2)
    save_figure(figure, path)


def _names(names: Iterable[str]) -> list[str]:
    return [shorten(" ".join(str(name).split()), 36).replace("$", r"\$") for name in names]


def selection_figure(
    steps: pd.DataFrame, names: Sequence[str], path: Path, *, title: str, about: str, references: dict[str, float],
    ranks_only: bool,
) -> None:  # fmt: skip
    """Plot the estimate along a search, with lines at the estimates `references`. Columns of `steps`: `step`, `task` (an index of
    `names`), `estimate` (with `ranks_only` `score`), `selected`."""
    figure, axes = plt.subplots(figsize=(max(5.6, 0.3 * len(steps) + 1.5), 4.8))
    value, taken, passed = SCORE if ranks_only else ESTIMATE, steps[steps["selected"]], steps[~steps["selected"]]
    axes.plot(steps["step"], steps[value], color=GREY, zorder=1)
    axes.scatter(taken["step"], taken[value], color=ORANGE, zorder=2, label="selected")
    if len(passed):
        label = "tried, no improvement"
        axes.scatter(passed["step"], passed[value], color=GREY, marker="X", s=44, zorder=2, label=label)
    axes.set_xticks(steps["step"], _names(names[task] for task in steps["task"]), rotation=60, ha="right", fontsize=8)
    for (label, level), style in zip(references.items(), ("--", ":"), strict=False):
        axes.axhline(level, color=BLUE, linestyle=style, linewidth=1, label=label)
    axes.set(xlabel="task of each step", ylabel=LABELS[ranks_only])
    titled(axes, title, about)
    axes.legend(fontsize=8)
    save_figure(figure, path)


def tradeoff_figure(
    paths: Sequence[pd.DataFrame], bases: Sequence[float], path: Path, limit: float | None, about: str
) -> None:
    """The estimate of each search's target against the rise of the worst target to keep, from the base model (0, `bases`) on.
    Columns of `paths`: `target`, `step`, `estimate`, `worst_rise`, `selected`; a `limit` of the rise is a line."""
    figure, axes = plt.subplots(figsize=(6.4, 4.8))
    chosen = {"marker": "*", "s": 150, "edgecolor": "black", "linewidth": 0.6, "zorder": 3}
    for table, base, color in zip(paths, bases, itertools.cycle(plt.cm.tab10.colors)):
        rises, estimates = [0.0, *table["worst_rise"]], [base, *table[ESTIMATE]]
        (label,) = _names(table["target"].iloc[:1])
        axes.plot(rises, estimates, color=color, marker="o", markersize=4, linewidth=1, label=label)
        last = int(table["selected"].sum())
        axes.scatter(rises[last], estimates[last], color=color, **chosen)
        for number, place in enumerate(zip(rises[1:], estimates[1:], strict=True), start=1):
            axes.annotate(str(number), place, (3, 3), textcoords="offset points", fontsize=7)
    axes.scatter([], [], color="white", label="selected", **chosen)
    axes.scatter([0.0] * len(bases), bases, color=GREY, marker="s", s=36, zorder=3, label="base model (measured)")
    if limit is not None:
        axes.axvline(limit, color=ORANGE, linestyle="--", linewidth=1, label="--tolerance_keep")
    axes.set(xlabel="worst rise of a kept target's loss above the base model's (nats per token)", ylabel=LABELS[False])
    titled(axes, "What the selection does to the rest", f"{about}; numbers are steps")
    axes.legend(fontsize=8)
    save_figure(figure, path)


def affinity_figure(
    affinity: np.ndarray, tasks: Sequence[str], targets: Sequence[str], path: Path, *, about: str, ranks_only: bool
) -> None:
    """How much each task alone lowers each target's loss, (n, k), as a heat map around zero."""
    figure, axes = plt.subplots(figsize=(max(5.0, 0.28 * len(targets) + 3.2), max(3.6, 0.2 * len(tasks) + 1.4)))
    limit = float(np.abs(affinity).max()) or 1.0
    image = axes.imshow(affinity, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    axes.set_xticks(range(len(targets)), _names(targets), rotation=60, ha="right", fontsize=7)
    axes.set_yticks(range(len(tasks)), _names(tasks), fontsize=7)
    axes.grid(visible=False)
    axes.set(xlabel="target", ylabel="task trained on")
    if len(targets) <= 8:
        for (task, target), value in np.ndenumerate(affinity):
            color = "white" if abs(value) > 0.6 * limit else "black"
            axes.text(target, task, f"{value:.2g}", color=color, fontsize=6, ha="center", va="center")
    titled(axes, "What each task alone does", about, labels=0.06 * max(map(len, _names(tasks))))
    label = f"fall of the {RANKING_ONLY}" if ranks_only else "estimated fall of the loss (nats per token)"
    figure.colorbar(image, ax=axes, shrink=0.8, label=label)
    save_figure(figure, path)


def scores_figure(
    table: pd.DataFrame, convergence: tuple[np.ndarray, np.ndarray], path: Path, *, about: str, ranks_only: bool
) -> None:
    """Sorted scores of the random ensemble, the selected marked, and the `selection.ranking_convergence`. Columns of `table`:
    `name`, `score`, `standard_error`, `selected`."""
    table, positions = table.sort_values("score"), np.arange(len(table))
    scores, errors, is_selected = (table[name].to_numpy() for name in ("score", "standard_error", "selected"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, max(3.8, 0.2 * len(table))), width_ratios=(1.5, 1))
    left.errorbar(scores, positions, xerr=errors, fmt="none", ecolor=GREY, zorder=1, label="standard error")
    for chosen, color, marker, label in ((is_selected, ORANGE, "o", "selected"), (~is_selected, GREY, "X", "left out")):
        left.scatter(scores[chosen], positions[chosen], c=color, marker=marker, s=30, zorder=2, label=label)
    left.set_yticks(positions, _names(table["name"]), fontsize=7)
    left.invert_yaxis()
    left.set_xlabel(f"mean over the subsets with the task: {LABELS[ranks_only]}", fontsize=9)
    titled(left, "Random-ensemble scores", about)
    left.legend(fontsize=8)
    sizes, correlations = convergence
    ticks = sizes[:: max(1, len(sizes) // 5)]
    right.plot(sizes, correlations, color=BLUE, marker="o", markersize=4)
    right.set(xscale="log", xlabel="number of subsets", ylabel="Spearman with the final ranking")
    titled(right, "How soon the ranking settles", "of the first subsets with that of all")
    right.xaxis.set_minor_locator(ticker.NullLocator())
    right.set_xticks(ticks, [f"{size:,}" for size in ticks])
    save_figure(figure, path)


def approximation_figure(frame: pd.DataFrame, path: Path, *, about: str) -> None:
    """Plot errors by distance, of every direction and the mean. Columns of `frame`: `scale`, `toward` (empty: a random direction),
    `whole_way` (the fine-tuned model itself), `first_order`, `zero_order`."""
    figure, axes = plt.subplots(figsize=(5.6, 4.4))
    for is_random, style, kind in ((True, "-", "random"), (False, "--", "towards fine-tuned models")):
        of_kind = frame[(frame["toward"] == "") == is_random]
        if of_kind.empty:
            continue
        means = of_kind[~of_kind["whole_way"]].groupby("scale").mean(numeric_only=True)
        for column, color, marker, what in (
            ("first_order", ORANGE, "o", "first order: outputs(w*) + g·δ"),
            ("zero_order", GREY, "s", "zero order: outputs(w*)"),
        ):
            axes.plot(means.index, means[column], style, color=color, marker=marker, label=f"{what}, {kind}")
            axes.scatter(of_kind["scale"], of_kind[column], color=color, marker=marker, s=12, alpha=0.4)
    axes.set(yscale="log", ylabel="relative squared error of the outputs")
    axes.set_xlabel("length of the displacement, |δ| / |w*|")
    titled(axes, "Errors by distance from the checkpoint", about)
    axes.legend(fontsize=8)
    save_figure(figure, path)
