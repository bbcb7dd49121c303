"""Everything a stage script shares with the person at the terminal: flags, names, progress, closing lines.

Each flag is declared here once, in a group; a script adds the groups it needs. A flag that defaults to None
takes the value that the previous stage stored.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import importlib.util
import math
import os
import re
import resource
import shlex
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, Protocol, TextIO, cast

from tqdm import tqdm

from src.paths import ALPACA_FILE, DATA, FLAN_FILE, SAVED, ZS_COT_FILE, Run, source_names

ALL_TASKS = "all"
AUTO = "auto"
ROOT = Path(__file__).resolve().parents[1]
LOG_INTERVAL_SECONDS = 15.0
"""How often a progress bar writes a line when nobody watches it move."""
SHOWN_AFTER_SECONDS = 2.0
"""What ends sooner shows no progress bar."""


class Parser(argparse.ArgumentParser):
    """A parser whose help is the script's docstring, and whose errors are a line that says what to do.

    Args:
        doc: The script's docstring: what it does, reads and writes, and commands that work.
        positionals: What comes before the flags, for the line of usage.
    """

    def __init__(self, doc: str | None, positionals: str = "") -> None:
        typed = (_typed or sys.argv)[0]
        super().__init__(
            prog=typed,
            usage=" ".join(["python", typed, *([positionals] if positionals else []), "[flags]"]),
            description=doc,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse does it; then flags that contradict each other are refused, and those without effect named."""
        parsed, strangers = self.parse_known_args(args, namespace)
        if strangers:
            self._refuse(strangers)
        if hasattr(parsed, "precision"):
            _settle_precision(parsed)
        for rule in RULES:
            for flag in rule.flags:
                if getattr(parsed, flag, None) == self.get_default(flag) or rule.holds(parsed):
                    continue
                if rule.refused:
                    self.error(f"--{flag} {rule.message}")
                say_once(f"note: --{flag} {rule.message}")
        return parsed

    def _refuse(self, words: Sequence[str]) -> NoReturn:
        """End with the flags that were probably meant."""
        known = [name for action in self._actions for name in action.option_strings]
        flags = [word.partition("=")[0] for word in words if word.startswith("-")]
        meant = [name for flag in flags for name in difflib.get_close_matches(flag, known, n=1)]
        guess = f"; did you mean {' '.join(meant)}?" if meant else ""
        self.error(f"unrecognized arguments: {' '.join(words)}{guess}")

    def error(self, message: str) -> NoReturn:
        """A line for how to call it, and one for what is wrong; exit status 2."""
        self.exit(2, f"{self.format_usage().strip()}   (all flags: --help)\nerror: {message}\n")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Flags in a column that is wide enough for most of them; a flag's values once, behind its last name."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        metavar = action.metavar or self._get_default_metavar_for_optional(action)
        several = action.nargs == "+" and not action.choices
        values = f"{metavar} ..." if several else self._format_args(action, str(metavar))
        return f"{', '.join(action.option_strings)} {values}"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return _METAVARS.get(cast(Any, action.type), "TEXT")


def positive_int(text: str) -> int:
    """An integer of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number of at least 1")
    return value


def positive_float(text: str) -> float:
    """A finite number above 0."""
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected a number above 0")
    return value


def not_negative_int(text: str) -> int:
    """A whole number of at least 0."""
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number of at least 0")
    return value


def not_negative(text: str) -> float:
    """A finite number of at least 0."""
    if not 0 <= (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected a number of at least 0")
    return value


def task_or_all(text: str) -> int | str:
    """A task id, or "all"."""
    return ALL_TASKS if text == ALL_TASKS else int(text)


def positive_int_or_auto(text: str) -> int | str:
    """A whole number of at least 1, or "auto"."""
    return AUTO if text == AUTO else positive_int(text)


def share(text: str) -> float:
    """A number from 0 to 1."""
    if not 0 <= (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a number from 0 to 1")
    return value


def share_or_count(text: str) -> float | int:
    """A share between 0 and 1, or a whole number of tasks."""
    value = float(text)
    if 0 < value < 1:
        return value
    if value < 1 or value != int(value):
        raise argparse.ArgumentTypeError(f"{text}: expected a share between 0 and 1, or a whole number of tasks")
    return int(value)


_METAVARS = {
    **dict.fromkeys((int, positive_int, not_negative_int, positive_int_or_auto), "N"),
    **dict.fromkeys((float, positive_float, not_negative), "X"),
    share: "SHARE",
    share_or_count: "SIZE",
}
"""What stands for a flag's value in the help, by its type."""


def _group(parser: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    """The parser's group of this title: flags of several functions may stand under one."""
    return next((group for group in parser._action_groups if group.title == title), None) or parser.add_argument_group(
        title
    )


# --- flags, once each ----------------------------------------------------------------------------------------


def add_instruction_data(parser: argparse.ArgumentParser) -> None:
    """Where the instruction track's examples come from."""
    group = parser.add_argument_group("data (instruction)")
    group.add_argument("--data_files", nargs="+", metavar="SOURCE", help="training sources: .jsonl, .json, .csv, .tsv, "
                       ".parquet or .pkl files, folders of them or that datasets saved, or hub ids such as org/name:split (default: "
                       f"{ALPACA_FILE})")  # fmt: skip
    add_columns(group)
    group.add_argument("--target_files", nargs="+", default=[], metavar="SOURCE", help="target tasks that are "
                       "never trained on; half of each is for validation, half for the final test (default: each training task is a "
                       "target too)")  # fmt: skip
    group.add_argument("--train_instruction", action="store_true", help="take Alpaca, FLAN v2 and chain of thought "
                       f"together: {ALPACA_FILE}, {FLAN_FILE.name}, {ZS_COT_FILE.name} (default: --data_files)")  # fmt: skip
    group.add_argument("--data_key", metavar="NAME", help="short name of this data in folder names (default: made of the "
                       "files' names)")  # fmt: skip
    add_tasks(
        group,
        "column that names a row's task, in sources that have it (default: _task_name, skill or task; without "
        "one a source is a task, which FLAN's inputs and targets do not allow)",
    )
    group.add_argument("--loss_on_prompt", action="store_true", help="count a decoder's prompt in the loss, as "
                       "published (default: the completion only)")  # fmt: skip


def add_columns(group: argparse._ArgumentGroup) -> None:
    """Columns whose names are not the usual ones."""
    group.add_argument("--prompt_column", metavar="NAME", help="column of the prompts, in sources that have it (default: "
                       "inputs, prompt, messages, conversations or instruction, whichever is there)")  # fmt: skip
    group.add_argument("--completion_column", metavar="NAME", help="column of the completions, in sources that have it "
                       "(default: targets, completion, output or response, or the last of the messages)")  # fmt: skip


def add_tasks(group: argparse._ArgumentGroup, task_column: str) -> None:
    """What a row's task is (`task_column` describes the flag), and how many rows are kept back from training."""
    group.add_argument("--task_column", metavar="NAME", help=task_column)
    group.add_argument("--heldout_share", type=share, help="share of each task's different "
                       "prompts held out for validation, and again for test; chain of thought: of the training questions, for "
                       "validation alone (default: 0.1; with --target_files 0, all rows of the sources are trained on)")  # fmt: skip
    group.add_argument("--max_heldout", type=positive_int, help="most prompts of a task held out for "
                       "validation, and for test (default: 50; chain of thought 500, validation alone)")  # fmt: skip


def add_cot_data(parser: argparse.ArgumentParser, *, or_instruction: bool = False) -> None:
    """Where the chain-of-thought track's examples come from.

    Args:
        parser: The script's parser.
        or_instruction: The script serves either track: the instruction group is there too, and `--dataset_key`
            decides.
    """
    group = parser.add_argument_group("data (chain of thought)")
    default = "(default: instruction data)" if or_instruction else "(required)"
    group.add_argument("--dataset_key", required=not or_instruction, metavar="KEY", help="data set: strategy_qa, "
                       f"commonsense_qa, gsm8k and so on {default}")  # fmt: skip
    group.add_argument("--preset_key", default="ft_cot", metavar="KEY", help="training rows: ft, ft_cot or ft_cot_t70_<k>aug with "
                       "k of 1 2 4 8 16 32 64 (default: ft_cot)")  # fmt: skip
    group.add_argument("--train_key", default="ft_cot", metavar="KEY", help="free label of the training run, kept in prediction "
                       "files (default: ft_cot)")  # fmt: skip
    group.add_argument(
        "--split_key",
        default="default",
        metavar="KEY",
        help="which split: <data_dir>/split/<data set>__<key>.json (default: default)",
    )
    group.add_argument(
        "--data_dir", default=str(DATA), metavar="FOLDER", help="folder of dataset/ and split/ (default: data)"
    )
    group.add_argument("--saved_dir", default=str(SAVED), metavar="FOLDER", help="folder of completion_data/: the teacher's "
                       "completions are read there, the model's own are written there (default: saved)")  # fmt: skip
    group.add_argument("--keep_incorrect", action="store_true", help="also train on completions with a wrong answer, "
                       "as published (default: right answers only)")  # fmt: skip
    group.add_argument("--letters", choices=("word", "published"), default="word", help="multiple choice: letters "
                       "that stand alone count as answers, or any capital letter as published (default: word)")  # fmt: skip
    if not or_instruction:
        add_tasks(group, "field of the completions or of the data set that names a row's task, such as teacher (default: "
                  "all rows are one task, which --load_clusters divides)")  # fmt: skip


def add_model(parser: argparse.ArgumentParser, model_key: str) -> None:
    """The base model, its adapter and the context."""
    group = parser.add_argument_group("model")
    group.add_argument("--model_key", default=model_key, metavar="MODEL", help="hub id, local folder, or short key such as "
                       f"flan_t5_base (default: {model_key})")  # fmt: skip
    group.add_argument("--train_lora", action="store_true", help="train a LoRA adapter (default: every weight)")
    group.add_argument(
        "--lora_rank", type=positive_int, default=16, help="rank of the adapter, with --train_lora (default: 16)"
    )
    group.add_argument("--lora_alpha", type=positive_int, default=32, help="scale of the adapter: its update counts "
                       "alpha / rank, with --train_lora (default: 32)")  # fmt: skip
    group.add_argument("--lora_target_modules", nargs="+", metavar="NAME", help="layers that carry the adapter: "
                       "ends of their names, a regular expression, or all-linear (default: the attention's inputs, by "
                       "architecture)")  # fmt: skip
    group.add_argument("--attn_implementation", choices=("eager", "sdpa", "flash_attention_2"), help="attention "
                       "kernel (default: the library's choice)")  # fmt: skip
    group.add_argument("--base_dtype", choices=("float32", "bfloat16"), default="float32", help="numbers that the base "
                       "model's weights are held in under --train_lora; the adapter is float32 (default: float32)")  # fmt: skip
    group.add_argument("--use_qlora", action="store_true", help="hold the base model in 4 bits (bitsandbytes NF4) and "
                       "compute in bfloat16; the adapter is float32 (default: as --base_dtype says)")  # fmt: skip
    group.add_argument("--gradient_checkpointing", action="store_true", help="compute activations again in the "
                       "backward: less memory, more time, the same numbers (default: keep them)")  # fmt: skip
    group.add_argument("--max_length", type=positive_int, default=512, help="longest row (decoder) or prompt "
                       "(encoder-decoder), in tokens (default: 512)")  # fmt: skip
    group.add_argument("--max_target_length", type=positive_int, default=512, help="longest completion of an "
                       "encoder-decoder, in tokens (default: 512)")  # fmt: skip
    add_output(parser)


def add_output(parser: argparse.ArgumentParser) -> None:
    """What the run and its results are called, and a look before anything is written."""
    group = _group(parser, "run")
    group.add_argument("--save_name", metavar="NAME", help="name of the run: given to every stage, it keeps a training, its "
                       "gradients and results apart from others (default: made of model, data and run)")  # fmt: skip
    group.add_argument("--results_name", metavar="NAME", help="name of a table of results and of the selections made of it: "
                       "several may belong to one run (default: --save_name)")  # fmt: skip
    add_dry_run(parser)


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """A look before anything is written."""
    group = _group(parser, "run")
    group.add_argument("--dry_run", action="store_true", help="say what would be read and written, and stop (default: do "
                       "it)")  # fmt: skip


def add_hardware(parser: argparse.ArgumentParser) -> None:
    """Where and how it runs."""
    group = parser.add_argument_group("hardware")
    group.add_argument("--devices", "--device", type=int, nargs="+", metavar="GPU", help="GPU numbers: `--devices 1` "
                       "is the second GPU, `--devices 0 1 2 3` four GPUs (default: GPU 0; ignored without a GPU)")  # fmt: skip
    group.add_argument("--accelerator", choices=("auto", "cuda", "cpu"), default="auto", help="auto takes a GPU where "
                       "there is one; `cpu` with several --devices runs as many processes (default: auto)")  # fmt: skip
    group.add_argument("--strategy", choices=("auto", "ddp", "fsdp"), default="auto", help="several processes: ddp, the "
                       "whole model in each, or fsdp, its weights spread over them; auto is ddp (default: auto)")  # fmt: skip
    group.add_argument("--precision", choices=("32", "16", "bf16", *PRECISIONS), default="32", metavar="NAME", help="32 "
                       "bits, or mixed precision in 16 (with --strategy fsdp bf16 is taken, on the CPU 32) or bf16; or Lightning's "
                       "names: 32-true, 16-mixed, bf16-mixed, and bf16-true, which is bf16 with --base_dtype bfloat16 (default: 32)")  # fmt: skip
    group.add_argument(
        "--num_nodes", type=positive_int, default=1, help="machines, each with as many processes (default: 1)"
    )


PRECISIONS = {"32-true": "32", "16-mixed": "16", "bf16-mixed": "bf16", "bf16-true": "bf16", "16-true": "bf16"}
"""Lightning's name of a precision -> ours."""


def _settle_precision(args: argparse.Namespace) -> None:
    """Our name for the precision; one that Lightning calls true also holds the base model's weights in bfloat16."""
    typed, args.precision = args.precision, PRECISIONS.get(args.precision, args.precision)
    if typed == "16-true":
        say_once("note: --precision 16-true is taken as bf16-true: weights in 16 bits need the range of bfloat16")
    if typed in ("16-true", "bf16-true"):
        if getattr(args, "train_lora", True):
            args.base_dtype = "bfloat16"
        else:
            say_once(f"note: --precision {typed} is taken as bf16-mixed: weights that are trained stay in 32 bits")


def add_training(
    parser: argparse.ArgumentParser,
    *,
    batch_size: int | None = None,
    lr: float | None = None,
    epochs: int | None = None,
) -> None:
    """How it is trained; without defaults what is not typed is None, and taken from meta-training."""
    inherited, of_parent = lr is None, "that of meta-training"
    add_batch_size(parser, batch_size, f"rows of a training batch, per device (default: {batch_size or of_parent})")
    group = _group(parser, "training")
    group.add_argument("--accumulate", type=positive_int, default=None if inherited else 1, help="batches per optimizer "
                       f"step (default: {of_parent if inherited else 1})")  # fmt: skip
    group.add_argument("--lr", type=positive_float, default=lr, help="learning rate of AdamW (default: "
                       f"{of_parent if lr is None else f'{lr:g}'})")  # fmt: skip
    group.add_argument("--loss_over", choices=("token", "row"), default=None if inherited else "token", help="what a batch's "
                       "loss is the mean over: its target tokens, or the mean losses of its rows (default: "
                       f"{of_parent if inherited else 'token'})")  # fmt: skip
    group.add_argument("--weight_decay", type=not_negative, default=None if inherited else 0.0, help="weight decay of AdamW "
                       f"(default: {of_parent if inherited else 0})")  # fmt: skip
    group.add_argument("--epochs", type=positive_int, default=epochs, help="passes over the rows (default: "
                       f"{epochs or of_parent})")  # fmt: skip
    group.add_argument("--runs", type=positive_int, default=1, help="repetitions, with seeds 0, 1, … (default: 1)")


def add_batch_size(
    parser: argparse.ArgumentParser,
    default: int | None = None,
    meaning: str = "kept for the published commands: no effect where nothing is trained (default: none)",
) -> None:
    """Rows of a training batch; scripts that do not train take the flag too."""
    if "--batch_size" in parser._option_string_actions:  # of a script that trains
        return
    _group(parser, "training").add_argument("--batch_size", type=positive_int, default=default, help=meaning)


def add_meta_training(parser: argparse.ArgumentParser) -> None:
    """What training on all tasks leaves on its way."""
    add_checkpoints(parser)
    group = _group(parser, "meta-training")
    group.add_argument("--stop_after_checkpoints", action="store_true", help="end meta-training with the last of them: "
                       "estimates need no more (default: train to the end, for the model trained on everything)")  # fmt: skip
    group.add_argument("--logger", choices=("none", "csv", "tensorboard", "wandb"), default="none", help="also log "
                       "losses, below the run's folder or to W&B (default: none)")  # fmt: skip


def add_checkpoints(parser: argparse.ArgumentParser) -> None:
    """Where on its way meta-training keeps checkpoints."""
    group = _group(parser, "meta-training")
    group.add_argument("--checkpoint_at", type=share, nargs="*", default=[0, 0.08, 0.33], metavar="SHARE", help="keep "
                       "checkpoints at these shares of the optimizer steps, 0 for the start: where gradients are taken "
                       "(default: 0 0.08 0.33)")  # fmt: skip


def add_start(parser: argparse.ArgumentParser) -> None:
    """A checkpoint to go on from."""
    group = parser.add_argument_group("start")
    group.add_argument("--load_model_dir", metavar="CHECKPOINT", help="start from this checkpoint below "
                       "external_lightning_logs/ (default: the base model)")  # fmt: skip


def add_chosen_tasks(
    parser: argparse.ArgumentParser, title: str, *, subset_file: str, task_weights: str, task_idxes: str
) -> None:
    """Chosen tasks, named in one of three ways, each with its meaning."""
    chosen = parser.add_argument_group(title).add_mutually_exclusive_group()
    chosen.add_argument("--subset_file", metavar="FILE", help=subset_file)
    chosen.add_argument("--task_weights", metavar="FILE", help=task_weights)
    chosen.add_argument("--task_idxes", type=task_or_all, nargs="*", metavar="ID", help=task_idxes)


def add_truth(parser: argparse.ArgumentParser) -> None:
    """Fine-tuning on chosen tasks only."""
    add_chosen_tasks(
        parser,
        "fine-tuning on subsets",
        subset_file="fine-tune the base model once for each line of a sampled_tasks file and append a row of losses for "
        "each (default: meta-training on all tasks)",
        task_weights="fine-tune the base model once on rows drawn from the tasks in these shares, a CSV that "
        "fast_estimate_forward_selection.py --weights writes (default: meta-training)",
        task_idxes="fine-tune once on these tasks, or on `all`; without ids, only evaluate the base model (default: "
        "meta-training)",
    )


def add_exported(parser: argparse.ArgumentParser) -> None:
    """The one subset to export, and how."""
    add_chosen_tasks(
        parser,
        "what is exported",
        subset_file="the rows of the tasks in this sampled_tasks file of one line (required, unless one of the other two is given)",
        task_weights="the rows of the tasks that have shares in this CSV, with these shares as weights (required, "
        "unless one of the other two is given)",
        task_idxes="the rows of these tasks, or of `all` (required, unless one of the other two is given)",
    )
    group = parser.add_argument_group("rows")
    group.add_argument(
        "--format", choices=("jsonl", "parquet"), default="jsonl", help="type of the file of rows (default: jsonl)"
    )


def add_meta_init(parser: argparse.ArgumentParser) -> None:
    """Which checkpoints of meta-training."""
    group = parser.add_argument_group("meta-initialization")
    group.add_argument("--load_model_dir", nargs="+", metavar="CHECKPOINT", help="checkpoints below "
                       "external_lightning_logs/, for example RUN/epoch_epoch=17 (default: stage 2 takes those that --checkpoint_at kept "
                       "in this run, later stages all that have gradients, and average their estimates)")  # fmt: skip
    add_run(parser)


def add_run(parser: argparse.ArgumentParser) -> None:
    """Which repetition."""
    group = _group(parser, "run")
    group.add_argument("--run", type=not_negative_int, default=0, help="number of the run, and seed of its projection and "
                       "subsets (default: 0)")  # fmt: skip


def add_clusters(parser: argparse.ArgumentParser) -> None:
    """Tasks made of samples with similar gradients."""
    group = parser.add_argument_group("clusters as tasks")
    group.add_argument("--load_clusters", action="store_true", help="tasks are clusters of the training samples by "
                       "their projected gradients, made on first use and kept beside them (default: the data's own tasks)")  # fmt: skip
    group.add_argument(
        "--num_clusters", type=positive_int, default=100, help="number of clusters, with --load_clusters (default: 100)"
    )


def add_generation(parser: argparse.ArgumentParser) -> None:
    """How answers are generated."""
    group = parser.add_argument_group("generation")
    group.add_argument("--inference_batch_size", type=positive_int, default=32, help="rows of a generation batch "
                       "(default: 32)")  # fmt: skip
    group.add_argument("--max_new_tokens", type=positive_int, default=256, help="longest generated completion, in "
                       "tokens (default: 256)")  # fmt: skip


def add_evaluation(parser: argparse.ArgumentParser) -> None:
    """How a solution is turned into an estimate."""
    group = parser.add_argument_group("evaluation")
    group.add_argument("--evaluate", choices=("first_order", "displaced"), default="first_order", help="linear algebra "
                       "alone, or also run the validation rows through the model at the displaced weights "
                       "(default: first_order)")  # fmt: skip
    add_scale(group, several=False)


def add_scale(group: argparse._ArgumentGroup, *, several: bool) -> None:
    """Length of a displacement."""
    default = "0.02 0.04 0.06 0.08 0.1" if several else "as long as the solution is"
    displacement = "displacements" if several else "displacement, with --evaluate displaced,"
    group.add_argument("--scale", type=positive_float, nargs="+" if several else None,
                       default=[float(number) for number in default.split()] if several else None, help="length of the "
                       f"{displacement} as a share of the norm of the trained weights (default: {default})")  # fmt: skip


def add_approximation(parser: argparse.ArgumentParser) -> None:
    """Stage 2, or how good the first order is."""
    group = parser.add_argument_group("stage 2, or the approximation error")
    group.add_argument("--compute_pretrained_outputs", action="store_true", help="compute outputs and gradients at the "
                       "checkpoints, which is stage 2 (default: measure the first-order approximation error there)")  # fmt: skip
    add_scale(group, several=True)
    group.add_argument("--seed", type=int, nargs="+", default=[0], help="seeds of the random directions (default: 0)")


def add_projection(parser: argparse.ArgumentParser) -> None:
    """What a store of projected gradients is named by."""
    group = parser.add_argument_group("projection")
    group.add_argument("--project_dim", "--project_dimension", type=positive_int, default=400, help="dimension d of "
                       "the projected gradients (default: 400)")  # fmt: skip
    group.add_argument("--projection", choices=("sketch", "two_sided", "dense", "none"), default="sketch", help="kind of "
                       "random projection; none keeps all p coordinates (default: sketch)")  # fmt: skip
    group.add_argument("--output_function", choices=("loss", "margin"), default="loss", help="what is differentiated: "
                       "the mean loss of a sample's target tokens, or their mean log-odds as in the paper "
                       "(default: loss)")  # fmt: skip
    group.add_argument("--project_gradients", action="store_true", help="kept for the published commands: gradients "
                       "are always projected (default: they are, unless --projection none)")  # fmt: skip


def add_gradients(parser: argparse.ArgumentParser) -> None:
    """How gradients are taken."""
    add_batch_size(parser)
    add_projection(parser)
    group = parser.add_argument_group("gradients")
    group.add_argument("--representations", action="store_true", help="also keep each sample's pooled hidden states, for "
                       "--estimator representation (default: do not)")  # fmt: skip
    group.add_argument("--save_projection_matrix", action="store_true", help="also write the projection's random signs, "
                       "packed in bits, beside the gradients of each checkpoint (default: do not; the seed draws them again)")  # fmt: skip
    group.add_argument("--on_nonfinite", choices=("stop", "skip"), default="stop", help="a sample whose output or gradient "
                       "is not finite: stop and name it, or leave it out and count it (default: stop)")  # fmt: skip
    group.add_argument("--max_tokens_per_batch", type=positive_int_or_auto, default=4096, metavar="TOKENS", help="rows "
                       "times longest row of a batch, or auto: on a GPU twice that, four times and so on, as long as a batch fits (default: 4096)")  # fmt: skip
    group.add_argument("--row_dtype", choices=("float32", "float16"), default="float32", help="numbers that gradients are "
                       "kept in on disk; float16 takes half the room (default: float32)")  # fmt: skip


def add_targets(parser: argparse.ArgumentParser, meaning: str | None = None) -> None:
    """What the estimates are for."""
    group = parser.add_argument_group("target")
    group.add_argument("--target_task", nargs="+", metavar="NAME", help=meaning or "target tasks; selection minimises the "
                       "mean over them (default: the tasks of --target_files, else every task)")  # fmt: skip


class Described(Protocol):
    """Something to choose, with a line that says what it is."""

    @property
    def meaning(self) -> str: ...


def _described(choices: Mapping[str, Described], default: str) -> str:
    """The help of a flag that takes one of these."""
    return "; ".join(f"{name}: {choice.meaning}" for name, choice in choices.items()) + f" (default: {default})"


def add_estimator(parser: argparse.ArgumentParser, estimators: Mapping[str, Described], rho: float) -> None:
    """How estimates are made; `rho` is the default ridge strength."""
    group = parser.add_argument_group("estimation")
    group.add_argument("--estimator", choices=tuple(estimators), default="ridge", help=_described(estimators, "ridge"))
    group.add_argument("--rho", type=positive_float, default=rho, help="strength of the ridge: lambda is rho times the "
                       f"mean squared norm of a gradient (default: {rho})")  # fmt: skip
    group.add_argument("--weight_by", choices=("token", "sample", "task"), help="what weighs the same in an estimate: target "
                       "tokens, as in training with --loss_over token; rows, as with --loss_over row; or the tasks of a subset "
                       "(default: as the meta-training was)")  # fmt: skip


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """What estimates are calibrated on."""
    group = parser.add_argument_group("calibration")
    group.add_argument("--calibrate", metavar="CSV", help="results of five or more really fine-tuned subsets (stage 1's script "
                       "with --subset_file): also write calibrated estimates and their 90 %% prediction intervals (default: estimates "
                       "as they are, for ranking)")  # fmt: skip


def add_results(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """Which results to go on from."""
    parser.add_argument("results", metavar="RESULTS", nargs="+" if several else None, help="folder of stage 3's estimates, "
                        "results/<name>")  # fmt: skip


def add_comparison(parser: argparse.ArgumentParser) -> None:
    """Estimates and what they are judged by."""
    parser.add_argument("estimates", metavar="ESTIMATES.csv", help="table of stage 3")
    parser.add_argument("truth", metavar="TRUTH.csv", help="fine-tuned values: results.csv of stage 1's script with "
                        "--subset_file; with --runs 2 or more the attainable maximum is known")  # fmt: skip
    group = parser.add_argument_group("comparison")
    group.add_argument("--metric", default="validation_loss", metavar="NAME", help="columns of the truth to compare with, for "
                       "example test_loss or test_accuracy (default: validation_loss)")  # fmt: skip
    add_dry_run(parser)


def add_estimation(parser: argparse.ArgumentParser, estimators: Mapping[str, Described], rho: float) -> None:
    """Stage 3, but for its data: which subsets, for what, and how. Arguments as in `add_estimator`."""
    add_batch_size(parser)
    add_subsets(parser)
    add_targets(parser, "targets to estimate (default: every task with validation rows)")
    add_estimator(parser, estimators, rho)
    add_calibration(parser)
    add_evaluation(parser)


def add_subsets(parser: argparse.ArgumentParser) -> None:
    """Which subsets are estimated."""
    group = parser.add_argument_group("subsets")
    group.add_argument("--sampled_tasks", metavar="FILE", help="file of subsets, one a line; read if it is there, "
                       "else drawn and written (default: sampled_tasks/<run>.txt)")  # fmt: skip
    group.add_argument("--number_of_subsets", type=positive_int, help="subsets to draw (default: 1000, or as many "
                       "as there are)")  # fmt: skip
    group.add_argument("--subset_size", type=share_or_count, help="share of the tasks in each, or their "
                       "number (default: 0.5)")  # fmt: skip


def add_selection(parser: argparse.ArgumentParser, methods: Mapping[str, Described]) -> None:
    """How a search goes and stops."""
    group = parser.add_argument_group("selection")
    group.add_argument("--method", "--direction", choices=tuple(methods), default="forward",
                       help=_described(methods, "forward"))  # fmt: skip
    group.add_argument("--start_from", type=int, nargs="+", default=[], metavar="ID", help="ids of the tasks to start with "
                       "(default: none; backward: all)")  # fmt: skip
    group.add_argument("--max_tasks", type=positive_int, help="most tasks in the subset (default: no limit)")
    group.add_argument("--budget_rows", type=positive_int, help="at most so many training rows (default: no limit)")
    group.add_argument("--try_at_most", type=positive_int, help="after the first step try only so many tasks, those that "
                       "looked best when last tried; for thousands of tasks (default: all)")  # fmt: skip
    group.add_argument("--refine", type=positive_int, metavar="K", help="really fine-tune the K best subsets on the way, "
                       "with the training flags, and select the best of them (default: trust the estimates)")  # fmt: skip
    group.add_argument("--weights", action="store_true", help="also find how much to draw from each task, for "
                       "--task_weights of stage 1's script (default: do not)")  # fmt: skip
    group.add_argument("--per_target", action="store_true", help="select for each target by itself: a subset for each, "
                       "and how much each task alone helps each target (default: one subset for the mean over the targets)")  # fmt: skip


def add_threshold(parser: argparse.ArgumentParser) -> None:
    """How random-ensemble scores become a subset."""
    group = parser.add_argument_group("threshold")
    chosen = group.add_mutually_exclusive_group()
    chosen.add_argument(
        "--top_k",
        type=positive_int,
        help="number of tasks to keep, lowest scores first (default: those with at most the mean score)",
    )
    chosen.add_argument(
        "--ratio",
        type=share,
        help="share of the tasks to keep, lowest scores first (default: those with at most the mean score)",
    )
    chosen.add_argument("--threshold", type=float, help="tasks with a score of at most this, in nats per "
                        "token (default: the mean score)")  # fmt: skip


# --- flags that need each other ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """Flags that mean something only beside others.

    Attributes:
        flags: Names of the flags.
        holds: Whether the others are as they have to be.
        message: What to say where they are not, behind the flag.
        refused: End there; else go on without the flag, and say so.
    """

    flags: tuple[str, ...]
    holds: Callable[[argparse.Namespace], bool]
    message: str
    refused: bool = False


def _is(flag: str, *values: Any) -> Callable[[argparse.Namespace], bool]:
    """Whether a flag has one of these values, or is none of the script's."""
    return lambda args: getattr(args, flag, values[0]) in values


def _is_meta_training(args: argparse.Namespace) -> bool:
    """Whether a training names no subsets."""
    chosen = [getattr(args, name, None) for name in ("subset_file", "task_weights", "task_idxes")]
    return hasattr(args, "stop_after_checkpoints") and chosen == [None, None, None]


RULES = (
    Rule(("use_qlora", "base_dtype"), _is("train_lora", True),
         "is for a base model that stays as it is; pass --train_lora too, or leave it out", refused=True),
    Rule(("use_qlora",), _is("strategy", "auto", "ddp"),
         "with --strategy fsdp: 4-bit weights are not spread; use ddp, or --base_dtype bfloat16", refused=True),
    Rule(("lora_rank", "lora_alpha", "lora_target_modules"), _is("train_lora", True),
         "has no effect without --train_lora: every weight is trained"),
    Rule(("batch_size",), lambda args: hasattr(args, "epochs"),
         "has no effect where nothing is trained"),
    Rule(("project_dim", "project_gradients"), _is("projection", "sketch", "two_sided", "dense"),
         "has no effect with --projection none, which keeps all numbers"),
    Rule(("data_files", "target_files", "train_instruction"), _is("dataset_key", None),
         "is instruction data, and --dataset_key chain of thought; name one of them", refused=True),
    Rule(("data_files",), _is("train_instruction", False),
         "and --train_instruction, which names files of its own; leave one of them out", refused=True),
    Rule(("results_name",), lambda args: not _is_meta_training(args), "has no effect in meta-training, which has --save_name"),
    Rule(("results_name",), _is("compute_pretrained_outputs", False),
         "has no effect with --compute_pretrained_outputs: gradients are named by --save_name"),
    Rule(("checkpoint_at", "stop_after_checkpoints", "logger"),
         lambda args: _is_meta_training(args) or not hasattr(args, "stop_after_checkpoints"),
         "has no effect in fine-tuning on subsets, only in meta-training"),
    Rule(("epochs", "lr", "batch_size", "accumulate", "loss_over", "weight_decay", "runs", "inference_batch_size", "max_new_tokens"),
         lambda args: getattr(args, "refine", True) is not None, "has no effect without --refine"),
    Rule(("num_clusters",), _is("load_clusters", True), "has no effect without --load_clusters"),
    Rule(("scale",), _is("evaluate", "displaced"), "has no effect without --evaluate displaced"),
    Rule(("scale", "seed"), _is("compute_pretrained_outputs", False),
         "has no effect with --compute_pretrained_outputs, only on the approximation error"),
    Rule(("representations", "save_projection_matrix", "on_nonfinite", "row_dtype", "max_tokens_per_batch"),
         _is("compute_pretrained_outputs", True), "has no effect without --compute_pretrained_outputs"),
    Rule(("rho",), lambda args: args.estimator not in ("alignment", "representation", "constant") or getattr(args, "weights", False),
         "has no effect on this estimator, which has no ridge"),
)  # fmt: skip


# --- from arguments to names ---------------------------------------------------------------------------------


def instruction_files(args: argparse.Namespace) -> list[str | Path]:
    """The training sources of the instruction track."""
    if args.data_files:
        return sorted(args.data_files)  # the order in which they are typed decides nothing
    return [ALPACA_FILE, FLAN_FILE, ZS_COT_FILE] if args.train_instruction else [ALPACA_FILE]


def _declared_by(*groups: Callable[[argparse.ArgumentParser], None]) -> list[argparse.Action]:
    """The flags that some groups declare."""
    parser = argparse.ArgumentParser(add_help=False)
    for add in groups:
        add(parser)
    return parser._actions


def flags_of(
    args: argparse.Namespace, *groups: Callable[[argparse.ArgumentParser], None], without: Iterable[str] = ()
) -> list[str]:
    """The flags of some groups whose values are not the groups' defaults, as a user types them."""
    words: list[str] = []
    for action in _declared_by(*groups):
        value = getattr(args, action.dest, action.default)
        if value == action.default or action.dest in without:
            continue
        words.append(action.option_strings[0])
        if action.nargs != 0:
            words += map(str, value if isinstance(value, list) else [value])
    return words


def instruction_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that decide what the rows of the instruction track are, with their values."""
    return {action.dest: getattr(args, action.dest) for action in _declared_by(add_instruction_data)}


def run_from(args: argparse.Namespace, run: int | None = None) -> Run:
    """The `Run` that a stage's arguments name."""
    if getattr(args, "dataset_key", None):
        data_key, preset_key = args.dataset_key, args.preset_key
    else:
        files = instruction_files(args)
        names = dict.fromkeys(source_names(map(str, files)).values())
        default = "instruction" if args.train_instruction else "+".join(names)
        data_key, preset_key = args.data_key or default, None
    return Run(
        args.model_key,
        data_key,
        preset_key,
        args.lora_rank if args.train_lora else None,
        args.save_name,
        args.run if run is None else run,
        args.results_name,
    )


@dataclass(frozen=True)
class Hardware:
    """Resolved hardware flags: what Lightning's Trainer takes."""

    accelerator: str
    devices: list[int] | int
    strategy: str
    precision: str
    num_nodes: int

    @property
    def device(self) -> str:
        """This process's device, for work outside a Trainer."""
        return f"cuda:{self.devices[int(os.environ.get('LOCAL_RANK', 0))]}" if isinstance(self.devices, list) else "cpu"

    @property
    def num_processes(self) -> int:
        """On all nodes together."""
        return (len(self.devices) if isinstance(self.devices, list) else self.devices) * self.num_nodes

    @property
    def autocast(self) -> str | None:
        """dtype name of mixed precision outside a Trainer, or None."""
        return {"16-mixed": "float16", "bf16-mixed": "bfloat16"}.get(self.precision)


_said: set[str] = set()


def say_once(message: str) -> None:
    """Print a notice the first time only."""
    if message not in _said:
        _said.add(message)
        say(message)


def is_another_process() -> bool:
    """Whether a launcher started this process as one that is not the first, so that it does not speak."""
    return any(int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def say(message: str) -> None:
    """Print a line beside progress bars, not into them; of several processes the first does."""
    if not is_another_process():
        tqdm.write(message)
        sys.stdout.flush()


def hardware_from(args: argparse.Namespace) -> Hardware:
    """Resolve the hardware flags against what the machine has.

    Under torchrun or srun the number of processes is theirs.

    Raises:
        ValueError: a GPU was asked for that is not there, or as many devices as the launcher did not start.
    """
    import torch

    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if args.accelerator == "cuda" and not available:
        raise ValueError("--accelerator cuda: this machine has no CUDA GPU; leave the flag out to run on the CPU")
    devices, num_nodes = args.devices, args.num_nodes
    if outside := _started_from_outside():
        per_node, num_nodes = outside
        devices = list(range(per_node)) if devices is None else devices
        if len(devices) != per_node:
            raise ValueError(
                f"--devices {' '.join(map(str, devices))}: the launcher started {per_node} processes on this node, one "
                "for each device; start as many as there are devices, or leave the flag out"
            )
    if args.accelerator == "cpu" or not available:
        processes = len(devices) if devices and (args.accelerator == "cpu" or outside) else 1
        if args.accelerator != "cpu":
            say_once(
                "No CUDA GPU here: everything runs on the CPU" + (", in 32-bit" if args.precision == "16" else "") + "."
            )
        elif args.precision == "16":
            say_once("note: --precision 16 is for a GPU: the CPU computes in 32 bits")
        precision = {"32": "32-true", "16": "32-true", "bf16": "bf16-mixed"}[args.precision]
        return Hardware("cpu", processes, args.strategy, precision, num_nodes)
    devices = devices or [0]
    if wrong := [device for device in devices if not 0 <= device < available]:
        raise ValueError(f"--devices {wrong[0]}: this machine has GPUs 0 to {available - 1}")
    precision = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}[args.precision]
    if args.strategy == "fsdp" and args.precision == "16":
        say_once("note: --strategy fsdp has no loss scaling, which 16 bits need: --precision bf16 is taken.")
        precision = "bf16-mixed"
    return Hardware("cuda", devices, args.strategy, precision, num_nodes)


def _started_from_outside() -> tuple[int, int] | None:
    """Processes on this node and number of nodes, where torchrun or srun started this process; else None."""
    from lightning_fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    if TorchElasticEnvironment.detect():
        per_node = int(os.environ["LOCAL_WORLD_SIZE"])
        return per_node, int(os.environ["WORLD_SIZE"]) // per_node
    if SLURMEnvironment.detect() and (tasks := int(os.environ["SLURM_NTASKS"])) > 1:
        nodes = int(os.environ.get("SLURM_NNODES", 1))
        return tasks // nodes, nodes
    return None


# --- what the user sees --------------------------------------------------------------------------------------


def progress(
    iterable: Iterable | None = None, *, desc: str, total: int | None = None, unit: str = "it", **options: Any
) -> tqdm:
    """A progress bar with rate and remaining time, for what takes over two seconds; in a log file, a line every so often."""
    watched = sys.stderr.isatty()
    if not watched:
        # the time is looked at in every step: bars guess how many steps an interval has, and a slower one would be silent
        options |= {"file": _Lines(sys.stderr), "mininterval": LOG_INTERVAL_SECONDS, "miniters": 1}
    known = total is not None or hasattr(iterable, "__len__")
    done = "{l_bar}{bar}| {n_fmt} of {total_fmt}" if watched else "{desc}: {percentage:.0f} %, {n_fmt} of {total_fmt}"
    pattern = f"{done} [{{elapsed}}<{{remaining}}, {{pace}}{{postfix}}]"
    options |= {
        "disable": is_another_process(),
        "bar_format": pattern if known else "{desc}: {n_fmt} {unit}s [{elapsed}, {pace}{postfix}]",
    }
    return _Bar(
        iterable, desc=desc, total=total, unit=unit, dynamic_ncols=watched, delay=SHOWN_AFTER_SECONDS, **options
    )


class _Bar(tqdm):
    """A bar that says its pace in words: 12 steps/s, or 3.4 s/step; and that keeps its delay whoever refreshes it."""

    def display(self, *args: Any, **options: Any) -> bool | None:
        if self._time() < getattr(self, "start_t", math.inf) + self.delay:
            return None
        return super().display(*args, **options)

    @property
    def format_dict(self) -> dict[str, Any]:
        facts = super().format_dict
        done, unit = facts["n"] - facts["initial"], facts["unit"]
        rate = facts["rate"] or (done / facts["elapsed"] if facts["elapsed"] else 0)
        pace = f"{rate:,.3g} {unit}s/s" if rate >= 1 else f"{1 / rate:,.3g} s/{unit}" if rate else "…"
        return {**facts, "pace": pace}


class _Lines:
    """A log file to a progress bar: each of its states is a line, where a terminal's is written over the last."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.last = file, ""

    def write(self, text: str) -> None:
        line = text.replace("\x1b[A", "").strip()  # a bar inside a bar moves the cursor
        if line and line != self.last:
            self.file.write(f"{line}\n")
            self.last = line

    def flush(self) -> None:
        self.file.flush()


@contextlib.contextmanager
def waiting_for(what: str) -> Iterator[None]:
    """Says what is going on when it takes over two seconds and has no steps to count."""
    if is_another_process():
        yield
        return
    timer = threading.Timer(SHOWN_AFTER_SECONDS, tqdm.write, [f"{what} …"], {"file": sys.stderr})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def is_dry_run(args: argparse.Namespace, reads: Iterable[str | Path], writes: Iterable[str | Path]) -> bool:
    """Whether `--dry_run` was asked for; then what would be read and written is printed, and whether it is there."""
    if not args.dry_run:
        return False
    for verb, names in (("read", reads), ("write", writes)):
        for name in names:
            print(f"would {verb}  {name}{'' if verb == 'read' or not Path(name).exists() else '  (is there already)'}")
    return True


def spent(started: float) -> dict[str, float]:
    """Seconds since `started` (`time.perf_counter`) and the process's largest memory so far in bytes, for a manifest."""
    import torch

    peaks = {"peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.cuda.is_available():
        peaks["peak_gpu_memory"] = torch.cuda.max_memory_allocated()
    return {"seconds": time.perf_counter() - started, **peaks}


def counted(number: int, noun: str) -> str:
    """A number and its noun: 1 row, 2 rows."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def say_notices(notices: Iterable[str]) -> None:
    """Print the one-line notices of a loading step."""
    for notice in notices:
        say_once(f"note: {notice}")


def quiet_libraries() -> None:
    """Silence what libraries print on every start and a user cannot act on; imports the slowest of them."""
    import logging

    import pytorch_lightning  # noqa: F401

    for name in ("lightning_fabric", "pytorch_lightning", "pytorch_lightning.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", module="pytorch_lightning.*")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers.*")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def load_script(script: str) -> ModuleType:
    """The module of a script of this project, named as a user types it; loaded once."""
    name = "script_" + script.removesuffix(".py").replace("/", "_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / script)
        if spec is None or spec.loader is None or not (ROOT / script).is_file():
            raise FileNotFoundError(f"no script {ROOT / script}")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)  # dataclasses look themselves up there
        spec.loader.exec_module(module)
    return sys.modules[name]


_typed: list[str] = []


def command_typed() -> str:
    """The command that is running, as a user types it: for manifests."""
    return shlex.join(["python", *(_typed or sys.argv)])


def run_command(command: str, *more: str) -> Any:
    """`python <command> <more>` in this process, printed first: what benchmarks and the quickstart are made of."""
    script, *arguments = _typed[:] = [*shlex.split(command), *more]
    print(f"\n\033[1m$ {command_typed()}\033[0m", flush=True)
    module = load_script(script)
    return run_stage(module.main, module.parse_args(arguments))


_GOES_ON = "then run the same command again: what was finished is kept"
_CURES = {
    errno.ENOSPC: f"free space there, {_GOES_ON}",
    errno.EDQUOT: f"your quota there is used up; free space or raise it, {_GOES_ON}",
    errno.EFBIG: f"the limit on file sizes is lower (ulimit -f); raise it, {_GOES_ON}",
    errno.EIO: f"look at the space and the health of that disk, {_GOES_ON}",
    errno.ENOTDIR: f"a file stands where a folder is to be; move it away, {_GOES_ON}",
    errno.EEXIST: f"a file stands where a folder is to be; move it away, {_GOES_ON}",
    errno.EISDIR: f"a folder stands where a file is to be; move it away, {_GOES_ON}",
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS),
        f"make that folder writable, or work in another one, {_GOES_ON}",
    ),
}
"""What to do about errors of the operating system that a user can mend."""


_OUT_OF_MEMORY = re.compile(r"out of memory|allocate memory|not enough memory|bad_alloc|ALLOC_FAILED", re.I)
_SAVES_MEMORY = {
    "accumulate": "a smaller --batch_size with a larger --accumulate",
    "max_tokens_per_batch": "a smaller --max_tokens_per_batch",
    "gradient_checkpointing": "--gradient_checkpointing",
    "precision": "--precision bf16",
    "base_dtype": "--base_dtype bfloat16",
    "use_qlora": "--use_qlora",
    "strategy": "--strategy fsdp",
    "max_length": "a smaller --max_length",
    "project_dim": "a smaller --project_dim",
}
"""Flag that a script may have -> how it saves memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, a GPU's or the CPU's: of the CPU's, torch says so only in the text of a RuntimeError."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


def _line_about(error: Exception, args: argparse.Namespace) -> str | None:
    """An error that the user can mend in one line: what, where, and the cure. None for other errors."""
    if is_out_of_memory(error):
        asked = re.search(r"allocate ([\d.]+ ?\w+)", str(error))
        cures = ", ".join(cure for flag, cure in _SAVES_MEMORY.items() if hasattr(args, flag))
        return f"out of memory{f' (asked for {asked[1]} more)' if asked else ''}" + (f"; try {cures}" if cures else "")
    if isinstance(error, OSError) and error.errno in _CURES:
        what = error.strerror or type(error).__name__
        return f"cannot use {error.filename}: {what[:1].lower()}{what[1:]}; {_CURES[error.errno]}"
    return str(error) if isinstance(error, (ValueError, FileNotFoundError, FileExistsError)) else None


def run_stage(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> Any:
    """Run a stage's `main`; an error that the user can mend is one line and exit status 1, not a traceback."""
    try:
        with waiting_for("loading the libraries"):
            quiet_libraries()
        return main(args)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on, or starts again, where it was", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        line = _line_about(error, args)
        if line is None or os.environ.get("GRADEX_TRACEBACK"):
            raise
        sys.exit(f"error: {line}")
