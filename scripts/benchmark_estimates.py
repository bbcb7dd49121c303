"""How good every estimator is, judged against real fine-tuning, on small worlds.

For each world: data and base model, meta-training, gradients (of losses, and of margins for the paper's estimator), the
fine-tuned value of random half-size subsets under several seeds, and every estimator's estimates of them. Calibration
learns from a few more subsets. Everything is kept, so that a second run, or one with more subsets, goes on where the
first one ended.

    python scripts/benchmark_estimates.py                                    # the suite of five synthetic worlds
    python scripts/benchmark_estimates.py --world synthetic:7 --epochs 2 --subsets 60
    python scripts/benchmark_estimates.py --world cot:0 --json
    python scripts/benchmark_estimates.py --world my/sources.jsonl --model_key my/model --epochs 3 --project_dim 4000

A world is `synthetic:SEED` or `cot:SEED`, with settings of its own after commas (`synthetic:1,num_tasks=12,noise=0/0.5`,
`epochs=2`, `lr=1e-3`), or a jsonl file in the FLAN layout, whose every task is a target.

Writes  results/benchmark_estimates/table.csv and figure.png; one line of JSON for each world and estimator
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from src import cli
from src.accuracy import AVERAGE, INCLUSION, MEAN, comparison
from src.calibration import CALIBRATION_RHOS, calibrate
from src.estimates import Estimator, own_targets
from src.estimation import ESTIMATORS, Part, TaskMoments, estimate
from src.paths import (
    BENCHMARK_DATA,
    BENCHMARK_ESTIMATES,
    BENCHMARK_FIGURE,
    BENCHMARK_TABLE,
    RESULTS_FILE,
    clusters_file,
    results_dir,
    slug,
    subset_file,
)
from src.report import VALIDATION_LOSS, benchmark_figure, fine_tuned_values, read_table, subset_text, write_table
from src.stages import store_dir
from src.subsets import load_or_draw_subsets, membership_matrix

SUITE = (
    "synthetic:0",
    "synthetic:1,num_tasks=12,noise=0/0.5",
    "synthetic:2,num_tasks=30,noise=0/0.3/0.6,epochs=2",
    "synthetic:3,num_tasks=16,noise=0/1,epochs=8,lr=1e-3",
    "synthetic:4,num_tasks=24,noise=0/0.25/0.5/0.75",
)
"""12 to 30 sources, mild to strong noise, short and long fine-tuning; fixed before any of them was run."""
TRAINING = ("epochs", "lr")


@dataclass
class World:
    """Where a world's data are and how its stages are called.

    Attributes:
        name: As typed.
        folder: Its data.
        data: Data and model flags of every stage.
        tasks: Flags that say what a task is, for stages 3 and 5.
        training: Hyperparameters.
        scripts: Of training, gradients and regression.
        made_by: The command that writes the data, where they are not the user's.
    """

    name: str
    folder: Path
    data: str
    training: str
    tasks: str = ""
    scripts: tuple[str, str, str] = (
        "custom_train_alpaca.py",
        "fast_estimate_eval_approximation_alpaca.py --compute_pretrained_outputs",
        "fast_estimate_linear_regression_alpaca.py",
    )
    made_by: str | None = None

    @property
    def save_name(self) -> str:
        """Folder below `results/`."""
        return f"{BENCHMARK_ESTIMATES}/{self.folder.name}"


def parse_world(name: str, args: argparse.Namespace) -> World:
    """A world from its name and the flags.

    Raises:
        ValueError: neither a known kind with a seed nor a jsonl file with `--model_key`.
    """
    first, *settings = name.split(",")
    options = dict(setting.partition("=")[::2] for setting in settings)
    training = {flag: options.pop(flag, getattr(args, flag)) for flag in TRAINING}
    flags = " ".join(f"--{flag} {value}" for flag, value in training.items()) + f" --batch_size {args.batch_size}"
    key = slug("_".join([first, *(f"{k}={v}" for k, v in {**options, **training}.items())]))
    folder = BENCHMARK_DATA / key
    kind, _, seed = first.partition(":")
    made = " ".join(f"--{option} {value.replace('/', ' ')}" for option, value in options.items())
    if kind == "synthetic" and seed.isdigit():
        data = f"--data_files {folder}/flan.jsonl --target_files {folder}/target.jsonl --model_key {folder}/model"
        command = f"data/make_synthetic.py --seed {seed} --output_dir {folder} {made}"
        return World(name, folder, f"{data} --train_lora", flags, made_by=command)
    if kind == "cot" and seed.isdigit():
        data = f"--dataset_key addsub --preset_key ft_cot_t70_4aug --data_dir {folder}/data --saved_dir {folder}/saved"
        scripts = ("custom_train.py", "fast_estimate_compute_gradients.py", "fast_estimate_linear_regression.py")
        command = f"data/make_synthetic_cot.py --seed {seed} --output_dir {folder} {made}"
        flags += " --inference_batch_size 128 --max_new_tokens 40"
        return World(
            name, folder, f"{data} --model_key {folder}/model --train_lora", flags,
            f"--load_clusters --num_clusters {args.num_clusters}", scripts, command,
        )  # fmt: skip
    if Path(first).suffix == ".jsonl" and args.model_key:
        folder.mkdir(parents=True, exist_ok=True)
        rows = shorten(Path(first), folder / "flan.jsonl", args.rows_per_task, args.max_characters)
        print(f"{first}: {rows} rows of at most {args.max_characters} characters")
        data = f"--data_files {folder}/flan.jsonl --model_key {args.model_key} --data_key {key} --heldout_share 0.2"
        return World(name, folder, f"{data} --max_length 256 --train_lora", flags)
    raise ValueError(
        f"--world {name}: expected synthetic:SEED, cot:SEED, or a .jsonl file together with --model_key FOLDER"
    )


def shorten(source: Path, path: Path, rows_per_task: int, max_characters: int) -> int:
    """The first short rows of each task that has enough of them; how many rows that are."""
    if not source.is_file():
        raise FileNotFoundError(f"--world {source}: no such file")
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = [row for row in rows if len(row["inputs"]) + len(row["targets"]) <= max_characters]
    sizes, taken, kept = Counter(row["_task_name"] for row in rows), Counter(), []
    for row in rows:
        task = row["_task_name"]
        if sizes[task] >= rows_per_task and taken[task] < rows_per_task:
            taken[task] += 1
            kept.append(row)
    if len(taken) < 2:
        raise ValueError(
            f"{source}: {len(taken)} tasks have {rows_per_task} rows of {max_characters} characters or less"
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    return len(kept)


def make_world(world: World, args: argparse.Namespace) -> tuple[pd.DataFrame, list[str], np.ndarray]:
    """Run every stage that is still missing.

    Returns:
        The truth's table, the texts of all subsets (calibration's first), and their membership (c + m, n).
    """
    train, gradients, _ = world.scripts
    if world.made_by:
        cli.run_command(world.made_by)
    cli.run_command(f"{train} {world.data} {world.training}")
    dim = f"--project_dim {args.project_dim}"
    cli.run_command(f"{gradients} {world.data} {dim} --representations")
    cli.run_command(f"{gradients} {world.data} {dim} --output_function margin")
    share_clusters(world, args)
    num_tasks = len(estimator_of(world, args, "constant").tasks)
    subsets = load_or_draw_subsets(
        subset_file(world.save_name), args.subsets + args.calibration_subsets, num_tasks, 0.5, seed=0
    )[: args.subsets + args.calibration_subsets]
    truth = f"{train} {world.data} {world.tasks} {dim if world.tasks else ''} {world.training} --save_name {world.save_name}"
    cli.run_command(f"{truth} --runs {args.runs} --subset_file {subset_file(world.save_name)}")
    texts = [subset_text(subset) for subset in subsets]
    return read_table(results_dir(world.save_name) / RESULTS_FILE), texts, membership_matrix(subsets, num_tasks)


def regression_args(world: World, args: argparse.Namespace, estimator: str) -> argparse.Namespace:
    """Stage 3's arguments for an estimator."""
    function = "margin" if estimator == "logistic" else "loss"
    flags = f"{world.data} {world.tasks} --project_dim {args.project_dim} --estimator {estimator} --output_function {function}"
    return cli.load_script(world.scripts[2]).parse_args(flags.split())


def estimator_of(world: World, args: argparse.Namespace, estimator: str) -> Estimator:
    """An estimator on the world's store."""
    return Estimator(regression_args(world, args, estimator), world.scripts[1])


def share_clusters(world: World, args: argparse.Namespace) -> None:
    """Where clusters make the tasks, both stores have those of the losses' gradients."""
    if not world.tasks:
        return
    run = estimator_of(world, args, "constant").run
    paths = [
        clusters_file(store_dir(regression_args(world, args, name), run), args.num_clusters)
        for name in ("constant", "logistic")
    ]
    shutil.copyfile(*paths)


def judge_world(world: World, args: argparse.Namespace) -> pd.DataFrame:
    """A row for every estimator."""
    truth, texts, membership = make_world(world, args)
    first, records = args.calibration_subsets, {}
    for name in ESTIMATORS:
        estimator = estimator_of(world, args, name)
        targets = own_targets(estimator.targets, estimator.tasks)
        columns = [estimator.targets.index(target) for target in targets]
        started = time.perf_counter()
        estimates = estimator(membership, columns)
        seconds = time.perf_counter() - started
        found, values = fine_tuned_values(truth, VALIDATION_LOSS, targets)
        values = values[[found.index(text) for text in texts]]
        by_rho = {rho: estimator(membership[:first], columns, rho) for rho in CALIBRATION_RHOS}
        rho, calibration = calibrate(by_rho, values[:first].mean(axis=2))
        calibrated, low, high = calibration(estimator(membership[first:], columns, rho))
        inclusion = None
        if set(targets) <= set(estimator.tasks):
            inclusion = membership[first:][:, [estimator.tasks.index(target) for target in targets]] > 0
        judged = comparison({name: estimates[first:], "calibrated": calibrated}, values[first:], targets, inclusion)
        kind = AVERAGE if len(targets) > 1 else targets[0]
        judged = judged.set_index(["target", "predictor"])
        own, true = judged.loc[kind, name], values[first:].mean(axis=2)
        records[name] = {
            "world": world.name,
            "estimator": name,
            "lds": own["lds"],
            "lds_low": own["lds_low"],
            "lds_given_inclusion": own.get("lds_given_inclusion"),
            "lds_mean_over_targets": judged.loc[MEAN, name]["lds"] if len(targets) > 1 else None,
            "pearson": own["pearson"],
            "relative_error": own["relative_error"],
            "relative_error_calibrated": judged.loc[kind, "calibrated"]["relative_error"],
            "coverage": float(np.mean((low <= true) & (true <= high))),
            "ceiling": own["ceiling"],
            "seconds": seconds,
        }
        if inclusion is not None:
            records[INCLUSION] = {
                **dict.fromkeys(records[name]), "world": world.name, "estimator": INCLUSION,
                "lds": judged.loc[kind, INCLUSION]["lds"], "ceiling": own["ceiling"],
            }  # fmt: skip
    return pd.DataFrame(list(records.values()))


def estimation_seconds(num_tasks: int = 100, dim: int = 400, num_subsets: int = 1000) -> float:
    """Seconds of `num_subsets` estimates of every task as a target from cached moments, however many rows they sum."""
    rng = np.random.default_rng(0)

    def moments() -> TaskMoments:
        rows = rng.standard_normal((num_tasks, 3 * dim, dim), np.float32)
        outers = rows.transpose(0, 2, 1) @ rows
        squares = np.trace(outers, axis1=1, axis2=2).astype(float)
        counts = np.full(num_tasks, 3 * dim)
        return TaskMoments(counts, rng.random(num_tasks), rows.sum(axis=1, dtype=float), squares, outers)

    part, membership = Part(moments(), moments()), rng.random((num_subsets, num_tasks)) < 0.5
    estimate([part], membership[:10])
    started = time.perf_counter()
    estimate([part], membership)
    return time.perf_counter() - started


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The script's flags."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--world", nargs="+", default=list(SUITE), metavar="WORLD", help="see above (default: the suite)"
    )
    parser.add_argument("--model_key", help="base model of a .jsonl world")
    parser.add_argument("--subsets", type=cli.positive_int, default=40, help="random halves to judge by (default: 40)")
    parser.add_argument("--calibration_subsets", type=cli.positive_int, default=6, help="more of them, for calibration "
                        "(default: 6)")  # fmt: skip
    parser.add_argument("--runs", type=cli.positive_int, default=2, help="fine-tunings of each, with other seeds; the "
                        "truth is their mean (default: 2)")  # fmt: skip
    parser.add_argument("--epochs", type=cli.positive_int, default=4, help="of every fine-tuning (default: 4)")
    parser.add_argument("--lr", type=cli.positive_float, default=2e-3, help="learning rate (default: 0.002)")
    parser.add_argument("--batch_size", type=cli.positive_int, default=16, help="rows of a batch (default: 16)")
    parser.add_argument("--project_dim", type=cli.positive_int, default=400, help="d (default: 400)")
    parser.add_argument("--num_clusters", type=cli.positive_int, default=20, help="tasks of a cot world (default: 20)")
    parser.add_argument("--rows_per_task", type=cli.positive_int, default=80, help="of a .jsonl world (default: 80)")
    parser.add_argument("--max_characters", type=cli.positive_int, default=450, help="longer rows of a .jsonl world are "
                        "left out (default: 450)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="only the lines of JSON")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Every world, the table, the figure, the lines."""
    cli.quiet_libraries()
    frames = []
    for name in args.world:
        with redirect_stdout(sys.stderr) if args.json else nullcontext():
            frames.append(judge_world(parse_world(name, args), args))
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
    print(
        json.dumps(
            {"estimates": 1000, "tasks": 100, "targets": 100, "dim": 400, "seconds": round(estimation_seconds(), 2)}
        )
    )


if __name__ == "__main__":
    cli.run_stage(main, parse_args())
