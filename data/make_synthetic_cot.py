"""A small chain-of-thought world in which choosing data matters: teachers, questions and a base model.

The questions are additions, and a rationale adds digit by digit, units first: `7+6+0=13, 4+8+1=13, 3+5+1=09 --> 933`.
Every teacher answers every question, always rightly, so that no filter on answers tells them apart; only the careful
one's reasoning supports the answer. The base model has learned to add and has then read much careless text: it can
carry and seldom does. Careful rows bring that back; rows of the other teachers teach steps that lead nowhere.

Writes, in the reasoning-teacher layout,  <output_dir>/
    data/dataset/addsub.json          the questions, with their answers and right rationales
    data/split/addsub__default.json   which of them train and which test
    saved/completion_data/B_text-davinci-002__C_zs_cot/D_addsub.json        the first teacher's completions
    saved/completion_data/B_text-davinci-002__C_zs_cot_t70/D_addsub.json    a completion of each teacher
    model/                            the base model, a Hugging Face folder
    manifest.json                     arguments, versions, sha256 of each file

    python data/make_synthetic_cot.py
    python data/make_synthetic_cot.py --teachers careful guesser --output_dir data/synthetic_cot_2
"""

from __future__ import annotations

import argparse
import string
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from src import config, console
from src.artifacts import write_json
from src.cot import TEACHER
from src.datamodule import IGNORED

base = console.load_script("data/make_base_model.py")

DATASET_KEY = "addsub"  # an existing key, as it decides how answers are read
NUM_DIGITS = 3  # of both numbers, always, so that all questions have the same length
TEST_SHARE = 0.25

CLEAN_SHARE = 0.75  # of the base model's pretraining comes before the careless text


# --- the world: questions and teachers -----------------------------------------------------------------------


class Question(NamedTuple):
    """Two numbers to add."""

    first: int
    second: int

    @property
    def text(self) -> str:
        """How it is asked."""
        return f"What is {self.first} + {self.second}?"

    @property
    def answer(self) -> str:
        """The sum."""
        return str(self.first + self.second)

    @property
    def columns(self) -> list[tuple[int, int]]:
        """Digits that stand above each other, units first."""
        return [(int(x), int(y)) for x, y in zip(reversed(str(self.first)), reversed(str(self.second)), strict=True)]


class Step(NamedTuple):
    """One column: two digits, a carry, and what they are said to make."""

    first: int
    second: int
    carry: int
    total: int


def add(question: Question, num_carried: int = NUM_DIGITS) -> list[Step]:
    """Column by column; only the first `num_carried` columns hand their carry on."""
    steps: list[Step] = []
    for position, (first, second) in enumerate(question.columns):
        carry = steps[-1].total // 10 if 0 < position <= num_carried else 0
        steps.append(Step(first, second, carry, first + second + carry))
    return steps


def rationale(steps: Sequence[Step]) -> str:
    """The steps as text. A carry or a ten that is zero is written too: what stands in one place is learned sooner."""
    return ", ".join(f"{first}+{second}+{carry}={total:02}" for first, second, carry, total in steps)


def conclusion(steps: Sequence[Step]) -> str:
    """The answer that the steps lead to: the last total, then the units of the others."""
    return "".join([str(steps[-1].total), *(str(step.total % 10) for step in reversed(steps[:-1]))])


def draw_questions(rng: np.random.Generator, seen: set[Question]) -> Iterator[Question]:
    """Endless random questions, none twice and none of `seen`, which grows."""
    while True:
        question = Question(*rng.integers(10 ** (NUM_DIGITS - 1), 10**NUM_DIGITS, size=2).tolist())
        if question not in seen:
            seen.add(question)
            yield question


def _guess(question: Question, rng: np.random.Generator) -> list[Step]:
    return [Step(first, second, 0, total) for first, second, total in rng.integers(10, size=(NUM_DIGITS, 3)).tolist()]


# How a teacher reasons about a question. The answer is right whatever the steps say.
TEACHERS: dict[str, Callable[[Question, np.random.Generator], list[Step]]] = {
    "careful": lambda question, rng: add(question),
    "hasty": lambda question, rng: add(question, num_carried=1),  # right where the tens make no carry
    "careless": lambda question, rng: add(question, num_carried=0),  # right where nothing is to carry
    "guesser": _guess,  # any digits
}


# --- files ---------------------------------------------------------------------------------------------------


def dataset_record(sample_index: int, question: Question) -> dict[str, Any]:
    """A question in the layout of `data/dataset`."""
    return {
        "sample_index": sample_index,
        "question": question.text,
        "answer": question.answer,
        "rationale": rationale(add(question)),
    }


def completion_records(
    sample_index: int, question: Question, teachers: Sequence[str], rng: np.random.Generator
) -> list[dict[str, Any]]:
    """A question's completions, one of each teacher, in the layout of `saved/completion_data`."""
    return [
        {
            "sample_index": sample_index,
            "completion_index": completion_index,
            "question": question.text,
            "answer": question.answer,
            "reasoning_completion": f" {rationale(TEACHERS[teacher](question, rng))}",
            "completion": f" {question.answer}.",
            "teacher": teacher,
        }
        for completion_index, teacher in enumerate(teachers)
    ]


def write_world(folder: Path, questions: Sequence[Question], teachers: Sequence[str], rng: np.random.Generator) -> None:
    """Data set, split, and the completions of both keys."""
    records = [dataset_record(i, question) for i, question in enumerate(questions)]
    write_json(
        folder / "data" / "dataset" / f"{DATASET_KEY}.json", {"metadata": {"dataset_key": DATASET_KEY}, "data": records}
    )
    order = rng.permutation(len(questions)).tolist()
    num_test = round(TEST_SHARE * len(questions))
    split = {"train": sorted(order[num_test:]), "test": sorted(order[:num_test])}
    write_json(folder / "data" / "split" / f"{DATASET_KEY}__default.json", split)
    completions = [completion_records(i, question, teachers, rng) for i, question in enumerate(questions)]
    for completion_key, count in (("zs_cot", 1), ("zs_cot_t70", len(teachers))):
        metadata = {
            "base_model": TEACHER,
            "dataset_key": DATASET_KEY,
            "completion_key": completion_key,
            **dict.fromkeys(("finetune_key", "train_key", "prediction_template", "epoch")),
        }
        path = folder / "saved" / "completion_data" / f"B_{TEACHER}__C_{completion_key}" / f"D_{DATASET_KEY}.json"
        write_json(path, {"metadata": metadata, "data": {str(i): c[:count] for i, c in enumerate(completions)}})


# --- base model ----------------------------------------------------------------------------------------------


def arithmetic_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each digit and printable character, and one for each fixed piece of the text, to keep rows short.

    Encoded texts end with </s>, as those of T5 tokenizers do.
    """
    pieces, characters = ["What is ", " + ", " --> ", ", "], sorted(set(string.printable) - set("\r\x0b\x0c"))
    vocabulary = {token: i for i, token in enumerate([*base.SPECIAL_TOKENS.values(), *characters, *pieces])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=base.SPECIAL_TOKENS["unk_token"]))
    pattern = "|".join([*(piece.replace("+", r"\+") for piece in pieces), r"[\s\S]"])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    backend.decoder = decoders.Fuse()
    eos = base.SPECIAL_TOKENS["eos_token"]
    backend.post_processor = processors.TemplateProcessing(single=f"$A {eos}", special_tokens=[(eos, vocabulary[eos])])
    return base.wrap_tokenizer(backend)


def pretraining_batches(
    tokenizer: PreTrainedTokenizerFast,
    rng: np.random.Generator,
    *,
    careless_rows: float,
    seen: set[Question],
    num_steps: int,
    batch_size: int,
) -> Iterator[dict[str, torch.Tensor]]:
    """`num_steps` batches of additions that are not in `seen`: `input_ids` (B, T), `labels` (B, target's T).

    At first all carry; then a share `careless_rows` forgets to, and concludes what its steps lead to.
    """
    questions = draw_questions(rng, seen)
    for step in range(num_steps):
        careless_share = careless_rows if step >= CLEAN_SHARE * num_steps else 0.0
        prompts, labels = [], []
        for is_careless in rng.random(batch_size) < careless_share:
            question = next(questions)
            steps = add(question, num_carried=0 if is_careless else NUM_DIGITS)
            prompts.append(question.text)
            labels.append(f"{rationale(steps)} --> {conclusion(steps)}")
        rows = [torch.tensor(row) for row in tokenizer(labels)["input_ids"]]
        yield {
            "input_ids": torch.tensor(tokenizer(prompts)["input_ids"]),  # all of one length: no mask
            "labels": pad_sequence(rows, batch_first=True, padding_value=IGNORED),
        }


# --- command line --------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The script's flags."""
    parser = console.Parser(__doc__)
    base.add_output(parser, "data/synthetic_cot")
    group = parser.add_argument_group("questions and teachers")
    group.add_argument("--num_questions", type=config.COUNT, default=400, help="additions, a quarter of them for "
                       "test (default: 400)")  # fmt: skip
    group.add_argument("--teachers", nargs="+", choices=TEACHERS, default=list(TEACHERS), help="who completes each "
                       "question, in this order; held-out questions are labelled by the first (default: all)")  # fmt: skip
    base.add_base_model(parser, hidden_size=64, num_layers=2, num_heads=4, pretrain_steps=1400, batch_size=64, lr=5e-3)
    text = parser.add_argument_group("base model's text")
    text.add_argument("--careless_rows", type=config.SHARE, default=0.9, help="share of the base model's later pretraining "
                      "rows that forget to carry (default: 0.9)")  # fmt: skip
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Data, base model, folder."""
    if base.nothing_to_do(args):
        return
    data_rng, pretraining_rng = np.random.default_rng(args.seed).spawn(2)  # the data do not depend on the model
    seen: set[Question] = set()
    questions = list(islice(draw_questions(data_rng, seen), args.num_questions))
    tokenizer = arithmetic_tokenizer()
    model = base.build_model(args, "t5", len(tokenizer))
    with base.made_folder(args) as folder:
        write_world(folder, questions, args.teachers, data_rng)
        batches = pretraining_batches(
            tokenizer,
            pretraining_rng,
            num_steps=args.pretrain_steps,
            batch_size=args.pretrain_batch_size,
            careless_rows=args.careless_rows,
            seen=seen,
        )
        base.pretrain_and_save(model, tokenizer, batches, args, folder / "model")
    output_dir = Path(args.output_dir)
    num_completions = 1 << (len(args.teachers) - 1).bit_length()  # presets know powers of two only
    print(
        f"Wrote {output_dir}: {len(questions):,} questions with a completion of each of {', '.join(args.teachers)}, and a "
        f"base model of {model.num_parameters():,} parameters. Next:\n"
        f"python custom_train.py --data_dir {output_dir / 'data'} --saved_dir {output_dir / 'saved'} --dataset_key "
        f"{DATASET_KEY} --preset_key ft_cot_t70_{num_completions}aug --model_key {output_dir / 'model'} --train_lora"
    )


if __name__ == "__main__":
    console.run_stage(main, parse_args())
