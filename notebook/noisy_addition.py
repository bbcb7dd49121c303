"""Do random-ensemble scores tell clean samples from noisy ones? The paper's example: noisy addition.

300 additions with the right sum and 200 with a random one, each sample a task of its own; the target is right
additions that none of them contains. The stages run on a small causal model that the script pretrains on other
additions until it can add, and the scores of the two kinds are compared. The adapter sits on every linear layer: on
the attention's alone it can hardly fit wrong sums, and then gradients tell them less well from right ones. With a row for
a task, gradients late in training and a stronger ridge say more than the defaults, which are for sources of many rows.

Writes  data/noisy_addition_seed_<k>/, results/noisy_addition/noisy_addition.png; prints the AUC

    python notebook/noisy_addition.py
"""

# %% arguments and data
from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score

from src import config, console
from src.artifacts import DATA, SCORES_FILE, read_manifest, results_dir
from src.figures import BLUE, ORANGE, about_run, plt, save_figure, titled
from src.tables import read_table

NAME = "noisy_addition"
CLEAN, NOISY = "clean", "noisy"
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The script's flags."""
    parser = console.Parser(__doc__)
    group = parser.add_argument_group("samples and model")
    for flag, default, meaning in (
        ("--num_clean", 300, "samples with the right sum"),
        ("--num_noisy", 200, "samples with a random sum"),
        ("--pretrain_steps", 1500, "optimizer steps of the model's pretraining"),
    ):
        group.add_argument(flag, type=config.COUNT, default=default, help=f"{meaning} (default: {default})")
    group.add_argument(
        "--seed", type=int, default=0, help="seed of the additions and of the model's pretraining (default: 0)"
    )
    return parser.parse_args(argv)


def write_rows(path: Path, rows: Iterable[tuple[str, int, int, int]]) -> None:
    """Additions in the FLAN layout: (task, a, b, sum as told)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ({"inputs": f"{a} + {b} =", "targets": str(total), "_task_name": task} for task, a, b, total in rows)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_data(folder: Path, args: argparse.Namespace) -> None:
    """Samples, target and the additions to pretrain on, no pair twice."""
    rng = np.random.default_rng(args.seed)
    pairs = [divmod(int(code), 100) for code in rng.permutation(10_000)]
    wrong = iter(rng.integers(0, 199, size=args.num_noisy).tolist())
    clean, pairs = pairs[: args.num_clean], pairs[args.num_clean :]
    noisy, pairs = pairs[: args.num_noisy], pairs[args.num_noisy :]
    target, pairs = pairs[:2000], pairs[2000:]
    samples = [(f"{CLEAN}_{i:03d}", a, b, a + b) for i, (a, b) in enumerate(clean)]
    samples += [(f"{NOISY}_{i:03d}", a, b, next(wrong)) for i, (a, b) in enumerate(noisy)]
    write_rows(folder / "samples.jsonl", samples)
    write_rows(folder / "target.jsonl", [("target", a, b, a + b) for a, b in target])
    write_rows(folder / "pretraining.jsonl", [("addition", a, b, a + b) for a, b in pairs])


# %% the stages
def run(*command: str) -> None:
    """Print a command and run it."""
    print(f"\n$ python {' '.join(command)}", flush=True)
    subprocess.run([sys.executable, *command], check=True)


def main(args: argparse.Namespace) -> None:
    """Data, model, stages, figure."""
    folder, save = DATA / f"{NAME}_seed_{args.seed}", ("--results_name", NAME)
    write_data(folder, args)
    data = f"--data_files {folder}/samples.jsonl --target_files {folder}/target.jsonl --heldout_share 0".split()
    adapter = ("--model_key", f"{folder}/model", "--train_lora", "--lora_target_modules", *LINEAR_LAYERS)
    model = (*adapter, "--project_dim", "200")
    run(
        "data/make_base_model.py", "--data_files", f"{folder}/pretraining.jsonl", "--output_dir", f"{folder}/model",
        "--architecture", "llama", "--vocab_size", "260", "--pretrain_on", "completions", "--pretrain_steps", str(args.pretrain_steps),
        "--hidden_size", "64", "--num_layers", "2", "--num_heads", "4", "--pretrain_batch_size", "128", "--seed", str(args.seed),
    )  # fmt: skip
    run("custom_train_alpaca.py", *data, *adapter, "--lr", "3e-3", "--batch_size", "16", "--epochs", "6",
        "--checkpoint_at", "0.25", "0.5", "1.0")  # fmt: skip
    run("fast_estimate_eval_approximation_alpaca.py", "--compute_pretrained_outputs", *data, *model)
    subsets = ("--sampled_tasks", f"{folder}/subsets.txt", "--number_of_subsets", "4000")
    run("fast_estimate_linear_regression_alpaca.py", *data, *model, *subsets, *save, "--rho", "0.01")
    run("notebook/select_random_ensemble.py", str(results_dir(NAME)))

    # %% clean against noisy
    table = read_table(results_dir(NAME) / SCORES_FILE)
    is_noisy = table["name"].str.startswith(NOISY).to_numpy()
    scores = table["score"].to_numpy(float)
    auc = float(roc_auc_score(is_noisy, scores))
    figure = results_dir(NAME) / f"{NAME}.png"
    drawn, axes = plt.subplots(figsize=(5.6, 4.0))
    edges = np.histogram_bin_edges(scores, bins=40)
    for label, chosen, color in (("right sum", ~is_noisy, BLUE), ("random sum", is_noisy, ORANGE)):
        axes.hist(scores[chosen], bins=edges, color=color, alpha=0.6, label=f"{label} ({chosen.sum()})")
    axes.set(xlabel="mean estimated loss of the subsets with the sample (nats per token)", ylabel="samples")
    facts = read_manifest(results_dir(NAME), "stage 3")
    titled(axes, f"Noisy addition, AUC {auc:.3f}", about_run(facts, ", ".join(facts["targets"])))
    axes.legend()
    save_figure(drawn, figure)
    print(f"\nAUC of the scores, noisy against clean: {auc:.3f}\nWrote {figure}.")


if __name__ == "__main__":
    console.run_stage(main, parse_args())
