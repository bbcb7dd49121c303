"""How good every estimator is, judged against real fine-tuning, on small worlds.

For each world: data and base model, meta-training, gradients (of losses, and of margins for the paper's estimator), the
fine-tuned value of random half-size subsets under several seeds, and every estimator's estimates of them. Calibration
learns from a few more subsets. Everything is kept, so that a second run, or one with more subsets, goes on where the
first one ended.

    python scripts/benchmark_estimates.py                                    # the suite of five synthetic worlds
    python scripts/benchmark_estimates.py --world synthetic:7 --epochs 2 --subsets 60
    python scripts/benchmark_estimates.py --world cot:0 --json
    python scripts/benchmark_estimates.py --world synthetic:0 --checkpoints 0.2/0.4 0/0.2/0.4 1   # which to take gradients at
    python scripts/benchmark_estimates.py --world my/sources.jsonl --model_key my/model --epochs 3 --project_dim 4000

`scripts/worlds.py` says what a world is.

Writes  results/benchmark_estimates/table.csv and figure.png; one line of JSON for each world and estimator; with --keep also
        the world's rows of a table of all worlds
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src import config, console
from src.artifacts import RESULTS_FILE, results_dir, subset_file
from src.estimation import ESTIMATORS, Part, estimate
from src.evaluation import AVERAGE, INCLUSION, MEAN, comparison, own_inclusion
from src.figures import BLUE, GREEN, GREY, ORANGE, plt, save_figure, titled
from src.stage_estimate import Estimator
from src.store import open_store
from src.subsets import load_or_draw_subsets, membership_matrix
from src.tables import VALIDATION_LOSS, fine_tuned_values, own_targets, read_table, subset_text, write_table

ATTAINABLE = ("attainable", "attainable_low", "attainable_high")
BENCHMARK_ESTIMATES = "benchmark_estimates"
BENCHMARK_TABLE, BENCHMARK_FIGURE = "table.csv", "figure.png"
worlds = console.load_script("scripts/worlds.py")
PROBABILITIES, MERGED = worlds.experts.PROBABILITIES, worlds.experts.MERGED
DATAMODEL = "linear datamodel"


def make_world(world: Any, args: argparse.Namespace) -> tuple[pd.DataFrame, list[str], np.ndarray]:
    """Run every stage that is still missing: the truth's table, the texts of all subsets (calibration's first), and their
    membership (c + m, n)."""
    worlds.prepare(world, args, margins=not world.checkpoint_at)
    num_tasks = len(worlds.estimator_of(world, args, "constant").tasks)
    name = world.save_name(BENCHMARK_ESTIMATES)
    count = args.subsets + args.calibration_subsets
    subsets = load_or_draw_subsets(subset_file(name), count, num_tasks, 0.5, seed=0)[:count]
    console.run_command(
        f"{worlds.fine_tuning(world, args, BENCHMARK_ESTIMATES)} --runs {args.runs} --subset_file {subset_file(name)}"
    )
    texts = [subset_text(subset) for subset in subsets]
    return read_table(results_dir(name) / RESULTS_FILE), texts, membership_matrix(subsets, num_tasks)


def estimators_of(world: Any, args: argparse.Namespace) -> Iterator[tuple[str, Estimator]]:
    """Every estimator, or the default one from gradients at each set of `--checkpoints`."""
    for name in () if args.checkpoints else ESTIMATORS:
        yield name, worlds.estimator_of(world, args, name)
    for shares in args.checkpoints or ():
        settings, store = worlds.store_of(world, args, "ridge")
        total = Estimator(settings, store).meta_training["validation_losses"]["last_step"]
        folders = {part.manifest["step"]: part.folder.name for part in open_store(store, None, world.scripts[1])}
        names = tuple(folders[max(1, round(share * total)) if share else 0] for share in shares)
        at = ", ".join("base" if not share else f"{100 * share:g} %" for share in shares)
        yield at, Estimator(replace(settings, load_model_dir=names), store)


def judge_world(world: Any, args: argparse.Namespace) -> pd.DataFrame:
    """A row for every estimator, and for the baselines: of these no seconds and no calibration, but for the linear datamodel,
    which is the calibration without estimates."""
    truth, texts, membership = make_world(world, args)
    first, ridge = args.calibration_subsets, worlds.estimator_of(world, args, "ridge")
    targets = own_targets(ridge.targets, ridge.tasks)
    columns = [ridge.targets.index(target) for target in targets]
    found, values = fine_tuned_values(truth, VALIDATION_LOSS, targets)
    values, known = values[[found.index(text) for text in texts]], truth[truth["subset"].isin(texts[:first] or texts)]
    predictions: dict[str, np.ndarray] = {}
    if not args.checkpoints:
        predictions[worlds.MEAN_MATCHING] = worlds.mean_matching(ridge.parts, membership, columns)
    if args.experts:
        experts = worlds.experts_of(world, args)
        of_targets = [experts.data.targets.index(target) for target in targets]
        for name, losses in ((PROBABILITIES, experts.probabilities), (MERGED, experts.merged)):
            predictions[name] = losses(membership)[:, of_targets]
    calibrated, seconds = {}, {}
    for name, estimator in estimators_of(world, args):
        started = time.perf_counter()
        predictions[name] = estimator(membership, columns)
        seconds[name] = time.perf_counter() - started
        calibrated[name] = estimator.calibrated(known, membership[first:], columns)
    if not args.checkpoints:
        calibrated[DATAMODEL] = worlds.estimator_of(world, args, "constant").calibrated(
            known, membership[first:], columns
        )
        predictions[DATAMODEL] = np.concatenate([np.zeros((first, len(columns))), calibrated[DATAMODEL][0]])
    inclusion, true = own_inclusion(membership[first:], targets, ridge.tasks), values[first:].mean(axis=2)
    every = {name: estimates[first:] for name, estimates in predictions.items()}
    every |= {f"{name}, calibrated": of_name[0] for name, of_name in calibrated.items()}
    judged = comparison(every, values[first:], targets, inclusion).set_index(["target", "predictor"])
    kind, records = AVERAGE if len(targets) > 1 else targets[0], []
    for name in [*predictions, *([INCLUSION] if inclusion is not None else [])]:
        own = judged.loc[kind, name]
        record = {
            "world": world.name,
            "estimator": name,
            **own[["lds", "lds_low", "pearson", "relative_error", "lds_top_quarter", "regret", *ATTAINABLE]],
            "lds_given_inclusion": own.get("lds_given_inclusion"),
            "lds_mean_over_targets": judged.loc[MEAN, name]["lds"] if len(targets) > 1 else None,
            "seconds": seconds.get(name),
        }
        if name in calibrated:
            _, low, high = calibrated[name]
            record["relative_error_calibrated"] = judged.loc[kind, f"{name}, calibrated"]["relative_error"]
            record["coverage"] = float(np.mean((low <= true) & (true <= high)))
        records.append(record)
    return pd.DataFrame(records)


def benchmark_figure(table: pd.DataFrame, path: Path) -> None:
    """The score of every estimator in every world, beside the attainable maximum with its interval."""
    worlds, estimators = (table[column].drop_duplicates().tolist() for column in ("world", "estimator"))
    figure, axes = plt.subplots(figsize=(8.4, 1.2 + 0.62 * len(worlds)))
    colors = (ORANGE, BLUE, GREEN, GREY, "#CC79A7", "#E69F00", "#56B4E9", "#000000")
    positions = np.arange(len(worlds))
    for index, estimator in enumerate(estimators):
        scores = table[table["estimator"] == estimator].set_index("world")["lds"].reindex(worlds).astype(float)
        if scores.isna().all():  # a constant has no ranking
            continue
        style = {"marker": "osD^vP*X<>"[index % 10], "color": colors[index % len(colors)], "s": 46, "alpha": 0.85}
        axes.scatter(scores, positions, label=estimator, zorder=2 + len(estimators) - index, **style)
    best, low, high = (table.groupby("world")[name].first().reindex(worlds).astype(float) for name in ATTAINABLE)
    axes.hlines(positions, low, high, color="black", alpha=0.4)
    axes.scatter(best, positions, marker="|", s=160, color="black", label="attainable maximum, 90 %")
    axes.set_yticks(positions, worlds, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(right=1.02)
    axes.set_xlabel("linear datamodeling score (Spearman over random half-size subsets)")
    titled(axes, "Estimators against really fine-tuned values", f"{len(worlds)} worlds, means over their targets")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    save_figure(figure, path)


def estimation_seconds() -> float:
    """Seconds of 1,000 estimates for 100 tasks as targets, on torch's threads, from the cached moments of three checkpoints."""
    parts = [Part(worlds.random_moments(100, 2 * part), worlds.random_moments(100, 2 * part + 1)) for part in range(3)]
    membership = np.random.default_rng(0).random((1000, 100)) < 0.5
    estimate(parts, membership[:10])
    started = time.perf_counter()
    estimate(parts, membership)
    return time.perf_counter() - started


def shares_of(text: str) -> tuple[float, ...]:
    """Shares with slashes between them."""
    return tuple(map(config.SHARE, text.split("/")))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The script's flags."""
    parser = console.Parser(__doc__)
    worlds.add_flags(parser)
    group = parser.add_argument_group("subsets")
    group.add_argument("--subsets", type=config.COUNT, default=40, help="random halves to judge by (default: 40)")
    group.add_argument("--calibration_subsets", type=config.number(int, 0), default=6, help="more of them, for "
                       "calibration; 0 calibrates each on all others (default: 6)")  # fmt: skip
    group.add_argument("--checkpoints", type=shares_of, nargs="+", metavar="SHARES", help="compare gradients at these sets "
                       "of shares of meta-training, each as 0.2/0.4 (0: the base model), not estimators (default: do not)")  # fmt: skip
    group = parser.add_argument_group("baselines")
    group.add_argument(
        "--experts", action="store_true", help="also what one expert for each source says (default: do not)"
    )
    group.add_argument("--keep", metavar="CSV", help="table of all worlds to put the rows into (default: none)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Every world, the table, the figure, the lines."""
    frames, shares = [], sorted({share for of_set in args.checkpoints or () for share in of_set})
    for name in args.world:
        with redirect_stdout(sys.stderr) if args.json else nullcontext():
            world = replace(worlds.parse_world(name, args), checkpoint_at=tuple(shares))
            frames.append(judge_world(world, args))
        if args.keep:
            sizes = {"subsets": args.subsets, "calibration_subsets": args.calibration_subsets, "runs": args.runs}
            worlds.keep(Path(args.keep), frames[-1].assign(**worlds.protocol(name, args), **sizes))
    table = pd.concat(frames, ignore_index=True)
    folder = results_dir(BENCHMARK_ESTIMATES)
    write_table(folder / BENCHMARK_TABLE, table)
    benchmark_figure(table, folder / BENCHMARK_FIGURE)
    if not args.json:
        print(table.round(3).to_string(index=False))
        print(f"Wrote {folder / BENCHMARK_TABLE} and {folder / BENCHMARK_FIGURE}.")
    for record in table.to_dict("records"):
        kept = {key: value for key, value in record.items() if value is not None and value == value}
        print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in kept.items()}))
    size = {"estimates": 1000, "tasks": 100, "targets": 100, "dim": 400, "checkpoints": 3}
    print(json.dumps({**size, "seconds": round(estimation_seconds(), 2)}))


if __name__ == "__main__":
    console.run_stage(main, parse_args())
