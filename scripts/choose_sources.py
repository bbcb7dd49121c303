"""From a folder of files to an answer, in one command: which sources to train on for this target.

Runs the stages of the instruction track one after the other in this process, each with its command printed first:
meta-training (until its last checkpoint), gradients, estimates, both selections, and real fine-tuning of the base model on
all sources and on the selections. The last lines say what to train on. What is trained already is not trained again.

Reads   the files of --data_files and --target_files, the base model of --model_key
Writes  what the stages write; results/<name>/summary.json, report.html, selected.jsonl, mixture.json; with --halves also
        estimates.png

    python scripts/choose_sources.py --data_files data/synthetic/flan.jsonl --target_files data/synthetic/target.jsonl \\
        --model_key data/synthetic/model --train_lora --lr 2e-3 --batch_size 16 --epochs 4 --halves 6 --save_name mine
"""

from __future__ import annotations

import argparse
import math
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pandas as pd

from src import cli
from src.accuracy import linear_datamodeling_score
from src.estimates import names_of
from src.paths import (
    ESTIMATES_FIGURE,
    ESTIMATES_FILE,
    RESULTS_FILE,
    SCORES_FILE,
    SELECTION_FILE,
    SUMMARY_FILE,
    model_dir,
    results_dir,
    slug,
    subset_file,
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


@dataclass
class Pipeline:
    """All stages of one run, as commands.

    Attributes:
        name: Of the results.
        data: Data and model flags.
        training: Hyperparameters of fine-tuning.
        tasks: Flags that say what a task is.
        train, gradients, regression: The stages' scripts (and what selects the stage in a script).
        seconds: Of each stage so far.
    """

    name: str
    data: str
    training: str
    tasks: str = ""
    train: str = "custom_train_alpaca.py"
    gradients: str = "fast_estimate_eval_approximation_alpaca.py --compute_pretrained_outputs"
    regression: str = "fast_estimate_linear_regression_alpaca.py"
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, stage: str, command: str, *more: str) -> None:
        """Print a command, run it, and keep its seconds."""
        started = time.perf_counter()
        cli.run_command(command, *more)
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - started, 2)

    def select(self) -> list[str]:
        """Stages 1 to 4; the names of the tasks."""
        regression = f"{self.regression} {self.data} {self.tasks} --results_name {self.name}"
        self.run("meta_training", f"{self.train} {self.data} {self.training} --stop_after_checkpoints")
        self.run("gradients", f"{self.gradients} {self.data}")
        self.run("estimation", f"{regression} --sampled_tasks {subset_file(self.name)}")
        selection = f"fast_estimate_forward_selection.py {self.data} {self.tasks} --results_name {self.name}"
        self.run("forward_selection", selection)
        self.run("random_ensemble", f"notebook/select_random_ensemble.py {results_dir(self.name)}")
        return read_table(results_dir(self.name) / SCORES_FILE).sort_values("task")["name"].tolist()

    def fine_tune(self, tasks: Sequence[str], num_halves: int, runs: int = 1) -> dict[str, list[str]]:
        """Stage 5 on nothing, everything, the selections and some random halves: the texts of the subsets of each."""
        fine_tuning = f"{self.train} {self.data} {self.tasks} {self.training} --runs {runs} --results_name {self.name}"
        self.run("base", f"{fine_tuning} --task_idxes")
        self.run("all_tasks", f"{fine_tuning} --task_idxes all")
        for method in SELECTIONS:
            self.run(f"fine_tuning_{method}", f"{fine_tuning} --subset_file {subset_file(f'{self.name}_{method}')}")
        subsets = {"base": [""], "all_tasks": [subset_text(range(len(tasks)))]}
        if num_halves:  # the first of those that stage 3 has estimated
            halves = subset_file(f"{self.name}_random_halves")
            drawn = read_subsets(subset_file(self.name), len(tasks), tasks)[:num_halves]
            write_subsets(halves, drawn, comment="random halves, to judge estimates by", tasks=tasks)
            self.run("random_halves", f"{fine_tuning} --subset_file {halves}")
            subsets["random_half"] = [subset_text(subset) for subset in drawn]
        for method in SELECTIONS:
            chosen = read_subsets(subset_file(f"{self.name}_{method}"), len(tasks))[0]
            subsets[method] = [subset_text(chosen)]
        return subsets

    def summarise(self, tasks: Sequence[str], subsets: dict[str, list[str]]) -> None:
        """The table and the summary; where random halves were fine-tuned, the figure and how well estimates rank them."""
        folder = results_dir(self.name)
        truth = self.fine_tuned_means()
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
        summary = {"seconds": self.seconds, "spearman": spearman, "selected_tasks": list(selected)}
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
            f"\n{judged}Seconds by stage: {', '.join(f'{stage} {value:.0f}' for stage, value in self.seconds.items())}\n"
            f"Wrote {folder / SUMMARY_FILE}{figure}."
        )

    def fine_tuned_means(self) -> pd.DataFrame:
        """The fine-tuned values of every subset, by its text: means over runs."""
        return read_table(results_dir(self.name) / RESULTS_FILE).groupby("subset").mean(numeric_only=True)

    def best_selection(self, tasks: Sequence[str], subsets: dict[str, list[str]]) -> str:
        """Of the two selections the one whose validation loss after fine-tuning is lower."""
        truth = self.fine_tuned_means()
        targets = own_targets(columns_of(truth, VALIDATION_LOSS), tasks)
        losses = {m: mean_over_targets(truth.loc[subsets[m]], VALIDATION_LOSS, targets)[0] for m in SELECTIONS}
        return min(losses, key=losses.__getitem__)

    def judge(self, truth: pd.DataFrame, targets: Sequence[str], subsets: dict[str, list[str]]) -> float:
        """Draw estimates against fine-tuned losses of the random halves, the selection marked; their Spearman."""
        folder, halves, (selected,) = results_dir(self.name), subsets["random_half"], subsets["forward_selection"]
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
    cli.add_hardware(parser)
    group = parser.add_argument_group("answer")
    group.add_argument("--halves", type=cli.not_negative_int, default=0, help="also fine-tune so many random halves of the "
                       "sources, at least 3, to see whether the estimates can be trusted (default: 0)")  # fmt: skip
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """All stages, the table, the answer."""
    if cli.hardware_from(args).num_processes > 1:
        raise ValueError(
            "several processes would each run every stage; run the stages one by one, or name one of --devices"
        )
    name = slug(cli.run_from(args, 0).results_name)
    # every flag whose default may differ from script to script is given
    data_groups = (cli.add_instruction_data, partial(cli.add_model, model_key=""))
    described = shlex.join(cli.flags_of(args, *data_groups, without=("results_name", "dry_run")))
    data = f"{described} {shlex.join(cli.flags_of(args, cli.add_hardware))}"
    training = shlex.join(cli.flags_of(args, cli.add_training, without=("runs",)))
    folder = results_dir(name)
    if cli.is_dry_run(args, [*cli.instruction_files(args), *args.target_files, args.model_key], [folder]):
        return
    pipeline = Pipeline(name, data, training)
    tasks = pipeline.select()
    halves = min(args.halves, math.comb(len(tasks), tasks_in_subset(len(tasks), 0.5)))
    if halves < args.halves or 0 < halves < FEWEST_HALVES:
        cli.say_notices([f"{len(tasks)} sources have {halves} halves; from {FEWEST_HALVES} on they are fine-tuned"])
    subsets = pipeline.fine_tune(tasks, halves if halves >= FEWEST_HALVES else 0, args.runs)
    method = pipeline.best_selection(tasks, subsets)
    (text,) = subsets[method]
    file = subset_file(f"{name}_{method}")
    pipeline.run("export", f"scripts/export_selection.py {described} --results_name {name} --subset_file {file}")
    cli.run_command(f"scripts/report.py {folder}")
    pipeline.summarise(tasks, subsets)
    print(
        f"\nTrain on: {names_of(parse_subset(text), tasks)} ({len(text.split())} of {len(tasks)} sources, by "
        f"{method.replace('_', ' ')}).\nThe model trained on it: {model_dir(folder, file.stem, 0)}; its rows and everything else: "
        f"{folder}."
    )


if __name__ == "__main__":
    cli.run_stage(main, parse_args())
