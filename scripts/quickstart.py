"""The main job on the embedded default, stage by stage: the commands a user would type, then what came of them.

Each command is printed before it runs, and runs in this process to save the time of importing the libraries
again. Stages that find their artifact there already do nothing, so a second run costs little.

    bash scripts/quickstart.sh            # instruction track
    bash scripts/quickstart.sh --seed 1   # another world
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from src import cli
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
    TEST_LOSS,
    VALIDATION_LOSS,
    estimates_figure,
    linear_datamodeling_score,
    mean_over_targets,
    parse_subset,
    read_table,
    subset_text,
    write_summary,
)
from src.subsets import read_subsets

ROOT = Path(__file__).resolve().parents[1]
TARGET = "target"
NUM_SHOWN_HALVES = 3
"""Random halves whose mean test loss the table shows; the correlation is over all that are fine-tuned."""


class Stages:
    """Runs stage scripts and keeps their seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, stage: str, script: str, *arguments: str) -> None:
        """Print a command, then run it."""
        print(f"\n\033[1m$ {shlex.join(['python', script, *arguments])}\033[0m", flush=True)
        spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses of the script look themselves up here
        spec.loader.exec_module(module)
        started = time.perf_counter()
        cli.run_stage(module.main, module.parse_args(list(arguments)))
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - started, 2)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The script's flags; what it does not know goes to data/make_synthetic.py."""
    parser = cli.parser(__doc__)
    parser.add_argument("--seed", type=int, default=0, help="which synthetic world (default: 0)")
    parser.add_argument("--num_halves", type=cli.positive_int, default=12, help="random halves that are really "
                        "fine-tuned, at least 3 (default: 12)")  # fmt: skip
    parser.add_argument("--world", nargs=argparse.REMAINDER, default=[], help="further flags of data/make_synthetic.py")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Run the stages, then show the table and the figure."""
    run = Stages()
    world = DATA / ("synthetic" if args.seed == 0 else f"synthetic_seed_{args.seed}")
    name = f"quickstart/seed_{args.seed}"
    data = ["--data_files", f"{world}/flan.jsonl", "--target_files", f"{world}/target.jsonl"]
    model = ["--model_key", f"{world}/model", "--train_lora"]
    training = ["--epochs", "4", "--lr", "2e-3", "--batch_size", "16"]
    run(
        "make_synthetic",
        "data/make_synthetic.py",
        "--seed",
        str(args.seed),
        "--output_dir",
        str(world),
        *args.world,
    )
    run("meta_training", "custom_train_alpaca.py", *data, *model, *training)
    run(
        "gradients",
        "fast_estimate_eval_approximation_alpaca.py",
        "--compute_pretrained_outputs",
        *data,
        *model,
    )
    halves = subset_file(f"{name}_random_halves")
    estimation = ["fast_estimate_linear_regression_alpaca.py", *data, *model]
    run("estimation", *estimation, "--save_name", name, "--sampled_tasks", str(subset_file(name)))
    run("forward_selection", "fast_estimate_forward_selection.py", *data, *model, "--save_name", name)
    run("random_ensemble", "notebook/select_random_ensemble.py", str(results_dir(name)))
    run(
        "estimation", *estimation, "--save_name", f"{name}_random_halves", "--sampled_tasks", str(halves),
        "--number_of_subsets", str(max(args.num_halves, NUM_SHOWN_HALVES)),
    )  # fmt: skip

    estimates = read_table(results_dir(f"{name}_random_halves") / ESTIMATES_FILE)
    num_tasks = len(read_table(results_dir(name) / SCORES_FILE))
    fine_tuning = ["custom_train_alpaca.py", *data, *model, *training, "--save_name", name]
    chosen = {method: subset_file(f"{name}_{method}") for method in ("random_ensemble", "forward_selection")}
    run("base", *fine_tuning, "--task_idxes")
    run("all_tasks", *fine_tuning, "--task_idxes", *map(str, range(num_tasks)))
    for method, path in chosen.items():
        run(f"fine_tuning_{method}", *fine_tuning, "--subset_file", str(path))
    run("random_halves", *fine_tuning, "--subset_file", str(halves))

    subsets: dict[str, list[str]] = {
        "base": [""],
        "all_tasks": [subset_text(range(num_tasks))],
        "random_half": estimates["subset"].tolist()[:NUM_SHOWN_HALVES],
        **{method: [subset_text(read_subsets(path, num_tasks)[0])] for method, path in chosen.items()},
    }
    summarise(name, subsets, estimates, run.seconds)


def summarise(name: str, subsets: dict[str, list[str]], estimates: pd.DataFrame, seconds: dict[str, float]) -> None:
    """The table, the summary and the figure of a quickstart."""
    truth = read_table(results_dir(name) / RESULTS_FILE).set_index("subset")
    test_loss = {
        method: float(np.mean(mean_over_targets(truth.loc[texts], TEST_LOSS, [TARGET])))
        for method, texts in subsets.items()
    }
    estimated = mean_over_targets(estimates, ESTIMATE, [TARGET])
    fine_tuned = mean_over_targets(truth.loc[estimates["subset"]], VALIDATION_LOSS, [TARGET])
    spearman = linear_datamodeling_score(estimated, fine_tuned)
    path = read_table(results_dir(name) / SELECTION_FILE)
    selected = subsets["forward_selection"][0]
    estimate = float(path.loc[path["subset"].map(lambda text: text == selected), "estimate"].iloc[0])
    value = float(truth.loc[[selected], f"{VALIDATION_LOSS}/{TARGET}"].iloc[0])
    folder = results_dir("quickstart")
    estimates_figure(
        estimated,
        fine_tuned,
        folder / ESTIMATES_FIGURE,
        selected={"forward selection": (estimate, value)},
        target=TARGET,
    )
    write_summary(
        folder / SUMMARY_FILE,
        {
            "test_loss": test_loss,
            "seconds": seconds,
            "spearman": spearman,
            "selected_tasks": list(parse_subset(selected)),
        },
    )
    fine_tuning_seconds = {
        method: float(truth.loc[texts, "seconds"].astype(float).mean()) for method, texts in subsets.items()
    }
    print(f"\n{'trained on':<24}{'tasks':>6}{'test loss':>12}{'seconds':>10}")
    for method, texts in subsets.items():
        tasks = np.mean([len(parse_subset(text)) for text in texts])
        label = method.replace("_", " ") + (f" (mean of {len(texts)})" if len(texts) > 1 else "")
        print(f"{label:<24}{tasks:>6.0f}{test_loss[method]:>12.3f}{fine_tuning_seconds[method]:>10.1f}")
    print(
        f"\nSpearman of estimates and fine-tuned losses over {len(estimates)} random halves: {spearman:.2f}\n"
        f"Seconds by stage: {', '.join(f'{stage} {value:.0f}' for stage, value in seconds.items())}\n"
        f"Wrote {folder / SUMMARY_FILE} and {folder / ESTIMATES_FIGURE}. Next: your own data, as the README shows."
    )


if __name__ == "__main__":
    main(parse_args())
