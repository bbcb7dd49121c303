"""A small world in which choosing data sources matters: sources, a target and a base model, in the users' formats.

Every source teaches one skill, a way of rewriting a six-letter word, and a share of its answers may be wrong. The
target asks for a few of those skills. The base model has met every skill in text full of typing errors: it knows how
each is done and does not trust it. Clean rows of a skill teach it to; wrong rows spoil what it knows. Training on
everything is therefore little better than no training, and a good subset is much better than both.

Writes  <output_dir>/
    flan.jsonl                all sources in the FLAN layout: an object per row
    target.jsonl              the target's validation and test rows in the FLAN layout, with the field `_split`
    alpaca.pkl                all sources in the Alpaca layout: a frame with skill, text, instruction, input, output
    alpaca_dev_split_map.pkl  the frame's held-out rows: skill -> index labels
    model/                    the base model, a Hugging Face folder
    manifest.json             arguments, versions, sha256 of each file

    python data/make_synthetic.py
    python data/make_synthetic.py --seed 1 --num_tasks 30 --output_dir data/synthetic_30
    python data/make_synthetic.py --joined 4 --output_dir data/synthetic_joined     # answers of different lengths
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from src import config, console

base = console.load_script("data/make_base_model.py")

TARGET = "target"
LETTERS = string.ascii_lowercase
WORD_LENGTH = 6  # even, for skills that work on pairs and halves
HALF = WORD_LENGTH // 2
DEV_SHARE = 0.2  # of the rows of each skill in the Alpaca layout; the FLAN layout leaves the choice to its reader

CLEAN_SHARE = 0.6  # of the base model's pretraining comes before the typing errors
TYPO_SHARE = 0.8  # of the letters of a sloppy answer are replaced; below 1, so that one error does not give it away

IGNORED = -100  # label of a position that is no part of the loss (the convention of torch and transformers)

ALPACA_PROMPT = (  # of Stanford Alpaca, for rows that have an input
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{word}\n\n### Response:\n"
)


# --- the world: skills, sources, rows ------------------------------------------------------------------------


class Skill(NamedTuple):
    """A way of rewriting a word, and how it is asked for."""

    instruction: str
    rewrite: Callable[[str], str]


SKILLS = {
    "reverse": Skill("Reverse the word", lambda word: word[::-1]),
    "sort": Skill("Sort the letters", lambda word: "".join(sorted(word))),
    "rotate_left": Skill("Move the first letter to the end", lambda word: word[1:] + word[0]),
    "rotate_right": Skill("Move the last letter to the front", lambda word: word[-1] + word[:-1]),
    "shift": Skill("Replace each letter by the next", lambda word: word.translate(_cipher(LETTERS[1:] + "a"))),
    "unshift": Skill("Replace each letter by the one before", lambda word: word.translate(_cipher("z" + LETTERS[:-1]))),
    "upper_case": Skill("Write the word in capitals", str.upper),
    "star_vowels": Skill("Replace each vowel by a star", lambda word: word.translate(dict.fromkeys(b"aeiou", "*"))),
    "swap_ends": Skill("Swap the first and the last letter", lambda word: word[-1] + word[1:-1] + word[0]),
    "swap_pairs": Skill(
        "Swap the letters of each pair", lambda word: "".join(word[i + 1] + word[i] for i in range(0, WORD_LENGTH, 2))
    ),
    "swap_halves": Skill("Swap the two halves", lambda word: word[HALF:] + word[:HALF]),
    "interleave": Skill(
        "Interleave the two halves", lambda word: "".join(word[i] + word[i + HALF] for i in range(HALF))
    ),
    "first_half": Skill("Give the first half", lambda word: word[:HALF]),
    "odd_letters": Skill("Give every other letter", lambda word: word[::2]),
    "duplicate": Skill("Write the first half twice", lambda word: 2 * word[:HALF]),
    "mirror": Skill("Write the first half and its mirror image", lambda word: word[:HALF] + word[:HALF][::-1]),
}


def _cipher(alphabet: str) -> dict[int, int]:
    return str.maketrans(LETTERS, alphabet)


class Row(NamedTuple):
    """One question and its answer, right or wrong."""

    task: str
    instruction: str
    word: str
    answer: str

    @property
    def flan(self) -> dict[str, Any]:
        """The row in the FLAN layout. Readers put a line break between inputs that end without one and targets."""
        return {
            "inputs": f"{self.instruction}: {self.word}",
            "targets": self.answer,
            "_template_idx": 0,
            "_task_source": "Synthetic",
            "_task_name": self.task,
            "_template_type": "zs_noopt",
        }

    @property
    def alpaca(self) -> dict[str, str]:
        """The row in the Alpaca layout; `text` is what a model is trained on."""
        prompt = ALPACA_PROMPT.format(instruction=self.instruction, word=self.word)
        return {
            "skill": self.task,
            "text": prompt + self.answer,
            "instruction": self.instruction,
            "input": self.word,
            "output": self.answer,
        }


class Source(NamedTuple):
    """A task to choose or not: a skill, the share of its answers that are wrong, and how many words a row asks for."""

    name: str
    skill: str
    wrong_share: float
    words_per_row: int = 1


def plan_sources(
    rng: np.random.Generator, num_tasks: int, noise: Sequence[float], num_target_skills: int, joined: int = 1
) -> tuple[list[Source], list[str]]:
    """The sources, and the skills of the target.

    Skills are drawn at random, just as many as give each a source for every share in `noise`; the first of them make
    the target. `reverse_clean_a` and `reverse_noisy50_b` teach one skill, half of the second's answers being wrong.
    Every other source asks for `joined` words in a row.

    Raises:
        ValueError: too few or too many sources for the skills there are.
    """
    most = len(SKILLS) * len(LETTERS)
    if not num_target_skills <= num_tasks <= most or num_target_skills > len(SKILLS):
        raise ValueError(
            f"--num_tasks {num_tasks} with --num_target_skills {num_target_skills}: expected at least as many tasks as "
            f"target skills, at most {most} tasks and at most {len(SKILLS)} target skills"
        )
    num_skills = min(len(SKILLS), max(num_target_skills, math.ceil(num_tasks / len(noise))))
    skills = [str(name) for name in rng.permutation(list(SKILLS))[:num_skills]]
    sources = []
    for position in range(num_tasks):
        skill, copy = skills[position % num_skills], position // num_skills
        wrong_share = noise[copy % len(noise)]
        quality = f"noisy{100 * wrong_share:g}" if wrong_share else "clean"
        words_per_row = joined if (position % num_skills + copy) % 2 else 1
        size = f"_x{words_per_row}" if words_per_row > 1 else ""
        sources.append(Source(f"{skill}_{quality}_{LETTERS[copy]}{size}", skill, wrong_share, words_per_row))
    return sources, skills[:num_target_skills]


def random_letters(rng: np.random.Generator, count: int) -> str:
    """So many letters, each equally likely."""
    return "".join(LETTERS[i] for i in rng.integers(len(LETTERS), size=count))


def draw_words(rng: np.random.Generator, seen: set[str]) -> Iterator[str]:
    """Endless random words, none twice and none of `seen`, which grows."""
    while True:
        word = random_letters(rng, WORD_LENGTH)
        if word not in seen:
            seen.add(word)
            yield word


def misspell(rng: np.random.Generator, answer: str, share: float) -> str:
    """The answer with about this share of its letters replaced by random ones."""
    replaced = rng.random(len(answer)) < share
    letters = zip(random_letters(rng, len(answer)), answer, replaced, strict=True)
    return "".join(wrong if is_replaced else right for wrong, right, is_replaced in letters)


def source_rows(rng: np.random.Generator, source: Source, num_rows: int, words: Iterator[str]) -> list[Row]:
    """Rows of one source, wrong answers among them: random letters, as many as the right answer has."""
    instruction, rewrite = SKILLS[source.skill]
    rows = []
    for is_wrong in rng.permutation(num_rows) < round(source.wrong_share * num_rows):
        asked = [next(words) for _ in range(source.words_per_row)]
        answers = [misspell(rng, rewrite(word), 1.0) if is_wrong else rewrite(word) for word in asked]
        rows.append(Row(source.name, instruction, " ".join(asked), " ".join(answers)))
    return rows


def target_rows(skills: Sequence[str], num_rows: int, words: Iterator[str]) -> list[Row]:
    """Right answers to the target's skills in turn."""
    turns = [SKILLS[skills[position % len(skills)]] for position in range(num_rows)]
    return [
        Row(TARGET, instruction, word, rewrite(word))
        for (instruction, rewrite), word in zip(turns, words, strict=False)
    ]


# --- files ---------------------------------------------------------------------------------------------------


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """One JSON object per line, in UTF-8."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_alpaca(folder: Path, rows: Sequence[Row], rng: np.random.Generator) -> None:
    """The frame and its dev split map, pickled.

    Columns and names are plain Python strings in object arrays, which pandas and numpy of any recent version read.
    """
    frame = pd.DataFrame([row.alpaca for row in rows], dtype=object)
    frame.columns = pd.Index(list(frame.columns), dtype=object)
    dev_labels = {
        skill: np.sort(rng.choice(labels, max(1, round(DEV_SHARE * len(labels))), replace=False)).astype(np.int64)
        for skill, labels in sorted(frame.groupby("skill").indices.items())
    }
    for name, content in (("alpaca.pkl", frame), ("alpaca_dev_split_map.pkl", dev_labels)):
        (folder / name).write_bytes(pickle.dumps(content, protocol=4))


# --- base model ----------------------------------------------------------------------------------------------


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each printable character, and one for each fixed piece of the prompts, to keep rows short.

    Ends of text are not added: the pipeline appends </s> to what a model has to write.
    """
    characters = ["\n", *map(chr, range(32, 127))]
    vocabulary = {token: i for i, token in enumerate([*base.SPECIAL_TOKENS.values(), *characters])}
    backend = Tokenizer(models.BPE(vocabulary, merges=[], unk_token=base.SPECIAL_TOKENS["unk_token"]))
    backend.decoder = decoders.Fuse()
    before, between, after = (ALPACA_PROMPT.format(instruction="|", word="|")).split("|")
    pieces = [before, between, after, ": ", *(skill.instruction for skill in SKILLS.values())]
    backend.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
    return base.wrap_tokenizer(backend)


def pretraining_batches(
    tokenizer: PreTrainedTokenizerFast,
    rng: np.random.Generator,
    *,
    num_steps: int,
    batch_size: int,
    typo_rows: float,
    seen: set[str],
    joined: int = 1,
) -> Iterator[dict[str, torch.Tensor]]:
    """`num_steps` batches (B, T) of all skills in both layouts, on words not in `seen`; answers make the loss.

    The text is clean at first, so that every skill is learned; then it has typing errors in a share `typo_rows` of
    its answers, so that the skill is known and not trusted.
    """
    words, skills = draw_words(rng, seen), list(SKILLS.values())
    for step in range(num_steps):
        prompts, answers = [], []
        for i in rng.integers(len(skills), size=batch_size):
            asked = [next(words) for _ in range(joined if joined > 1 and rng.random() < 0.5 else 1)]
            answer = " ".join(map(skills[i].rewrite, asked))
            row = Row(TARGET, skills[i].instruction, " ".join(asked), answer)
            in_flan, has_typos = rng.random(2) < (0.5, typo_rows if step >= CLEAN_SHARE * num_steps else 0.0)
            prompts.append(f"{row.flan['inputs']}\n" if in_flan else row.alpaca["text"].removesuffix(row.answer))
            answers.append(misspell(rng, row.answer, TYPO_SHARE) if has_typos else row.answer)
        prompt_ids, answer_ids = tokenizer(prompts)["input_ids"], tokenizer(answers)["input_ids"]
        rows = [torch.tensor([*p, *a, tokenizer.eos_token_id]) for p, a in zip(prompt_ids, answer_ids, strict=True)]
        input_ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)  # (B, T)
        labels = pad_sequence(rows, batch_first=True, padding_value=IGNORED)
        for label_row, prompt in zip(labels, prompt_ids, strict=True):
            label_row[: len(prompt)] = IGNORED
        yield {"input_ids": input_ids, "labels": labels}  # padded at the end, where a causal model looks last: no mask


# --- command line --------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The script's flags."""
    parser = console.Parser(__doc__)
    base.add_output(parser, "data/synthetic")
    group = parser.add_argument_group("sources and target")
    group.add_argument("--num_tasks", type=config.COUNT, default=20, help="sources (default: 20)")
    group.add_argument("--rows_per_task", type=config.COUNT, default=80, help="rows of each source (default: 80)")
    group.add_argument("--noise", type=config.SHARE, nargs="+", default=[0.0, 0.5, 1.0], metavar="SHARE", help="shares of "
                       "wrong answers; the sources of a skill take one after the other (default: 0 0.5 1)")  # fmt: skip
    group.add_argument("--joined", type=config.COUNT, default=1, metavar="WORDS", help="every other source asks for so "
                       "many words in a row, so that answers differ in length (default: 1)")  # fmt: skip
    group.add_argument("--num_target_skills", type=config.COUNT, default=3, help="skills of the target (default: 3)")
    group.add_argument("--target_rows", type=config.COUNT, default=150, help="the target's rows for validation, and "
                       "again for test (default: 150)")  # fmt: skip
    base.add_base_model(parser, hidden_size=64, num_layers=3, num_heads=4, pretrain_steps=1500, batch_size=64, lr=3e-3)
    text = parser.add_argument_group("base model's text")
    text.add_argument("--typo_rows", type=config.SHARE, default=0.6, help="share of the base model's pretraining rows that "
                      "are full of typing errors; more make it less sure (default: 0.6)")  # fmt: skip
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Data, base model, folder."""
    if base.nothing_to_do(args):
        return
    data_rng, pretraining_rng = np.random.default_rng(args.seed).spawn(2)  # the data do not depend on the model
    sources, target_skills = plan_sources(data_rng, args.num_tasks, args.noise, args.num_target_skills, args.joined)
    seen: set[str] = set()
    words = draw_words(data_rng, seen)
    rows = [row for source in sources for row in source_rows(data_rng, source, args.rows_per_task, words)]
    rows = [rows[i] for i in data_rng.permutation(len(rows))]
    targets = [
        row.flan | {"_split": split}
        for split in ("validation", "test")
        for row in target_rows(target_skills, args.target_rows, words)
    ]
    tokenizer = character_tokenizer()
    model = base.build_model(args, "llama", len(tokenizer))
    with base.made_folder(args) as folder:
        write_jsonl(folder / "flan.jsonl", (row.flan for row in rows))
        write_jsonl(folder / "target.jsonl", targets)
        write_alpaca(folder, rows, data_rng)
        batches = pretraining_batches(
            tokenizer,
            pretraining_rng,
            num_steps=args.pretrain_steps,
            batch_size=args.pretrain_batch_size,
            typo_rows=args.typo_rows,
            seen=seen,
            joined=args.joined,
        )
        base.pretrain_and_save(model, tokenizer, batches, args, folder / "model")
    output_dir = Path(args.output_dir)
    print(
        f"Wrote {output_dir}: {len(sources)} sources with {len(rows):,} rows, a target made of "
        f"{', '.join(target_skills)}, and a base model of {model.num_parameters():,} parameters. Next:\n"
        f"python custom_train_alpaca.py --data_files {output_dir / 'flan.jsonl'} --target_files "
        f"{output_dir / 'target.jsonl'} --model_key {output_dir / 'model'} --train_lora"
    )


if __name__ == "__main__":
    console.run_stage(main, parse_args())
