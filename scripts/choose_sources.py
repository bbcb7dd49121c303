"""From a folder of files to an answer, in one command: which sources to train on for this target.

Runs the stages of the instruction track one after the other in this process, each with its command printed first:
meta-training (until its last checkpoint), gradients, estimates, both selections, and real fine-tuning of the base model on
all sources and on the selections. With checkpoints of another trainer there is no meta-training. The last lines say what to
train on, of all that was fine-tuned the best on validation rows, how sure that is, what it cost and how to train on it; or
that nothing helps. What is trained already is not trained again.

Reads   the files of --data_files and --target_files, the base model of --model_key
Writes  what the stages write; results/<name>/summary.json, report.html, selected.jsonl, mixture.json; with --halves also
        estimates.png

    python scripts/choose_sources.py --data_files data/synthetic/flan.jsonl --target_files data/synthetic/target.jsonl \\
        --model_key data/synthetic/model --train_lora --lr 2e-3 --batch_size 16 --epochs 4 --halves 6 --save_name mine
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from src import artifacts, config, console, figures, tables
from src.distributed import started_from_outside
from src.evaluation import Answer, best_fine_tuned, bootstrap_interval, linear_datamodeling_score
from src.export import TRAINERS, check_trainer
from src.subsets import read_subsets, tasks_in_subset, write_subsets

FEWEST_HALVES = 3
"""Random halves that a rank correlation needs."""
SELECTIONS = ("random_ensemble", "forward_selection")
SCRIPTS = {
    "instruction": ("custom_train_alpaca.py", "fast_estimate_eval_approximation_alpaca.py", "fast_estimate_linear_regression_alpaca.py"),
    "cot": ("custom_train.py", "fast_estimate_compute_gradients.py", "fast_estimate_linear_regression.py"),
}  # fmt: skip
"""Of training, gradients and regression, by track."""


@dataclass
class Pipeline:
    """All stages of one run.

    Attributes:
        name: Of the run and of its results.
        training: Flags of meta-training: data, model, hyperparameters.
        gradients, estimation, tasks: Flags of stage 2, of stages 3 and 4, and of all that name tasks.
        hardware: Flags of every stage that runs a model.
        apart: Whether several processes run it.
        checkpoints: Of another trainer, in the place of meta-training.
        selection: Flags of forward selection.
        runs: Repetitions of each fine-tuning.
        track: "instruction" or "cot".
        seconds: Of what leaves no record of its own, so far.
    """

    name: str
    training: dict[str, Any]
    gradients: dict[str, Any] = field(default_factory=dict)
    estimation: dict[str, Any] = field(default_factory=dict)
    tasks: dict[str, Any] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)
    apart: bool = False
    checkpoints: tuple[str, ...] = ()
    selection: dict[str, Any] = field(default_factory=dict)
    runs: int = 1
    track: str = "instruction"
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where results are."""
        return artifacts.results_dir(self.name)

    def run(self, stage: str, command: str, *more: str) -> None:
        """Print and run a command that leaves no record of its seconds, and keep them."""
        started = time.perf_counter()
        console.run_command(command, *more)
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - started, 2)

    def to_lower(self, targets: Sequence[str], tasks: Sequence[str]) -> list[str]:
        """The targets whose losses are to fall."""
        kept = self.selection.get("keep_task", ())
        return [name for name in tables.own_targets(targets, tasks) if name not in kept]

    def select(self) -> list[str]:
        """Stages 1 to 4; the names of the tasks."""
        train, gradients, regression = SCRIPTS[self.track]
        named = {"save_name": self.name}
        stage_2: dict[str, Any] = {"compute_pretrained_outputs": True} if self.track == "instruction" else {}
        if self.checkpoints:
            stage_2 |= {"load_model_dir": self.checkpoints, **self.training}
            stage_2.pop("batch_size", None)
        else:
            flags = {**self.training, **named, "stop_after_checkpoints": True, **self.hardware}
            console.call(train, apart=self.apart, **flags)
        console.call(gradients, **stage_2, **named, **self.gradients, **self.hardware, apart=self.apart)
        estimation = {**named, **self.tasks, **self.estimation}
        console.call(regression, **estimation, sampled_tasks=str(artifacts.subset_file(self.name)))
        console.call("fast_estimate_forward_selection.py", **estimation, **self.selection)
        manifest = artifacts.read_manifest(self.folder, regression)
        lowered: dict[str, Any] = {}
        if self.selection:
            lowered["target_task"] = self.to_lower(manifest["targets"], manifest["tasks"])
        console.call("notebook/select_random_ensemble.py", results=str(self.folder), **lowered)
        return tables.read_table(self.folder / artifacts.SCORES_FILE).sort_values("task")["name"].tolist()

    def train_on(self, **chosen: Any) -> None:
        """Stage 5 on chosen tasks."""
        flags: dict[str, Any] = {"runs": self.runs} if self.runs > 1 else {}
        if self.checkpoints:  # what is not typed comes from the other trainer
            names = [f.name for f in fields(config.TrainingConfig)]
            flags |= {name: value for name, value in self.training.items() if name in names}
        flags |= {**self.tasks, **chosen, **self.hardware}
        console.call(SCRIPTS[self.track][0], save_name=self.name, **flags, apart=self.apart)

    def fine_tune(self, tasks: Sequence[str], num_halves: int) -> dict[str, list[str]]:
        """Stage 5 on nothing, everything, the selections and some random halves: the texts of the subsets of each."""
        self.train_on(task_idxes=())
        self.train_on(task_idxes=("all",))
        subsets = {"base": [""], "all_tasks": [tables.subset_text(range(len(tasks)))]}
        if num_halves:  # the first of those that stage 3 has estimated
            halves = artifacts.subset_file(f"{self.name}_random_halves")
            drawn = read_subsets(artifacts.subset_file(self.name), len(tasks), tasks)[:num_halves]
            write_subsets(halves, drawn, comment="random halves, to judge estimates by", tasks=tasks)
            self.train_on(subset_file=str(halves))
            subsets["random_half"] = [tables.subset_text(subset) for subset in drawn]
        for method in SELECTIONS:
            file = artifacts.subset_file(f"{self.name}_{method}")
            self.train_on(subset_file=str(file))
            subsets[method] = [tables.subset_text(read_subsets(file, len(tasks), tasks)[0])]
        return subsets

    def closing(self, answer: Answer, tasks: Sequence[str], chosen: str) -> list[str]:
        """Lines below the answer: its test loss beside the baselines', what finding it cost, and how to train on it, with
        the flag that names it."""
        rows = tables.read_table(self.folder / artifacts.RESULTS_FILE, of_subsets=True)
        targets = self.to_lower(tables.columns_of(rows, tables.TEST_LOSS), tasks)
        rows["test"] = tables.mean_over_targets(rows, tables.TEST_LOSS, targets)
        means, everything = rows.groupby("subset")["test"].mean(), tables.subset_text(range(len(tasks)))
        called = {
            tables.subset_text(answer.subset): "of these",
            everything: f"of all {len(tasks)} sources",
            "": "of the base model",
        }
        losses = ", ".join(f"{means[text]:.3f} {name}" for text, name in called.items() if text in means)
        summary = json.loads((self.folder / artifacts.SUMMARY_FILE).read_text(encoding="utf-8"))
        groups: dict[str, float] = {}
        for stage, seconds in summary["seconds"].items():
            group = "fine-tuning" if stage.startswith("fine_tuning") else stage.replace("_", " ")
            groups[group] = groups.get(group, 0.0) + seconds
        costs = ", ".join(f"{group} {console.duration(seconds)}" for group, seconds in groups.items())
        lines = [
            f"Test loss, on rows that chose nothing: {losses}.",
            f"Cost: {console.duration(sum(groups.values()))} ({costs}).",
        ]
        train = f"python {SCRIPTS[self.track][0]} --save_name {self.name} {chosen}"
        return [*lines, f"To train on it: {train}"] if answer.subset else lines

    def answer(self, tasks: Sequence[str], subsets: dict[str, list[str]]) -> Answer:
        """The best of everything that was fine-tuned."""
        chosen_by: dict[str, str] = {}
        for method in SELECTIONS:
            text, name = subsets[method][0], method.replace("_", " ")
            chosen_by[text] = f"{chosen_by[text]} and {name}" if text in chosen_by else name
        return best_fine_tuned(self.folder, tasks, chosen_by)

    def all_seconds(self, truth: pd.DataFrame, subsets: dict[str, list[str]]) -> dict[str, float]:
        """What every stage took, over all processes that worked on it: from manifests and tables, where they say it."""
        path = self.folder / artifacts.SUMMARY_FILE
        before = json.loads(path.read_text(encoding="utf-8"))["seconds"] if path.is_file() else {}
        seconds = {stage: value + before.get(stage, 0.0) for stage, value in self.seconds.items()}
        seconds |= artifacts.read_manifest(self.folder, SCRIPTS[self.track][2])["seconds"]
        for stage, table in (
            ("forward_selection", artifacts.SELECTION_FILE),
            ("random_ensemble", artifacts.SCORES_FILE),
        ):
            described = (self.folder / table).with_suffix(".json")
            seconds[stage] = json.loads(described.read_text(encoding="utf-8"))["seconds"]
        of_subset = truth.groupby("subset")["seconds"].sum()
        for method, texts in {**subsets, "others": list(of_subset.index)}.items():  # each subset once
            texts = [text for text in texts if text in of_subset.index]
            seconds[f"fine_tuning_{method}"] = float(of_subset[texts].sum())
            of_subset = of_subset.drop(texts)
        return {stage: round(value, 2) for stage, value in seconds.items() if isinstance(value, float) and value}

    def summarise(self, tasks: Sequence[str], subsets: dict[str, list[str]]) -> None:
        """The table and the summary; where random halves were fine-tuned, the figure and how well estimates rank them."""
        folder = self.folder
        rows = tables.read_table(folder / artifacts.RESULTS_FILE, of_subsets=True)
        truth, seconds = rows.groupby("subset").mean(numeric_only=True), self.all_seconds(rows, subsets)
        targets = self.to_lower(tables.columns_of(truth, tables.TEST_LOSS), tasks)
        metrics = {"test_loss": tables.TEST_LOSS}
        if tables.columns_of(truth, tables.TEST_ACCURACY):
            metrics["test_accuracy"] = tables.TEST_ACCURACY
        measured = {
            metric: {
                method: float(np.mean(tables.mean_over_targets(truth.loc[texts], prefix, targets)))
                for method, texts in subsets.items()
            }
            for metric, prefix in metrics.items()
        }
        spearman, judged = self.judge(truth, targets, subsets) if "random_half" in subsets else (None, "")
        selected = tables.parse_subset(subsets["forward_selection"][0])
        answer = self.answer(tasks, subsets)
        summary = {"seconds": seconds, "spearman": spearman, "selected_tasks": list(selected),
                   "answer": {"tasks": list(answer.subset), "lines": answer.lines}}  # fmt: skip
        artifacts.write_json(folder / artifacts.SUMMARY_FILE, {**measured, **summary})
        headings = "".join(f"{metric.replace('_', ' '):>15}" for metric in metrics)
        print(f"\n{'trained on':<28}{'tasks':>6}{headings}{'seconds':>10}")
        for method, texts in subsets.items():
            count = np.mean([len(tables.parse_subset(text)) for text in texts])
            label = method.replace("_", " ") + (f" (mean of {len(texts)})" if len(texts) > 1 else "")
            values = "".join(f"{measured[metric][method]:>15.3f}" for metric in metrics)
            print(f"{label:<28}{count:>6.0f}{values}{truth.loc[texts, 'seconds'].astype(float).mean():>10.1f}")
        figure = f" and {folder / artifacts.ESTIMATES_FIGURE}" if judged else ""
        print(
            f"\n{judged}Seconds by stage: {', '.join(f'{stage} {value:.0f}' for stage, value in seconds.items())}\n"
            f"Wrote {folder / artifacts.SUMMARY_FILE}{figure}."
        )

    def judge(self, truth: pd.DataFrame, targets: Sequence[str], subsets: dict[str, list[str]]) -> tuple[float, str]:
        """Draw estimates against fine-tuned losses of the random halves, the selection marked; their Spearman, and in words."""
        folder, halves, (selected,) = self.folder, subsets["random_half"], subsets["forward_selection"]
        estimates = tables.read_table(folder / artifacts.ESTIMATES_FILE).set_index("subset").loc[halves]
        prefix = tables.estimate_prefix(estimates)
        estimated = tables.mean_over_targets(estimates, prefix, targets)
        rows = tables.read_table(folder / artifacts.RESULTS_FILE, of_subsets=True)
        rows["loss"] = tables.mean_over_targets(rows, tables.VALIDATION_LOSS, targets)
        by_run = rows.pivot_table(index="subset", columns="run", values="loss").loc[halves].to_numpy()
        steps = tables.read_table(folder / artifacts.SELECTION_FILE)
        estimate = float(steps.loc[steps["subset"] == selected, prefix].iloc[0])
        value = float(tables.mean_over_targets(truth.loc[[selected]], tables.VALIDATION_LOSS, targets)[0])
        spearman = linear_datamodeling_score(estimated, by_run.mean(axis=1))
        low, high = bootstrap_interval(np.stack([estimated, by_run.mean(axis=1)], axis=1))
        figure, axes = figures.plt.subplots(figsize=(5.6, 4.4))
        figures.scatter(axes, estimated, by_run, ranks_only=prefix == tables.SCORE, label="random half")
        style = {"color": figures.ORANGE, "marker": "*", "s": 110, "edgecolor": "black", "linewidth": 0.6}
        axes.scatter(estimate, value, label="forward selection", **style)
        manifest, runs = artifacts.read_manifest(folder, "stage 3"), console.counted(by_run.shape[1], "training seed")
        about = figures.about_run(manifest, ", ".join(targets), f"{len(halves)} random halves", runs)
        found = f"{spearman:.2f} (90 % interval {low:.2f} to {high:.2f})"
        figures.titled(axes, f"Spearman {found}", about)
        axes.legend(fontsize=8)
        figures.save_figure(figure, folder / artifacts.ESTIMATES_FIGURE)
        judged = f"Spearman of estimates and fine-tuned losses over random halves: {found}\n"
        if low <= 0:
            judged += "That is no better than chance: trust what was fine-tuned, not estimates of other subsets.\n"
        return spearman, judged


SHOWN = (
    config.InstructionData, config.RowsConfig, config.ModelConfig, config.TrainingConfig, config.CheckpointShares,
    config.LoadedCheckpoints, config.RunsConfig, config.NameConfig, config.ProjectionConfig, config.GradientConfig,
    config.EstimatorConfig, config.KeepConfig, config.HardwareConfig,
)  # fmt: skip


def parse_args(argv: Sequence[str] | None = None) -> Any:
    """The script's flags."""
    parser = config.stage_parser(__doc__, SHOWN)
    group = parser.add_argument_group("answer")
    group.add_argument("--halves", type=config.number(int, 0), default=0, metavar="N",
        help="also fine-tune N random halves of the sources, at least 3, to see whether the estimates can be trusted "
        "(default: 0)")  # fmt: skip
    group.add_argument("--for", metavar="TRAINER",
        help="write the answer's rows for axolotl, llamafactory, trl, open-instruct, ms-swift or torchtune (default: "
        "selected.jsonl)")  # fmt: skip
    return parser.parse_args(argv)


def pipeline_from(typed: dict[str, Any], name: str) -> Pipeline:
    """The stages with the flags that were typed."""

    def of(*groups: type) -> dict[str, Any]:
        names = [f.name for group in groups for f in fields(group)]
        return {flag: typed[flag] for flag in names if flag in typed}

    kept = of(config.KeepConfig)
    trained_by_us = () if typed.get("load_model_dir") else (config.CheckpointShares,)
    return Pipeline(
        name,
        of(config.InstructionData, config.RowsConfig, config.ModelConfig, config.TrainingConfig, *trained_by_us),
        of(config.ProjectionConfig, config.GradientConfig),
        of(config.EstimatorConfig),
        hardware=of(config.HardwareConfig),
        checkpoints=typed.get("load_model_dir", ()),
        selection=kept | ({"refine": 0} if kept else {}),  # what is fine-tuned afterwards has to hold
        runs=typed.get("runs", 1),
    )


def main(args: Any) -> None:
    """All stages, the table, the answer."""
    typed = config.typed_flags(args)
    halves_asked, trainer = typed.pop("halves"), typed.pop("for", None)
    check_trainer(trainer)  # before anything is trained
    checkpoints = typed.get("load_model_dir")
    manifest = {"config": config.of_another_trainer(checkpoints)} if checkpoints else None
    settings = config.inherit(config.RunConfig, typed, manifest)
    if started_from_outside():
        raise ValueError("start this script as one process: it starts those of --devices itself, stage by stage")
    name = artifacts.slug(settings.results)
    pipeline = pipeline_from(typed, name)
    pipeline.apart = settings.hardware.num_processes > 1
    folder = pipeline.folder
    tasks = pipeline.select()
    halves = min(halves_asked, math.comb(len(tasks), tasks_in_subset(len(tasks), 0.5)))
    if halves < halves_asked or 0 < halves < FEWEST_HALVES:
        console.say_notices([f"{len(tasks)} sources have {halves} halves; from {FEWEST_HALVES} on they are fine-tuned"])
    subsets = pipeline.fine_tune(tasks, halves if halves >= FEWEST_HALVES else 0)
    answer, closing = pipeline.answer(tasks, subsets), f"Everything that was found: {folder}."
    flag = ""
    for exported in (folder / artifacts.SELECTED_ROWS, folder / artifacts.MIXTURE_FILE):  # of an earlier answer
        exported.unlink(missing_ok=True)
    for other in TRAINERS:
        shutil.rmtree(artifacts.export_dir(folder, other), ignore_errors=True)
    if answer.subset:
        exporting: dict[str, Any] = {"for": trainer} if trainer else {}
        files = {method: artifacts.subset_file(f"{name}_{method}") for method in SELECTIONS}
        file = next((files[m] for m in SELECTIONS if subsets[m] == [tables.subset_text(answer.subset)]), None)
        chosen: dict[str, Any] = {"subset_file": str(file)} if file else {"task_idxes": answer.subset}
        if not file:  # of random halves no model is kept
            pipeline.train_on(**chosen)
            answer = pipeline.answer(tasks, subsets)
        console.call("scripts/export_selection.py", save_name=name, **chosen, **exporting)
        label = file.stem if file else artifacts.tasks_label(answer.subset, len(tasks))
        model = artifacts.model_dir(folder, label, 0)
        flag = " ".join(word for named in chosen.items() for word in console.as_typed(*named))
        rows = artifacts.export_dir(folder, trainer) if trainer else folder / artifacts.SELECTED_ROWS
        closing = f"The model trained on it: {model}; its rows: {rows}; everything else: {folder}."
    pipeline.summarise(tasks, subsets)
    console.run_command(f"scripts/report.py {folder}")
    print("", *answer.lines, *pipeline.closing(answer, tasks, flag), closing, sep="\n")


if __name__ == "__main__":
    console.run_stage(main, parse_args())
