"""Subsets of tasks: membership matrices, random draws, the text files that hold them; and clusters that serve as tasks.

Why this module exists: a subset is a sorted tuple of task ids everywhere, and a line of a text file that a user can read
and edit on disk. The file decides: it is read when it is there and drawn from the seed only when it is not.

Shapes: N samples, d projection dimension, n tasks, m subsets.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.cluster import AgglomerativeClustering, MiniBatchKMeans

from src.paths import atomic_write

Subset = tuple[int, ...]

# Average linkage holds all pairwise distances: 3 GB at this many samples.
MAX_LINKAGE_SAMPLES = 20_000


def membership_matrix(subsets: Sequence[Subset], num_tasks: int) -> np.ndarray:
    """Which tasks (columns) are in which subset (rows): (m, n) bool.

    Raises:
        ValueError: an id is out of range.
    """
    membership = np.zeros((len(subsets), num_tasks), bool)
    for row, subset in zip(membership, subsets, strict=True):
        if wrong := [task for task in subset if not 0 <= task < num_tasks]:
            raise ValueError(f"subset {subset} holds task {wrong[0]}; tasks are 0 to {num_tasks - 1}")
        row[list(subset)] = True
    return membership


DEFAULT_NUM_SUBSETS = 1000
DEFAULT_SUBSET_SIZE = 0.5


def tasks_in_subset(num_tasks: int, subset_size: float) -> int:
    """The number of tasks in a subset of a size: below 1 a share of the tasks, from 1 on their number.

    Raises:
        ValueError: no such size.
    """
    if 0 < subset_size < 1:
        return max(1, math.floor(subset_size * num_tasks + 0.5))
    if 1 <= subset_size <= num_tasks and subset_size == int(subset_size):
        return int(subset_size)
    raise ValueError(
        f"subset size {subset_size}: expected a share between 0 and 1, or a whole number from 1 to {num_tasks} tasks"
    )


def draw_subsets(num_subsets: int | None, num_tasks: int, subset_size: float, seed: int) -> list[Subset]:
    """Different random subsets of one size.

    Args:
        num_subsets: m; None = 1,000, or as many as exist.
        num_tasks: n.
        subset_size: below 1 the share of the tasks, from 1 on their number.
        seed: of numpy's `default_rng`.

    Raises:
        ValueError: no such size, or fewer than m subsets of it exist.
    """
    size = tasks_in_subset(num_tasks, subset_size)
    existing = math.comb(num_tasks, size)
    num_subsets = min(DEFAULT_NUM_SUBSETS, existing) if num_subsets is None else num_subsets
    if num_subsets > existing:
        raise ValueError(
            f"{num_subsets:,} subsets of {size} out of {num_tasks} tasks are asked for, but only {existing:,} exist; "
            "ask for fewer (--number_of_subsets), or for another size (--subset_size)"
        )
    rng = np.random.default_rng(seed)
    if existing <= 2 * num_subsets:  # drawing until all differ would take long
        everything = list(combinations(range(num_tasks), size))
        return [everything[i] for i in rng.choice(existing, num_subsets, replace=False)]
    drawn: dict[Subset, None] = {}  # a set that keeps the order
    while len(drawn) < num_subsets:
        drawn[tuple(sorted(rng.choice(num_tasks, size, replace=False).tolist()))] = None
    return list(drawn)


def read_subsets(path: Path, num_tasks: int, tasks: Sequence[str] = ()) -> list[Subset]:
    """The subsets of a text file, one a line: task ids separated by spaces, or names of tasks separated by commas.

    What follows a `#` is a comment; blank lines do not count. Where comments say what the tasks are called, as
    `write_subsets` writes them, the names are compared with those of the data.

    Args:
        path: The file.
        num_tasks: n.
        tasks: The data's names of the tasks; none are compared with the file's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line holds something else, an id out of range or twice, the names in the comments are not the
            data's, or there is no subset at all.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; expected a file of task ids, one subset a line")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    if tasks:
        _check_names(path, lines, _shown(tasks))
    id_of = {name: task for task, name in enumerate(_shown(tasks))}
    subsets = []
    for number, line in enumerate(lines, start=1):
        words = line.split("#")[0].split()
        wrong = [word for word in words if not (word.isascii() and word.isdigit()) or int(word) >= num_tasks]
        named = [" ".join(part.split()) for part in " ".join(words).split(",")]
        unknown = [name for name in named if name not in id_of]
        if wrong and not unknown:
            subset = [id_of[name] for name in named]
        elif wrong:
            first = unknown[0] if len(unknown) < len(named) else wrong[0]
            names = ", or names of tasks separated by commas" if tasks else ""
            raise ValueError(
                f"{path}, line {number}: {first!r} is no task id; expected numbers from 0 to {num_tasks - 1}{names}"
            )
        else:
            subset = [int(word) for word in words]
        if twice := [task for task in subset if subset.count(task) > 1]:
            raise ValueError(f"{path}, line {number}: task {twice[0]} is named twice")
        if subset:
            subsets.append(tuple(sorted(subset)))
    if not subsets:
        raise ValueError(f"{path} holds no subset; expected task ids separated by spaces, one subset a line")
    return subsets


MOST_NAMES = 200
"""Up to so many tasks a file of subsets says in comments what they are called, beyond it a hash of all names."""


def _shown(tasks: Sequence[str]) -> list[str]:
    """Names of tasks as a file of subsets has them: on one line."""
    return [" ".join(name.split()) for name in tasks]


def _hashed(names: Sequence[str]) -> str:
    """The comment that stands for too many names."""
    return f"{len(names)} tasks, sha256 of their names {hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]}"


def _check_names(path: Path, lines: Sequence[str], names: Sequence[str]) -> None:
    """Refuse a file whose comments name other tasks than the data has under these ids."""
    cure = "draw or select the subsets again, or change the ids and remove the comments that name the tasks"
    for number, line in enumerate(lines, start=1):
        if found := re.fullmatch(r"\s*#\s*(\d+)\s*=\s*(.*)", line):
            task, name = int(found[1]), " ".join(found[2].split())
            if name != (here := names[task] if task < len(names) else None):
                known = f"{here!r}" if here is not None else f"not among the {len(names)} tasks"
                raise ValueError(
                    f"{path}, line {number}: task {task} is {name!r} there, and {known} in the data; {cure}"
                )
        elif (found := re.match(r"\s*#\s*(\d+) tasks, sha256", line)) and _hashed(names[: int(found[1])]) not in line:
            raise ValueError(
                f"{path}, line {number}: it was written for {int(found[1]):,} tasks, whose names are not those of the "
                f"data's {len(names):,} tasks; {cure}"
            )


def write_subsets(path: Path, subsets: Iterable[Subset], comment: str = "", tasks: Sequence[str] = ()) -> None:
    """Write subsets as `read_subsets` reads them, all at once; `comment` becomes the first lines, and the names of the
    tasks the next.

    Raises:
        ValueError: a subset is empty, which a line cannot say.
    """
    names = _shown(tasks)
    named = [f"{task} = {name}" for task, name in enumerate(names)] if len(names) <= MOST_NAMES else [_hashed(names)]
    lines = [f"# {line}" for line in (*comment.splitlines(), *named)]
    for subset in subsets:
        if not subset:
            raise ValueError(f"{path}: an empty subset cannot be written")
        lines.append(" ".join(map(str, sorted(subset))))
    with atomic_write(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_task_weights(path: Path, tasks: Sequence[str], shares: np.ndarray) -> None:
    """Write the share of the rows to draw from each task, (n,), as `read_task_weights` reads them."""
    frame = pd.DataFrame({"task": range(len(tasks)), "name": list(tasks), "share": shares})
    with atomic_write(path) as temporary:
        frame.to_csv(temporary, index=False)


def read_task_weights(path: Path, tasks: Sequence[str]) -> np.ndarray:
    """The share of the rows to draw from each task (n,), summing to 1; a task that the file does not name has none.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no columns `name` and `share`, a task that the data does not have or that stands there twice, or
            shares that are negative, not finite or all zero.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"--task_weights {path}: no such file; fast_estimate_forward_selection.py --weights writes one"
        )
    frame = pd.read_csv(path, dtype={"name": str}, keep_default_na=False)
    if missing := {"name", "share"} - set(frame.columns):
        raise ValueError(f"{path}: no column {sorted(missing)[0]!r}; expected columns name and share")
    if unknown := [name for name in frame["name"] if name not in tasks]:
        raise ValueError(f"{path}: task {unknown[0]!r} is not among the data's {len(tasks)} tasks")
    if frame["name"].duplicated().any():
        raise ValueError(f"{path}: task {frame['name'][frame['name'].duplicated()].iloc[0]!r} stands there twice")
    shares = np.zeros(len(tasks))
    shares[[list(tasks).index(name) for name in frame["name"]]] = pd.to_numeric(frame["share"], errors="coerce")
    if not (np.isfinite(shares).all() and (shares >= 0).all() and shares.sum() > 0):
        raise ValueError(f"{path}: shares must be numbers, not negative and not all 0")
    return shares / shares.sum()


def load_or_draw_subsets(
    path: Path, num_subsets: int | None, num_tasks: int, subset_size: float, seed: int, tasks: Sequence[str] = ()
) -> list[Subset]:
    """The subsets of a file, whatever their number; drawn and written to it when it is not there.

    Arguments and errors as in `draw_subsets` and `read_subsets`; `tasks` are the names of the tasks.
    """
    if not path.exists():
        subsets = draw_subsets(num_subsets, num_tasks, subset_size, seed)
        comment = f"{len(subsets)} random subsets of {num_tasks} tasks, seed {seed}"
        write_subsets(path, subsets, comment=comment, tasks=tasks)
    return read_subsets(path, num_tasks, tasks)


def cluster_samples(rows: np.ndarray, num_clusters: int, seed: int) -> np.ndarray:
    """Cluster samples by the direction of their projected gradients, to serve as tasks.

    Average linkage on cosine distance; above `MAX_LINKAGE_SAMPLES` samples k-means on rows of norm 1, which is about
    the same and needs no matrix of distances. A row of zeros has no direction and joins the largest cluster.

    Args:
        rows: projected gradients (N, d).
        num_clusters: how many clusters to form.
        seed: of k-means; linkage needs none.

    Returns:
        (N,) int32, cluster ids in the order in which they first appear.

    Raises:
        ValueError: fewer rows that are not zero than clusters, or rows that are not finite.
    """
    rows = np.asarray(rows)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if not np.isfinite(norms).all():
        raise ValueError(f"row {int(np.argmin(np.isfinite(norms)))} is not finite, so samples cannot be clustered")
    directed = np.flatnonzero(norms)
    if not 1 <= num_clusters <= len(directed):
        raise ValueError(
            f"{num_clusters} clusters of {len(directed)} samples with a gradient: expected 1 to {len(directed)} clusters"
        )
    directions = rows[directed] / norms[directed]
    if num_clusters == 1:
        found = np.zeros(len(directed), int)
    elif len(directed) <= MAX_LINKAGE_SAMPLES:
        linkage = AgglomerativeClustering(num_clusters, metric="cosine", linkage="average")
        found = linkage.fit_predict(directions)
    else:
        found = MiniBatchKMeans(num_clusters, random_state=seed, n_init=3).fit_predict(directions)
    clusters = np.full(len(rows), np.bincount(found).argmax())
    clusters[directed] = found
    _, first, inverse = np.unique(clusters, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse].astype(np.int32)
