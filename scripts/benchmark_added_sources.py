"""How well estimates rank subsets that hold sources which meta-training has not seen, on a world of the quickstart.

Some sources are left out of meta-training and of the first gradient pass, and added by a second one; the estimates of the
quickstart's random halves are judged against the fine-tuned losses that the quickstart has measured.

Reads   what `bash scripts/quickstart.sh --seed N` has written
Writes  a run of its own; one line of JSON

    python scripts/benchmark_added_sources.py --seed 2 --added 4
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from src import artifacts, config, console, tables
from src.evaluation import linear_datamodeling_score

TRAIN, COLLECT = "custom_train_alpaca.py", "fast_estimate_eval_approximation_alpaca.py"


def parse_args(argv: Sequence[str] | None = None) -> Any:
    """The script's flags."""
    parser = console.Parser(__doc__)
    group = parser.add_argument_group("world")
    group.add_argument("--seed", type=int, default=0, help="the quickstart's world (default: 0)")
    group.add_argument("--added", type=config.COUNT, default=4, metavar="N", help="sources to add later (default: 4)")
    return parser.parse_args(argv)


def main(args: Any) -> None:
    """Train on the others, add them, estimate, judge."""
    world = artifacts.DATA / ("synthetic" if args.seed == 0 else f"synthetic_seed_{args.seed}")
    known, name = f"quickstart/seed_{args.seed}", f"added_{args.seed}_{args.added}"
    lines = (world / "flan.jsonl").read_text(encoding="utf-8").splitlines()
    task_of = [json.loads(line)["_task_name"] for line in lines]
    tasks = sorted(set(task_of))
    late = set(np.random.default_rng(args.seed).choice(tasks, args.added, replace=False).tolist())
    files = [artifacts.BENCHMARK_DATA / name / f"{part}.jsonl" for part in ("early", "late")]
    for file, is_late in zip(files, (False, True), strict=True):
        kept = [line for line, task in zip(lines, task_of, strict=True) if (task in late) == is_late]
        with artifacts.atomic_write(file) as temporary:
            temporary.write_text("\n".join(kept) + "\n", encoding="utf-8")
    parent = json.loads(
        next(artifacts.META_INITIALIZATIONS.glob(f"*_{artifacts.slug(known)}_run_0/manifest.json")).read_text()
    )
    training = {flag: parent["config"][flag] for flag in ("epochs", "lr", "batch_size", "model_key", "train_lora")}
    targets = [str(world / "target.jsonl")]
    console.call(TRAIN, data_files=[str(files[0])], target_files=targets, **training, save_name=name,
                 stop_after_checkpoints=True)  # fmt: skip
    console.call(COLLECT, compute_pretrained_outputs=True, save_name=name)
    console.call(COLLECT, compute_pretrained_outputs=True, save_name=name, data_files=list(map(str, files)))
    halves = artifacts.subset_file(f"{known}_random_halves")
    console.call("fast_estimate_linear_regression_alpaca.py", save_name=name, sampled_tasks=str(halves))
    truth = tables.read_table(artifacts.results_dir(known) / artifacts.RESULTS_FILE, of_subsets=True)
    subsets, values = tables.fine_tuned_values(truth, tables.VALIDATION_LOSS, ["target"])
    scores = {}
    for what, results in (("all_seen", known), ("added_later", name)):
        found = tables.read_table(artifacts.results_dir(results) / artifacts.ESTIMATES_FILE, of_subsets=True)
        column = found.drop_duplicates("subset").set_index("subset")["estimate/target"]
        judged = [text in column.index and len(text.split()) == len(tasks) // 2 for text in subsets]
        estimates = column[[text for text, some in zip(subsets, judged, strict=True) if some]].to_numpy()
        scores[what] = round(linear_datamodeling_score(estimates, values[judged].mean(axis=(1, 2))), 3)
    print(json.dumps({"seed": args.seed, "added": sorted(late), **scores, "halves": int(sum(judged))}))


if __name__ == "__main__":
    console.run_stage(main, parse_args())
