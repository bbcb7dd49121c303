"""Where every artifact lives, and what makes one whole.

Each folder and file name of the project is spelled here and nowhere else. An artifact is a folder with a
`manifest.json` that is written last: a folder without one is unfinished, and a reader compares the manifest
with what it expects before it computes anything.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

META_INITIALIZATIONS = Path("external_lightning_logs")
GRADIENTS = Path("gradients")
SAMPLED_TASKS = Path("sampled_tasks")
RESULTS = Path("results")
DATA = Path("data")
SAVED = Path("saved")
TOKENS = Path("cache") / "tokens"

BENCHMARK_DATA = DATA / "benchmark"
BENCHMARK_ESTIMATES = "benchmark_estimates"
BENCHMARK_SELECTION = "benchmark_selection"
TABLE_MARKDOWN = "table.md"
TABLE_CSV = "table.csv"
BENCHMARK_TABLE = "table.csv"
BENCHMARK_FIGURE = "figure.png"

ALPACA_FILE = DATA / "alpaca_data" / "alpaca_final.pkl"
FLAN_FILE = DATA / "alpaca_data" / "flan_dataset.pkl"
ZS_COT_FILE = DATA / "alpaca_data" / "zs_cot_dataset.pkl"

MANIFEST = "manifest.json"
UNFINISHED = "unfinished.json"
LOGS = "logs"
WEIGHTS = "*.safetensors"
RESULTS_FILE = "results.csv"
MODELS = "models"
LOSSES = "losses"
ESTIMATES_FILE = "estimates.csv"
SELECTED_ROWS = "selected"
MIXTURE_FILE = "mixture.json"
REPORT_FILE = "report.html"
SUMMARY_FILE = "summary.json"
ESTIMATES_FIGURE = "estimates.png"
AFFINITY_FILE = "affinity.csv"
AFFINITY_FIGURE = "affinity.png"
COMPARISON_FILE = "comparison.csv"
COMPARISON_FIGURE = "comparison.png"
SELECTION_FILE = "selection.csv"
SELECTION_FIGURE = "selection.png"
SCORES_FILE = "scores.csv"
SCORES_FIGURE = "scores.png"
APPROXIMATION_FILE = "approximation_error.csv"
APPROXIMATION_FIGURE = "approximation_error.png"

ARTIFACT_VERSION = 4


LONGEST_NAME = 180
"""Characters of a name that is made of keys: file systems take 255 bytes, and endings and temporary names need some."""


def slug(key: str) -> str:
    """A key as one safe file name: `TinyLlama/TinyLlama-1.1B` -> `TinyLlama-TinyLlama-1.1B`.

    Absolute paths keep their last two components, so that a name stays readable. A name that is too long ends in a hash
    of its key, and a key that carries nothing printable becomes that hash; no result ever climbs out of its folder.
    """
    parts = [part for part in Path(key).parts if part not in ("/", ".", "..")]
    if Path(key).is_absolute():
        parts = parts[-2:]
    name = re.sub(r"[^A-Za-z0-9._=+-]+", "-", "-".join(parts)).strip(".-")
    if name and len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"{name[: LONGEST_NAME - 13]}-{digest}".lstrip("-")


def source_names(sources: Iterable[str]) -> dict[str, str]:
    """What each source without a column of tasks is called, as a task and in folder names: the shortest end of its path
    that tells it from the others.

    Endings of files are no part of a name, nor are `train` and `data` where a folder stands above them: `law/train.jsonl`
    and `law/data/train-00000-of-00002.parquet` are `law`. Shards of one data set have one name. Folders and hub ids keep
    what stands behind a dot.
    """
    shard = re.compile(r"[-_.]?\d{3,}-of-\d{3,}(-[0-9a-f]+)?(?=\.\w)|(?<=/train/)\d{3,}(?=\.\w)")
    whole = {source: shard.sub("", os.path.abspath(source)) for source in sources}
    parts: dict[str, list[str]] = {}
    for source, path in whole.items():
        *folders, name = re.sub(r"datasets--(?:[^/]+--)?([^/]+)/snapshots/[^/]+", r"\1", shard.sub("", source)).split(
            "/"
        )
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


@dataclass(frozen=True)
class Run:
    """What the names of a run's artifacts depend on.

    `lora_rank` is None for full fine-tuning; `save_name` is of the training and its gradients, `table` of results alone;
    `run` numbers repetitions and is their seed.
    """

    model_key: str
    data_key: str
    preset_key: str | None = None
    lora_rank: int | None = None
    save_name: str | None = None
    run: int = 0
    table: str | None = None

    def name(self, suffix: str | None = None) -> str:
        """`<model>_<data>[_<preset>][_lora_r_<r>][_<suffix>]_run_<k>`."""
        parts = [slug(self.model_key), slug(self.data_key)]
        parts += [slug(self.preset_key)] if self.preset_key else []
        parts += [f"lora_r_{self.lora_rank}"] if self.lora_rank else []
        parts += [slug(suffix)] if suffix else []
        return f"{slug('_'.join(parts))}_run_{self.run}"

    @property
    def meta_initialization_dir(self) -> Path:
        """Folder of this run's meta-training: one sub-folder per checkpoint."""
        return META_INITIALIZATIONS / self.name(self.save_name)

    def store_dir(self, project_dim: int | None, output_function: str = "loss") -> Path:
        """Folder of this run's projected gradients: one sub-folder per checkpoint."""
        named = f"{self.save_name}_" if self.save_name else ""
        of_margin = "" if output_function == "loss" else f"_{output_function}"
        return GRADIENTS / self.name(f"{named}dim_{project_dim if project_dim else 'full'}{of_margin}")

    @property
    def results_name(self) -> str:
        """What `results/` and `sampled_tasks/` call this run: `--results_name`, else `--save_name`, else its name."""
        return self.table or self.save_name or self.name()


def results_dir(name: str) -> Path:
    """`results/<name>`; the name may have sub-folders but cannot leave `results/`."""
    return RESULTS.joinpath(*(slug(part) for part in Path(name).parts if part not in ("/", ".", "..")))


def model_dir(results: Path, label: str, run: int) -> Path:
    """A model that was fine-tuned on chosen tasks, below its results."""
    return results / MODELS / f"{slug(label)}_run_{run}"


def tasks_label(subset: Sequence[int], num_tasks: int | None = None) -> str:
    """What models and losses of tasks that no file names are called."""
    ids = "_".join(map(str, subset))
    short = ids if len(ids) <= 60 else f"{ids[:40]}_{hashlib.sha256(ids.encode()).hexdigest()[:8]}"
    return "all_tasks" if len(subset) == num_tasks else f"tasks_{short}" if ids else "base_model"


def losses_file(results: Path, subset: Sequence[int], run: int) -> Path:
    """The loss of every validation row after fine-tuning on one subset, below its results."""
    return results / LOSSES / f"{tasks_label(subset)}_run_{run}.csv"


def subset_file(name: str) -> Path:
    """`sampled_tasks/<name>.txt`."""
    return SAMPLED_TASKS / f"{slug(name)}.txt"


def weights_file(name: str) -> Path:
    """`sampled_tasks/<name>_weights.csv`: how much to draw from each task."""
    return SAMPLED_TASKS / f"{slug(name)}_weights.csv"


def prediction_file(
    saved_dir: str,
    model_key: str,
    completion_key: str,
    dataset_key: str,
    train_key: str,
    epoch: int,
    lora_rank: int | None,
) -> Path:
    """A student's completions, named as reasoning-teacher names them."""
    name = f"D_{dataset_key}__T_{slug(train_key)}__E_{epoch:03d}" + (f"__Lora_r_{lora_rank}" if lora_rank else "")
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
    """The checkpoint folder that `--load_model_dir` names: below `external_lightning_logs/`, or a path.

    A trailing `.ckpt` is accepted and dropped.

    Raises:
        FileNotFoundError: no such folder; the message lists what is there.
    """
    name = load_model_dir.removesuffix("/").removesuffix(".ckpt")
    candidates = [META_INITIALIZATIONS / name, Path(name)]
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    parent = candidates[0].parent if candidates[0].parent.is_dir() else META_INITIALIZATIONS
    there = sorted(entry.name for entry in parent.iterdir() if entry.is_dir()) if parent.is_dir() else []
    listing = f"{parent} holds: {', '.join(there)}" if there else f"{parent} holds no checkpoint yet"
    raise FileNotFoundError(
        f"--load_model_dir {load_model_dir}: no folder {candidates[0]} ({listing}); train it first with "
        "custom_train.py or custom_train_alpaca.py"
    )


# --- writing so that a reader never sees half a file ---------------------------------------------------------


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on failure it is removed.

    What is written under the temporary name is flushed to disk before it takes the final one. A writer holds a lock on
    its temporary file, which ends with its process: files that a killed writer of `path` left behind are known by it and
    removed.

    Raises:
        OSError: nothing can be written there; it names `path`.
    """
    with os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = None
        try:
            with _locked_temporary(path) as temporary:
                for left in path.parent.glob(f".{_literal(path.stem)}.????????{_literal(path.suffix)}"):
                    _remove_if_left(left)
                yield temporary
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())
                temporary.chmod(0o644)  # mkstemp makes private files; artifacts are shared like any other
                os.replace(temporary, path)
        except BaseException:
            if temporary is not None:
                temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _locked_temporary(path: Path) -> Iterator[Path]:
    """A new file beside `path`, locked while it is entered."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
        with contextlib.closing(os.fdopen(handle)):
            # another writer may have met it unlocked and taken it for one that was left behind
            if _try_lock(handle) is not False and os.fstat(handle).st_nlink:
                yield Path(name)
                return


def _literal(text: str) -> str:
    """A pattern of `glob` that matches this text alone."""
    return re.sub(r"([*?\[])", r"[\1]", text)


def _remove_if_left(path: Path) -> None:
    """Remove a temporary file whose writer is dead."""
    with contextlib.suppress(OSError), open(path, "rb+") as file:
        if _try_lock(file.fileno()):
            path.unlink(missing_ok=True)


def _try_lock(handle: int) -> bool | None:
    """Lock an open file; False where another has it, None where the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            return None
        raise
    return True


def _lock_soon(handle: int, seconds: float = 1.0) -> bool:
    """Lock an open file within some time: a process that was killed gives its locks back when all its threads are dead."""
    until = time.monotonic() + seconds
    while (free := _try_lock(handle)) is False and time.monotonic() < until:
        time.sleep(0.05)
    return free is not False


@contextlib.contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Give every error of the system a number and a file name: libraries leave out either, or raise their own kind."""
    try:
        yield
    except OSError as error:
        if type(error) is OSError and error.errno is None:  # numpy: "8000 requested and 0 written"
            raise OSError(errno.EIO, str(error), str(path)) from error
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:
        if found := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors, tokenizers
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
        raise


@contextlib.contextmanager
def locked(*paths: Path) -> Iterator[None]:
    """Hold artifacts against other processes that would write them too.

    The lock is `flock` on a hidden file beside the artifact that names its holder. The kernel gives it back when the
    holder dies, however it dies, so that nothing has to be cleaned up by hand. On NFS Linux turns it into a lock of the
    server and other machines see it; a file system without locks is used without one.

    Raises:
        ValueError: another process holds it; the message names it.
    """
    with contextlib.ExitStack() as held:
        for path in sorted(set(paths)):
            held.enter_context(_locked(path))
        yield


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = path.with_name(f".{path.name}.lock")
    made = [folder for folder in lock.parents if not folder.exists()]
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # another holder has just removed the empty folder
            continue
        with contextlib.closing(os.fdopen(handle, "r+", encoding="utf-8")) as file:
            if not _lock_soon(handle):
                raise ValueError(
                    f"{path} is being written by {file.read().strip() or 'another process'}; wait until it has ended, "
                    "or end it and start again"
                )
            # a holder removes the file before it gives the lock back: only the file that is there counts
            if not os.fstat(handle).st_nlink:
                continue
            command = shlex.join(["python", *sys.argv])
            file.truncate()
            file.write(f"process {os.getpid()} on {socket.gethostname()} ({shorten(command)})\n")
            file.flush()
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
                for folder in made:  # where nothing was written, nothing is left
                    with contextlib.suppress(OSError):
                        folder.rmdir()
            return


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path` that becomes `path` on success: the folder is whole or absent.

    Several processes may make it at once; the last that is done stays. What a killed one left behind is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{_literal(path.name)}.????????.part"):
        with contextlib.suppress(OSError), _directory(left) as handle:
            if _try_lock(handle):
                shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
    with _directory(temporary) as handle:
        _try_lock(handle)
        try:
            yield temporary
            temporary.chmod(0o755)  # mkdtemp makes private folders
            replaced = temporary.with_suffix(".old")
            with contextlib.suppress(FileNotFoundError):
                os.replace(path, replaced)
            os.replace(temporary, path)
            shutil.rmtree(replaced, ignore_errors=True)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextlib.contextmanager
def _directory(path: Path) -> Iterator[int]:
    """A folder's handle, open while it is entered."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield handle
    finally:
        os.close(handle)


# --- manifests -----------------------------------------------------------------------------------------------


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write `manifest.json`, the last file of an artifact."""
    write_json(folder / MANIFEST, {"version": ARTIFACT_VERSION, **content})


def files_facts(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size in bytes of files of an artifact: the `files` of its manifest, which `check_file` compares."""
    return {name: {"bytes": (folder / name).stat().st_size} for name in names}


def check_file(folder: Path, manifest: Mapping[str, Any], name: str, repair: str) -> None:
    """Refuse a file of an artifact that has another size than its manifest lists; one that is not listed is not checked.

    Raises:
        FileNotFoundError: it is gone.
        ValueError: its size is another.
    """
    listed, path = manifest.get("files", {}).get(name), folder / name
    if listed is None:
        return
    if not path.is_file():
        raise FileNotFoundError(f"{path} is gone, {folder / MANIFEST} lists it. {repair}")
    if (size := path.stat().st_size) != listed["bytes"]:
        raise ValueError(f"{path} is damaged: it has {size:,} bytes, expected {listed['bytes']:,}. {repair}")


def read_manifest(folder: Path, made_by: str) -> dict[str, Any]:
    """Read an artifact's manifest.

    Args:
        folder: The artifact.
        made_by: The script that makes it, for the message.

    Raises:
        FileNotFoundError: the artifact is absent or unfinished.
        ValueError: the manifest is damaged or of another version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        state = "is not finished (it has no manifest)" if folder.is_dir() else "does not exist"
        raise FileNotFoundError(f"{folder} {state}; make it with: python {made_by}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove {folder} and run: python {made_by}") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{path} is damaged (it holds no object); remove {folder} and run: python {made_by}")
    if manifest.get("version") != ARTIFACT_VERSION:
        raise ValueError(
            f"{path} has version {manifest.get('version')}, this code reads version {ARTIFACT_VERSION}; "
            f"remove {folder} and run: python {made_by}"
        )
    return manifest


def check_manifest(folder: Path, found: Mapping[str, Any], expected: Mapping[str, Any], repair: str) -> None:
    """Refuse an artifact that was made from something else.

    Raises:
        ValueError: names every entry that differs with both values, and the repair.
    """
    expected = json.loads(json.dumps(expected, default=str))
    differing = [key for key in expected if found.get(key) != expected[key]]
    if differing:
        details = "; ".join(
            f"{key}: found {shorten(found.get(key))}, expected {shorten(expected[key])}" for key in differing
        )
        raise ValueError(f"{folder} does not fit what is asked for: {details}. {repair}")


def shorten(value: Any, length: int = 80) -> str:
    """A value for an error message, cut to about `length` characters."""
    text = str(value)
    return text if len(text) <= length else f"{text[: length - 1]}…"


def file_fingerprint(paths: Iterable[Path]) -> str:
    """sha256 over the bytes of the files, in order."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
