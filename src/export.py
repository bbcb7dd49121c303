"""Export a selection for other trainers: its rows in one file, or a file for each source and a trainer's own settings.
A new trainer is an entry of `TRAINERS`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from src import artifacts
from src.config import TrainConfig
from src.console import command_typed, counted, say_notices
from src.data import Example, TaskData
from src.run_data import chosen_subsets, load_data
from src.subsets import drawn_rows, row_counts
from src.tables import ESTIMATE, SCORE, read_table, subset_text

MAX_REPEAT = 4.0
"""Repeating data up to four times is nearly as good as new data (Muennighoff et al. 2023, arXiv:2305.16264)."""


class Source(NamedTuple):
    """The file of one source, and its row counts."""

    source: str
    file: str
    form: str  # "messages", or "texts": a prompt and a completion
    weight: float  # its share, before rounding and the cap
    available: int  # rows that it has
    rows: int  # to train on in an epoch
    written: int  # rows in the file; where they are not `rows`, the trainer is to sample

    @property
    def parts(self) -> list[int]:
        """Rows of each time that the file is read: whole as often as `rows` holds it, then its first rows."""
        return [self.written] * (self.rows // self.written) + [rest for rest in [self.rows % self.written] if rest]


def _yaml(key: str, entries: Sequence[dict[str, Any]]) -> str:
    """A list of mappings; values stand as JSON, which YAML reads."""
    pairs = [("  - " if n == 0 else "    ", *pair) for entry in entries for n, pair in enumerate(entry.items())]
    return "\n".join([f"{key}:", *(f"{lead}{name}: {json.dumps(value)}" for lead, name, value in pairs)]) + "\n"


def _axolotl(sources: Sequence[Source]) -> dict[str, str]:
    texts = {"field_instruction": "prompt", "field_output": "completion", "format": "{instruction}"}
    chat, texts["no_input_format"] = {"type": "chat_template", "field_messages": "messages"}, "{instruction}"
    of_form: dict[str, dict] = {"messages": chat, "texts": {"type": texts}}
    entries = [{"path": s.file, "ds_type": "json", **of_form[s.form], "split": "train"}
               | ({"weight": part / s.written} if part < s.written else {}) for s in sources for part in s.parts]  # fmt: skip
    return {"axolotl.yaml": _yaml("datasets", entries)}


def _llamafactory(sources: Sequence[Source]) -> dict[str, str]:
    tags = {f"{name}_tag": name for name in ("role", "content", "user", "assistant", "system")}
    of_form: dict[str, dict] = {"messages": {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags},
               "texts": {"columns": {"prompt": "prompt", "response": "completion"}}}  # fmt: skip
    info = {Path(s.file).stem: {"file_name": s.file, "num_samples": s.rows, **of_form[s.form]} for s in sources}
    settings = f'dataset_dir: "."\ndataset: "{",".join(info)}"\nmix_strategy: "concat"\n'
    return {"dataset_info.json": json.dumps(info, indent=2) + "\n", "llamafactory.yaml": settings}


def _trl(sources: Sequence[Source]) -> dict[str, str]:
    columns, total = {"messages": ["messages"], "texts": ["prompt", "completion"]}, sum(s.rows for s in sources)
    sampled = any(s.rows != s.written for s in sources)
    entries = [{"path": "json", "data_files": s.file, "split": "train", "columns": columns[s.form]}
               | ({"fraction": s.rows / total} if sampled else {}) for s in sources]  # fmt: skip
    return {"trl.yaml": _yaml("datasets", entries) + "streaming: false\n"}


def _open_instruct(sources: Sequence[Source]) -> dict[str, str]:
    mixer = " ".join(f"{s.file} {'1.0' if s.rows == s.written else s.rows}" for s in sources)
    return {"open-instruct.txt": f"--dataset_mixer_list {mixer} --dataset_mixer_list_splits train\n"}


def _ms_swift(sources: Sequence[Source]) -> dict[str, str]:
    return {"ms-swift.txt": f"--dataset {' '.join(f'{s.file}#{s.rows}' for s in sources)}\n"}


def _torchtune(sources: Sequence[Source]) -> dict[str, str]:
    chat = {"conversation_column": "conversations", "conversation_style": "sharegpt"}
    of_form: dict[str, tuple[str, dict]] = {"messages": ("chat", chat), "texts": ("instruct", {})}
    entries = [{"_component_": f"torchtune.datasets.{of_form[s.form][0]}_dataset", "source": "json", "data_files": s.file,
                "split": "train" if part == s.written else f"train[:{part}]", **of_form[s.form][1]}
               for s in sources for part in s.parts]  # fmt: skip
    return {"torchtune.yaml": _yaml("dataset", entries)}


class Trainer(NamedTuple):
    """How files are written for one trainer."""

    write: Callable[[Sequence[Source]], dict[str, str]]  # text of each file that stands beside the sources' files
    trap: str  # what to know about it
    fields: tuple[str, ...] = ("prompt", "completion")  # what it calls them; () where it takes conversations alone
    alike: bool = False  # conversations everywhere where they are anywhere
    turns: str = "any"  # "plain": text by system, user and assistant; "sharegpt": so, as `from` and `value`


TRAINERS = {
    "axolotl": Trainer(_axolotl, "weight is the share of a source that is kept, at most 1; version 0.19.0 ignores it"),
    "llamafactory": Trainer(_llamafactory, "num_samples draws exactly so many rows, also more than there are", turns="plain"),
    "trl": Trainer(_trl, "fraction stands at all or none and takes first rows, never repeats, and so the scarcest source sets the total", alike=True),
    "open-instruct": Trainer(_open_instruct, "1 is one row and 1.0 is all of them; rows must have messages", ()),
    "ms-swift": Trainer(_ms_swift, "behind # stand rows, not a share; more than there are repeat", ("query", "response")),
    "torchtune": Trainer(_torchtune, "has no weights: entries repeat, or split cuts them", ("input", "output"), turns="sharegpt"),
}  # fmt: skip
"""Choices of `--for`; keys and their meaning are those of the trainers' documents of 2026."""


def _record(example: Example, conversation: str | None, form: str, name: str) -> dict[str, Any]:
    """Convert a row to the trainer's record. ValueError: the trainer cannot read it, or a conversation would have no prompt."""
    trainer, said = TRAINERS[name], (example.prompt, example.completion)
    if form == "texts":
        return dict(zip(trainer.fields, said, strict=True))
    row = f"{example.task} (leave it out, or name another trainer): {artifacts.shorten(''.join(said).strip(), 40)!r}"
    if not conversation and not example.prompt.strip():
        raise ValueError(f"--for {name} takes conversations here, and there is a row without a prompt in {row}")
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), said, strict=True)]
    found = json.loads(conversation) if conversation else {"messages": turns}
    called, turns = {"system": "system", "user": "human", "assistant": "gpt"}, found["messages"]
    plain = all(turn.keys() == {"role", "content"} and turn["role"] in called for turn in turns)
    if trainer.turns != "any" and not (plain and "tools" not in found):
        raise ValueError(f"--for {name} takes texts by system, user and assistant, and there is more in a row of {row}")
    if trainer.turns == "sharegpt":
        return {"conversations": [{"from": called[turn["role"]], "value": turn["content"]} for turn in turns]}
    return found


def _estimates(file: Path, subset: Sequence[int], tasks: Sequence[str]) -> list[dict[str, Any]]:
    """Look up a subset's estimates in a search's table, for each target; empty if it is absent or of other tasks."""
    table = read_table(file) if file.is_file() else pd.DataFrame(columns=["subset", "task", "name"])
    of_these = set(zip(table["task"], table["name"], strict=True)) <= set(enumerate(tasks))
    found = table[(table["subset"] == subset_text(subset)) & of_these].filter(["target", ESTIMATE, SCORE])
    return found.to_dict("records")


def _counts(shares: dict[str, float], available: Sequence[int], total: int, most: float) -> list[int]:
    """Compute `row_counts` of tasks; print which of them are left out or capped."""
    counts, wanted = (row_counts(list(shares.values()), available, total, cap) for cap in (most, total))
    if none := [task for task, count in zip(shares, counts, strict=True) if not count]:
        say_notices([f"left out, with less than a row of {total:,}: {artifacts.shorten(', '.join(none), 200)}"])
    if capped := [task for n, task in enumerate(shares) if counts[n] < wanted[n]]:
        rest = "the others take the rest" if sum(counts) == total else f"{sum(counts):,} rows remain of {total:,}"
        say_notices([f"--max_repeat {most:g} caps {artifacts.shorten(', '.join(capped), 200)}; {rest}"])
    return counts


def _write_for(
    name: str, config: TrainConfig, data: TaskData, shares: dict[str, float], estimates: list[dict], *, seed: int = 0,
    total_rows: int | None = None, max_repeat: float = MAX_REPEAT, trainer_samples: bool = False,
) -> tuple[Path, list[Source]]:  # fmt: skip
    """Write a trainer's folder. `total_rows` of an epoch are by default those of the sources; `trainer_samples` writes each
    row once, and leaves it to the trainer's own keys how many are taken."""
    trainer, rows = TRAINERS[name], {task: data.indices("train", [data.tasks.index(task)]) for task in shares}
    available = list(map(len, rows.values()))
    counts = _counts(shares, available, total_rows or sum(available), max_repeat)
    kept = {task: count for task, count in zip(shares, counts, strict=True) if count}
    is_chat = np.zeros(len(data), bool) if data.messages is None else data.messages.is_valid().to_numpy()
    everywhere = not trainer.fields or (trainer.alike and any(is_chat[rows[task]].any() for task in kept))
    form = {task: "messages" if everywhere or is_chat[rows[task]].any() else "texts" for task in kept}
    if made := sum(int((~is_chat[rows[task]]).sum()) for task in kept if form[task] == "messages"):
        say_notices([f"{counted(made, 'row')} without a conversation: prompt and completion become its two turns"])
    sources, drawn, stems = list[Source](), list[np.ndarray](), [artifacts.slug(task) for task in kept]
    path = artifacts.export_dir(artifacts.results_dir(config.results), name)
    with artifacts.whole_folder(path) as folder:
        for (task, count), stem in zip(kept.items(), stems, strict=True):
            file = f"{stem}.jsonl" if stems.count(stem) == 1 else f"{stem}-{data.tasks.index(task)}.jsonl"
            drawn.append(drawn_rows(rows[task], len(rows[task]) if trainer_samples else count, seed, task))
            sources.append(Source(task, file, form[task], shares[task], len(rows[task]), count, len(drawn[-1])))
            with open(folder / file, "x", encoding="utf-8", errors="backslashreplace") as lines:
                for row in drawn[-1].tolist():
                    conversation = data.messages[row].as_py() if data.messages is not None else None
                    record = _record(data.examples[row], conversation, form[task], name)
                    print(json.dumps(record, ensure_ascii=False), file=lines)
        for file, text in trainer.write(sources).items():
            (folder / file).write_text(text, encoding="utf-8")
        lengths = dict[int, int]()
        try:
            from src.datamodule import token_counts
            from src.models import load_tokenizer, resolve_model_key

            tokenizer = load_tokenizer(resolve_model_key(config.model_key))
            lengths = token_counts(data, np.unique(np.concatenate(drawn)).tolist(), tokenizer)
        except FileNotFoundError as error:
            say_notices([f"tokens are not counted: {error}"])
        means = [np.mean([lengths.get(row, 0) for row in rows_of.tolist()]) for rows_of in drawn]
        tokens = [round(float(mean) * s.rows) if lengths else None for mean, s in zip(means, sources, strict=True)]
        described = [{**s._asdict(), "repeat": s.rows / s.available, "share_of_rows": s.rows / sum(counts), "tokens": number,
                      "share_of_tokens": number and number / sum(filter(None, tokens)),
                      "sha256": artifacts.file_fingerprint([folder / s.file])}
                     for s, number in zip(sources, tokens, strict=True)]  # fmt: skip
        facts = {"trainer": name, "note": trainer.trap, "seed": seed, "max_repeat": max_repeat, "rows": sum(counts),
                 "trainer_samples": trainer_samples, "estimates": estimates, "command": command_typed()}  # fmt: skip
        artifacts.write_json(folder / artifacts.MIXTURE_FILE, {**facts, "sources": described})
    return path, sources


def check_trainer(name: str | None) -> None:
    """Refuse (ValueError) a trainer that is unknown."""
    if name is not None and name not in TRAINERS:
        raise ValueError(f"--for {name}: expected one of {', '.join(TRAINERS)}")


def export(config: TrainConfig, data: TaskData | None = None, trainer: str | None = None, **sampling: Any) -> None:
    """Write the training rows of a subset, and how often each source is to be drawn, for one of `TRAINERS` (`sampling` as in
    `_write_for`); without one, all rows once and the weights. ValueError: no subset is named, or several; the trainer is
    unknown, or does not take the rows."""
    check_trainer(trainer)
    data = load_data(config) if data is None else data
    say_notices(data.notices)
    subsets, shares = chosen_subsets(config, data) or ([], None)
    if len(subsets) != 1 or not subsets[0]:
        raise ValueError(f"found {len(subsets)} subsets to export, expected one: name it with --subset_file, --task_weights or --task_idxes")  # fmt: skip
    counts = [len(data.indices("train", [task])) for task in subsets[0]]
    weights = (np.array(counts) / sum(counts) if shares is None else shares[list(subsets[0])]).tolist()
    chosen, folder = [data.tasks[task] for task in subsets[0]], artifacts.results_dir(config.results)
    if trainer is not None:
        known = _estimates(folder / artifacts.SELECTION_FILE, subsets[0], data.tasks)
        if config.task_weights:  # what the stage that wrote them says of them
            path = Path(config.task_weights).with_suffix(".json")
            known = artifacts.described(path.parent, path.name).get("estimates", [])
        path, of_file = _write_for(trainer, config, data, dict(zip(chosen, weights, strict=True)), known, **sampling)
        written, counts = f"{path} (its settings name the data alone)", [source.rows for source in of_file]
    else:
        examples = [data.examples[index] for index in data.indices("train", subsets[0]).tolist()]
        rows = pd.DataFrame(map(vars, examples))[["prompt", "completion", "task", "sample_index"]]
        with artifacts.atomic_write(folder / artifacts.SELECTED_ROWS) as temporary:
            rows.to_json(temporary, orient="records", lines=True, force_ascii=False)
        sources = [{"source": s, "rows": n, "weight": w} for s, n, w in zip(chosen, counts, weights, strict=True)]
        artifacts.write_json(folder / artifacts.MIXTURE_FILE, {"file": artifacts.SELECTED_ROWS, "sources": sources})
        written = f"{folder / artifacts.SELECTED_ROWS} and {folder / artifacts.MIXTURE_FILE}"
    held_out = sum(data.targets[target] in chosen for target in data.target_of_sample[data.target_of_sample >= 0])
    left = f"; the {held_out:,} held out for validation and test are not among them" if held_out else ""
    print(f"Wrote {written}: {counted(sum(counts), 'training row')} of {counted(len(counts), 'source')}{left}.")
