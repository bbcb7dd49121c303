"""The store of projected gradients: one folder per checkpoint, complete or absent, rows keyed by content.

Letters: R rows (training and validation), B batch, d projection dimension, H hidden size, n tasks.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from src.artifacts import MANIFEST, atomic_write, check_files, check_manifest, file_sizes, read_manifest, write_manifest
from src.console import progress, waiting_for
from src.data import read_arrays, write_arrays
from src.estimation import Part, Rows, TaskMoments, principal_basis, task_moments, token_weights

if TYPE_CHECKING:
    from src.projection import Projection

PROJECTED = "projected.npy"
OUTPUTS = "outputs.npy"
REPRESENTATIONS = "representations.npy"
SAMPLES = "samples.npz"
DONE = "done.npy"
PROJECTION_SIGNS = "projection_signs.npz"
BASIS = "principal_directions.npz"
PRINCIPAL_DIM = 400
"""Of more dimensions, so many principal ones are kept for estimates: with 4,000 projected to begin with, they are as good as
all 4,000, where a projection to 400 loses a third of the score (`docs/decisions.md`)."""
FINGERPRINT = "rows_fingerprint"
FLUSH_SECONDS = 5.0
"""How much work a killed run loses at most."""
JOIN_SECONDS = 120.0


class StoreWriter:
    """The rows of one checkpoint on their way to disk.

    Rows go to memory-mapped arrays in a hidden `.part` folder, which `finish` gives its name; a killed run is resumed from
    it. Rows that an earlier run, finished or not, took of other data (before some were added, dropped, corrected, renamed)
    are taken over where keys are the same. Rows with the same key are computed once.

    Args:
        folder: The part's final folder.
        request: Everything that a row depends on besides its key; a folder of another request is refused.
        samples: Arrays (R,): `sample_index`, ascending; `key`, hash of the row's tokens and labels; `task` and `target`,
            positions in `names` or -1; `target_tokens`, how many tokens the output is a mean over.
        dim: d.
        repair: What to do about another request, for the message.
        representation_size: H, where representations are kept too.
        names: "tasks" and "targets" -> their names.
        describe: A sample's index -> its name, for messages.
        joins: Another process has made the part: wait until it is seen here too, which may take a shared file system long.

    Attributes:
        complete: The finished folder has just these rows.
        reused: How many of the R rows were taken over.
        to_compute: Sample indices of the others, done or not: batches are cut from these, wherever a run was killed.

    ValueError: the folder is of another request. OSError: there is no room for the rows. All is taken at once: a write
    through a map would end the process.
    """

    def __init__(
        self,
        folder: Path,
        request: Mapping[str, Any],
        samples: Mapping[str, np.ndarray],
        dim: int,
        repair: str,
        representation_size: int | None = None,
        names: Mapping[str, Sequence[str]] | None = None,
        describe: Callable[[int], str] = "sample {}".format,
        joins: bool = False,
    ) -> None:
        self.folder, self.request, self.repair, self.describe = folder, dict(request), repair, describe
        self.samples = {name: np.asarray(values) for name, values in samples.items()}
        self.names = {kind: list((names or {}).get(kind, ())) for kind in ("tasks", "targets")}
        digest = hashlib.blake2b(json.dumps(self.names).encode(), digest_size=16)
        for name in sorted(self.samples):
            digest.update(self.samples[name].tobytes())
        self.fingerprint = digest.hexdigest()
        self.partial = folder.with_name(f".{folder.name}.part")
        _, first, group = np.unique(self.samples["key"], return_index=True, return_inverse=True)
        self._first = first[group]  # (R,) position of the first row with the same key
        self._is_first = self._first == np.arange(len(self._first))
        self.reused = len(self._first)
        waited_until = time.monotonic() + JOIN_SECONDS
        while joins and self.fingerprint not in (self._found(folder), self._found(self.partial)):
            if time.monotonic() > waited_until:
                unseen = f"which the first process made, is not seen here after {JOIN_SECONDS:.0f} seconds"
                cure = "give all processes the same folder, on a file system that they share"
                raise ValueError(f"{self.partial}, {unseen}; {cure}")
            time.sleep(0.1)
        self.complete = self._found(folder) == self.fingerprint
        if self.complete:
            if not self.partial.is_dir():  # else other rows were begun, which are kept
                self._tidy()
            return
        sizes: dict[str, tuple[int, ...]] = {PROJECTED: (dim,), OUTPUTS: ()}
        if representation_size:
            sizes[REPRESENTATIONS] = (representation_size,)
        if (found := self._found(self.partial)) != self.fingerprint:
            if found is not None:  # other rows: absorbed like a shard
                _remove(shard := self._shard(found))
                os.replace(self.partial, shard)
            self._create(sizes)
        self._open(sizes)
        with np.load(self.partial / SAMPLES) as arrays:
            reused = arrays["reused"]
        self.reused = int(reused[self._first].sum())
        self.to_compute = self.samples["sample_index"][self._is_first & ~reused]

    def _found(self, folder: Path) -> str | None:
        """Fingerprint of the rows in a folder, of this request; None where there are none."""
        if folder == self.folder and folder.is_dir():
            found = read_manifest(folder, self.repair)
        elif (folder / SAMPLES).is_file():
            with np.load(folder / SAMPLES) as arrays:
                found = json.loads(str(arrays["made_from"]))
        else:
            return None
        check_manifest(folder, found, self.request, self.repair)
        return found.get(FINGERPRINT)

    def _create(self, sizes: Mapping[str, tuple[int, ...]]) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        try:
            for name, size in {**sizes, DONE: ()}.items():
                dtype, shape = (bool if name == DONE else np.float32), (len(self._first), *size)
                array = np.lib.format.open_memmap(self.partial / name, "w+", dtype, shape)
                with open(self.partial / name, "rb+") as file:
                    os.posix_fallocate(file.fileno(), 0, array.offset + array.nbytes)
        except OSError as error:
            shutil.rmtree(self.partial)
            needed = 4 * len(self._first) * sum(map(math.prod, sizes.values()))
            reason = f"{error.strerror} (the rows need {needed:,} bytes)"
            raise OSError(error.errno, reason, str(self.folder.parent)) from error
        self._open(sizes)
        for source in (self.folder, *self._shards()):
            self._copy(source)
        self.flush()
        made_from = np.array(json.dumps({**self.request, FINGERPRINT: self.fingerprint}, default=str))
        # last: a folder without it was not begun
        write_arrays(self.partial / SAMPLES, {**self.samples, "reused": self._done, "made_from": made_from})

    def _open(self, names: Iterable[str]) -> None:
        self._arrays = {name: np.lib.format.open_memmap(self.partial / name, "r+") for name in names}
        self.rows, self.representations = self._arrays[PROJECTED], self._arrays.get(REPRESENTATIONS)
        self._done = np.lib.format.open_memmap(self.partial / DONE, "r+")
        self._written, self._flushed = np.zeros(len(self._done), bool), time.monotonic()

    def _copy(self, source: Path) -> None:
        """Take over the missing rows that another folder has."""
        if self._found(source) is None:
            return
        with np.load(source / SAMPLES) as arrays:
            keys = arrays["key"]
        ours = np.flatnonzero(self._is_missing)
        theirs = np.flatnonzero(np.load(source / DONE) if (source / DONE).is_file() else np.ones(len(keys)))
        _, at_ours, at_theirs = np.intersect1d(self.samples["key"][ours], keys[theirs], return_indices=True)
        order = np.argsort(at_theirs)  # to read from front to back
        ours, theirs = ours[at_ours[order]], theirs[at_theirs[order]]
        for name, array in self._arrays.items():
            _copy_rows(array, ours, np.load(source / name, mmap_mode="r"), theirs)
        self._written[ours] = True

    @property
    def _is_missing(self) -> np.ndarray:
        return self._is_first & ~(self._done | self._written)

    def missing(self) -> np.ndarray:
        """Sample indices still to be computed, ascending."""
        indices = self.samples["sample_index"]
        return indices[:0] if self.complete else indices[self._is_missing]

    def unfinished(self, batches: Iterable[np.ndarray]) -> list[np.ndarray]:
        """Those batches of sample indices that have one still to be computed; they are computed as a whole."""
        missing, indices = self._is_missing, self.samples["sample_index"]
        return [batch for batch in batches if missing[np.searchsorted(indices, batch)].any()]

    def write(
        self, sample_index: np.ndarray, rows: np.ndarray, outputs: np.ndarray, representations: np.ndarray | None = None
    ) -> None:
        """Store the rows (B, d), outputs (B,) and, where they are kept, representations (B, H) of these samples.
        ValueError: a value is not finite; names the sample.
        """
        finite = {"output": np.isfinite(outputs), "gradient": np.isfinite(rows).all(axis=1)}
        if (bad := ~(finite["output"] & finite["gradient"])).any():
            at = int(np.argmax(bad))
            what = " and ".join(name for name, values in finite.items() if not values[at])
            raise ValueError(
                f"{self.describe(int(sample_index[at]))}: its {what} is not finite at {self.folder.name}; look at the "
                "row's text, lower the learning rate of meta-training, or take gradients with --precision 32"
            )
        positions = np.searchsorted(self.samples["sample_index"], sample_index)
        for array, values in zip(self._arrays.values(), (rows, outputs, representations), strict=False):
            array[positions] = values
        self._written[positions] = True
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Force rows to disk, and only then mark them as done: no mark is there without its row."""
        for array in self._arrays.values():
            array.flush()
        self._done |= self._written
        self._done.flush()
        self._flushed = time.monotonic()

    def _shard(self, name: str | int) -> Path:
        return self.folder.with_name(f".{self.folder.name}.rank_{name}.part")

    def _shards(self) -> list[Path]:
        return sorted(self.folder.parent.glob(glob.escape(f".{self.folder.name}.rank_") + "*.part"))

    def shard(self, rank: int, sample_index: np.ndarray) -> StoreWriter:
        """A writer of its own for the process `rank`, for these samples; `absorb` takes its rows over."""
        kept = np.isin(self.samples["sample_index"], sample_index)
        samples = {name: values[kept] for name, values in self.samples.items()}
        hidden_size = None if self.representations is None else self.representations.shape[1]
        folder, dim = self.folder.with_name(f"{self.folder.name}.rank_{rank}"), self.rows.shape[1]
        return StoreWriter(folder, self.request, samples, dim, self.repair, hidden_size, describe=self.describe)

    def absorb(self) -> None:
        """Take over what shards have done, of this run or of a killed one, and remove them."""
        for shard in self._shards():
            self._copy(shard)
            self.flush()
            _remove(shard)

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Make the part whole: moments, weighted as in the training (`loss_over` of the facts) and summed in the order of
        the samples; the manifest with names and facts; the final name."""
        if len(missing := self.missing()):
            raise ValueError(f"{len(missing)} of {len(self._first)} rows are missing in {self.partial}")
        copies = np.flatnonzero(~self._is_first)
        for array in self._arrays.values():
            _copy_rows(array, copies, array, self._first[copies])
        self.flush()
        manifest = {**self.request, **self.names, FINGERPRINT: self.fingerprint, "num_rows": len(self._first), **facts}
        manifest["files"] = file_sizes(self.partial, [*self._arrays, SAMPLES])
        part = StoredPart(self.partial, manifest)
        for kind, names in self.names.items():
            if names:
                groups = self.samples[kind.removesuffix("s")]
                part.moments(kind, groups, len(names), part.weight_by, not part.kernel_is_smaller)
        if (signs := self.folder / PROJECTION_SIGNS).is_file():  # of the same request
            os.replace(signs, self.partial / PROJECTION_SIGNS)
        write_manifest(self.partial, manifest)
        if self.folder.is_dir():
            os.replace(self.folder, self._shard("replaced"))
        os.replace(self.partial, self.folder)
        self.complete = True
        self._tidy()

    def _tidy(self) -> None:
        """Remove what a complete part does not need."""
        (self.folder / DONE).unlink(missing_ok=True)
        for shard in self._shards():
            _remove(shard)


def _remove(folder: Path) -> None:
    """Remove an unfinished part; once removal has begun it is not taken for one."""
    (folder / SAMPLES).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _copy_rows(to: np.ndarray, ours: np.ndarray, source: np.ndarray, theirs: np.ndarray, block: int = 8192) -> None:
    for start in range(0, len(ours), block):
        to[ours[start : start + block]] = source[theirs[start : start + block]]


@dataclass(frozen=True)
class StoredPart:
    """The finished rows of one checkpoint, memory-mapped."""

    folder: Path
    manifest: dict[str, Any]

    @cached_property
    def rows(self) -> np.ndarray:
        """Projected gradients (R, d)."""
        return np.load(self.folder / PROJECTED, mmap_mode="r")

    @cached_property
    def outputs(self) -> np.ndarray:
        """Per-sample outputs at the checkpoint (R,), lower is better (a margin store holds minus the margin)."""
        return np.load(self.folder / OUTPUTS)

    @cached_property
    def representations(self) -> np.ndarray:
        """Representations (R, H); FileNotFoundError where the store was made without."""
        if REPRESENTATIONS not in self.manifest["files"]:
            raise FileNotFoundError(f"{self.folder} has no representations; take gradients with --representations")
        return np.load(self.folder / REPRESENTATIONS, mmap_mode="r")

    @cached_property
    def samples(self) -> dict[str, np.ndarray]:
        """The `samples` of `StoreWriter`."""
        with np.load(self.folder / SAMPLES) as arrays:
            return dict(arrays)

    @property
    def weight_by(self) -> str:
        """How rows weigh in the training that made the checkpoint."""
        return "sample" if self.manifest.get("loss_over") == "row" else "token"

    @property
    def targets(self) -> list[str]:
        """Names of the targets, in the order of their ids."""
        return self.manifest["targets"]

    @property
    def kernel_is_smaller(self) -> bool:
        """Whether the rows' kernel is the smaller matrix, so that no outer products are kept."""
        return self.manifest["num_rows"] <= min(self.manifest["dim"], PRINCIPAL_DIM)

    @cached_property
    def basis(self) -> np.ndarray | None:
        """What estimates are computed in where d is above `PRINCIPAL_DIM`, (d, r): that many principal directions of the rows,
        made on first use and kept beside them."""
        if self.manifest["dim"] <= PRINCIPAL_DIM:
            return None
        made_from, kept = f"{self.manifest[FINGERPRINT]} {PRINCIPAL_DIM}", read_arrays(self.folder / BASIS) or {}
        if kept.get("made_from") != made_from:
            with waiting_for(f"principal directions of {self.manifest['num_rows']:,} rows"):
                kept = {"basis": principal_basis(self.rows, self.samples["task"] >= 0, PRINCIPAL_DIM)}
            write_arrays(self.folder / BASIS, kept | {"made_from": np.array(made_from)})
        return kept["basis"]

    def estimation_part(
        self,
        task_of_row: np.ndarray | None = None,
        num_tasks: int | None = None,
        name: str = "tasks",
        *,
        weight_by: str | None = None,
        by_rows: bool = False,
        represented: bool = False,
    ) -> Part:
        """Moments of tasks and targets for the estimators.

        Args:
            task_of_row: Task of each row (R,), -1 for none; None = the tasks of the data.
            num_tasks: n.
            name: Names the cache of the moments; another division into tasks needs another name.
            weight_by: How rows weigh, one of `estimation.WEIGHT_BY`; None = as in the training.
            by_rows: Give the rows themselves instead of their outer products.
            represented: Representations in place of the gradients (estimator `representation`).
        """
        weight_by = weight_by or self.weight_by
        tasks, targets = self.samples["task"] if task_of_row is None else task_of_row, self.samples["target"]
        num_tasks = len(self.manifest["tasks"]) if num_tasks is None else num_tasks
        outers = not (by_rows or represented)
        train = self.moments(name, tasks, num_tasks, weight_by, outers, represented)
        target = self.moments("targets", targets, len(self.targets), weight_by, outers, represented)
        basis, rows = None if represented else self.basis, None
        if by_rows:
            values = self.representations if represented else self.rows
            values = values if basis is None else np.asarray(values, np.float64) @ basis
            rows = Rows(values, self.outputs, tasks, targets, self._row_weights(weight_by))
        return Part(train, target, rows, self.manifest["output_function"], weight_by, basis)

    def _row_weights(self, weight_by: str) -> np.ndarray | None:
        """Weights of the rows (R,); None where all weigh the same."""
        tokens, is_training = self.samples["target_tokens"], self.samples["task"] >= 0
        return token_weights(tokens, is_training) if weight_by == "token" else None

    def moments(
        self, name: str, groups: np.ndarray, number: int, weight_by: str, outers: bool, represented: bool = False
    ) -> TaskMoments:
        """The moments of so many groups of rows, computed once and kept in a .npz beside the rows."""
        by_token = weight_by == "token"
        file = f"moments_{name}{'_represented' * represented}{'_by_row' * (not by_token)}{'_sums' * (not outers)}.npz"
        made_from = self.manifest[FINGERPRINT] + f" {PRINCIPAL_DIM}" * (self.manifest["dim"] > PRINCIPAL_DIM)
        kept = read_arrays(self.folder / file) or {}
        same_groups = np.array_equal(kept.pop("group_of_row", ()), groups)
        if kept.pop("made_from", None) == made_from and same_groups:
            return TaskMoments(**{"outers": cast(Any, None), **kept})
        values, weights = self.representations if represented else self.rows, self._row_weights(weight_by)
        options: dict[str, Any] = {"weights": weights, "outers": outers, "basis": None if represented else self.basis}
        moments = task_moments(values, self.outputs, groups, number, progress=progress, **options)
        kept = {field: value for field, value in vars(moments).items() if value is not None}
        write_arrays(self.folder / file, {"group_of_row": groups, "made_from": np.array(made_from), **kept})
        return moments


def save_projection_signs(path: Path, projection: Projection, shapes: Mapping[str, tuple[int, int]]) -> None:
    """The signs of every matrix as a .npz: parameter name -> `Projection.packed_signs`, one in memory at a time."""
    with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, shape in shapes.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, projection.packed_signs(name, shape))


def open_store(folder: Path, checkpoints: Sequence[str] | None, made_by: str) -> list[StoredPart]:
    """The finished parts of a store, in the order of training.

    Args:
        folder: `Run.store_dir`.
        checkpoints: Names of the checkpoints wanted; None = all that are there.
        made_by: The script that makes the store, for messages.

    FileNotFoundError: there is no store, or not for a checkpoint, or a file of it is gone. ValueError: parts do not belong
    together, or a file has another size than when it was made.
    """
    if checkpoints is None:
        found = sorted(path.parent for path in folder.glob(f"[!.]*/{MANIFEST}"))
        if not found:
            raise FileNotFoundError(f"no projected gradients in {folder}; make them with: python {made_by}")
    else:
        found = [folder / Path(name.removesuffix("/")).name.removesuffix(".ckpt") for name in checkpoints]
    parts = [StoredPart(path, read_manifest(path, made_by)) for path in found]
    parts.sort(key=lambda part: (part.manifest["step"], part.folder.name))
    trainings = sorted({str(Path(part.manifest.get("checkpoint_dir", "")).parent.resolve()) for part in parts})
    if checkpoints is None and len(trainings) > 1:
        of_several = f"{folder} has gradients at checkpoints of several meta-trainings ({', '.join(trainings)})"
        raise ValueError(f"{of_several}; name those to be used with --load_model_dir")
    expected = {key: parts[0].manifest[key] for key in ("tasks", "targets", FINGERPRINT, "output_function", "dim")}
    for part in parts:
        check_files(part.folder, part.manifest, f"Remove {part.folder} and take the gradients again.")
        check_manifest(part.folder, part.manifest, expected, f"Take those of all checkpoints again: python {made_by}")
    return parts
