"""Chain-of-thought data in the formats of the reasoning-teacher repository, and its rules for judging completions."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.artifacts import DATA, SAVED, shorten, write_json
from src.data import SPLITS, Example, TaskData, require_file, stable_split, text_field, unchanged

TEACHER = "text-davinci-002"


@dataclass(frozen=True)
class Preset:
    """The meaning of a preset key."""

    teacher_key: str | None  # completion key of the teacher's file; None: train on the bare answers
    num_completions: int  # completions asked for, of each sample
    template: str  # how rows are formatted and student completions are read: "ft_token" or "ft_cot_token"
    student_key: str  # completion key of the student's predictions
    finetune_key: str  # "{}" stands for the dataset key


def parse_preset(preset_key: str) -> Preset:
    """Look up `ft`, `ft_cot`, its other name `zs_cot`, or `ft_cot_t70_<k>aug`; raises ValueError for any other key."""
    if preset_key == "ft":
        return Preset(None, 1, "ft_token", "ft", "{}")
    if preset_key in ("ft_cot", "zs_cot"):
        return Preset("zs_cot", 1, "ft_cot_token", "ft_cot", "zs_cot_{}")
    if match := re.fullmatch(r"ft_cot_t70_(1|2|4|8|16|32|64)aug", preset_key):
        finetune_key = f"zs_cot_t70_{{}}_{match[1]}aug"
        return Preset("zs_cot_t70", int(match[1]), "ft_cot_token", "ft_cot", finetune_key)
    raise ValueError(
        f"preset {preset_key!r}: expected ft, ft_cot, zs_cot or ft_cot_t70_<k>aug, k = 1, 2, 4, 8, 16, 32, 64"
    )


def _read_json(path: Path, cure: str, data_type: type | None = None, **metadata: str | None) -> dict[str, Any]:
    """A JSON object from a file: any, or one whose `data` are of a type and whose metadata hold these values."""
    try:
        with unchanged(require_file(path, cure)):
            content = json.loads(path.read_text(encoding="utf-8"))
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
            gold = str(clean_answer(dataset_key, texts["answer"]))
        except ValueError as error:
            raise ValueError(f"{where}: the answer {texts['answer']!r} is not a number, as in {dataset_key}") from error
        rationale = record.get("rationale") and text_field(record, "rationale", where, allow_empty=True).strip()
        record |= {**texts, "gold": gold, "rationale": rationale}
    return data


def _read_split(path: Path, num_samples: int) -> dict[str, list[int]]:
    """Sample indices of "train" and "test", each at most once."""
    split = _read_json(path, "put the split there, or choose another with split_key")
    seen: set[int] = set()
    for side in ("train", "test"):
        if not isinstance(split.get(side), list):
            raise ValueError(f"{path} has no list {side!r}, expected the sample indices of train and of test")
        for index in split[side]:
            if type(index) is not int or not 0 <= index < num_samples or index in seen:
                where = f"no index of the data set (0 to {num_samples - 1}) or stands there twice"
                raise ValueError(f"{path}: {index!r} in {side} is {where}")
            seen.add(index)
    return split


def _read_teacher(
    path: Path, dataset: Sequence[Mapping], train: Sequence[int], **metadata: str
) -> tuple[dict[int, list[dict]], str | None]:
    """The teacher's completions by sample index, and the template that says how to read their answers."""
    cure = "put the teacher's completions of this data set there, or use preset ft, which needs none"
    content = _read_json(path, cure, dict, base_model=TEACHER, train_key=None, epoch=None, **metadata)
    for key, records in content["data"].items():
        if not (key.isdecimal() and int(key) < len(dataset) and isinstance(records, list)):
            raise ValueError(f"{path}: {key!r} in data is no index of the data set with a list; {cure}")
        for position, record in enumerate(records):
            where, sample = f"{path}, sample {key}, completion {position}", dataset[int(key)]
            for field in ("reasoning_completion", "completion", "question", "answer"):
                text = text_field(record, field, where, allow_empty=True).strip()
                if text != sample.get(field, text):
                    found, right = shorten(text), shorten(sample[field])
                    raise ValueError(f"{where}: {field} is {found!r}, the data set has {right!r}; {cure}")
    completions = {int(key): records for key, records in content["data"].items()}
    if absent := [index for index in train if index not in completions]:
        raise ValueError(
            f"{path} has no completions of {len(absent)} training samples, the first is {absent[0]}; {cure}, or choose "
            "a smaller split with split_key"
        )
    return completions, content["metadata"].get("prediction_template")


def load_cot(
    dataset_key: str, preset_key: str, *, architecture: str, data_dir: str | Path = DATA, saved_dir: str | Path = SAVED,
    split_key: str = "default", keep_incorrect: bool = False, heldout_share: float = 0.1, max_heldout: int = 500,
    task_column: str | None = None,
) -> TaskData:  # fmt: skip
    """The examples of a data set and a preset.

    Training rows come first, in split order, then completion order. A part of the split's train questions, the same
    one for every preset, validates; the split's test questions test. A held-out question is one row, labelled with its
    first kept completion (test: completion 0 if correct), else the data set's rationale, else the bare answer.

    Args:
        architecture: "encoder_decoder" or "decoder"; decides the template.
        keep_incorrect: Train also on completions whose answer is wrong, as published.
        heldout_share: Share of the train questions that validates, at most `max_heldout` of them; 0 for none.
        task_column: Field of the completion or the data-set record that names a training row's task, for example
            `teacher`; without it all training rows are one task, `dataset_key`.

    FileNotFoundError: the data set, split or completion file is missing. ValueError: an unknown key, a file that does not
    fit the others, or no training row left.
    """
    preset = parse_preset(preset_key)
    if dataset_key not in DATASET_KEYS:
        raise ValueError(f"data set {dataset_key!r}: expected one of {', '.join(DATASET_KEYS)}")
    path = Path(data_dir) / "split" / f"{dataset_key}__{split_key}.json"
    dataset = _read_dataset(Path(data_dir) / "dataset" / f"{dataset_key}.json", dataset_key)
    split = _read_split(path, len(dataset))
    completions: dict[int, list[dict]] = {}
    template = None
    if teacher_key := preset.teacher_key:
        path = Path(saved_dir) / "completion_data" / f"B_{TEACHER}__C_{teacher_key}" / f"D_{dataset_key}.json"
        made_for = {"completion_key": teacher_key, "dataset_key": dataset_key}
        completions, template = _read_teacher(path, dataset, split["train"], **made_for)
    sides = stable_split([dataset[i]["question"] for i in split["train"]], heldout_share, max_heldout, test_share=0)
    side_of = dict(zip(split["train"], sides, strict=True)) | dict.fromkeys(split["test"], "test")
    examples: list[Example] = []
    num_bare = num_there = 0
    for index in sorted(side_of, key=lambda index: SPLITS.index(side_of[index])):  # else as the split has them
        side, sample = side_of[index], dataset[index]
        count = 1 if side == "test" else preset.num_completions
        records = completions.get(index, [])[:count] if teacher_key else [{}]
        num_there += len(records) * (side == "train")
        if teacher_key and (side == "test" or not keep_incorrect):
            records = [r for r in records if judge(dataset_key, r["completion"], r["answer"], template)["correct"]]
        if side != "train":
            records = [*records, {"reasoning_completion": sample["rationale"]}][:1]
        for record in records:
            column = task_column if task_column and side == "train" else "dataset_key"
            fields = {**sample, **record, "dataset_key": dataset_key}
            task = text_field(fields, column, f"{path}, sample {index}, task_column")
            prompt, label, reasoning = sample["question"], sample["answer"], record.get("reasoning_completion")
            if reasoning or (side == "train" and reasoning is not None):
                label = f"{reasoning.strip()} --> {label}"
            else:
                num_bare += side != "train"
            if architecture == "decoder":
                prompt, label = f"{prompt} ###", f" {label}"
            examples.append(Example(len(examples), task, side, prompt, label, index, sample["gold"]))
    num_samples = sides.count("train")
    if not (num_train := sum(example.split == "train" for example in examples)):
        raise ValueError(f"{path}: no training row is left of {num_samples} train samples with preset {preset_key}")
    num_asked = preset.num_completions * num_samples
    notices = (
        (num_asked - num_there, f"of {num_asked:,} completions that {preset_key} asks for are not there"),
        (num_there - num_train, f"of {num_there:,} completions are left out, as their answer is wrong"),
        (num_bare, "held-out rows have neither correct completion nor rationale; the label is the bare answer"),
    )
    return TaskData(
        tuple(examples),
        tuple(f"{path}: {number:,} {text}" for number, text in notices if number and teacher_key),
        answer_key=dataset_key,
        judge=lambda completion, gold: judge(dataset_key, completion, gold, preset.template),
    )


_CHOICES = {"commonsense_qa": "A-E", "aqua": "A-E", "date_understanding": "A-F", "tracking_shuffled_objects": "A-C"}
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


def extract_answers(dataset_key: str, text: str) -> list:
    """Candidate answers in a text, in order: floats where the data set's answers are, else strings.

    Letters of multiple choice stand alone, as `(B)` or `B.`. An A that begins a sentence and is followed by a word in
    lower case is the article, so that a bare "A because ..." gives nothing.
    """
    if dataset_key in _YES_NO:
        return [word for word in re.sub(r"[\"'.\s:,]", " ", text.lower()).split(" ") if word in ("yes", "no")]
    if dataset_key in _NUMBERS:
        numbers = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
        return [float(number) for number in numbers] if dataset_key in _FLOATS else numbers
    if dataset_key == "last_letter_concatenation":
        rest = re.sub(r"[\"'.\s]", "", text)
        return [rest] if rest else []
    text = re.sub(r"(^|[.!?\n])(\s*)A(?=\s+[a-z])", r"\1\2", text)
    return re.findall(rf"(?<![\w'\u2019&+.-])[{_CHOICES[dataset_key]}](?![\w'\u2019&+-]|\.\w)", text)


def clean_answer(dataset_key: str, answer: str) -> str | float:
    """The gold answer in the form of the candidates; cleaning twice changes nothing."""
    if dataset_key in _NUMBERS:
        answer = answer.replace(",", "")
        return float(answer) if dataset_key in _FLOATS else answer
    return answer.lower() if dataset_key == "strategy_qa" else answer


def judge(dataset_key: str, completion: str, gold: str, template: str | None) -> dict[str, bool]:
    """`correct`, `contains_answer` and `correct_format` of one completion.

    The answer is the first candidate behind the marker of `template`, which the completion was made with (None: the
    teacher's short answers), or the text's last one where the marker is missing. `gold` may be cleaned or not.
    """
    if template not in _MARKERS:
        raise ValueError(f"template {template!r} is unknown; expected one of {', '.join(map(str, _MARKERS))}")
    answer, marker = clean_answer(dataset_key, gold), _MARKERS[template]
    has_format = marker is None or marker in completion
    text = completion.split(marker, 1)[1] if marker and has_format else completion
    candidates = extract_answers(dataset_key, text)
    right = [abs(c - answer) <= 1e-6 if isinstance(answer, float) else c == answer for c in candidates]
    chosen = right[:1] if has_format else right[-1:]
    return {"correct": any(chosen), "contains_answer": any(right), "correct_format": has_format}


def save_predictions(
    path: str | Path, data: TaskData, completions: Mapping[int, str], *, preset_key: str, **metadata: Any
) -> None:
    """Write a student's completions in the format of the completion files, atomically.

    Args:
        completions: Whole decoded output by sample index of `data`; the file is keyed by the data set's own index.
        metadata: `base_model`, `train_key`, `epoch`, `train_lora` and `lora_rank`, as the format has them.
    """
    preset = parse_preset(preset_key)
    metadata |= {
        "dataset_key": data.answer_key,
        "completion_key": preset.student_key,
        "finetune_key": preset.finetune_key.format(data.answer_key),
        "prediction_template": preset.template,
    }
    records = {}
    for sample_index, completion in sorted(completions.items()):
        example = data.examples[sample_index]
        answer = example.completion.split("-->")[-1].strip()
        texts = {"question": example.prompt.removesuffix(" ###"), "answer": answer, "prompt": example.prompt}
        numbers = {"sample_index": example.record_index, "completion_index": 0}
        records[str(example.record_index)] = [{**numbers, **texts, "completion": completion}]
    write_json(Path(path), {"metadata": metadata, "data": records})
