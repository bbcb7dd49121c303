"""From a folder of files to an answer, in one command: which sources to train on for this target.

Runs the stages of the instruction track one after the other in this process, each with its command printed first:
meta-training (until its last checkpoint), gradients, estimates, both selections, and real fine-tuning of the base model on
all sources and on the selections. The last lines say what to train on, of all that was fine-tuned the best on validation
rows, and how sure that is; or that nothing helps. What is trained already is not trained again.

Reads   the files of --data_files and --target_files, the base model of --model_key
Writes  what the stages write; results/<name>/summary.json, report.html, selected.jsonl, mixture.json; with --halves also
        estimates.png

    python scripts/choose_sources.py --data_files data/synthetic/flan.jsonl --target_files data/synthetic/target.jsonl \\
        --model_key data/synthetic/model --train_lora --lr 2e-3 --batch_size 16 --epochs 4 --halves 6 --save_name mine
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from src import cli
from src.estimation import DEFAULT_RHO, ESTIMATORS
from src.evaluation import Answer, best_fine_tuned, linear_datamodeling_score
from src.paths import (
    ESTIMATES_FIGURE,
    ESTIMATES_FILE,
    MIXTURE_FILE,
    RESULTS_FILE,
    SCORES_FILE,
    SELECTED_ROWS,
    SELECTION_FILE,
    SUMMARY_FILE,
    model_dir,
    read_manifest,
    results_dir,
    slug,
    subset_file,
    tasks_label,
)
from src.report import (
    ESTIMATE,
    TEST_ACCURACY,
    TEST_LOSS,
    VALIDATION_LOSS,
    columns_of,
    estimates_figure,
    mean_over_targets,
    own_targets,
    parse_subset,
    read_table,
    subset_text,
    write_summary,
)
from src.subsets import read_subsets, tasks_in_subset, write_subsets

FEWEST_HALVES = 3
"""Random halves that a rank correlation needs."""
SELECTIONS = ("random_ensemble", "forward_selection")
INSTRUCTION = (
    "custom_train_alpaca.py",
    "fast_estimate_eval_approximation_alpaca.py --compute_pretrained_outputs",
    "fast_estimate_linear_regression_alpaca.py",
)
"""The scripts of training, gradients and regression."""


@dataclass
class Pipeline:
    """All stages of one run, as commands.

    Attributes:
        name: Of the results.
        data: Data, model and hardware flags of every stage.
        training: Hyperparameters of fine-tuning.
        meta_training, gradients, estimation: Flags of stage 1 alone, of stage 2, and of stages 3 and 4.
        tasks: Flags that say what a task is.
        runs: Repetitions of each fine-tuning.
        scripts: Of training, gradients (and what selects the stage in it) and regression.
        seconds: Of what leaves no record of its own, so far.
    """

    name: str
    data: str
    training: str
    meta_training: str = ""
    gradients: str = ""
    estimation: str = ""
    tasks: str = ""
    runs: int = 1
    scripts: tuple[str, str, str] = INSTRUCTION
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where results are."""
        return results_dir(self.name)

    @property
    def fine_tuning(self) -> str:
        """The command that fine-tunes on chosen tasks, without them."""
        flags = f"{self.data} {self.tasks} {self.training} --runs {self.runs} --results_name {self.name}"
        return f"{self.scripts[0]} {flags}"

    def run(self, stage: str, command: str, *more: str) -> None:
        """Print and run a command that leaves no record of its seconds, and keep them."""
        started = time.perf_counter()
        cli.run_command(command, *more)
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - started, 2)

    def select(self) -> list[str]:
        """Stages 1 to 4; the names of the tasks."""
        train, gradients, regression = self.scripts
        estimation = f"{self.data} {self.tasks} {self.estimation} --results_name {self.name}"
        cli.run_command(f"{train} {self.data} {self.training} {self.meta_training} --stop_after_checkpoints")
        cli.run_command(f"{gradients} {self.data} {self.gradients}")
        cli.run_command(f"{regression} {estimation} --sampled_tasks {subset_file(self.name)}")
        cli.run_command(f"fast_estimate_forward_selection.py {estimation}")
        cli.run_command(f"notebook/select_random_ensemble.py {self.folder}")
        return read_table(self.folder / SCORES_FILE).sort_values("task")["name"].tolist()

    def fine_tune(self, tasks: Sequence[str], num_halves: int) -> dict[str, list[str]]:
        """Stage 5 on nothing, everything, the selections and some random halves: the texts of the subsets of each."""
        cli.run_command(f"{self.fine_tuning} --task_idxes")
        cli.run_command(f"{self.fine_tuning} --task_idxes all")
        subsets = {"base": [""], "all_tasks": [subset_text(range(len(tasks)))]}
        if num_halves:  # the first of those that stage 3 has estimated
            halves = subset_file(f"{self.name}_random_halves")
            drawn = read_subsets(subset_file(self.name), len(tasks), tasks)[:num_halves]
            write_subsets(halves, drawn, comment="random halves, to judge estimates by", tasks=tasks)
            cli.run_command(f"{self.fine_tuning} --subset_file {halves}")
            subsets["random_half"] = [subset_text(subset) for subset in drawn]
        for method in SELECTIONS:
            file = subset_file(f"{self.name}_{method}")
            cli.run_command(f"{self.fine_tuning} --subset_file {file}")
            subsets[method] = [subset_text(read_subsets(file, len(tasks), tasks)[0])]
        return subsets

    def answer(self, tasks: Sequence[str], subsets: dict[str, list[str]]) -> Answer:
        """The best of everything that was fine-tuned."""
        chosen_by: dict[str, str] = {}
        for method in SELECTIONS:
            text, name = subsets[method][0], method.replace("_", " ")
            chosen_by[text] = f"{chosen_by[text]} and {name}" if text in chosen_by else name
        return best_fine_tuned(self.folder, tasks, chosen_by)

    def all_seconds(self, truth: pd.DataFrame, subsets: dict[str, list[str]]) -> dict[str, float]:
        """What every stage took, over all processes that worked on it: from manifests and tables, where they say it."""
        path = self.folder / SUMMARY_FILE
        before = json.loads(path.read_text(encoding="utf-8"))["seconds"] if path.is_file() else {}
        seconds = {stage: value + before.get(stage, 0.0) for stage, value in self.seconds.items()}
        seconds |= read_manifest(self.folder, self.scripts[2])["seconds"]
        for stage, table in (("forward_selection", SELECTION_FILE), ("random_ensemble", SCORES_FILE)):
            described = (self.folder / table).with_suffix(".json")
            seconds[stage] = json.loads(described.read_text(encoding="utf-8"))["seconds"]
        of_subset = truth.groupby("subset")["seconds"].sum()
        for method, texts in {**subsets, "others": list(of_subset.index)}.items():  # each subset once
            texts = [text for text in texts if text in of_subset.index]
            seconds[f"fine_tuning_{method}"] = float(of_subset[texts].sum())
            of_subset = of_subset.drop(texts)
        return {stage: round(value, 2) for stage, value in seconds.items() if value}

    def summarise(self, tasks: Sequence[str], subsets: dict[str, list[str]]) -> None:
        """The table and the summary; where random halves were fine-tuned, the figure and how well estimates rank them."""
        folder = self.folder
        rows = read_table(folder / RESULTS_FILE, of_subsets=True)
        truth, seconds = rows.groupby("subset").mean(numeric_only=True), self.all_seconds(rows, subsets)
        targets = own_targets(columns_of(truth, TEST_LOSS), tasks)
        metrics = {"test_loss": TEST_LOSS}
        if columns_of(truth, TEST_ACCURACY):
            metrics["test_accuracy"] = TEST_ACCURACY
        measured = {
            metric: {
                method: float(np.mean(mean_over_targets(truth.loc[texts], prefix, targets)))
                for method, texts in subsets.items()
            }
            for metric, prefix in metrics.items()
        }
        spearman = self.judge(truth, targets, subsets) if "random_half" in subsets else None
        selected = parse_subset(subsets["forward_selection"][0])
        answer = self.answer(tasks, subsets)
        summary = {"seconds": seconds, "spearman": spearman, "selected_tasks": list(selected),
                   "answer": {"tasks": list(answer.subset), "lines": answer.lines}}  # fmt: skip
        write_summary(folder / SUMMARY_FILE, {**measured, **summary})
        print(
            f"\n{'trained on':<28}{'tasks':>6}"
            + "".join(f"{metric.replace('_', ' '):>15}" for metric in metrics)
            + f"{'seconds':>10}"
        )
        for method, texts in subsets.items():
            count = np.mean([len(parse_subset(text)) for text in texts])
            label = method.replace("_", " ") + (f" (mean of {len(texts)})" if len(texts) > 1 else "")
            values = "".join(f"{measured[metric][method]:>15.3f}" for metric in metrics)
            print(f"{label:<28}{count:>6.0f}{values}{truth.loc[texts, 'seconds'].astype(float).mean():>10.1f}")
        judged, figure = "", ""
        if spearman is not None:
            judged = f"Spearman of estimates and fine-tuned losses over random halves: {spearman:.2f}\n"
            figure = f" and {folder / ESTIMATES_FIGURE}"
        print(
            f"\n{judged}Seconds by stage: {', '.join(f'{stage} {value:.0f}' for stage, value in seconds.items())}\n"
            f"Wrote {folder / SUMMARY_FILE}{figure}."
        )

    def judge(self, truth: pd.DataFrame, targets: Sequence[str], subsets: dict[str, list[str]]) -> float:
        """Draw estimates against fine-tuned losses of the random halves, the selection marked; their Spearman."""
        folder, halves, (selected,) = self.folder, subsets["random_half"], subsets["forward_selection"]
        estimates = read_table(folder / ESTIMATES_FILE).set_index("subset").loc[halves]
        estimated = mean_over_targets(estimates, ESTIMATE, targets)
        fine_tuned = mean_over_targets(truth.loc[halves], VALIDATION_LOSS, targets)
        steps = read_table(folder / SELECTION_FILE)
        estimate = float(steps.loc[steps["subset"] == selected, "estimate"].iloc[0])
        value = float(mean_over_targets(truth.loc[[selected]], VALIDATION_LOSS, targets)[0])
        estimates_figure(
            estimated, fine_tuned, folder / ESTIMATES_FIGURE, target=", ".join(targets),
            selected={"forward selection": (estimate, value)},
        )  # fmt: skip
        return linear_datamodeling_score(estimated, fine_tuned)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The script's flags."""
    parser = cli.Parser(__doc__)
    cli.add_instruction_data(parser)
    cli.add_model(parser, model_key="TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T")
    cli.add_training(parser, batch_size=128, lr=2e-5, epochs=10)
    cli.add_checkpoints(parser)
    cli.add_gradients(parser)
    cli.add_estimator(parser, ESTIMATORS, DEFAULT_RHO)
    cli.add_hardware(parser)
    group = parser.add_argument_group("answer")
    group.add_argument("--halves", type=cli.not_negative_int, default=0, help="also fine-tune so many random halves of the "
                       "sources, at least 3, to see whether the estimates can be trusted (default: 0)")  # fmt: skip
    return parser.parse_args(argv)


def pipeline_from(args: argparse.Namespace, name: str) -> Pipeline:
    """The stages with the flags that were typed; every flag whose default may differ from script to script is given."""

    def typed(*groups: Callable[[argparse.ArgumentParser], None], without: Sequence[str] = ()) -> str:
        return shlex.join(cli.flags_of(args, *groups, without=without))

    model = partial(cli.add_model, model_key="")
    return Pipeline(
        name,
        typed(cli.add_instruction_data, model, cli.add_hardware, without=("results_name", "dry_run")),
        typed(cli.add_training, without=("runs",)),
        typed(cli.add_checkpoints),
        typed(cli.add_gradients, without=("batch_size",)),
        typed(cli.add_projection, partial(cli.add_estimator, estimators=ESTIMATORS, rho=DEFAULT_RHO)),
        runs=args.runs,
    )


def main(args: argparse.Namespace) -> None:
    """All stages, the table, the answer."""
    if cli.hardware_from(args).num_processes > 1:
        raise ValueError(
            "several processes would each run every stage; run the stages one by one, or name one of --devices"
        )
    name = slug(cli.run_from(args, 0).results_name)
    pipeline = pipeline_from(args, name)
    folder = pipeline.folder
    if cli.is_dry_run(args, [*cli.instruction_files(args), *args.target_files, args.model_key], [folder]):
        return
    tasks = pipeline.select()
    halves = min(args.halves, math.comb(len(tasks), tasks_in_subset(len(tasks), 0.5)))
    if halves < args.halves or 0 < halves < FEWEST_HALVES:
        cli.say_notices([f"{len(tasks)} sources have {halves} halves; from {FEWEST_HALVES} on they are fine-tuned"])
    subsets = pipeline.fine_tune(tasks, halves if halves >= FEWEST_HALVES else 0)
    answer, closing = pipeline.answer(tasks, subsets), f"Everything that was found: {folder}."
    if answer.subset:
        files = {method: subset_file(f"{name}_{method}") for method in SELECTIONS}
        file = next((files[m] for m in SELECTIONS if subsets[m] == [subset_text(answer.subset)]), None)
        chosen = f"--subset_file {file}" if file else f"--task_idxes {' '.join(map(str, answer.subset))}"
        label = file.stem if file else tasks_label(answer.subset, len(tasks))
        if not file:  # of random halves no model is kept
            cli.run_command(f"{pipeline.fine_tuning} {chosen}")
            answer = pipeline.answer(tasks, subsets)
        groups = (cli.add_instruction_data, partial(cli.add_model, model_key=""))
        described = shlex.join(cli.flags_of(args, *groups, without=("results_name", "dry_run")))
        export = f"scripts/export_selection.py {described} --results_name {name} {chosen}"
        pipeline.run("export", export)
        closing = f"The model trained on it: {model_dir(folder, label, 0)}; its rows and everything else: {folder}."
    else:  # rows of an earlier answer are no longer recommended
        for exported in (f"{SELECTED_ROWS}.jsonl", MIXTURE_FILE):
            (folder / exported).unlink(missing_ok=True)
    pipeline.summarise(tasks, subsets)
    cli.run_command(f"scripts/report.py {folder}")
    print("", *answer.lines, closing, sep="\n")


if __name__ == "__main__":
    cli.run_stage(main, parse_args())
