"""Where the chain-of-thought track's examples come from, and how a completion is judged.

Files, presets, templates and answer rules are those of the reasoning-teacher repository.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.data import SPLITS, Example, TaskData, require_file, stable_split, text_field
from src.paths import DATA, SAVED, shorten, write_json

TEACHER = "text-davinci-002"

_CotRow = tuple[str, str, int, str | None]
"""Split, task, index of the sample, reasoning."""


@dataclass(frozen=True)
class Preset:
    """What a preset key stands for."""

    key: str
    teacher_key: str | None  # completion key of the teacher's file; None: train on the bare answers
    num_completions: int  # completions asked for, of each sample
    template: str  # how rows are formatted and student completions are read: "ft_token" or "ft_cot_token"
    student_key: str  # completion key of the student's predictions
    finetune_key: str  # "{}" stands for the dataset key


def parse_preset(preset_key: str) -> Preset:
    """Look up `ft`, `ft_cot`, its other name `zs_cot`, or `ft_cot_t70_<k>aug`.

    Raises:
        ValueError: any other key.
    """
    if preset_key == "ft":
        return Preset(preset_key, None, 1, "ft_token", "ft", "{}")
    if preset_key in ("ft_cot", "zs_cot"):
        return Preset(preset_key, "zs_cot", 1, "ft_cot_token", "ft_cot", "zs_cot_{}")
    if match := re.fullmatch(r"ft_cot_t70_(1|2|4|8|16|32|64)aug", preset_key):
        finetune_key = f"zs_cot_t70_{{}}_{match[1]}aug"
        return Preset(preset_key, "zs_cot_t70", int(match[1]), "ft_cot_token", "ft_cot", finetune_key)
    raise ValueError(
        f"preset {preset_key!r} is unknown; expected ft, ft_cot, zs_cot or ft_cot_t70_<k>aug with k one of 1, 2, "
        "4, 8, 16, 32, 64 (presets for inference only have no training rows)"
    )


def _read_json(path: Path, cure: str, data_type: type | None = None, **metadata: str | None) -> dict[str, Any]:
    """A JSON object from a file: any, or one whose `data` are of a type and whose metadata hold these values."""
    try:
        content = json.loads(require_file(path, cure).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON in UTF-8 ({error}); {cure}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected an object; {cure}")
    if data_type:
        found = content.get("metadata")
        if not isinstance(found, dict) or not isinstance(content.get("data"), data_type):
            raise ValueError(f"{path} lacks metadata, or data that are a {data_type.__name__}; {cure}")
        if wrong := [key for key, expected in metadata.items() if found.get(key) != expected]:
            details = ", ".join(f"{key} {found.get(key)!r} (expected {metadata[key]!r})" for key in wrong)
            raise ValueError(f"{path}: the metadata say {details}; {cure}")
    return content


def _read_dataset(path: Path, dataset_key: str) -> list[dict]:
    """Records of a data set, stripped and with their `gold` answer and a `rationale` or None."""
    cure = "put the data set there, or name its folder with data_dir"
    data = _read_json(path, cure, list, dataset_key=dataset_key)["data"]
    for position, record in enumerate(data):
        where = f"{path}, data[{position}]"
        texts = {field: text_field(record, field, where).strip() for field in ("question", "answer")}
        if record.get("sample_index") != position:
            raise ValueError(f"{where}: sample_index is {record.get('sample_index')!r}, expected {position}")
        try:
            record |= texts | {"gold": str(clean_answer(dataset_key, texts["answer"]))}
        except ValueError as error:
            raise ValueError(
                f"{where}: the answer {texts['answer']!r} is not a number, as {dataset_key} has"
            ) from error
        record["rationale"] = (
            record.get("rationale") and text_field(record, "rationale", where, allow_empty=True).strip()
        )
    return data


def _read_split(path: Path, num_samples: int) -> dict[str, list[int]]:
    split = _read_json(path, "put the split there, or choose another with split_key")
    seen: set[int] = set()
    for side in ("train", "test"):
        if not isinstance(split.get(side), list):
            raise ValueError(f"{path} has no list {side!r}, expected the sample indices of train and of test")
        for index in split[side]:
            if type(index) is not int or not 0 <= index < num_samples or index in seen:
                raise ValueError(
                    f"{path}: {index!r} in {side} is no index of the data set (0 to {num_samples - 1}) or stands there twice"
                )
            seen.add(index)
    return split


def _read_teacher(
    path: Path, dataset: Sequence[Mapping], train: Sequence[int], **metadata: str | None
) -> tuple[dict[int, list[dict]], str | None]:
    """The teacher's completions by sample index, and the template that says how to read their answers."""
    cure = "put the teacher's completions of this data set there, or use preset ft, which needs none"
    content = _read_json(path, cure, dict, **metadata)
    for key, records in content["data"].items():
        if not (key.isdecimal() and int(key) < len(dataset) and isinstance(records, list)):
            raise ValueError(f"{path}: {key!r} in data is no index of the data set with a list; {cure}")
        for position, record in enumerate(records):
            where, sample = f"{path}, sample {key}, completion {position}", dataset[int(key)]
            for field in ("reasoning_completion", "completion", "question", "answer"):
                text = text_field(record, field, where, allow_empty=True).strip()
                if text != sample.get(field, text):
                    raise ValueError(
                        f"{where}: {field} is {shorten(text)!r}, the data set has {shorten(sample[field])!r}; {cure}"
                    )
    completions = {int(key): records for key, records in content["data"].items()}
    if absent := [index for index in train if index not in completions]:
        raise ValueError(
            f"{path} has no completions of {len(absent)} training samples, the first is {absent[0]}; {cure}, or choose "
            "a smaller split with split_key"
        )
    return completions, content["metadata"].get("prediction_template")


def _render(architecture: str, question: str, answer: str, reasoning: str | None) -> tuple[str, str]:
    """Prompt and completion by template `ft_cot_token`, without reasoning by `ft_token`."""
    label = answer if reasoning is None else f"{reasoning.strip()} --> {answer}"
    return (f"{question} ###", f" {label}") if architecture == "decoder" else (question, label)


def load_cot(
    dataset_key: str,
    preset_key: str,
    *,
    architecture: str,
    data_dir: str | Path = DATA,
    saved_dir: str | Path = SAVED,
    split_key: str = "default",
    keep_incorrect: bool = False,
    letters: str = "word",
    heldout_share: float = 0.1,
    max_heldout: int = 500,
    task_column: str | None = None,
) -> TaskData:
    """Chain-of-thought data in the reasoning-teacher formats.

    Training rows come first, in split order, then completion order. A part of the split's train questions, the same
    one for every preset, validates; the split's test questions test. A held-out question is one row, labelled with its
    first kept completion (test: completion 0 if correct), else the data set's rationale, else the bare answer.

    Args:
        architecture: "encoder_decoder" or "decoder"; decides the template.
        keep_incorrect: Train also on completions whose answer is wrong, as published.
        letters: How multiple-choice answers are read; see `extract_answers`.
        heldout_share: Share of the train questions that validates; 0 leaves the target without validation rows.
        max_heldout: Most validation questions.
        task_column: Field of the completion or the data-set record that names a training row's task, for example
            `teacher`; without it all training rows are one task, `dataset_key`.

    Raises:
        FileNotFoundError: the data set, split or completion file is missing.
        ValueError: an unknown key, a file that does not fit the others, or no training row left.
    """
    preset = parse_preset(preset_key)
    if dataset_key not in DATASET_KEYS or architecture not in ("encoder_decoder", "decoder"):
        raise ValueError(
            f"data set {dataset_key!r} for architecture {architecture!r}: expected one of {', '.join(DATASET_KEYS)} for "
            "encoder_decoder or decoder"
        )
    source = _Source.read(dataset_key, preset, Path(data_dir), Path(saved_dir), split_key, letters)
    questions = [source.dataset[index]["question"] for index in source.split["train"]]
    sides = stable_split(questions, heldout_share, max_heldout, test_share=0)
    indices = {side: [i for i, s in zip(source.split["train"], sides, strict=True) if s == side] for side in SPLITS}
    indices["test"] = source.split["test"]
    rows = source.training_rows(indices["train"], keep_incorrect, task_column)
    if not rows:
        raise ValueError(
            f"{source.path}: no training row is left of {len(questions)} train samples with preset {preset_key}"
        )
    num_train = len(rows)
    for side, count, any_answer in (("validation", preset.num_completions, keep_incorrect), ("test", 1, False)):
        rows += [(side, dataset_key, index, source.reasoning(index, count, any_answer)) for index in indices[side]]
    num_bare = sum(not reasoning for *_, reasoning in rows[num_train:])
    examples = []
    for position, (side, task, index, reasoning) in enumerate(rows):
        sample = source.dataset[index]
        texts = _render(architecture, sample["question"], sample["answer"], reasoning)
        examples.append(Example(position, task, side, *texts, record_index=index, answer=sample["gold"]))
    return TaskData(
        tuple(examples),
        source.notices(indices["train"], num_train, num_bare) if preset.teacher_key else (),
        answer_key=dataset_key,
        judge=_judge_of(dataset_key, preset.template, letters),
    )


@dataclass(frozen=True)
class _Source:
    """The files that a preset's rows come from.

    Attributes:
        dataset_key, preset, letters: As in `load_cot`.
        dataset: A record for each sample.
        split: "train" and "test" -> sample indices.
        path: The teacher's file, or the split's where there is none; for messages.
        completions: The teacher's, by sample index.
        template: How their answers are read.
    """

    dataset_key: str
    preset: Preset
    letters: str
    dataset: Sequence[Mapping]
    split: Mapping[str, list[int]]
    path: Path
    completions: Mapping[int, list[dict]]
    template: str | None

    @classmethod
    def read(
        cls, dataset_key: str, preset: Preset, data_dir: Path, saved_dir: Path, split_key: str, letters: str
    ) -> _Source:
        """Read the data set, its split and, where the preset has one, the teacher's completions."""
        dataset = _read_dataset(data_dir / "dataset" / f"{dataset_key}.json", dataset_key)
        path = data_dir / "split" / f"{dataset_key}__{split_key}.json"
        split = _read_split(path, len(dataset))
        if not preset.teacher_key:
            return cls(dataset_key, preset, letters, dataset, split, path, {}, None)
        path = saved_dir / "completion_data" / f"B_{TEACHER}__C_{preset.teacher_key}" / f"D_{dataset_key}.json"
        expected = {"base_model": TEACHER, "completion_key": preset.teacher_key, "dataset_key": dataset_key}
        completions, template = _read_teacher(path, dataset, split["train"], **expected, train_key=None, epoch=None)
        return cls(dataset_key, preset, letters, dataset, split, path, completions, template)

    def kept(self, index: int, count: int, any_answer: bool) -> list[dict]:
        """Those of a sample's first completions to learn from; for `ft` a single one without reasoning."""
        if not self.preset.teacher_key:
            return [{}]
        return [
            record
            for record in self.completions.get(index, [])[:count]
            if any_answer
            or judge(self.dataset_key, record["completion"], record["answer"], self.template, self.letters)["correct"]
        ]

    def training_rows(self, indices: Sequence[int], any_answer: bool, task_column: str | None) -> list[_CotRow]:
        """A row for each completion to learn from."""
        rows: list[_CotRow] = []
        for index in indices:
            for record in self.kept(index, self.preset.num_completions, any_answer):
                fields = {**self.dataset[index], **record, "dataset_key": self.dataset_key}
                task = text_field(fields, task_column or "dataset_key", f"{self.path}, sample {index}, task_column")
                rows.append(("train", task, index, record.get("reasoning_completion")))
        return rows

    def reasoning(self, index: int, count: int, any_answer: bool) -> str | None:
        """What a held-out sample is labelled with: its first kept completion, else the data set's rationale."""
        first, *_ = [*self.kept(index, count, any_answer), {"reasoning_completion": self.dataset[index]["rationale"]}]
        return first.get("reasoning_completion") or None

    def notices(self, train: Sequence[int], num_train: int, num_bare: int) -> tuple[str, ...]:
        """What is not there, and what was left out."""
        num_asked = self.preset.num_completions * len(train)
        num_there = sum(len(self.completions[index][: self.preset.num_completions]) for index in train)
        counted = (
            (num_asked - num_there, f"of {num_asked:,} completions that {self.preset.key} asks for are not there"),
            (num_there - num_train, f"of {num_there:,} completions are left out, as their answer is wrong"),
            (num_bare, "held-out rows have neither correct completion nor rationale; the label is the bare answer"),
        )
        return tuple(f"{self.path}: {number:,} {message}" for number, message in counted if number)


# --- chain-of-thought track: answers ------------------------------------------------------------------------

_CHOICES = {
    "commonsense_qa": "A-E",
    "aqua": "A-E",
    "date_understanding": "A-F",
    "tracking_shuffled_objects": "A-C",
}
_FLOATS = ("addsub", "svamp", "single_eq")
_NUMBERS = ("gsm8k", "multiarith", *_FLOATS)
_YES_NO = ("strategy_qa", "coin_flip")
DATASET_KEYS = (*_CHOICES, *_NUMBERS, *_YES_NO, "last_letter_concatenation")

# What stands between reasoning and answer, by template; None where the answer comes at once.
_MARKERS = {
    "ft_cot_token": "-->",
    "fs_cot": "The answer is",
    "ft_cot_natural": "Therefore, the answer is",
    **dict.fromkeys((None, "zs", "zs_cot", "ft_token", "ft_natural")),
}


def extract_answers(dataset_key: str, text: str, letters: str = "word") -> list[str | float]:
    """Candidate answers in a text, in order.

    Args:
        letters: For multiple choice, "published" takes every capital letter in range, also inside words; "word"
            only letters that stand alone, as `(B)` or `B.`. There an A that begins a sentence and is followed by a
            word in lower case is the article, so that a bare "A because ..." gives nothing.

    Raises:
        ValueError: unknown data set or letter rule.
    """
    if dataset_key not in DATASET_KEYS or letters not in ("word", "published"):
        raise ValueError(f"no rule to read answers of {dataset_key!r} with letters {letters!r}")
    if dataset_key in _YES_NO:
        return [word for word in re.sub(r"[\"'.\s:,]", " ", text.lower()).split(" ") if word in ("yes", "no")]
    if dataset_key in _NUMBERS:
        numbers = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
        return [float(number) for number in numbers] if dataset_key in _FLOATS else numbers
    if dataset_key == "last_letter_concatenation":
        rest = re.sub(r"[\"'.\s]", "", text)
        return [rest] if rest else []
    letter = f"[{_CHOICES[dataset_key]}]"
    if letters == "published":
        return re.findall(letter, text)
    text = re.sub(r"(^|[.!?\n])(\s*)A(?=\s+[a-z])", r"\1\2", text)
    return re.findall(rf"(?<![\w'\u2019&+.-]){letter}(?![\w'\u2019&+-]|\.\w)", text)


def clean_answer(dataset_key: str, answer: str) -> str | float:
    """The gold answer in the form of the candidates; cleaning twice changes nothing."""
    if dataset_key in _NUMBERS:
        answer = answer.replace(",", "")
        return float(answer) if dataset_key in _FLOATS else answer
    return answer.lower() if dataset_key == "strategy_qa" else answer


def _candidates(dataset_key: str, completion: str, template: str | None, letters: str) -> tuple[list, bool]:
    """Candidates after the template's marker, and whether the completion has the template's format."""
    if template not in _MARKERS:
        raise ValueError(f"template {template!r} is unknown; expected one of {', '.join(map(str, _MARKERS))}")
    marker = _MARKERS[template]
    has_format = marker is None or marker in completion
    text = completion.split(marker, 1)[1] if marker and has_format else completion
    return extract_answers(dataset_key, text, letters), has_format


def predict_answer(
    dataset_key: str, completion: str, template: str | None, letters: str = "word"
) -> str | float | None:
    """The first candidate, or the last one when the marker is missing; None without candidates."""
    candidates, has_format = _candidates(dataset_key, completion, template, letters)
    return candidates[0 if has_format else -1] if candidates else None


def judge(dataset_key: str, completion: str, gold: str, template: str | None, letters: str = "word") -> dict[str, bool]:
    """`correct`, `contains_answer` and `correct_format` of one completion.

    Args:
        gold: The gold answer, cleaned or not.
        template: The template the completion was made with; None for the teacher's short answers.
    """
    answer = clean_answer(dataset_key, gold)

    def equal(candidate: str | float | None) -> bool:
        if isinstance(candidate, float) and isinstance(answer, float):
            return abs(candidate - answer) <= 1e-6
        return candidate == answer

    candidates, has_format = _candidates(dataset_key, completion, template, letters)
    return {
        "correct": equal(predict_answer(dataset_key, completion, template, letters)),
        "contains_answer": any(map(equal, candidates)),
        "correct_format": has_format,
    }


def _judge_of(dataset_key: str, template: str, letters: str) -> Callable[[str, str], dict[str, bool]]:
    """`judge` for the completions of one training run: (completion, gold answer) -> properties."""
    return lambda completion, gold: judge(dataset_key, completion, gold, template, letters)


def summarize(judgements: Iterable[Mapping[str, bool]]) -> dict[str, float]:
    """Share of completions with each property: `accuracy`, `contains_answer`, `correct_format`; {} of none."""
    judgements = list(judgements)
    if not judgements:
        warnings.warn("no completions to summarize", stacklevel=2)
        return {}
    names = {"accuracy": "correct", "contains_answer": "contains_answer", "correct_format": "correct_format"}
    return {name: sum(j[key] for j in judgements) / len(judgements) for name, key in names.items()}


def save_predictions(
    path: str | Path,
    data: TaskData,
    completions: Mapping[int, str],
    *,
    base_model: str,
    preset_key: str,
    train_key: str | None = None,
    epoch: int | None = None,
    train_lora: bool = False,
    lora_rank: int | None = None,
) -> None:
    """Write a student's completions in the format of the completion files, atomically.

    Args:
        completions: Whole decoded output by sample index of `data`; the file is keyed by the data set's own index.
        base_model: The student's model key.

    Raises:
        ValueError: a sample index that is not one of a chain-of-thought example.
    """
    preset, records = parse_preset(preset_key), {}
    for sample_index, completion in sorted(completions.items()):
        example = data.examples[sample_index] if 0 <= sample_index < len(data) else None
        if example is None or example.record_index is None:
            raise ValueError(f"sample index {sample_index} is none of the {len(data)} chain-of-thought examples")
        record = {
            "sample_index": example.record_index,
            "completion_index": 0,
            "question": example.prompt.removesuffix(" ###"),
            "answer": example.completion.split(_MARKERS["ft_cot_token"])[-1].strip(),
            "prompt": example.prompt,
            "completion": completion,
        }
        records[str(example.record_index)] = [record]
    metadata = {
        "base_model": base_model,
        "dataset_key": data.answer_key,
        "completion_key": preset.student_key,
        "finetune_key": preset.finetune_key.format(data.answer_key),
        "train_key": train_key,
        "prediction_template": preset.template,
        "epoch": epoch,
        "train_lora": train_lora,
        "lora_rank": lora_rank,
    }
    write_json(Path(path), {"metadata": metadata, "data": records})
