"""What every stage begins with: the rows that a configuration names, and the tasks that are chosen of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from src import console, cot, instruction
from src.config import ALL_TASKS, EstimationConfig, RunConfig
from src.console import counted
from src.data import TaskData
from src.subsets import read_subsets, read_task_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_data(config: RunConfig) -> TaskData:
    """The rows that a configuration names: of chain of thought, in the template of the model's architecture, or of
    instruction data. FileNotFoundError: no data are named, and the default file is not there."""
    typed = {"heldout_share": config.heldout_share, "max_heldout": config.max_heldout}
    held_out: dict[str, Any] = {name: value for name, value in typed.items() if value is not None}
    if config.dataset_key:
        names = ("data_dir", "saved_dir", "split_key", "keep_incorrect", "task_column")
        options = held_out | {name: getattr(config, name) for name in names}
        from src.models import model_kind

        architecture = model_kind(config.model_key)
        return cot.load_cot(config.dataset_key, config.preset_key, architecture=architecture, **options)
    if missing := [file for file in config.sources if not config.data_files and not Path(file).is_file()]:
        name_them = "name your files with --data_files (chain of thought: --dataset_key)"
        raise FileNotFoundError(f"no data: {name_them}; without, {missing[0]} is expected, which does not exist")
    return instruction.load_instruction(
        config.sources,
        config.target_files,
        columns=instruction.Columns(config.task_column, config.prompt_column, config.completion_column),
        load_tokenizer=lambda: _tokenizer(config.model_key),
        **held_out,
    )


def _tokenizer(model_key: str) -> PreTrainedTokenizerBase:
    from src.models import load_tokenizer, resolve_model_key

    return load_tokenizer(resolve_model_key(model_key))


def chosen_subsets(config: Any, data: TaskData) -> tuple[list[tuple[int, ...]], np.ndarray | None] | None:
    """The subsets that `ChosenTasks` names, and the tasks' shares (n,) where it names those; None for neither.
    ValueError: several ways at once, an id out of range or twice."""
    ways = ("subset_file", "task_weights", "task_idxes")
    if len(given := [name for name in ways if getattr(config, name) is not None]) > 1:
        raise ValueError(f"--{given[0]} and --{given[1]} both name tasks; leave one of them out")
    if config.subset_file is not None:
        subsets = read_subsets(Path(config.subset_file), len(data.tasks), data.tasks)
        different = list(dict.fromkeys(subsets))
        if repeated := len(subsets) - len(different):
            what = "with a subset that appears before; each is taken once"
            console.say_notices([f"{config.subset_file}: {counted(repeated, 'line')} {what}"])
        return different, None
    if config.task_weights is not None:
        shares = read_task_weights(Path(config.task_weights), data.tasks)
        return [tuple(np.flatnonzero(shares).tolist())], shares
    if config.task_idxes is None:
        return None
    tasks = range(len(data.tasks)) if tuple(config.task_idxes) == (ALL_TASKS,) else config.task_idxes
    return [valid_subset(tasks, len(data.tasks), "task_idxes")], None


def valid_subset(tasks: Sequence[Any], num_tasks: int, flag: str) -> tuple[int, ...]:
    """Task ids typed at the terminal, sorted. ValueError: an id out of range, or twice."""
    if wrong := [task for task in tasks if task == ALL_TASKS or not 0 <= task < num_tasks]:
        raise ValueError(f"--{flag} {wrong[0]}: this data has tasks 0 to {num_tasks - 1}")
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"--{flag} {' '.join(map(str, tasks))}: a task is named twice")
    return tuple(sorted(tasks))


def named(config: RunConfig) -> str:
    """The flags by which the next stage finds this run, and clusters that are its tasks; empty where it has no name."""
    words = f" --save_name {config.save_name}" if config.save_name else ""
    if isinstance(config, EstimationConfig) and config.load_clusters:
        words += f" --load_clusters --num_clusters {config.num_clusters}"
    return words
