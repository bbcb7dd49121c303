"""How exact the first order is on a pretrained model: at the base model, half-way through meta-training and at its end.

Outputs of validation rows at displaced weights against f(w*) + g.delta, by length of the displacement: in random directions,
and towards models that were really fine-tuned, from the base model, on random halves of the sources; of those at the model
itself too, which is as far as the method extrapolates. Everything is kept: a second run goes on where the first one ended.

    python scripts/benchmark_approximation.py --world real:flan,epochs=2,lr=1e-3,rows=16,target_rows=36 --model_key data/smollm2 \\
        --flan_file flan.jsonl --alpaca_file alpaca.pkl --batch_size 8 --keep docs/results/approximation_error.csv

Writes  results/benchmark_approximation/<world>/; with --keep also the world's rows of a table of all worlds
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from src import config, console
from src.artifacts import APPROXIMATION_FILE, model_dir, results_dir, tasks_label
from src.store import open_store
from src.subsets import draw_subsets
from src.tables import read_table, write_table

BENCHMARK_APPROXIMATION = "benchmark_approximation"
WHEN = {"base model": 0, "half-way": 0.5, "end": 1}
"""Where on the way of meta-training, as shares of its steps."""
MEASURE = "fast_estimate_eval_approximation_alpaca.py"
worlds = console.load_script("scripts/worlds.py")


def measure(world: Any, args: argparse.Namespace) -> pd.DataFrame:
    """Train, take gradients, fine-tune halves, measure at every checkpoint: a row for each displacement."""
    train, gradients, _ = world.scripts
    name = f"{world.folder.name}_way"
    if world.made_by:
        console.run_command(world.made_by)
    shares = " ".join(map(str, WHEN.values()))
    console.run_command(f"{train} {world.data} {world.training} --save_name {name} --checkpoint_at {shares}")
    console.run_command(f"{gradients} --save_name {name} --project_dim {args.project_dim}")
    typed = config.typed_flags(console.load_script(MEASURE).parse_args(["--save_name", name]))
    stored = open_store(config.from_store(config.CollectConfig, typed)[1], None, "stage 2")
    num_tasks = args.num_clusters if world.tasks else len(stored[0].manifest["tasks"])
    results, models = f"{BENCHMARK_APPROXIMATION}/{world.folder.name}", []
    for subset in draw_subsets(args.halves, num_tasks, 0.5, seed=0):
        ids = " ".join(map(str, subset))
        console.run_command(f"{train} --save_name {name} {world.tasks} --results_name {results} --task_idxes {ids}")
        models.append(str(model_dir(results_dir(results), tasks_label(subset, num_tasks), 0)))
    frames = []
    for part, when in zip(stored, WHEN, strict=True):  # in the order of training
        words = ["--save_name", name, "--load_model_dir", part.manifest["checkpoint_dir"]]
        words += ["--results_name", f"{results}/{args.seeds}_{args.halves}/{part.manifest['step']}"]
        words += ["--seed", *map(str, range(args.seeds)), "--toward", *models]
        file = results_dir(words[5]) / APPROXIMATION_FILE
        if not file.is_file():
            console.run_command(MEASURE, *words)
        frame = read_table(file).rename(columns={"scale": "distance"})
        protocol = {
            **worlds.protocol(world.name, args),
            "checkpoint": when,
            "rows": json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))["rows"],
        }
        for place, (column, value) in enumerate(protocol.items()):
            frame.insert(place, column, value)
        frames.append(frame)
    table = pd.concat(frames, ignore_index=True)
    table["command"] = f"python scripts/{Path(__file__).name} --world {world.name}"
    return table


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The script's flags."""
    parser = console.Parser(__doc__)
    worlds.add_flags(parser)
    group = parser.add_argument_group("directions")
    group.add_argument("--seeds", type=config.COUNT, default=2, help="random directions (default: 2)")
    group.add_argument("--halves", type=config.COUNT, default=3, help="random halves of the sources to fine-tune and "
                       "measure towards (default: 3)")  # fmt: skip
    group.add_argument("--keep", metavar="CSV", help="table of all worlds to put the rows into (default: none)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Every world; its table."""
    for name in args.world:
        world = worlds.parse_world(name, args)
        table = measure(world, args)
        file = results_dir(f"{BENCHMARK_APPROXIMATION}/{world.folder.name}") / "table.csv"
        write_table(file, table)
        if args.keep:
            worlds.keep(Path(args.keep), table)
        print(f"Wrote {file}{f' and {args.keep}' if args.keep else ''}.")


if __name__ == "__main__":
    console.run_stage(main, parse_args())
