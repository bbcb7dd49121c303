"""Run every stage on a small world: each command as a user would type it, then the results.

Each command is printed before it runs, and runs in this process to save the time of importing the libraries
again. What is trained already is not trained again, so a second run costs little.

    bash scripts/quickstart.sh            # instruction tuning
    bash scripts/quickstart.sh cot        # chain of thought
    bash scripts/quickstart.sh real       # a pretrained model (SmolLM2-135M-Instruct) and real data
    bash scripts/quickstart.sh --seed 1   # another world
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from src import console
from src.artifacts import DATA, ESTIMATES_FIGURE, SUMMARY_FILE, results_dir
from src.config import COUNT

choose = console.load_script("scripts/choose_sources.py")
TRAINING = {"epochs": 4, "lr": 2e-3, "batch_size": 16}


def world_folder(name: str, seed: int) -> Path:
    """Where a world is."""
    return DATA / (name if seed == 0 else f"{name}_seed_{seed}")


def instruction(args: argparse.Namespace, name: str) -> Any:
    """String skills as sources, some with wrong answers."""
    world = world_folder("synthetic", args.seed)
    data = {"data_files": (f"{world}/flan.jsonl",), "target_files": (f"{world}/target.jsonl",)}
    pipeline = choose.Pipeline(name, {**data, "model_key": f"{world}/model", "train_lora": True, **TRAINING})
    pipeline.run("make_synthetic", f"data/make_synthetic.py --seed {args.seed} --output_dir {world}", *args.world)
    return pipeline


def chain_of_thought(args: argparse.Namespace, name: str) -> Any:
    """Clusters of reasoned additions as sources."""
    world = world_folder("synthetic_cot", args.seed)
    data = {
        "dataset_key": "addsub",
        "preset_key": "ft_cot_t70_4aug",
        "data_dir": f"{world}/data",
        "saved_dir": f"{world}/saved",
    }
    generation = {"inference_batch_size": 128, "max_new_tokens": 40}
    pipeline = choose.Pipeline(
        name,
        {**data, "model_key": f"{world}/model", "train_lora": True, **TRAINING, **generation},
        tasks={"load_clusters": True, "num_clusters": 20},
        track="cot",
    )
    pipeline.run("make_synthetic", f"data/make_synthetic_cot.py --seed {args.seed} --output_dir {world}", *args.world)
    return pipeline


def real(args: argparse.Namespace, name: str) -> Any:
    """Languages as sources of dates, for a pretrained model that has to write them in another language."""
    world, model = world_folder("calendar", args.seed), DATA / "smollm2"
    data = {"data_files": (f"{world}/sources",), "target_files": (f"{world}/target/norwegian.jsonl",)}
    training = {"epochs": 3, "lr": 2e-3, "batch_size": 8, "max_length": 128, "checkpoint_at": (0.15,)}
    pipeline = choose.Pipeline(
        name,
        {**data, "model_key": str(model), "train_lora": True, **training},
        gradients={"max_tokens_per_batch": 1024},
    )
    pipeline.run("convert_model", f"data/convert_gguf.py smollm2 {model}")
    pipeline.run("make_world", f"data/make_calendar.py --seed {args.seed} --output_dir {world}", *args.world)
    return pipeline


WORLDS = {
    "instruction": ("quickstart", instruction, 12),
    "cot": ("quickstart_cot", chain_of_thought, 12),
    "real": ("quickstart_real", real, 8),
}
"""Track -> what its results are called, what makes its world and says how its stages are called, and how many halves."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The script's flags."""
    parser = console.Parser(__doc__, "[instruction|cot|real]")
    parser.add_argument("track", nargs="?", choices=tuple(WORLDS), default="instruction", help="instruction tuning, "
                        "chain of thought, or instruction tuning of a pretrained model (default: instruction)")  # fmt: skip
    group = parser.add_argument_group("world")
    group.add_argument("--seed", type=int, default=0, help="which world (default: 0)")
    group.add_argument("--num_halves", type=COUNT, help="random halves that are really "
                       "fine-tuned, at least 3 (default: 12; real 8)")  # fmt: skip
    group.add_argument("--world", nargs=argparse.REMAINDER, default=[], metavar="...", help="all that follows: flags of the "
                       "script that writes the world (default: none)")  # fmt: skip
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """The world, the stages, the table and the figure."""
    called, make, num_halves = WORLDS[args.track]
    name = f"{called}/seed_{args.seed}"
    pipeline = make(args, name)
    tasks = pipeline.select()
    subsets = pipeline.fine_tune(tasks, max(args.num_halves or num_halves, choose.FEWEST_HALVES))
    pipeline.summarise(tasks, subsets)
    for file in (SUMMARY_FILE, ESTIMATES_FIGURE):  # of the last world that was run
        shutil.copyfile(results_dir(name) / file, results_dir(called) / file)
    console.run_command(f"scripts/report.py {results_dir(name)}")
    print("", *pipeline.answer(tasks, subsets).lines, sep="\n")
    print("Next: your own data, with scripts/choose_sources.py or stage by stage, as the README shows.")


if __name__ == "__main__":
    console.run_stage(main, parse_args())
