"""Worlds to measure on: what benchmarks share, from a world's name to finished gradients.

A world is `synthetic:SEED` or `cot:SEED`, with settings of its own after commas (`synthetic:1,num_tasks=12,noise=0/0.5`,
`epochs=2`, `lr=1e-3`); for a pretrained model `real:flan`, FLAN tasks and Alpaca skills, `real:alpaca`, skills alone (both of
`data/make_flan_world.py`), or `real:strategy_qa` and `real:commonsense_qa`, short questions with the teacher's reasoning,
clusters as tasks; or a jsonl file in the FLAN layout, whose every task is a target. Everything is kept, so that a second run
goes on where the first one ended, also one that was killed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src import config, console, cot
from src.artifacts import BENCHMARK_DATA, clusters_file, results_dir, slug, write_json
from src.estimation import Part, TaskMoments
from src.stage_estimate import Estimator, clustered, stored
from src.tables import read_table, write_table

experts = console.load_script("scripts/experts.py")

SUITE = (
    "synthetic:0",
    "synthetic:1,num_tasks=12,noise=0/0.5",
    "synthetic:2,num_tasks=30,noise=0/0.3/0.6,epochs=2",
    "synthetic:3,num_tasks=16,noise=0/1,epochs=8,lr=1e-3",
    "synthetic:4,num_tasks=24,noise=0/0.25/0.5/0.75",
)
"""12 to 30 sources, mild to strong noise, short and long fine-tuning; fixed before any of them was run."""
MEAN_MATCHING = "mean matching"
TRAINING = ("epochs", "lr")
COT_SCRIPTS = ("custom_train.py", "fast_estimate_compute_gradients.py", "fast_estimate_linear_regression.py")
SKILLS_WORLD = {
    "sources": "classify/rewrite/name/categorize/calculate/identify",
    "shuffled": "",
    "targets": "find/determine",
}
"""`real:alpaca`, where nothing else is typed: the skills that have most short rows."""


@dataclass
class World:
    """Where a world's data are and how its stages are called."""

    name: str  # as typed
    folder: Path  # of its data
    data: str  # data and model flags of every stage
    training: str  # hyperparameters
    tasks: str = ""  # flags that say what a task is, for stages 3 and 5
    scripts: tuple[str, str, str] = (
        "custom_train_alpaca.py",
        "fast_estimate_eval_approximation_alpaca.py --compute_pretrained_outputs",
        "fast_estimate_linear_regression_alpaca.py",
    )
    made_by: str | None = None  # the command that writes the data, where they are not the user's
    checkpoint_at: tuple[float, ...] = ()  # shares of meta-training; none: the default's

    @property
    def run(self) -> str:
        """What its meta-training is called."""
        return f"{self.folder.name}_{len(self.checkpoint_at)}_checkpoints" if self.checkpoint_at else self.folder.name

    def save_name(self, benchmark: str) -> str:
        """Folder of a benchmark's fine-tuned values, below `results/`."""
        return f"{benchmark}/{self.folder.name}"


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
    kind, _, which = first.partition(":")
    if first == "real:alpaca":
        options = SKILLS_WORLD | options
    made = " ".join(f"--{option} {value.replace('/', ' ')}".strip() for option, value in options.items())
    if kind == "synthetic" and which.isdigit():
        data = f"--data_files {folder}/flan.jsonl --target_files {folder}/target.jsonl --model_key {folder}/model"
        command = f"data/make_synthetic.py --seed {which} --output_dir {folder} {made}"
        return World(name, folder, f"{data} --train_lora", flags, made_by=command)
    if kind == "cot" and which.isdigit():
        data = f"--dataset_key addsub --preset_key ft_cot_t70_4aug --data_dir {folder}/data --saved_dir {folder}/saved"
        command = f"data/make_synthetic_cot.py --seed {which} --output_dir {folder} {made}"
        flags += " --inference_batch_size 128 --max_new_tokens 40"
        return World(
            name, folder, f"{data} --model_key {folder}/model --train_lora", flags,
            f"--load_clusters --num_clusters {args.num_clusters}", COT_SCRIPTS, command,
        )  # fmt: skip
    typed = [(f.name, getattr(args, f.name)) for f in fields(config.HardwareConfig)]
    hardware = shlex.join(word for name, value in typed for word in console.as_typed(name, value))
    hardware += " --base_dtype bfloat16" if args.precision == "bf16" else ""
    of_model = f"--model_key {args.model_key} --max_length 128 --train_lora {hardware}"
    if first in ("real:flan", "real:alpaca") and args.model_key and args.flan_file and args.alpaca_file:
        data = f"--data_files {folder}/flan.jsonl --target_files {folder}/target.jsonl {of_model}"
        files = f"--flan_file {args.flan_file} --alpaca_file {args.alpaca_file}"
        command = f"data/make_flan_world.py {files} --output_dir {folder} {made}"
        return World(name, folder, data, flags, made_by=command)
    if first in ("real:strategy_qa", "real:commonsense_qa") and args.model_key and args.cot_dir:
        rows = short_questions(Path(args.cot_dir), folder, which, **{key: int(value) for key, value in options.items()})
        print(f"{args.cot_dir}: {rows} questions")
        data = f"--dataset_key {which} --data_dir {folder} --saved_dir {folder}/saved --heldout_share 0.2 {of_model}"
        return World(
            name, folder, data, f"{flags} --inference_batch_size 32 --max_new_tokens 64",
            f"--load_clusters --num_clusters {args.num_clusters}", COT_SCRIPTS,
        )  # fmt: skip
    if Path(first).suffix == ".jsonl" and args.model_key:
        folder.mkdir(parents=True, exist_ok=True)
        rows = shorten(Path(first), folder / "flan.jsonl", args.rows_per_task, args.max_characters)
        print(f"{first}: {rows} rows of at most {args.max_characters} characters")
        data = f"--data_files {folder}/flan.jsonl --model_key {args.model_key} --heldout_share 0.2"
        return World(name, folder, f"{data} --max_length 256 --train_lora", flags)
    raise ValueError(
        f"--world {name}: expected synthetic:SEED, cot:SEED, real:flan or real:alpaca with --model_key, --flan_file and "
        "--alpaca_file, real:strategy_qa or real:commonsense_qa with --model_key and --cot_dir, or a .jsonl file with --model_key"
    )


def short_questions(
    source: Path, folder: Path, dataset_key: str, rows: int = 96, test_rows: int = 24, max_characters: int = 260
) -> int:
    """Write a split of the first questions of a data set that are short with what they are trained on, beside copies of the data
    set and of the teacher's completions: of those to train on, ones that the teacher answers right. Returns their number;
    ValueError: there are fewer."""
    dataset = source / "dataset" / f"{dataset_key}.json"
    samples = json.loads(dataset.read_text(encoding="utf-8"))["data"]
    split = json.loads((source / "split" / f"{dataset_key}__default.json").read_text(encoding="utf-8"))
    file = source / "saved" / "completion_data" / f"B_{cot.TEACHER}__C_zs_cot" / f"D_{dataset.name}"
    completions = json.loads(file.read_text(encoding="utf-8"))["data"]

    def is_short(index: int, reasoning: str) -> bool:
        return len(samples[index]["question"]) + len(reasoning) <= max_characters

    def is_kept(index: int) -> bool:
        (of_teacher,) = completions[str(index)]
        right = cot.judge(dataset_key, of_teacher["completion"], samples[index]["answer"], None)["correct"]
        return right and is_short(index, of_teacher["reasoning_completion"])

    train = [index for index in split["train"] if is_kept(index)][:rows]
    test = [index for index in split["test"] if is_short(index, samples[index].get("rationale", ""))][:test_rows]
    if len(train) < rows:
        raise ValueError(
            f"{source}: {len(train)} questions to train on have at most {max_characters} characters, {rows} are needed"
        )
    for original in (dataset, file):
        copy = folder / original.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(original, copy)
    (folder / "split").mkdir(exist_ok=True)
    write_json(folder / "split" / f"{dataset_key}__default.json", {"train": train, "test": test})
    return len(train) + len(test)


def shorten(source: Path, path: Path, rows_per_task: int, max_characters: int) -> int:
    """The first short rows of each task that has enough of them; how many rows that are."""
    if not source.is_file():
        raise FileNotFoundError(f"--world {source}: no such file")
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = [row for row in rows if len(row["inputs"]) + len(row["targets"]) <= max_characters]
    sizes, kept = Counter(row["_task_name"] for row in rows), []
    taken: Counter[str] = Counter()
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


def prepare(world: World, args: argparse.Namespace, *, margins: bool) -> None:
    """Run the stages up to the gradients where they are missing: of losses, with representations, and of margins."""
    train, gradients, _ = world.scripts
    if world.made_by:
        console.run_command(world.made_by)
    kept = f"--checkpoint_at {' '.join(map(str, world.checkpoint_at))}" if world.checkpoint_at else ""
    console.run_command(f"{train} {world.data} {world.training} {kept} --save_name {world.run}")
    stage_2 = f"{gradients} --save_name {world.run} --project_dim {args.project_dim}"
    console.run_command(f"{stage_2} --representations")
    if margins:
        console.run_command(f"{stage_2} --output_function margin")
        share_clusters(world, args)


def fine_tuning(world: World, args: argparse.Namespace, benchmark: str) -> str:
    """The command that fine-tunes on subsets, without them."""
    named = f"--save_name {world.run} --results_name {world.save_name(benchmark)}"
    return f"{world.scripts[0]} {named} {world.tasks}"


def store_of(world: World, args: argparse.Namespace, estimator: str) -> tuple[config.EstimateConfig, Path]:
    """The configuration of an estimator on the world, and its store."""
    flags = f"--save_name {world.run} {world.tasks} --project_dim {args.project_dim} --estimator {estimator}"
    typed = config.typed_flags(console.load_script(world.scripts[2]).parse_args(flags.split()))
    return stored(config.EstimateConfig, typed)


def estimator_of(world: World, args: argparse.Namespace, estimator: str) -> Estimator:
    """An estimator on the world's store."""
    return Estimator(*store_of(world, args, estimator))


def experts_of(world: World, args: argparse.Namespace) -> Any:
    """The experts of the world's sources, trained where they are missing."""
    flags = f"--save_name {world.folder.name} {world.tasks} --task_idxes"
    typed = config.typed_flags(console.load_script(world.scripts[0]).parse_args(flags.split()))
    settings = config.for_training(typed)
    data = clustered(settings, typed) if settings.load_clusters else None
    return experts.Experts(settings, results_dir(f"experts/{world.folder.name}"), data)


def mean_matching(parts: Sequence[Part], membership: np.ndarray, targets: Sequence[int]) -> np.ndarray:
    """Kernel mean matching: the squared distance of a subset's mean gradient to each target's, relative to the target's, summed
    over checkpoints, (m, k)."""
    distances = np.zeros((len(membership), len(targets)))
    for part in parts:
        goals = part.target.sums[targets] / part.target.counts[targets, None]
        means = membership @ part.train.sums / np.maximum(membership @ part.train.counts, 1)[:, None]
        distances += np.square(means[:, None] - goals).sum(axis=2) / np.square(goals).sum(axis=1)
    return distances


def protocol(name: str, args: argparse.Namespace) -> dict[str, str]:
    """What a table of several worlds says of each: model, data, and the world as typed."""
    return {"model": Path(args.model_key or "own").name, "data": name.partition(",")[0], "world": name}


def keep(file: Path, table: pd.DataFrame) -> None:
    """Put a world's rows into a table of all worlds, in the place of those it has; numbers to five digits."""
    there = read_table(file) if file.is_file() else table[:0]
    others = there[~there["world"].isin(table["world"]) | ~there["model"].isin(table["model"])]
    rounded = table.assign(
        **{name: [float(f"{value:.5g}") for value in table[name]] for name in table.select_dtypes("float")}
    )
    write_table(file, pd.concat([others, rounded]) if len(others) else rounded)


def share_clusters(world: World, args: argparse.Namespace) -> None:
    """Where clusters make the tasks, both stores have those of the losses' gradients."""
    if world.tasks:
        estimator_of(world, args, "constant")  # makes them
        stores = [store_of(world, args, name)[1] for name in ("constant", "logistic")]
        shutil.copyfile(*(clusters_file(store, args.num_clusters) for store in stores))


def random_moments(num_tasks: int, seed: int, dim: int = 400) -> TaskMoments:
    """Moments of tasks of a few random rows each, to time what is computed from moments."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((num_tasks, 40, dim), np.float32) + rng.standard_normal((num_tasks, 1, dim), np.float32)
    outers = rows.transpose(0, 2, 1) @ rows
    squares = np.square(rows).sum(axis=(1, 2), dtype=float)
    sums, counts = rows.sum(axis=1, dtype=float), np.full(num_tasks, 40)
    return TaskMoments(counts, counts.astype(float), rng.random(num_tasks), sums, squares, outers)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Which worlds, and how they are trained."""
    group = parser.add_argument_group("worlds")
    group.add_argument("--world", nargs="+", default=list(SUITE), metavar="WORLD", help="synthetic:SEED, cot:SEED, "
                       "real:flan, real:alpaca, real:strategy_qa, real:commonsense_qa or a .jsonl file, with settings after commas (default: the suite of five)")  # fmt: skip
    group.add_argument("--model_key", metavar="MODEL", help="base model of real:flan or a .jsonl world (default: none)")
    group.add_argument("--flan_file", metavar="JSONL", help="FLAN rows of real:flan (default: none)")
    group.add_argument("--alpaca_file", metavar="PKL", help="Alpaca frame of real:flan (default: none)")
    group.add_argument(
        "--cot_dir", metavar="FOLDER", help="dataset/, split/ and saved/ of the questions (default: none)"
    )
    group.add_argument("--rows_per_task", type=config.COUNT, default=80, help="rows of each task of a .jsonl world "
                       "(default: 80)")  # fmt: skip
    group.add_argument("--max_characters", type=config.COUNT, default=450, help="longer rows of a .jsonl world are "
                       "left out (default: 450)")  # fmt: skip
    group.add_argument("--num_clusters", type=config.COUNT, default=20, help="tasks of a cot world (default: 20)")
    group = parser.add_argument_group("training and gradients")
    group.add_argument("--runs", type=config.COUNT, default=2, help="fine-tunings of each subset, with other seeds; "
                       "the truth is their mean (default: 2)")  # fmt: skip
    group.add_argument("--epochs", type=config.COUNT, default=4, help="passes of every fine-tuning over its rows "
                       "(default: 4)")  # fmt: skip
    group.add_argument("--lr", type=config.POSITIVE, default=2e-3, help="learning rate (default: 0.002)")
    group.add_argument("--batch_size", type=config.COUNT, default=16, help="rows of a batch (default: 16)")
    group.add_argument("--project_dim", type=config.COUNT, default=4000, help="projection dimension d (default: 4000)")
    config.add_flags(parser, config.HardwareConfig)
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print only the lines of JSON (default: the commands and the "
                       "table too)")  # fmt: skip
