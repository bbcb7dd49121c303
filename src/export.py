"""A selection as files for other trainers: its rows in one file, or a file for each source and what one trainer reads them by.
A new trainer is an entry of `TRAINERS`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from src import artifacts
from src.artifacts import shorten
from src.config import TrainConfig
from src.console import command_typed, counted, progress, say_notices
from src.data import Example, TaskData, key_digest
from src.models import load_tokenizer, resolve_model_key
from src.stage_train import chosen_subsets, load_data
from src.tables import ESTIMATE, SCORE, read_table, subset_text

MAX_REPEAT = 4.0
"""Repeating data up to four times is nearly as good as new data (Muennighoff et al. 2023, arXiv:2305.16264)."""


@dataclass(frozen=True)
class Source:
    """A source in its file."""

    file: str
    form: str  # "messages", or "texts": a prompt and a completion
    rows: int  # to train on in an epoch
    written: int  # in the file: another number than `rows` where the trainer is to sample

    @property
    def parts(self) -> list[int]:
        """Rows of each time that the file is read: whole as often as `rows` holds it, then its first rows."""
        return [self.written] * (self.rows // self.written) + [rest for rest in [self.rows % self.written] if rest]


# --- what trainers read --------------------------------------------------------------------------------------


def _yaml(key: str, entries: Sequence[dict[str, Any]]) -> str:
    """A list of mappings; values stand as JSON, which YAML reads."""
    pairs = [("  - " if n == 0 else "    ", *pair) for entry in entries for n, pair in enumerate(entry.items())]
    return "\n".join([f"{key}:", *(f"{lead}{name}: {json.dumps(value)}" for lead, name, value in pairs)]) + "\n"


def _axolotl(sources: Sequence[Source]) -> dict[str, str]:
    texts = {"field_instruction": "prompt", "field_output": "completion"}
    texts |= {"format": "{instruction}", "no_input_format": "{instruction}"}
    of_form = {"messages": {"type": "chat_template", "field_messages": "messages"}, "texts": {"type": texts}}
    entries = [{"path": s.file, "ds_type": "json", **of_form[s.form], "split": "train"}
               | ({"weight": part / s.written} if part < s.written else {}) for s in sources for part in s.parts]  # fmt: skip
    return {"axolotl.yaml": _yaml("datasets", entries)}


def _llamafactory(sources: Sequence[Source]) -> dict[str, str]:
    tags = {f"{name}_tag": name for name in ("role", "content", "user", "assistant", "system")}
    of_form = {"messages": {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags},
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
    of_form = {"messages": ("chat", chat), "texts": ("instruct", {})}
    entries = [{"_component_": f"torchtune.datasets.{of_form[s.form][0]}_dataset", "source": "json", "data_files": s.file,
                "split": "train" if part == s.written else f"train[:{part}]", **of_form[s.form][1]}
               for s in sources for part in s.parts]  # fmt: skip
    return {"torchtune.yaml": _yaml("dataset", entries)}


class Trainer(NamedTuple):
    """How a trainer is written for."""

    write: Callable[[Sequence[Source]], dict[str, str]]  # text of each file that stands beside the sources' files
    trap: str  # what to know about it
    fields: tuple[str, ...] = ("prompt", "completion")  # what it calls them; () where it takes conversations alone
    alike: bool = False  # conversations everywhere where they are anywhere
    turns: str = "any"  # "plain": text by system, user and assistant; "sharegpt": so, as `from` and `value`


TRAINERS = {
    "axolotl": Trainer(_axolotl, "weight is the share of a source that is kept, at most 1; older versions ignore it"),
    "llamafactory": Trainer(_llamafactory, "num_samples draws exactly so many rows, also more than there are", turns="plain"),
    "trl": Trainer(_trl, "fraction takes the first rows, never repeats any, and stands at all data sets or at none", alike=True),
    "open-instruct": Trainer(_open_instruct, "1 is one row and 1.0 is all of them; rows must have messages", ()),
    "ms-swift": Trainer(_ms_swift, "behind # stand rows, not a share; more than there are repeat", ("query", "response")),
    "torchtune": Trainer(_torchtune, "has no weights: entries repeat, or split cuts them", ("input", "output"), turns="sharegpt"),
}  # fmt: skip
"""What `--for` takes; keys and their meaning are those of the trainers' documents of 2026."""

# --- how many rows, and which --------------------------------------------------------------------------------


def row_counts(shares: Sequence[float], available: Sequence[int], total: int, max_repeat: float) -> list[int]:
    """Rows to take from each of n sources, which add up to `total`: by shares, rounded by largest remainder (of equal ones
    the first), none above `max_repeat` times its rows. What a cap takes away goes to the others in proportion to their
    shares; the total is smaller only where all are at their caps."""
    weights = [Fraction(float(share)) for share in shares]  # exact: no machine rounds in another way
    caps = [math.floor(Fraction(str(max_repeat)) * rows) for rows in available]
    free, quotas = {n for n, weight in enumerate(weights) if weight}, [Fraction(0)] * len(caps)
    while free:
        left, whole = total - sum(quotas), sum(weights[n] for n in free)
        wanted = {n: left * weights[n] / whole for n in free}
        over = {n for n in free if wanted[n] > caps[n]}
        for n in over or free:
            quotas[n] = Fraction(caps[n]) if over else wanted[n]
        free = free - over if over else set()
    counts = [math.floor(quota) for quota in quotas]
    for n in sorted(range(len(counts)), key=lambda n: counts[n] - quotas[n])[: int(sum(quotas)) - sum(counts)]:
        counts[n] += 1
    return counts


def drawn_rows(rows: np.ndarray, count: int, seed: int, name: str) -> np.ndarray:
    """`count` of a source's rows, (count,), in random order: permutations of all, one after the other, the last one cut.
    They depend on the rows, the seed and the source's name alone."""
    rng = np.random.default_rng([seed, int.from_bytes(key_digest(name)[:8], "big")])
    return np.concatenate([rng.permutation(rows) for _ in range(-(-count // len(rows)))])[:count]


# --- writing -------------------------------------------------------------------------------------------------


def _record(example: Example, conversation: str | None, form: str, name: str) -> dict[str, Any]:
    """A row as a trainer takes it. ValueError: it does not, or a conversation is to be made without a prompt."""
    trainer, said = TRAINERS[name], (example.prompt, example.completion)
    if form == "texts":
        return dict(zip(trainer.fields, said, strict=True))
    row, cure = (
        f"a row of {example.task}, {shorten(''.join(said).strip(), 40)!r},",
        "leave it out, or name another trainer",
    )
    if not conversation and not example.prompt.strip():
        raise ValueError(f"{row} has no prompt, and --for {name} takes conversations here; {cure}")
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), said, strict=True)]
    found = json.loads(conversation) if conversation else {"messages": turns}
    called, turns = {"system": "system", "user": "human", "assistant": "gpt"}, found["messages"]
    is_plain = "tools" not in found and all(t.keys() == {"role", "content"} and t["role"] in called for t in turns)
    if trainer.turns != "any" and not is_plain:
        raise ValueError(f"{row} has tools; --for {name} writes texts by system, user and assistant; {cure}")
    if trainer.turns == "sharegpt":
        return {"conversations": [{"from": called[turn["role"]], "value": turn["content"]} for turn in turns]}
    return found


def _token_counts(config: TrainConfig, data: TaskData, rows: Sequence[int]) -> dict[int, int]:
    """Tokens of prompt and completion of some rows, uncut, by the run's tokenizer; empty where it cannot be loaded."""
    counts: dict[int, int] = {}
    try:
        tokenizer = load_tokenizer(resolve_model_key(config.model_key))
    except FileNotFoundError as error:
        say_notices([f"tokens are not counted: {error}"])
        return counts
    for start in progress(range(0, len(rows), 1000), desc="counting tokens", unit="block"):
        block = [data.examples[row] for row in rows[start : start + 1000]]
        ids = tokenizer([example.prompt + example.completion for example in block], add_special_tokens=False)[
            "input_ids"
        ]
        counts.update(zip((example.sample_index for example in block), map(len, ids), strict=True))
    return counts


def _estimates(file: Path, subset: Sequence[int], tasks: Sequence[str]) -> list[dict[str, Any]]:
    """What a search's table says of a subset, for each target; nothing where there is none, or it is of other tasks."""
    table = read_table(file) if file.is_file() else pd.DataFrame(columns=["subset", "task", "name"])
    of_these = set(zip(table["task"], table["name"], strict=True)) <= set(enumerate(tasks))
    rows = table[(table["subset"] == subset_text(subset)) & of_these]
    return rows.filter(["target", ESTIMATE, SCORE]).to_dict("records")


def _write_for(
    name: str, config: TrainConfig, data: TaskData, subset: Sequence[int], shares: np.ndarray, *, seed: int = 0,
    total_rows: int | None = None, max_repeat: float = MAX_REPEAT, trainer_samples: bool = False,
) -> tuple[str, int]:  # fmt: skip
    """Write a folder for one trainer: what was written, and rows of an epoch. `trainer_samples` writes each row once, and
    leaves it to the trainer's own keys how many are taken; `total_rows` are by default those of the sources."""
    trainer, folder = TRAINERS[name], artifacts.results_dir(config.results)
    tasks, rows = [data.tasks[task] for task in subset], [data.indices("train", [task]) for task in subset]
    available = list(map(len, rows))
    total = total_rows or sum(available)
    counts, uncapped = (row_counts(shares, available, total, most) for most in (max_repeat, total))
    kept, notices = [n for n, count in enumerate(counts) if count], []
    if none := [task for task, count in zip(tasks, counts, strict=True) if not count]:
        notices.append(
            f"left out, as their shares of {total:,} rows are less than one: {shorten(', '.join(none), 200)}"
        )
    if capped := [task for task, count, wanted in zip(tasks, counts, uncapped, strict=True) if count < wanted]:
        rest = (
            f"{sum(counts):,} rows remain of {total:,}"
            if sum(counts) < total
            else "the others take the rest, by their shares"
        )
        notices.append(
            f"--max_repeat {max_repeat:g} holds {shorten(', '.join(capped), 200)} below their shares; {rest}"
        )
    if not kept:
        raise ValueError(f"--max_repeat {max_repeat:g} and --total_rows {total} leave no row; raise them")
    talks = np.zeros(len(data), bool) if data.messages is None else data.messages.is_valid().to_numpy()
    everywhere = not trainer.fields or (trainer.alike and any(talks[rows[n]].any() for n in kept))
    if made := sum(int((~talks[rows[n]]).sum()) for n in kept if everywhere or talks[rows[n]].any()):
        notices.append(
            f"{counted(made, 'row')} without a conversation: --for {name} takes prompt and completion as two turns"
        )
    sources, drawn, taken = [], [], set[str]()
    say_notices(notices)
    with artifacts.whole_folder(artifacts.export_dir(folder, name)) as temporary:
        for n in kept:
            file = artifacts.slug(tasks[n])
            while file.lower() in taken:
                file += "_"
            taken.add(file.lower())
            drawn.append(drawn_rows(rows[n], available[n] if trainer_samples else counts[n], seed, tasks[n]))
            form = "messages" if everywhere or talks[rows[n]].any() else "texts"
            sources.append(Source(f"{file}.jsonl", form, counts[n], len(drawn[-1])))
            with open(temporary / sources[-1].file, "w", encoding="utf-8", errors="backslashreplace") as lines:
                for row in drawn[-1].tolist():
                    conversation = data.messages[row].as_py() if talks[row] else None
                    record = _record(data.examples[row], conversation, form, name)
                    lines.write(json.dumps(record, ensure_ascii=False) + "\n")
        for file, text in trainer.write(sources).items():
            (temporary / file).write_text(text, encoding="utf-8")
        lengths = _token_counts(config, data, np.unique(np.concatenate(drawn)).tolist())
        tokens = [
            round(sum(lengths[r] for r in d.tolist()) * s.rows / s.written) if lengths else None
            for d, s in zip(drawn, sources, strict=True)
        ]
        described = [{"source": tasks[n], **vars(s), "weight": float(shares[n]), "available": available[n], "repeat": s.rows / available[n],
                      "share_of_rows": s.rows / sum(counts), "tokens": count, "share_of_tokens": count and count / sum(tokens),
                      "sha256": artifacts.file_fingerprint([temporary / s.file])}
                     for n, s, count in zip(kept, sources, tokens, strict=True)]  # fmt: skip
        facts = {"trainer": name, "note": trainer.trap, "seed": seed, "max_repeat": max_repeat, "rows": sum(counts)}
        estimates = _estimates(folder / artifacts.SELECTION_FILE, subset, data.tasks)
        artifacts.write_json(
            temporary / artifacts.MIXTURE_FILE,
            {**facts, "estimates": estimates, "command": command_typed(), "sources": described},
        )
    return f"{artifacts.export_dir(folder, name)}", sum(counts)


def export(config: TrainConfig, data: TaskData | None = None, trainer: str | None = None, **sampling: Any) -> None:
    """Write the training rows of a subset, and how often each source is to be drawn, for one of `TRAINERS` (`sampling` as in
    `_write_for`); without one, all rows once and the weights. ValueError: no subset is named, or several; the trainer is
    unknown, or does not take the rows."""
    if trainer is not None and trainer not in TRAINERS:
        raise ValueError(f"--for {trainer}: expected one of {', '.join(TRAINERS)}")
    data = load_data(config) if data is None else data
    subsets, shares = chosen_subsets(config, data) or ([], None)
    if len(subsets) != 1 or not subsets[0]:
        raise ValueError(
            f"found {len(subsets)} subsets to export, expected one: name it with --subset_file, --task_weights or --task_idxes"
        )
    counts = [len(data.indices("train", [task])) for task in subsets[0]]
    of_task = np.array(counts) / sum(counts) if shares is None else shares[list(subsets[0])]
    chosen, folder = [data.tasks[task] for task in subsets[0]], artifacts.results_dir(config.results)
    written, number = f"{folder / artifacts.SELECTED_ROWS} and {folder / artifacts.MIXTURE_FILE}", sum(counts)
    if trainer is not None:
        written, number = _write_for(trainer, config, data, subsets[0], of_task, **sampling)
    else:
        examples = [data.examples[index] for index in data.indices("train", subsets[0]).tolist()]
        fields = ("prompt", "completion", "task", "sample_index")
        rows = pd.DataFrame([{name: getattr(example, name) for name in fields} for example in examples])
        with artifacts.atomic_write(folder / artifacts.SELECTED_ROWS) as temporary:
            rows.to_json(temporary, orient="records", lines=True, force_ascii=False)
        pairs = zip(chosen, counts, of_task.tolist(), strict=True)
        sources = [{"source": name, "rows": count, "weight": weight} for name, count, weight in pairs]
        artifacts.write_json(folder / artifacts.MIXTURE_FILE, {"file": artifacts.SELECTED_ROWS, "sources": sources})
    held_out = sum(data.targets[target] in chosen for target in data.target_of_sample[data.target_of_sample >= 0])
    left = f"; the {held_out:,} held out for validation and test are not among them" if held_out else ""
    print(f"Wrote {written}: {counted(number, 'training row')} of {counted(len(chosen), 'source')}{left}.")
