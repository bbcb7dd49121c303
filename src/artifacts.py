"""Paths of all artifacts; atomic writes, manifests, locks, and checks that an artifact is complete.

Each folder and file name of the project is spelled here and nowhere else. An artifact is a folder with a `manifest.json`
that is written last: a folder without one is unfinished. A manifest holds the whole configuration of the stage that wrote
it, from which the next stage takes what is not typed.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from src.distributed import is_first_process

META_INITIALIZATIONS, GRADIENTS = Path("external_lightning_logs"), Path("gradients")
SAMPLED_TASKS, RESULTS = Path("sampled_tasks"), Path("results")
DATA, SAVED = Path("data"), Path("saved")
TOKENS, LOCKS = Path("cache/tokens"), Path("cache/locks")
ALPACA_FILE, BENCHMARK_DATA = DATA / "alpaca_data" / "alpaca_final.pkl", DATA / "benchmark"
FLAN_FILE, ZS_COT_FILE = (ALPACA_FILE.with_name(name) for name in ("flan_dataset.pkl", "zs_cot_dataset.pkl"))

MANIFEST, UNFINISHED, WEIGHTS = "manifest.json", "unfinished.json", "*.safetensors"
ADAPTER_CONFIG, TRAINER_STATE = "adapter_config.json", "trainer_state.json"
"""What peft and the trainers on top of transformers leave in a checkpoint."""
BASE = "base"
"""Names the base model among checkpoints of another trainer."""
RESULTS_FILE, MODELS, LOSSES = "results.csv", "models", "losses"
SELECTED_ROWS, MIXTURE_FILE = "selected.jsonl", "mixture.json"
REPORT_FILE, SUMMARY_FILE = "report.html", "summary.json"
ESTIMATES_FILE, ESTIMATES_FIGURE = "estimates.csv", "estimates.png"
AFFINITY_FILE, AFFINITY_FIGURE = "affinity.csv", "affinity.png"
COMPARISON_FILE, COMPARISON_FIGURE = "comparison.csv", "comparison.png"
SELECTION_FILE, SELECTION_FIGURE, TRADEOFF_FIGURE = "selection.csv", "selection.png", "tradeoff.png"
SCORES_FILE, SCORES_FIGURE, SOURCES_FILE = "scores.csv", "scores.png", "sources.csv"
APPROXIMATION_FILE, APPROXIMATION_FIGURE = "approximation_error.csv", "approximation_error.png"

ARTIFACT_VERSION = 5
LONGEST_NAME = 180
"""Characters of a name that is made of keys: file systems take 255 bytes, and endings and temporary names need some."""


# --- names ---------------------------------------------------------------------------------------------------


def slug(key: str) -> str:
    """A key as one safe file name: `TinyLlama/TinyLlama-1.1B` -> `TinyLlama-TinyLlama-1.1B`.

    Absolute paths keep their last two components. A name that is too long ends in a hash of its key, and a key that
    carries nothing printable becomes that hash; no result ever climbs out of its folder.
    """
    parts = [part for part in Path(key).parts if part not in ("/", ".", "..")][-2 if Path(key).is_absolute() else 0 :]
    name = re.sub(r"[^A-Za-z0-9._=+-]+", "-", "-".join(parts)).strip(".-")
    if name and len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"{name[: LONGEST_NAME - 13]}-{digest}".lstrip("-")


def source_names(sources: Iterable[str]) -> dict[str, str]:
    """What each source without a column of tasks is called, as a task and in folder names: the shortest end of its path
    that tells it from the others.

    Endings of files are no part of it, nor are `train` and `data` where a folder stands above them: `law/train.jsonl` and
    `law/data/train-00000-of-00002.parquet` are `law`. Shards of a data set have one name. Folders and hub ids keep dots.
    """
    shard = re.compile(r"[-_.]?\d{3,}-of-\d{3,}(-[0-9a-f]+)?(?=\.\w)|(?<=/train/)\d{3,}(?=\.\w)")
    whole = {source: shard.sub("", os.path.abspath(source)) for source in sources}
    parts: dict[str, list[str]] = {}
    for source, path in whole.items():
        snapshot = re.sub(r"datasets--(?:[^/]+--)?([^/]+)/snapshots/[^/]+", r"\1", shard.sub("", source))
        *folders, name = snapshot.split("/")
        known = re.sub(r"\.(jsonl|ndjson|json|csv|tsv|parquet|pkl)(\.gz)?$", "", name, flags=re.IGNORECASE)
        stem = Path(name).stem if known == name and Path(source).is_file() else known
        parts[path] = [part for part in (*folders, stem) if part not in ("", ".", "..")] or [Path(path).name]
        for generic in ("train", "data"):
            if len(parts[path]) > 1 and parts[path][-1].lower() == generic:
                parts[path].pop()
    names: dict[str, str] = {}
    for depth in range(1, max(map(len, parts.values()), default=0) + 1):
        ends = {path: "/".join(of_path[-depth:]) for path, of_path in parts.items()}
        counts = Counter(ends.values())
        names = {path: end for path, end in ends.items() if counts[end] == 1} | names
    return {source: names.get(path, os.path.relpath(path)) for source, path in whole.items()}


def results_dir(name: str) -> Path:
    """`results/<name>`; the name may have sub-folders but cannot leave `results/`."""
    parts = Path(name).parts[1:] if Path(name).is_relative_to(RESULTS) else Path(name).parts
    return RESULTS.joinpath(*(slug(part) for part in parts if part not in ("/", ".", "..")))


def results_folder(typed: str) -> Path:
    """The folder that `results/<name>`, `<name>`, or a file in there names."""
    return results_dir(str(Path(typed).parent if Path(typed).is_file() else typed))


def tasks_label(subset: Sequence[int], num_tasks: int | None = None) -> str:
    """Label of models and losses of tasks that no subset file names."""
    ids = "_".join(map(str, subset))
    short = ids if len(ids) <= 60 else f"{ids[:40]}_{hashlib.sha256(ids.encode()).hexdigest()[:8]}"
    return "all_tasks" if len(subset) == num_tasks else f"tasks_{short}" if ids else "base_model"


def model_dir(results: Path, label: str, run: int) -> Path:
    """A model that was fine-tuned on chosen tasks, below its results."""
    return results / MODELS / f"{slug(label)}_run_{run}"


def losses_file(results: Path, subset: Sequence[int], run: int) -> Path:
    """The loss of every validation row after fine-tuning on one subset, below its results."""
    return results / LOSSES / f"{tasks_label(subset)}_run_{run}.csv"


def unfinished_file(results: Path, subset: Sequence[int], run: int) -> Path:
    """What is known of a fine-tuning that is not finished, below its results."""
    return results / f"{Path(UNFINISHED).stem}_{tasks_label(subset)}_run_{run}.json"


def state_file(unfinished: Path) -> Path:
    """The state of a training, beside what else is known of it."""
    return unfinished.with_suffix(".ckpt")


def export_dir(results: Path, trainer: str) -> Path:
    """A selection as files for another trainer, below its results."""
    return results / f"export_{slug(trainer)}"


def subset_file(name: str) -> Path:
    """`sampled_tasks/<name>.txt`."""
    return SAMPLED_TASKS / f"{slug(name)}.txt"


def weights_file(name: str) -> Path:
    """`sampled_tasks/<name>_weights.csv`: how much to draw from each task."""
    return SAMPLED_TASKS / f"{slug(name)}_weights.csv"


def prediction_file(
    saved_dir: str, model_key: str, completion_key: str, dataset_key: str, train_key: str, epoch: int, rank: int | None
) -> Path:
    """A student's completions, named as reasoning-teacher names them."""
    name = f"D_{dataset_key}__T_{slug(train_key)}__E_{epoch:03d}" + (f"__Lora_r_{rank}" if rank else "")
    return Path(saved_dir) / "completion_data" / f"B_{slug(model_key)}__C_{completion_key}" / f"{name}.json"


def clusters_file(store: Path, num_clusters: int) -> Path:
    """Cluster of every stored row, beside the projected gradients."""
    return store / f"clusters_{num_clusters}.npz"


def epoch_checkpoint_name(epoch: int) -> str:
    """Lightning's spelling of `epoch_{epoch}`, which `--load_model_dir` takes: `epoch_epoch=17`."""
    return f"epoch_epoch={epoch}"


def step_checkpoint_name(step: int) -> str:
    """A checkpoint on the way of meta-training, by optimizer step: `step_step=40`."""
    return f"step_step={step}"


def is_checkpoint_name(name: str) -> bool:
    """Whether meta-training gives its checkpoints such names."""
    return re.fullmatch(r"(epoch_epoch|step_step)=\d+", name) is not None


def resolve_checkpoint(load_model_dir: str) -> Path:
    """The checkpoint folder that `--load_model_dir` names: below `external_lightning_logs/`, or a path. A trailing `.ckpt`
    is accepted and dropped. FileNotFoundError: no such folder; the message lists what is there."""
    name = load_model_dir.removesuffix("/").removesuffix(".ckpt")
    ours = META_INITIALIZATIONS / name
    for candidate in (ours, Path(name)):
        if candidate.is_dir():
            return candidate
    parent = ours.parent if ours.parent.is_dir() else META_INITIALIZATIONS
    there = ", ".join(sorted(entry.name for entry in parent.glob("*/"))) or "no checkpoint yet"
    repair = "train it first with custom_train.py or custom_train_alpaca.py"
    raise FileNotFoundError(f"--load_model_dir {load_model_dir}: no folder {ours} ({parent} holds: {there}); {repair}")


def described(folder: Path, file: str, repair: str = "copy the checkpoint again") -> dict[str, Any]:
    """Read a JSON file that describes a checkpoint or a table, such as `ADAPTER_CONFIG`; empty where it is absent.
    ValueError: it cannot be read, with the `repair`."""
    path = folder / file
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}); {repair}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no settings; {repair}")
    return found


# --- atomic writes ---------------------------------------------------------


@contextlib.contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Give every error of the system a number and a file name: libraries leave out either, or raise their own kind."""
    try:
        yield
    except OSError as error:
        if error.errno is None and type(error) is OSError:  # numpy: "8000 requested and 0 written"
            raise OSError(errno.EIO, str(error), str(path)) from error
        if error.errno is not None:  # else our own, with a text
            error.filename = error.filename or str(path)
        raise
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)", str(error))  # safetensors, tokenizers; torch raises on top of it
        if number := int(found[1]) if found else getattr(error.__context__, "errno", None):
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


def _is_running(process: str) -> bool:
    try:  # Z: a dead child not waited for
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return not Path("/proc").is_dir()


def _beside(path: Path) -> Path:
    """A temporary name beside a path, with its ending; those that killed processes left there are removed."""
    for left in path.parent.glob(f".{glob.escape(path.stem)}.*.part{glob.escape(path.suffix)}"):
        process = left.name.removesuffix(f".part{path.suffix}").rpartition(".")[2]
        if process.isdigit() and not _is_running(process):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
    return path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success, flushed to disk, it replaces `path`, on failure it is removed.
    OSError: nothing can be written there; it names `path`."""
    with os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _beside(path)
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path` that becomes `path` on success: the folder is complete or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    temporary.mkdir()
    try:
        yield temporary
        old = temporary.with_name(f"{temporary.name}.old")
        with contextlib.suppress(FileNotFoundError):
            os.replace(path, old)
        os.replace(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def locked(*paths: Path) -> Iterator[None]:
    """Hold artifacts against other runs that would write them too; a holder that dies gives them back. Of several
    processes of a run the first holds them. ValueError: another run holds one."""
    with contextlib.ExitStack() as held:
        for path in sorted(set(paths)) if is_first_process() else ():
            LOCKS.mkdir(parents=True, exist_ok=True)
            try:
                held.enter_context(FileLock(LOCKS / f"{slug(str(path))}.lock", timeout=1))
            except Timeout:
                wait = "wait until it has ended, or end it and start again"
                raise ValueError(f"{path} is being written by another process; {wait}") from None
        yield


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


# --- manifests -----------------------------------------------------------------------------------------------


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write `manifest.json`, the last file of an artifact."""
    write_json(folder / MANIFEST, {"version": ARTIFACT_VERSION, **content})


def file_sizes(folder: Path, names: Iterable[str]) -> dict[str, int]:
    """Bytes of files of an artifact: the `files` of its manifest, which `check_files` compares."""
    return {name: (folder / name).stat().st_size for name in names}


def check_files(folder: Path, manifest: Mapping[str, Any], repair: str, names: Iterable[str] | None = None) -> None:
    """Refuse an artifact of which files that its manifest lists (or those of them that are named) are gone
    (FileNotFoundError) or cut (ValueError)."""
    sizes: Mapping[str, int] = manifest.get("files", {})
    for name in [name for name in sizes if names is None or name in names]:
        path, size = folder / name, sizes[name]
        if not path.is_file():
            raise FileNotFoundError(f"{path} is gone, {folder / MANIFEST} lists it. {repair}")
        if (found := path.stat().st_size) != size:
            raise ValueError(f"{path} is damaged: it has {found:,} bytes, expected {size:,}. {repair}")


def read_manifest(folder: Path, made_by: str) -> dict[str, Any]:
    """Read an artifact's manifest; `made_by` is the script that makes it, for the message. FileNotFoundError: the artifact
    is absent or unfinished. ValueError: the manifest is damaged or of another version."""
    path = folder / MANIFEST
    repair = f"remove {folder} and run: python {made_by}"
    if not path.is_file():
        state = "is not finished (it has no manifest)" if folder.is_dir() else "does not exist"
        raise FileNotFoundError(f"{folder} {state}; make it with: python {made_by}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); {repair}") from error
    found = manifest.get("version") if isinstance(manifest, dict) else None
    if found != ARTIFACT_VERSION:
        raise ValueError(f"{path} has version {found}, this code reads version {ARTIFACT_VERSION}; {repair}")
    return manifest


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact that may be another program's, or gone: empty then."""
    return read_manifest(folder, "") if (folder / MANIFEST).is_file() else {}


def finished(pattern: str) -> list[tuple[Path, dict[str, Any]]]:
    """Folders and manifests of the finished artifacts of this version that match a glob pattern, the oldest first."""
    found = []
    for path in sorted(Path().glob(f"{pattern}/{MANIFEST}"), key=lambda path: path.stat().st_mtime_ns):
        with contextlib.suppress(ValueError, FileNotFoundError):
            found.append((path.parent, read_manifest(path.parent, "")))
    return found


def check_manifest(folder: Path, found: Mapping[str, Any], expected: Mapping[str, Any], repair: str) -> None:
    """Refuse an artifact that was made from something else. ValueError: names every entry that differs with both values,
    and the repair."""
    expected = json.loads(json.dumps(expected, default=str))
    differing = [(key, found.get(key), value) for key, value in expected.items() if found.get(key) != value]
    if differing:
        named = "; ".join(f"{key}: found {shorten(ours)}, expected {shorten(asked)}" for key, ours, asked in differing)
        raise ValueError(f"{folder} does not fit what is asked for: {named}. {repair}")


def shorten(value: Any, length: int = 80) -> str:
    """A value for an error message, cut to about `length` characters."""
    text = str(value)
    return text if len(text) <= length else f"{text[: length - 1]}…"


def file_fingerprint(paths: Iterable[Path]) -> str:
    """sha256 over the bytes of the files, in order."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def folder_fingerprint(folder: Path) -> str | None:
    """sha256 over the configuration and the ends of every weights file of a model in a local folder: models that were
    trained differ everywhere, so that gigabytes need not be read. None where there is no such folder."""
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob(WEIGHTS))]:
        if path.is_file():
            with open(path, "rb") as file:
                digest.update(f"{path.name} {path.stat().st_size} ".encode() + file.read(1 << 20))
                file.seek(-min(1 << 20, path.stat().st_size), os.SEEK_END)
                digest.update(file.read())
    return digest.hexdigest()
