"""Write a small world of real text: FLAN tasks and Alpaca skills of short rows, some with shuffled answers, and targets.

A benchmark of estimates on a pretrained model needs sources that differ, some that mislead, and targets that no source
holds. The first short rows of each named task are taken, so that the world is the same for everybody who has the files.

Reads   a FLAN jsonl (inputs, targets, _task_name) and a pickled Alpaca frame (skill, instruction, input, output)
Writes  <output_dir>/flan.jsonl (sources, in _task_name) and <output_dir>/target.jsonl (targets)

    python data/make_flan_world.py --flan_file flan.jsonl --alpaca_file alpaca.pkl --output_dir data/flan_world
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from src import config, console
from src.frames import read_pickle

calendar = console.load_script("data/make_calendar.py")

FLAN_SOURCES = (
    "common_gen_Example_prompt",
    "common_gen_sentence_to_concepts",
    "commonsense_qa_question_answering",
    "cosmos_qa_only_question_answer",
    "kilt_tasks_hotpotqa_straighforward_qa",
    "qasc_is_correct_1",
    "social_i_qa_Check_if_a_random_answer_is_valid_or_not",
    "social_i_qa_Generate_answer",
    "social_i_qa_Generate_the_question_from_the_answer",
)
SKILLS = ("classify", "name", "rewrite")
SHUFFLED = ("common_gen_Example_prompt", "kilt_tasks_hotpotqa_straighforward_qa", "social_i_qa_Generate_answer")
"""Sources that stand there a second time, each question with the answer to another."""
TARGETS = ("common_gen_Given_concepts_type_1", "kilt_tasks_hotpotqa_complex_question", "find")


def short_rows(flan: Path, alpaca: Path, max_characters: int) -> Iterator[tuple[str, str, str]]:
    """Task, prompt and answer of every row of at most so many characters, in the files' order."""
    frame = read_pickle(alpaca)
    if isinstance(frame, dict):
        raise ValueError(f"{alpaca} holds no rows, expected a frame of skill, instruction, input and output")
    rows = [json.loads(line) for line in flan.read_text(encoding="utf-8").splitlines() if line.strip()]
    texts = [(row["_task_name"], row["inputs"], row["targets"]) for row in rows]
    for row in frame.fillna("").to_dict("records"):
        prompt = "".join(f"{part}\n" for part in (row["instruction"], row["input"]) if part)
        texts.append((row["skill"], prompt, row["output"]))
    return (row for row in texts if len(row[1]) + len(row[2]) <= max_characters and row[2].strip())


def write_world(args: argparse.Namespace) -> tuple[int, int]:
    """Write both files; the numbers of sources and targets."""
    of_task: dict[str, list[tuple[str, str]]] = {}
    for task, prompt, answer in short_rows(Path(args.flan_file), Path(args.alpaca_file), args.max_characters):
        of_task.setdefault(task, []).append((prompt, answer))
    sources: dict[str, list[tuple[str, str]]] = {}
    for task in args.sources:
        rows = sources[task] = of_task.get(task, [])[: args.rows]
        if task in args.shuffled:
            sources[f"{task}_shuffled"] = calendar.shuffled(rows, args.seed)
    targets = {task: of_task.get(task, [])[: args.target_rows] for task in args.targets}
    for file, rows_of in (("flan.jsonl", sources), ("target.jsonl", targets)):
        for task, rows in rows_of.items():
            wanted = args.rows if rows_of is sources else args.target_rows
            if len(rows) < wanted:
                raise ValueError(
                    f"{task} has {len(rows)} rows of at most {args.max_characters} characters, {wanted} are needed; "
                    "pass fewer rows or more characters"
                )
        written = (
            {"inputs": prompt, "targets": answer, "_task_name": task}
            for task, rows in rows_of.items()
            for prompt, answer in rows
        )
        calendar.write_rows(Path(args.output_dir) / file, written)
    return len(sources), len(targets)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The script's flags."""
    parser = console.Parser(__doc__)
    group = parser.add_argument_group("world")
    group.add_argument("--flan_file", required=True, metavar="JSONL", help="FLAN rows (required)")
    group.add_argument("--alpaca_file", required=True, metavar="PKL", help="pickled Alpaca frame (required)")
    group.add_argument(
        "--output_dir", default="data/flan_world", metavar="FOLDER", help="where to (default: data/flan_world)"
    )
    for name, tasks, what in (
        ("sources", (*FLAN_SOURCES, *SKILLS), "tasks to train on"),
        ("shuffled", SHUFFLED, "those that stand there a second time, with answers shuffled"),
        ("targets", TARGETS, "tasks that no source holds"),
    ):
        group.add_argument(
            f"--{name}", nargs="*", default=tasks, metavar="TASK", help=f"{what} (default: {', '.join(tasks)})"
        )
    group.add_argument("--rows", type=config.COUNT, default=24, help="rows of each source (default: 24)")
    group.add_argument("--target_rows", type=config.COUNT, default=48, help="rows of each target (default: 48)")
    group.add_argument(
        "--max_characters", type=config.COUNT, default=220, help="longer rows are left out (default: 220)"
    )
    group.add_argument("--seed", type=int, default=0, help="of the shuffled answers (default: 0)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Write the world."""
    num_sources, num_targets = write_world(args)
    print(
        f"Wrote {args.output_dir}: {num_sources} sources of {args.rows} rows, {num_targets} targets of {args.target_rows}."
    )


if __name__ == "__main__":
    console.run_stage(main, parse_args())
