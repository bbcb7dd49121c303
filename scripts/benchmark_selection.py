"""What a selection is worth: the target's test loss after the final fine-tuning, for this project's and other methods.

For each world every method selects tasks for the target from validation data alone; the base model is then fine-tuned on
each selection and its test loss, and accuracy where answers are judged, taken: means over `--runs` seeds, with 90 % intervals
by Student's t. Regret is the distance to the oracle (forward selection by really fine-tuning every candidate) as a share of
the gap from the oracle to training on all tasks, where there is one. Cost is in passes: one sample going forward and backward
is one pass; all training and all gradients count.

    python scripts/benchmark_selection.py
    python scripts/benchmark_selection.py --world synthetic:7 --no_oracle --json

`scripts/worlds.py` says what a world is, `scripts/experts.py` what experts are.

Writes  results/benchmark_selection/table.csv and figure.png; one line of JSON for each world and method; with --keep also
        the world's rows of a table of all worlds
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student

from src import config, console
from src.artifacts import (
    RESULTS_FILE,
    results_dir,
    subset_file,
    weights_file,
)
from src.estimation import Part, estimate, mixture_weights
from src.figures import BLUE, GREY, ORANGE, plt, save_figure, titled
from src.selection import forward_selection, random_ensemble_scores, select_by_score
from src.stage_estimate import Estimator
from src.subsets import draw_subsets, membership_matrix, write_subsets, write_task_weights
from src.tables import (
    TEST_ACCURACY,
    TEST_LOSS,
    VALIDATION_LOSS,
    columns_of,
    mean_over_targets,
    read_table,
    subset_text,
    write_table,
)

BENCHMARK_SELECTION = "benchmark_selection"
BENCHMARK_TABLE, BENCHMARK_FIGURE = "table.csv", "figure.png"
worlds = console.load_script("scripts/worlds.py")

PROBABILITIES, MERGED = worlds.experts.PROBABILITIES, worlds.experts.MERGED
Subset = tuple[int, ...]
MIXTURE = "mixture weights"
OURS = ("forward selection", "forward selection, refined", "backward elimination", "random ensemble", MIXTURE)
NUM_ENSEMBLE_SUBSETS, NUM_RANDOM, NUM_REFINED = 1000, 3, 5


class Selecting:
    """One world's estimates, real fine-tunings and selections; the world is of `worlds.parse_world`."""

    def __init__(self, world: Any, args: argparse.Namespace) -> None:
        self.world, self.args = world, args
        worlds.prepare(world, args, margins=False)
        self.estimators = {
            name: worlds.estimator_of(world, args, name) for name in ("ridge", "alignment", "representation")
        }
        self.estimator: Estimator = self.estimators["ridge"]
        self.columns = self.estimator.chosen_targets()
        self.targets = [self.estimator.targets[column] for column in self.columns]
        self.num_tasks = len(self.estimator.tasks)
        self.rows_of_task = self.estimator.parts[0].train.counts
        self.name = world.save_name(BENCHMARK_SELECTION)
        words = world.training.split()
        self.epochs = int(words[words.index("--epochs") + 1])

    def estimates(self, name: str) -> Callable[[np.ndarray], np.ndarray]:
        """An estimator's mean over the targets, as searches take it."""
        return lambda membership: self.estimators[name](membership, self.columns).mean(axis=1)

    def fine_tuned(self, subsets: Sequence[Subset]) -> pd.DataFrame:
        """Fine-tune on the subsets, the empty one being the base model: all rows of the results so far."""
        command = worlds.fine_tuning(self.world, self.args, BENCHMARK_SELECTION)
        wanted = sorted({subset for subset in subsets if subset})
        if wanted:
            file = subset_file(self.name)
            write_subsets(file, wanted)
            console.run_command(f"{command} --runs {self.args.runs} --subset_file {file}")
        if () in subsets:
            console.run_command(f"{command} --runs {self.args.runs} --task_idxes")
        return read_table(results_dir(self.name) / RESULTS_FILE)

    def validation_losses(self, subsets: Sequence[Subset]) -> np.ndarray:
        """Mean validation losses of the fine-tuned subsets, over runs too."""
        table = self.fine_tuned(subsets)
        table["mean"] = mean_over_targets(table, VALIDATION_LOSS, self.targets)
        return table.groupby("subset")["mean"].mean().loc[[subset_text(subset) for subset in subsets]].to_numpy(float)

    def tested(self, table: pd.DataFrame) -> dict[str, float]:
        """Test loss, and accuracy where there is one, the mean over subsets and runs, and half of its 90 % interval over runs."""
        found: dict[str, float] = {}
        for name, metric in (("test_loss", TEST_LOSS), ("test_accuracy", TEST_ACCURACY)):
            if columns_of(table, metric):
                values = (
                    pd.Series(mean_over_targets(table, metric, self.targets)).groupby(table["run"].to_numpy()).mean()
                )
                half = float(student.ppf(0.95, len(values) - 1) * values.sem()) if len(values) > 1 else np.nan
                found |= {name: float(values.mean()), f"{name}_half": half}
        return found

    def passes(self, subsets: Sequence[Subset]) -> int:
        """Training passes of one fine-tuning on each subset, in the benchmark's epochs."""
        return int(sum(self.rows_of_task[list(subset)].sum() for subset in subsets) * self.epochs)

    @property
    def estimation_passes(self) -> int:
        """Meta-training and gradients: what estimates cost before the first of them."""
        stored = self.estimator.stored
        return self.passes([tuple(range(self.num_tasks))]) + len(stored) * int(stored[0].manifest["num_rows"])

    # --- methods: each gives its subsets (their mean counts) and its passes, the last fine-tuning left out ------

    def forward(self, direction: str = "forward") -> tuple[list[Subset], int]:
        path = forward_selection(self.estimates("ridge"), self.num_tasks, direction=direction)
        return [path.selected], self.estimation_passes

    def refined(self) -> tuple[list[Subset], int]:
        """The subsets on forward selection's way with the best estimates, the best of them by real fine-tuning."""
        steps = forward_selection(self.estimates("ridge"), self.num_tasks, past_best=3).steps
        candidates = [step.subset for step in sorted(steps, key=lambda step: step.estimate)[:NUM_REFINED]]
        values = self.validation_losses(candidates)
        cost = self.estimation_passes + self.passes(candidates) * self.args.runs
        return [candidates[int(np.argmin(values))]], cost

    def mixture(self) -> dict[str, Any]:
        """The row of training on rows drawn in the shares that the estimates find best."""
        started = time.perf_counter()
        rho, weights = self.estimator.config.rho, self.estimator.part_weights(self.columns)
        shares, _ = mixture_weights(self.estimator.parts, self.columns, rho=rho, weights=weights)
        seconds = time.perf_counter() - started
        file = weights_file(self.name)
        write_task_weights(file, self.estimator.tasks, shares)
        command = worlds.fine_tuning(self.world, self.args, f"{BENCHMARK_SELECTION}_mixture")
        console.run_command(f"{command} --runs {self.args.runs} --task_weights {file}")
        name = self.world.save_name(f"{BENCHMARK_SELECTION}_mixture")
        table = read_table(results_dir(name) / RESULTS_FILE)
        drawn = 1 / np.sum(shares**2 / np.maximum(self.rows_of_task, 1))
        used = tuple(np.flatnonzero(shares > 0.1 / self.num_tasks).tolist())
        return {
            "world": self.world.name,
            "method": MIXTURE,
            "tasks": float(len(used)),
            **self.tested(table),
            "selection_seconds": seconds,
            "passes": self.estimation_passes + int(drawn * self.epochs),
            "selected": subset_text(used),
        }

    def random_ensemble(self) -> tuple[list[Subset], int]:
        try:
            drawn = draw_subsets(NUM_ENSEMBLE_SUBSETS, self.num_tasks, 0.5, seed=0)
        except ValueError:  # fewer halves exist: all of them
            drawn = draw_subsets(None, self.num_tasks, 0.5, seed=0)
        membership = membership_matrix(drawn, self.num_tasks)
        scores, _ = random_ensemble_scores(membership, self.estimates("ridge")(membership))
        return [select_by_score(scores)], self.estimation_passes

    def top_k(self, estimator: str, k: int) -> tuple[list[Subset], int]:
        """The k tasks that score best alone."""
        scores = self.estimates(estimator)(np.eye(self.num_tasks, dtype=bool))
        return [select_by_score(scores, top_k=k)], self.estimation_passes

    def mean_matching(self, k: int) -> tuple[list[Subset], int]:
        """Kernel mean matching of the targets' mean, k tasks added greedily."""

        def distance(membership: np.ndarray) -> np.ndarray:
            return worlds.mean_matching(self.estimator.parts, membership, self.columns).mean(axis=1)

        path = forward_selection(distance, self.num_tasks, max_tasks=k, past_best=self.num_tasks)
        return [path.steps[k - 1].subset], self.estimation_passes

    def by_experts(self, kind: str) -> tuple[list[Subset], int]:
        """Forward selection by what the experts of the sources say of a subset, their training counting."""
        experts = self.experts()
        columns = [list(experts.data.targets).index(target) for target in self.targets]
        values = experts.merged if kind == MERGED else experts.probabilities
        path = forward_selection(lambda membership: values(membership)[:, columns].mean(axis=1), self.num_tasks)
        return [path.selected], self.passes([tuple(range(self.num_tasks))])

    @functools.cache  # noqa: B019 as long as the world is
    def experts(self) -> Any:
        """The experts of the world's sources."""
        return worlds.experts_of(self.world, self.args)

    def oracle(self) -> tuple[list[Subset], int]:
        """Forward selection by really fine-tuning every candidate."""
        tried: set[Subset] = set()

        def really(membership: np.ndarray) -> np.ndarray:
            subsets = [tuple(np.flatnonzero(row).tolist()) for row in membership]
            tried.update(subsets)
            return self.validation_losses(subsets)

        path = forward_selection(really, self.num_tasks)
        return [path.selected], self.passes(sorted(tried)) * self.args.runs

    def select(self) -> pd.DataFrame:
        """A row for every method."""
        forward, _ = self.forward()
        k = len(forward[0])
        methods: dict[str, Callable[[], tuple[list[Subset], int]]] = {
            "forward selection": self.forward,
            "forward selection, refined": self.refined,
            "backward elimination": lambda: self.forward("backward"),
            "random ensemble": self.random_ensemble,
            "alignment, top k": lambda: self.top_k("alignment", k),
            "representation, top k": lambda: self.top_k("representation", k),
            "mean matching, k tasks": lambda: self.mean_matching(k),
            "random k tasks": lambda: (draw_subsets(NUM_RANDOM, self.num_tasks, k, seed=1), 0),
            "random halves": lambda: (draw_subsets(NUM_RANDOM, self.num_tasks, 0.5, seed=1), 0),
            "all tasks": lambda: ([tuple(range(self.num_tasks))], 0),
            "base model": lambda: ([()], 0),
        }
        if self.args.experts:
            methods |= {kind: lambda kind=kind: self.by_experts(kind) for kind in (PROBABILITIES, MERGED)}
        if not self.args.no_oracle:
            methods["oracle"] = self.oracle
        wanted = ["all tasks", *(self.args.methods or [*methods, MIXTURE])]
        records = []
        for method, choose in methods.items():
            if method not in wanted:
                continue
            started = time.perf_counter()
            subsets, passes = choose()
            seconds, table = time.perf_counter() - started, self.fine_tuned(subsets)
            records.append(
                {
                    "world": self.world.name,
                    "method": method,
                    "tasks": float(np.mean([len(subset) for subset in subsets])),
                    **self.tested(table[table["subset"].isin([subset_text(subset) for subset in subsets])]),
                    "selection_seconds": seconds,
                    "passes": passes + self.passes(subsets) // len(subsets),
                    "selected": "; ".join(subset_text(subset) for subset in subsets),
                }
            )
        table = pd.DataFrame([*records, *([self.mixture()] if MIXTURE in wanted else [])])
        losses = table.set_index("method")["test_loss"]
        best = losses.get("oracle", losses.min())
        gap = losses["all tasks"] - best
        table.insert(3, "regret", (table["test_loss"] - best) / gap if gap > 0 else np.nan)
        return table


def regret_figure(table: pd.DataFrame, path: Path) -> None:
    """What each method's selection costs in test loss, 0 the oracle's and 1 that of all tasks, by world."""
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
    titled(axes, "What a method's selection costs", f"bars are means over {len(worlds)} worlds, marks single worlds")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    save_figure(figure, path)


def search_seconds(num_tasks: int, steps: int, try_at_most: int | None, num_parts: int = 3) -> dict[str, Any]:
    """Seconds of forward selection steps on random tasks at d = 400, three checkpoints, one target."""
    target = worlds.random_moments(1, 1)
    parts = [Part(worlds.random_moments(num_tasks, 2 + part), target) for part in range(num_parts)]
    started = time.perf_counter()
    path = forward_selection(
        lambda membership: estimate(parts, membership)[:, 0], num_tasks, max_tasks=steps, past_best=num_tasks,
        try_at_most=try_at_most, progress=console.progress,
    )  # fmt: skip
    seconds = round(time.perf_counter() - started, 1)
    return {"tasks": num_tasks, "try_at_most": try_at_most, "steps": len(path.steps), "seconds": seconds}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The script's flags."""
    parser = console.Parser(__doc__)
    worlds.add_flags(parser)
    group = parser.add_argument_group("methods")
    group.add_argument("--no_oracle", action="store_true", help="leave the oracle out; regret is then to the best method "
                       "(default: run it, which takes most of the time)")  # fmt: skip
    group.add_argument(
        "--experts", action="store_true", help="also select by one expert for each source (default: do not)"
    )
    group.add_argument("--methods", nargs="+", metavar="METHOD", help="these and all tasks, as the table names them (default: "
                       "all)")  # fmt: skip
    group.add_argument("--keep", metavar="CSV", help="table of all worlds to put the rows into (default: none)")
    group = parser.add_argument_group("time of a search")
    group.add_argument("--search_tasks", type=config.COUNT, help="instead of worlds, time forward selection over so "
                       "many random tasks (default: worlds)")  # fmt: skip
    group.add_argument("--search_steps", type=config.COUNT, default=50, help="steps of it, whether they improve or "
                       "not (default: 50)")  # fmt: skip
    group.add_argument("--try_at_most", type=config.COUNT, help="as in fast_estimate_forward_selection.py, for "
                       "--search_tasks (default: all)")  # fmt: skip
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Every world, the table, the figure, the lines."""
    if args.search_tasks:
        print(json.dumps(search_seconds(args.search_tasks, args.search_steps, args.try_at_most)))
        return
    frames = []
    for name in args.world:
        with redirect_stdout(sys.stderr) if args.json else nullcontext():
            frames.append(Selecting(worlds.parse_world(name, args), args).select())
        if args.keep:
            command = f"python scripts/{Path(__file__).name} --world {name} --runs {args.runs}"
            worlds.keep(
                Path(args.keep), frames[-1].assign(**worlds.protocol(name, args), runs=args.runs, command=command)
            )
    table = pd.concat(frames, ignore_index=True)
    folder = results_dir(BENCHMARK_SELECTION)
    write_table(folder / BENCHMARK_TABLE, table)
    regret_figure(table, folder / BENCHMARK_FIGURE)
    if not args.json:
        print(table.drop(columns="selected").round(3).to_string(index=False))
        means = table.groupby("method", sort=False)[["test_loss", "regret", "passes"]].mean()
        print(f"\nMean over {len(args.world)} worlds:\n{means.round(3).to_string()}")
        print(f"Wrote {folder / BENCHMARK_TABLE} and {folder / BENCHMARK_FIGURE}.")
    for record in table.to_dict("records"):
        print(json.dumps({key: round(v, 4) if isinstance(v, float) else v for key, v in record.items()}))


if __name__ == "__main__":
    console.run_stage(main, parse_args())
