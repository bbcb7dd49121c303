"""The main job on the embedded default, stage by stage: the commands a user would type, then what came of them.

Each command is printed before it runs, and runs in this process to save the time of importing the libraries
again. Stages that find their artifact there already do nothing, so a second run costs little.

    bash scripts/quickstart.sh            # instruction tuning
    bash scripts/quickstart.sh cot        # chain of thought
    bash scripts/quickstart.sh --seed 1   # another world
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from src import cli
from src.accuracy import linear_datamodeling_score
from src.paths import (
    DATA,
    ESTIMATES_FIGURE,
    ESTIMATES_FILE,
    RESULTS_FILE,
    SCORES_FILE,
    SELECTION_FILE,
    SUMMARY_FILE,
    results_dir,
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
    parse_subset,
    read_table,
    subset_text,
    write_summary,
)
from src.subsets import read_subsets

NUM_SHOWN_HALVES = 3
"""Random halves whose mean test loss the table shows; the correlation is over all that are fine-tuned."""
SELECTIONS = ("random_ensemble", "forward_selection")


@dataclass(frozen=True)
class Track:
    """What differs between the tracks; `{world}` stands for the folder of the synthetic data.

    Attributes:
        name: Folder below `results/`.
        target: The target task.
        world: Folder below `data/`, and the script that writes it.
        train, gradients, regression: The stages' scripts (and what selects the stage in a script).
        data: Data and model flags.
        tasks: Flags that say what a task is.
        training: Hyperparameters of fine-tuning.
    """

    name: str
    target: str
    world: tuple[str, str]
    train: str
    gradients: str
    regression: str
    data: str
    tasks: str
    training: str


TRACKS = {
    "instruction": Track(
        name="quickstart",
        target="target",
        world=("synthetic", "data/make_synthetic.py"),
        train="custom_train_alpaca.py",
        gradients="fast_estimate_eval_approximation_alpaca.py --compute_pretrained_outputs",
        regression="fast_estimate_linear_regression_alpaca.py",
        data="--data_files {world}/flan.jsonl --target_files {world}/target.jsonl --model_key {world}/model --train_lora",
        tasks="",
        training="--epochs 4 --lr 2e-3 --batch_size 16",
    ),
    "cot": Track(
        name="quickstart_cot",
        target="addsub",
        world=("synthetic_cot", "data/make_synthetic_cot.py"),
        train="custom_train.py",
        gradients="fast_estimate_compute_gradients.py",
        regression="fast_estimate_linear_regression.py",
        data="--dataset_key addsub --preset_key ft_cot_t70_4aug --data_dir {world}/data --saved_dir {world}/saved "
        "--model_key {world}/model --train_lora",
        tasks="--load_clusters --num_clusters 20",
        training="--epochs 4 --lr 2e-3 --batch_size 16 --inference_batch_size 128 --max_new_tokens 40",
    ),
}


class Stages:
    """Runs stage scripts and keeps their seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, stage: str, command: str, *more: str) -> None:
        """Print a command, then run it."""
        started = time.perf_counter()
        cli.run_command(command, *more)
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - started, 2)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The script's flags."""
    parser = cli.Parser(__doc__, "[instruction|cot]")
    parser.add_argument("track", nargs="?", choices=tuple(TRACKS), default="instruction", help="instruction tuning or "
                        "chain of thought (default: instruction)")  # fmt: skip
    group = parser.add_argument_group("world")
    group.add_argument("--seed", type=int, default=0, help="which synthetic world (default: 0)")
    group.add_argument("--num_halves", type=cli.positive_int, default=12, help="random halves that are really "
                       "fine-tuned, at least 3 (default: 12)")  # fmt: skip
    group.add_argument("--world", nargs=argparse.REMAINDER, default=[], metavar="...", help="everything behind it: flags of the "
                       "script that writes the synthetic world (default: none)")  # fmt: skip
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Run the stages, then show the table and the figure."""
    run, track = Stages(), TRACKS[args.track]
    folder, script = track.world
    world = DATA / (folder if args.seed == 0 else f"{folder}_seed_{args.seed}")
    name = f"{track.name}/seed_{args.seed}"
    data = track.data.format(world=world)
    halves = subset_file(f"{name}_random_halves")
    regression = f"{track.regression} {data} {track.tasks}"
    run("make_synthetic", f"{script} --seed {args.seed} --output_dir {world}", *args.world)
    run("meta_training", f"{track.train} {data} {track.training}")
    run("gradients", f"{track.gradients} {data}")
    run("estimation", f"{regression} --save_name {name} --sampled_tasks {subset_file(name)}")
    run("forward_selection", f"fast_estimate_forward_selection.py {data} {track.tasks} --save_name {name}")
    run("random_ensemble", f"notebook/select_random_ensemble.py {results_dir(name)}")
    run(
        "estimation", f"{regression} --save_name {name}_random_halves --sampled_tasks {halves}",
        "--number_of_subsets", str(max(args.num_halves, NUM_SHOWN_HALVES)),
    )  # fmt: skip

    estimates = read_table(results_dir(f"{name}_random_halves") / ESTIMATES_FILE)
    num_tasks = len(read_table(results_dir(name) / SCORES_FILE))
    everything = subset_text(range(num_tasks))
    fine_tuning = f"{track.train} {data} {track.tasks} {track.training} --save_name {name}"
    run("base", f"{fine_tuning} --task_idxes")
    run("all_tasks", f"{fine_tuning} --task_idxes all")
    for method in SELECTIONS:
        run(f"fine_tuning_{method}", f"{fine_tuning} --subset_file {subset_file(f'{name}_{method}')}")
    run("random_halves", f"{fine_tuning} --subset_file {halves}")
    subsets = {
        "base": [""],
        "all_tasks": [everything],
        "random_half": estimates["subset"].tolist()[:NUM_SHOWN_HALVES],
        **{m: [subset_text(read_subsets(subset_file(f"{name}_{m}"), num_tasks)[0])] for m in SELECTIONS},
    }
    summarise(track, name, subsets, estimates, run.seconds)
    cli.run_command(f"scripts/report.py {results_dir(name)}")


def summarise(
    track: Track, name: str, subsets: dict[str, list[str]], estimates: pd.DataFrame, seconds: dict[str, float]
) -> None:
    """The table, the summary and the figure of a quickstart."""
    truth = read_table(results_dir(name) / RESULTS_FILE).set_index("subset")
    metrics = {"test_loss": TEST_LOSS}
    if columns_of(truth, TEST_ACCURACY):
        metrics["test_accuracy"] = TEST_ACCURACY
    measured = {
        metric: {
            method: float(np.mean(mean_over_targets(truth.loc[texts], prefix, [track.target])))
            for method, texts in subsets.items()
        }
        for metric, prefix in metrics.items()
    }
    estimated = mean_over_targets(estimates, ESTIMATE, [track.target])
    fine_tuned = mean_over_targets(truth.loc[estimates["subset"]], VALIDATION_LOSS, [track.target])
    spearman = linear_datamodeling_score(estimated, fine_tuned)
    path = read_table(results_dir(name) / SELECTION_FILE)
    selected = subsets["forward_selection"][0]
    estimate = float(path.loc[path["subset"] == selected, "estimate"].iloc[0])
    value = float(truth.loc[[selected], f"{VALIDATION_LOSS}/{track.target}"].iloc[0])
    folder = results_dir(track.name)
    marked = {"forward selection": (estimate, value)}
    estimates_figure(estimated, fine_tuned, folder / ESTIMATES_FIGURE, selected=marked, target=track.target)
    shutil.copyfile(folder / ESTIMATES_FIGURE, results_dir(name) / ESTIMATES_FIGURE)  # for the run's page
    summary = {"seconds": seconds, "spearman": spearman, "selected_tasks": list(parse_subset(selected))}
    write_summary(folder / SUMMARY_FILE, {**measured, **summary})

    print(
        f"\n{'trained on':<28}{'tasks':>6}"
        + "".join(f"{metric.replace('_', ' '):>15}" for metric in metrics)
        + f"{'seconds':>10}"
    )
    for method, texts in subsets.items():
        tasks = np.mean([len(parse_subset(text)) for text in texts])
        label = method.replace("_", " ") + (f" (mean of {len(texts)})" if len(texts) > 1 else "")
        values = "".join(f"{measured[metric][method]:>15.3f}" for metric in metrics)
        print(f"{label:<28}{tasks:>6.0f}{values}{truth.loc[texts, 'seconds'].astype(float).mean():>10.1f}")
    print(
        f"\nSpearman of estimates and fine-tuned losses over {len(estimates)} random halves: {spearman:.2f}\n"
        f"Seconds by stage: {', '.join(f'{stage} {value:.0f}' for stage, value in seconds.items())}\n"
        f"Wrote {folder / SUMMARY_FILE} and {folder / ESTIMATES_FIGURE}. Next: your own data, as the README shows."
    )


if __name__ == "__main__":
    cli.run_stage(main, parse_args())
