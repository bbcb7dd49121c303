"""Configuration: one dataclass for each concern, from which flags, help, defaults and manifests are made.

A stage's configuration is a dataclass that inherits from the groups it needs, so that its fields are the stage's flags.
What is not typed comes from the run that the stage goes on from (`inherit`), else from the defaults here.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from src import artifacts
from src.artifacts import ALPACA_FILE, FLAN_FILE, GRADIENTS, META_INITIALIZATIONS, ZS_COT_FILE, slug
from src.console import Parser, say_once
from src.distributed import PRECISIONS, Hardware, resolve_hardware

ALL_TASKS, AUTO = "all", "auto"


def number(
    kind: type, low: float = -math.inf, *, above: float = -math.inf, high: float = math.inf, word: str = ""
) -> Callable[[str], Any]:
    """Return an argparse type: a finite number in a range, or one given word."""

    def convert(text: str) -> Any:
        if word and text == word:
            return text
        value, bounds = kind(text), f"above {above:g}" if above > -math.inf else f"of at least {low:g}"
        if not (low <= value <= high and value > above and math.isfinite(value)):
            bounds = f"from {low:g} to {high:g}" if high < math.inf else bounds
            raise argparse.ArgumentTypeError(f"{text}: expected a {'whole ' * (kind is int)}number {bounds}")
        return value

    convert.__name__ = "number"
    return convert


COUNT, NOT_NEGATIVE, POSITIVE = number(int, 1), number(float, 0), number(float, above=0)
SHARE = number(float, 0, high=1)
METAVARS = {COUNT: "N", int: "N", NOT_NEGATIVE: "X", POSITIVE: "X", SHARE: "SHARE"}


def share_or_count(text: str) -> float | int:
    """A share of the tasks between 0 and 1, or a whole number of them."""
    value = float(text)
    if not 0 < value < 1 and (value < 1 or value != int(value)):
        raise argparse.ArgumentTypeError(f"{text}: expected a share between 0 and 1, or a whole number of tasks")
    return value if value < 1 else int(value)


def flag(
    default: Any, help: str, type: Callable[[str], Any] = str, metavar: str | None = None, *, free: bool = False,
    shown: str | None = None, alias: str | None = None, nargs: str | None = None, choices: Sequence[str] | None = None,
) -> Any:  # fmt: skip
    """A field of a configuration and its flag. Help adds the default, or what is `shown` in its place; a `free` flag may
    differ from the run that a stage goes on from; `alias` is another name, the rest as argparse takes it."""
    options = {"type": type, "metavar": metavar or METAVARS.get(type), "nargs": nargs, "choices": choices}
    metadata = {"help": help, "shown": shown, "alias": alias, "free": free,
                "options": {name: value for name, value in options.items() if value is not None}}  # fmt: skip
    return field(default=default, metadata=metadata)


# --- the groups ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InstructionData:
    """data (instruction)"""

    data_files: tuple[str, ...] = flag((), "training sources: files, folders, or hub ids as org/name:split",
        metavar="SOURCE", nargs="+", shown=str(ALPACA_FILE))  # fmt: skip
    target_files: tuple[str, ...] = flag((), "target tasks, never trained on",
        metavar="SOURCE", nargs="+", shown="each training task is a target too")  # fmt: skip
    train_instruction: bool = flag(False, "train on Alpaca, FLAN v2 and chain of thought", shown="--data_files")
    prompt_column: str | None = flag(None, "column of the prompts, in sources that have it",
        metavar="NAME", shown="found by its name")  # fmt: skip
    completion_column: str | None = flag(None, "column of the completions, in sources that have it",
        metavar="NAME", shown="found by its name")  # fmt: skip
    loss_on_prompt: bool = flag(False, "count a decoder's prompts in the loss, as published", shown="do not")

    @property
    def sources(self) -> list[str]:
        """The training sources; the order in which they are typed decides nothing."""
        alpaca = [ALPACA_FILE, FLAN_FILE, ZS_COT_FILE] if self.train_instruction else [ALPACA_FILE]
        return sorted(self.data_files) or list(map(str, alpaca))


@dataclass(frozen=True)
class RowsConfig:
    """tasks and held-out rows"""

    task_column: str | None = flag(None, "column that names a row's task, in sources that have it",
        metavar="NAME", shown="_task_name, skill or task")  # fmt: skip
    heldout_share: float | None = flag(None, "share of a task's prompts for validation, and again for test",
        SHARE, shown="0.1; with --target_files 0")  # fmt: skip
    max_heldout: int | None = flag(None, "most prompts of a task for each", COUNT, shown="50; chain of thought 500")


@dataclass(frozen=True)
class CotData:
    """data and generation (chain of thought)"""

    dataset_key: str | None = flag(None, "data set: strategy_qa, gsm8k, …", metavar="KEY", shown="instruction data")
    preset_key: str = flag("ft_cot", "rows: ft, ft_cot, ft_cot_t70_<k>aug with k of 1 2 4 8 16 32 64", metavar="KEY")
    keep_incorrect: bool = flag(False, "train on completions with a wrong answer too, as published", shown="do not")
    inference_batch_size: int = flag(32, "rows of a generation batch", COUNT, free=True)
    max_new_tokens: int = flag(256, "longest generated completion, in tokens", COUNT, free=True)


@dataclass(frozen=True)
class CotFiles:
    """files (chain of thought)"""

    train_key: str = flag("ft_cot", "free label of the run, kept in prediction files", metavar="KEY", free=True)
    split_key: str = flag("default", "which split: <data_dir>/split/<data set>__<key>.json", metavar="KEY")
    data_dir: str = flag("data", "folder of dataset/ and split/", metavar="FOLDER")
    saved_dir: str = flag("saved", "folder of completion_data/: the teacher's and the model's own", metavar="FOLDER")


@dataclass(frozen=True)
class DataConfig(InstructionData, RowsConfig, CotData, CotFiles):
    """data"""

    @property
    def training_script(self) -> str:
        """Stage 1's script of the track."""
        return "custom_train.py" if self.dataset_key else "custom_train_alpaca.py"


@dataclass(frozen=True)
class ModelConfig:
    """model"""

    model_key: str = flag("TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
        "hub id, folder, or short key such as flan_t5_base", metavar="MODEL")  # fmt: skip
    train_lora: bool = flag(False, "train a LoRA adapter", shown="every weight")
    lora_rank: int = flag(16, "rank of the adapter, with --train_lora", COUNT)
    lora_alpha: int = flag(32, "scale of the adapter: its update counts alpha / rank, with --train_lora", COUNT)
    lora_target_modules: tuple[str, ...] | None = flag(None, "layers that carry the adapter, or all-linear",
        metavar="NAME", nargs="+", shown="the attention's inputs")  # fmt: skip
    base_dtype: str = flag("float32", "dtype of the frozen base, with --train_lora", choices=("float32", "bfloat16"))
    use_qlora: bool = flag(False, "hold the base model in 4 bits (NF4), compute in bfloat16", shown="see --base_dtype")
    gradient_checkpointing: bool = flag(False, "save memory: compute activations twice", free=True, shown="do not")
    max_length: int = flag(512, "longest row (decoder) or prompt (encoder-decoder), in tokens", COUNT)
    max_target_length: int = flag(512, "longest completion of an encoder-decoder, in tokens", COUNT)


@dataclass(frozen=True)
class TrainingConfig:
    """training"""

    batch_size: int = flag(128, "rows of a training batch, per device", COUNT)
    accumulate: int = flag(1, "batches per optimizer step", COUNT)
    lr: float = flag(2e-5, "learning rate of AdamW", POSITIVE)
    loss_over: str = flag("token", "a batch's loss is the mean over target tokens, or rows", choices=("token", "row"))
    weight_decay: float = flag(0.0, "weight decay of AdamW", NOT_NEGATIVE)
    epochs: int = flag(10, "passes over the rows", COUNT)


@dataclass(frozen=True)
class CheckpointShares:
    """meta-training"""

    checkpoint_at: tuple[float, ...] = flag((0.08, 0.2, 0.5), "shares of the steps to keep checkpoints at; 0: the start",
        SHARE, nargs="*")  # fmt: skip


@dataclass(frozen=True)
class MetaTrainingConfig(CheckpointShares):
    """meta-training"""

    stop_after_checkpoints: bool = flag(False, "stop after these: estimates need no more", free=True, shown="train on")
    load_model_dir: str | None = flag(None, "checkpoint to start from", metavar="RUN/CHECKPOINT", shown="base model")


@dataclass(frozen=True)
class StatesConfig:
    """interruptions"""

    save_every: float = flag(15.0, "minutes between states that a killed training goes on from",
        NOT_NEGATIVE, "MINUTES", free=True)  # fmt: skip


@dataclass(frozen=True)
class ChosenTasks:
    """fine-tuning on subsets"""

    subset_file: str | None = flag(None, "fine-tune on the tasks of each line of a file, and append their losses",
        metavar="FILE", shown="meta-training")  # fmt: skip
    task_weights: str | None = flag(None, "fine-tune on rows drawn in the shares of this CSV",
        metavar="FILE", shown="meta-training")  # fmt: skip
    task_idxes: tuple[Any, ...] | None = flag(None, "fine-tune on these tasks, or `all`; on none: the base model",
        number(int, 0, word=ALL_TASKS), "ID", nargs="*", shown="meta-training")  # fmt: skip


@dataclass(frozen=True)
class StepsConfig:
    """length of a fine-tuning"""

    max_steps: int | None = flag(None, "optimizer steps of each fine-tuning, whatever its rows", COUNT, free=True,
        shown="as many as --epochs are")  # fmt: skip


@dataclass(frozen=True)
class RunsConfig:
    """repetitions"""

    runs: int = flag(1, "repetitions, with seeds 0, 1, …", COUNT, free=True)


@dataclass(frozen=True)
class NameConfig:
    """run"""

    save_name: str | None = flag(None, "name of the run, from which later stages take their flags",
        metavar="NAME", shown="model and data; later the last that fits")  # fmt: skip
    results_name: str | None = flag(None, "name of tables and selections", str, "NAME", free=True, shown="--save_name")


@dataclass(frozen=True)
class HardwareConfig:
    """hardware"""

    devices: tuple[int, ...] | None = flag(None, "GPU numbers: `--devices 1` is the second, `--devices 0 1` are two",
        int, "GPU", nargs="+", alias="--device", free=True, shown="GPU 0")  # fmt: skip
    accelerator: str = flag("auto", "auto: a GPU if there is one; cpu: a process for each of --devices",
        choices=("auto", "cuda", "cpu"), free=True)  # fmt: skip
    strategy: str = flag("auto", "ddp, auto: the whole model in each process; fsdp: its weights spread",
        choices=("auto", "ddp", "fsdp"), free=True)  # fmt: skip
    precision: str = flag("32", "32 bits, or mixed in 16 or bf16; Lightning's names too",
        metavar="NAME", free=True, choices=("32", "16", "bf16", *PRECISIONS))  # fmt: skip
    num_nodes: int = flag(1, "machines, each with as many processes", COUNT, free=True)

    @property
    def hardware(self) -> Hardware:
        """These flags against what this machine has; notices are printed once."""
        return resolve_hardware(self, say_once)


@dataclass(frozen=True)
class ProjectionConfig:
    """projection"""

    project_dim: int = flag(4000, "dimension d of the projected gradients", COUNT, alias="--project_dimension")
    projection: str = flag("sketch", "kind; none keeps all p numbers", choices=("sketch", "two_sided", "dense", "none"))
    output_function: str = flag("loss", "what is differentiated: loss, or log-odds", choices=("loss", "margin"))
    project_gradients: bool = flag(False, "published; has no effect", free=True, shown="gradients are projected")


@dataclass(frozen=True)
class LoadedCheckpoints:
    """checkpoints"""

    load_model_dir: tuple[str, ...] | None = flag(None, "checkpoints: below external_lightning_logs/, for example "
        "RUN/epoch_epoch=17, or folders that peft or another trainer saved; with these, `base` is their base model", metavar="CHECKPOINT", nargs="+", free=True,
        shown="those that --checkpoint_at kept in this run; later stages all that have gradients, averaged")  # fmt: skip


@dataclass(frozen=True)
class CheckpointsConfig(LoadedCheckpoints):
    """meta-initialization"""

    run: int = flag(0, "number of the run, and seed of its projection and subsets", number(int, 0), "N")


@dataclass(frozen=True)
class GradientConfig:
    """gradients"""

    representations: bool = flag(False, "also keep hidden states, for --estimator representation", shown="do not")
    save_projection_matrix: bool = flag(False, "also write the projection's random signs, packed in bits",
        free=True, shown="do not")  # fmt: skip
    max_tokens_per_batch: Any = flag(4096, "padded tokens of a batch, or auto: as many as a GPU takes",  # noqa: RUF009
        number(int, 1, word=AUTO), "TOKENS", free=True)  # fmt: skip


@dataclass(frozen=True)
class ClustersConfig:
    """clusters as tasks"""

    load_clusters: bool = flag(False, "tasks are clusters of the training rows' gradients",
        free=True, shown="the data's own tasks")  # fmt: skip
    num_clusters: int = flag(100, "number of clusters, with --load_clusters", COUNT, free=True)


@dataclass(frozen=True)
class TargetConfig:
    """target"""

    target_task: tuple[str, ...] | None = flag(None, "target tasks",
        metavar="NAME", nargs="+", free=True, shown="all; selection: those of --target_files")  # fmt: skip


@dataclass(frozen=True)
class EstimatorConfig:
    """estimation"""

    estimator: str = flag("ridge", "ridge, linear, logistic, alignment, representation or constant",
        metavar="NAME", free=True)  # fmt: skip
    rho: float = flag(1e-3, "ridge strength lambda, per mean squared norm of a gradient", POSITIVE, free=True)
    weight_by: str | None = flag(None, "unit of equal weight: target token, row (sample), or task",
        free=True, choices=("token", "sample", "task"), shown="the meta-training's")  # fmt: skip


@dataclass(frozen=True)
class SubsetsConfig:
    """subsets"""

    sampled_tasks: str | None = flag(None, "file of subsets, a line each; drawn and written if absent",
        metavar="FILE", shown="sampled_tasks/<run>.txt")  # fmt: skip
    number_of_subsets: int | None = flag(None, "subsets to draw", COUNT, shown="1000, or as many as there are")
    subset_size: Any = flag(None, "share or number of the tasks in each", share_or_count, "SIZE", shown="0.5")  # noqa: RUF009
    calibrate: str | None = flag(None, "results.csv of five or more fine-tuned subsets: add intervals",
        metavar="CSV", shown="estimates as they are")  # fmt: skip
    evaluate: str = flag("first_order", "displaced: run the displaced model too", choices=("first_order", "displaced"))
    scale: float | None = flag(None, "its length, in norms of the weights", POSITIVE, shown="that of the solution")


@dataclass(frozen=True)
class ApproximationConfig:
    """stage 2, or the approximation error"""

    compute_pretrained_outputs: bool = flag(False, "take gradients, which is stage 2",
        shown="measure the approximation error")  # fmt: skip
    scale: tuple[float, ...] = flag((0.02, 0.04, 0.06, 0.08, 0.1), "lengths of the displacements as a share of the "
        "norm of the trained weights", POSITIVE, nargs="+")  # fmt: skip
    seed: tuple[int, ...] = flag((0,), "seeds of the random directions", int, nargs="+")
    toward: tuple[str, ...] = flag((), "fine-tuned models to measure the error towards",
        metavar="FOLDER", nargs="+", shown="random directions")  # fmt: skip


@dataclass(frozen=True)
class SelectionConfig:
    """selection"""

    method: str = flag("forward", "forward adds the best, backward drops the worst", str, "NAME", alias="--direction")
    start_from: tuple[int, ...] = flag((), "tasks to start with", int, "ID", nargs="+", shown="none; backward: all")
    max_tasks: int | None = flag(None, "most tasks in the subset", COUNT, shown="no limit")
    budget_rows: int | None = flag(None, "at most so many training rows", COUNT, shown="no limit")
    try_at_most: int | None = flag(None, "tasks to try at a step, those that last looked best", COUNT, shown="all")
    refine: int | None = flag(None, "fine-tune the K best subsets on the way and select among them",
        number(int, 0), "K", shown="0; with --keep_task 1")  # fmt: skip
    weights: bool = flag(False, "also find how much to draw from each task, for --task_weights", shown="do not")
    per_target: bool = flag(False, "select for each target; show what each task alone does", shown="do not")


@dataclass(frozen=True)
class KeepConfig:
    """what must not get worse"""

    keep_task: tuple[str, ...] = flag((), "targets that must not get worse, estimated and fine-tuned",
        metavar="NAME", nargs="+", shown="none")  # fmt: skip
    tolerance_keep: float = flag(0.0, "by how much more these losses may be, in nats per token", number(float), "X")


# --- the stages' configurations ------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunConfig(DataConfig, ModelConfig, TrainingConfig, NameConfig, HardwareConfig):
    """What every stage knows of its run: data, model, training, name; and where it runs itself."""

    @property
    def lora(self) -> int | None:
        """The adapter's rank; None without one."""
        return self.lora_rank if self.train_lora else None

    def name(self, run: int = 0, suffix: str | None = None) -> str:
        """`<model>_<data>[_<preset>][_lora_r_<r>][_<suffix>]_run_<k>`."""
        parts = [slug(self.model_key), slug(self.data_name)]
        parts += [slug(self.preset_key)] if self.dataset_key else []
        parts += [f"lora_r_{self.lora}"] if self.lora else []
        parts += [slug(suffix)] if suffix else []
        return f"{slug('_'.join(parts))}_run_{run}"

    @property
    def data_name(self) -> str:
        """What folder names and figures call the training data."""
        names = dict.fromkeys(artifacts.source_names(self.sources).values())
        return self.dataset_key or ("instruction" if self.train_instruction else "+".join(names))

    @property
    def results(self) -> str:
        """What `results/` and `sampled_tasks/` call this run: --results_name, else --save_name, else its name."""
        return self.results_name or self.save_name or self.name()

    def training_dir(self, run: int) -> Path:
        """Folder of a meta-training: one sub-folder per checkpoint."""
        return META_INITIALIZATIONS / self.name(run, self.save_name)


@dataclass(frozen=True)
class TrainConfig(RunConfig, MetaTrainingConfig, StatesConfig, ChosenTasks, StepsConfig, RunsConfig, ClustersConfig):
    """Stages 1 and 5."""


@dataclass(frozen=True)
class StoreConfig(RunConfig, CheckpointsConfig, ProjectionConfig):
    """Settings that name a store of projected gradients."""

    def store_dir(self, run_folder: Path | None) -> Path:
        """The store's folder, one sub-folder per checkpoint: named as the meta-training is, whatever data came later."""
        name = self.name(self.run, self.save_name) if run_folder is None else run_folder.name
        dim = "full" if self.projection == "none" else self.project_dim
        margin = "" if self.output_function == "loss" else f"_{self.output_function}"
        return GRADIENTS / f"{name.removesuffix(f'_run_{self.run}')}_dim_{dim}{margin}_run_{self.run}"


@dataclass(frozen=True)
class CollectConfig(StoreConfig, GradientConfig, ApproximationConfig):
    """Stage 2, and the approximation error."""


@dataclass(frozen=True)
class EstimationConfig(StoreConfig, ClustersConfig, TargetConfig, EstimatorConfig):
    """Settings that estimates depend on."""


@dataclass(frozen=True)
class EstimateConfig(EstimationConfig, SubsetsConfig):
    """Stage 3."""


@dataclass(frozen=True)
class SelectConfig(EstimationConfig, SelectionConfig, KeepConfig, RunsConfig):
    """Stage 4."""


# --- from flags and manifests to a configuration --------------------------------------------------------------

Config = TypeVar("Config", bound=RunConfig)
RECORDED = {f.name for group in (DataConfig, ModelConfig, TrainingConfig, ProjectionConfig, GradientConfig)
            for f in fields(group)} | {"save_name", "run", "precision", "checkpoint_at"}  # fmt: skip
"""What a manifest records for the stages after it."""
DATA_FLAGS = tuple(f.name for f in fields(DataConfig))


def add_flags(parser: argparse.ArgumentParser, *groups: type, hidden: bool = False, **defaults: Any) -> None:
    """Declare the flags of some groups; those that a stage inherits are `hidden` from its help and taken all the same."""
    for group in groups:
        section = parser.add_argument_group(group.__doc__)
        for f in fields(group):
            about, default = f.metadata, defaults.get(f.name, f.default)
            shown = _words(default) if about["shown"] is None or f.name in defaults else about["shown"]
            text = f"{about['help']} (default: {shown})".replace("%", "%%")
            options = {"action": "store_true"} if isinstance(f.default, bool) else about["options"]
            names = filter(None, [f"--{f.name}", about["alias"]])
            section.add_argument(*names, help=argparse.SUPPRESS if hidden else text, default=None, **options)


def stage_parser(
    doc: str | None, shown: Sequence[type], inherited: Sequence[type] = (), also: Sequence[type] = (), **defaults: Any
) -> Parser:
    """The parser of a stage: the groups of flags that its help explains, those that it takes from its run unless they are
    typed, and those that it accepts without a line of help."""
    notes = [(doc or "").rstrip()]
    if inherited:
        notes.append("Flags of data, model and training are those of the run; typed as for stage 1, they must agree.")
    if also:
        notes.append("Taken too: " + " ".join(f"--{f.name}" for group in also for f in fields(group)))
    parser = Parser("\n\n".join(notes))
    add_flags(parser, *shown, **defaults)
    add_flags(parser, *inherited, *also, hidden=True, **defaults)
    return parser


def typed_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that were typed, by name; lists become tuples."""
    return _with_tuples({name: value for name, value in vars(args).items() if value is not None})


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def recorded(config: RunConfig) -> dict[str, Any]:
    """What the stages after this one take from its manifest."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name in RECORDED}


def contradictions(cls: type, typed: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[str]:
    """List typed flags that differ from a manifest's configuration, each with both values."""
    there = manifest["config"]
    names = [f.name for f in fields(cls) if f.name in typed and f.name in there and not f.metadata["free"]]
    differing = [name for name in names if _comparable(typed[name]) != _comparable(there[name])]
    return [f"--{name} {_words(there[name])} there, {_words(typed[name])} typed" for name in differing]


def _comparable(value: Any) -> Any:
    """Normalise a flag's value: paths relative, names of sources sorted."""
    if isinstance(value, (list, tuple)):
        values = [_comparable(one) for one in value]
        return sorted(values) if values and isinstance(values[0], str) else values
    return os.path.relpath(value) if isinstance(value, str) and os.path.exists(value) else value


def _words(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(_words, value)) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _misfit(path: Path, differing: Sequence[str], made_by: str) -> ValueError:
    repair = f"Leave these flags out, or make another with {made_by}"
    return ValueError(f"{path} does not fit what is typed: {'; '.join(differing)}. {repair}")


def parent_of(
    cls: type, typed: Mapping[str, Any], pattern: str, made_by: str, ignoring: Sequence[str] = (), *, optional: bool = False
) -> tuple[Path, dict[str, Any]] | None:  # fmt: skip
    """The finished artifact that a stage goes on from, and its manifest: that of the --save_name or --load_model_dir that is
    typed, else the last that contradicts nothing that is typed, but for the flags that are ignored.

    `pattern` is of the artifacts' folders; `made_by` says in messages what makes one. Where it is `optional`, none need fit
    that no name asks for. ValueError: no artifact is called so, or each contradicts what is typed; both values are named.
    """
    wanted = {name: value for name, value in typed.items() if name not in (*ignoring, "save_name", "load_model_dir")}
    there = [(path, found) for path, found in artifacts.finished(pattern) if "config" in found]
    name, checkpoints = typed.get("save_name"), typed.get("load_model_dir")
    if checkpoints:
        names = [checkpoints] if isinstance(checkpoints, str) else checkpoints
        folders = {artifacts.resolve_checkpoint(one).resolve() for one in names if one != artifacts.BASE}
        runs = {folder.parent for folder in folders}
        there = [(path, found) for path, found in there
                 if path.resolve() in runs or Path(found.get("checkpoint_dir", "")).resolve() in folders]  # fmt: skip
    elif name:
        of_name = [(path, found) for path, found in there if found["config"]["save_name"] == name]
        if not of_name and optional:
            return None
        if not of_name and not (there and wanted.keys() - {"run", "output_function"}):
            called = sorted({found["config"]["save_name"] or path.name for path, found in there}) or ["nothing"]
            what = f"nothing finished is called that; there is {', '.join(called)}"
            raise ValueError(f"--save_name {name}: {what}; make it with {made_by}")
        there = of_name or [(path, found) for path, found in there if not found["config"]["save_name"]]
        if there and not of_name:
            say_once(f"note: no run is called {name}: one without a name is taken, and {name} names what is made of it")
    differing = [contradictions(cls, wanted, found) for _, found in there]
    if fitting := [one for one, others in zip(there, differing, strict=True) if not others]:
        if "save_name" not in typed and "load_model_dir" not in typed:
            say_once(f"going on from {fitting[-1][0]}")
        return fitting[-1]
    if there and (name or not optional):
        nearest = min(range(len(there)), key=lambda position: len(differing[position]))
        raise _misfit(there[nearest][0], differing[nearest], made_by)
    return None


def _for_gradients(typed: Mapping[str, Any]) -> dict[str, Any]:
    """Drop --batch_size, which the published commands give to stages that do not train."""
    if "batch_size" in typed:
        say_once("note: --batch_size has no effect where nothing is trained")
    return {name: value for name, value in typed.items() if name != "batch_size"}


def from_run(cls: type[Config], typed: Mapping[str, Any], **defaults: Any) -> tuple[Config, Path | None]:
    """The configuration of stage 2, and the folder of the meta-training that it goes on from; None where checkpoints of
    another trainer are named. Data may be others than in meta-training: a source can be added later."""
    typed, stage_1 = _for_gradients(typed), "stage 1 (custom_train.py or custom_train_alpaca.py)"
    parent = parent_of(cls, {"run": 0, **typed}, f"{META_INITIALIZATIONS}/*", stage_1, DATA_FLAGS)
    folder, manifest = parent or (None, None)
    if parent is None and typed.get("load_model_dir"):
        manifest = {"config": of_another_trainer(typed["load_model_dir"])}
    return inherit(cls, typed, manifest, **defaults), folder


def of_another_trainer(checkpoints: Sequence[str]) -> dict[str, Any]:
    """What the folders that peft, transformers or a trainer on top of them saved say of base model, adapter and training, as
    flags; printed in a line. ValueError: two of them differ, or there is none."""
    found: dict[str, tuple[Any, Path]] = {}
    folders = [artifacts.resolve_checkpoint(name) for name in checkpoints if name != artifacts.BASE]
    if not folders:
        raise ValueError(f"--load_model_dir {artifacts.BASE}: name a checkpoint that was trained from it too")
    for folder in folders:
        adapter = artifacts.described(folder, artifacts.ADAPTER_CONFIG)
        state = artifacts.described(folder, artifacts.TRAINER_STATE)
        modules = adapter.get("target_modules")
        rates = [entry.get("learning_rate", 0) for entry in state.get("log_history", ())]
        says = {
            "train_lora": bool(adapter),
            "model_key": adapter.get("base_model_name_or_path"),
            "lora_rank": adapter.get("r"),
            "lora_alpha": adapter.get("lora_alpha"),
            "lora_target_modules": (modules,) if isinstance(modules, str) else tuple(sorted(modules or ())) or None,
            "lr": max(rates, default=0) or None,
            "epochs": state.get("num_train_epochs"),
            "batch_size": state.get("train_batch_size"),
        }
        for name, value in says.items():
            if value is not None and found.setdefault(name, (value, folder))[0] != value:
                other, where = found[name]
                raise ValueError(f"--load_model_dir: --{name} is {_words(other)} in {where} and {_words(value)} in {folder}; "
                                 "name checkpoints of one training")  # fmt: skip
    words = ", ".join(f"{name} {_words(value)}" for name, (value, _) in found.items() if value is not False)
    say_once(f"note: taken from {folders[0]}: {words}" + (" (lr: the highest that is logged)" if "lr" in found else ""))
    return {name: value for name, (value, _) in found.items()}


def from_store(cls: type[Config], typed: Mapping[str, Any], output_function: str | None = None) -> tuple[Config, Path]:
    """The configuration of stages 3 and 4, and the store of gradients, of this output function where it matters, that they
    go on from. FileNotFoundError: there is none."""
    typed = _for_gradients(typed)
    wanted = {"run": 0, "output_function": output_function or "loss", **typed}
    parent = parent_of(cls, wanted, f"{GRADIENTS}/*/*", "stage 2")
    if parent is None:
        raise FileNotFoundError(
            f"no projected gradients in {GRADIENTS}/ fit; make them with: python fast_estimate_compute_gradients.py or "
            "python fast_estimate_eval_approximation_alpaca.py --compute_pretrained_outputs"
        )
    return inherit(cls, typed, parent[1]), parent[0].parent


def for_training(typed: Mapping[str, Any], **defaults: Any) -> TrainConfig:
    """The configuration of stages 1 and 5. Fine-tuning takes what is not typed from the run of this --save_name, or from
    the last one that fits, and its data as they were when gradients were last taken; meta-training from a run of the same
    name alone."""
    named, fine_tunes = "save_name" in typed, any(f.name in typed for f in fields(ChosenTasks))
    given = {name: value for name, value in typed.items() if name != "load_model_dir"}
    made_by, ignoring = "stage 1 and another --save_name", DATA_FLAGS if fine_tunes else ()
    runs, manifest, parent = f"{META_INITIALIZATIONS}/*", None, None
    if named or fine_tunes:
        parent = parent_of(TrainConfig, given, runs, made_by, ignoring, optional=True)
    if fine_tunes and not parent:  # trained by another trainer: its gradients say what with
        trained_with = tuple(f.name for f in fields(TrainingConfig))
        parent = parent_of(TrainConfig, given, f"{GRADIENTS}/*/*", made_by, trained_with, optional=True)
        manifest, parent = parent[1] if parent else None, None
    if parent:
        folder, manifest = parent
        if fine_tunes:
            stores = [store for _, store in artifacts.finished(f"{GRADIENTS}/*/*")
                      if Path(store["checkpoint_dir"]).parent.resolve() == folder.resolve()]  # fmt: skip
            last = [manifest, *stores][-1]["config"]
            manifest = {**manifest, "config": manifest["config"] | {name: last[name] for name in DATA_FLAGS}}
            differing = contradictions(TrainConfig, given, manifest)
            if differing and named:
                raise _misfit(folder, differing, made_by)
            manifest = None if differing else manifest
    return inherit(TrainConfig, typed, manifest, **defaults)


def inherit(
    cls: type[Config], typed: Mapping[str, Any], manifest: Mapping[str, Any] | None = None, **defaults: Any
) -> Config:
    """A stage's configuration: what is typed, else what the artifact that it goes on from records, else the defaults.
    ValueError: flags contradict each other; both are named."""
    names = {f.name for f in fields(cls)}
    values = _with_tuples({**defaults, **(manifest["config"] if manifest else {}), **typed})
    config = cls(**{name: value for name, value in values.items() if name in names})
    _refuse_contradictions(config)
    _say_what_has_no_effect(config, typed)
    in_16_bits = config.train_lora and config.precision in ("bf16-true", "16-true")
    return dataclasses.replace(config, base_dtype="bfloat16") if in_16_bits else config


def _refuse_contradictions(config: RunConfig) -> None:
    if config.use_qlora and (not config.train_lora or config.strategy == "fsdp"):
        needs = "pass --train_lora, and not --strategy fsdp"
        raise ValueError(f"--use_qlora is for a base model that stays as it is, whole on each device: {needs}")
    if config.base_dtype != "float32" and not config.train_lora:
        raise ValueError("--base_dtype bfloat16 is for a base model that stays as it is; pass --train_lora too")
    if config.dataset_key and (config.data_files or config.target_files or config.train_instruction):
        flags = "--data_files, --target_files and --train_instruction are instruction data"
        raise ValueError(f"{flags}, --dataset_key is chain of thought; name one of them")
    if config.data_files and config.train_instruction:
        raise ValueError("--train_instruction names files of its own; leave it or --data_files out")


def _say_what_has_no_effect(config: RunConfig, typed: Mapping[str, Any]) -> None:
    if config.precision in ("bf16-true", "16-true") and not config.train_lora:
        taken = "is taken as bf16-mixed: weights that are trained stay in 32 bits"
        say_once(f"note: --precision {config.precision} {taken}")
    lora = config.train_lora, "--train_lora: every weight is trained"
    without_effect = {
        **dict.fromkeys(("lora_rank", "lora_alpha", "lora_target_modules"), lora),
        "num_clusters": (getattr(config, "load_clusters", True), "--load_clusters"),
        "scale": (getattr(config, "evaluate", "displaced") == "displaced", "--evaluate displaced"),
    }
    for name, (has_effect, other) in without_effect.items():
        if name in typed and not has_effect:
            say_once(f"note: --{name} has no effect without {other}")
