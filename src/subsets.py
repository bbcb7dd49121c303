"""Subsets of tasks (sorted tuples of ids): drawn at random, kept as lines of a text file; and clusters as tasks.

Shapes: N samples, d projection dimension, n tasks, m subsets.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from src.artifacts import atomic_write
from src.data import key_digest, require_file

Subset = tuple[int, ...]

DEFAULT_NUM_SUBSETS, DEFAULT_SUBSET_SIZE = 1000, 0.5
# Average linkage holds all pairwise distances: 3 GB at this many samples.
MAX_LINKAGE_SAMPLES = 20_000


def membership_matrix(subsets: Sequence[Subset], num_tasks: int) -> np.ndarray:
    """Which tasks (columns) are in which subset (rows): (m, n) bool; refused (ValueError) where an id is out of range."""
    membership = np.zeros((len(subsets), num_tasks), bool)
    for row, subset in zip(membership, subsets, strict=True):
        if wrong := [task for task in subset if not 0 <= task < num_tasks]:
            raise ValueError(f"subset {subset} holds task {wrong[0]}; tasks are 0 to {num_tasks - 1}")
        row[list(subset)] = True
    return membership


def tasks_in_subset(num_tasks: int, subset_size: float) -> int:
    """The number of tasks in a subset of a size: below 1 a share of the tasks, from 1 on their number."""
    if 0 < subset_size < 1:
        return max(1, math.floor(subset_size * num_tasks + 0.5))
    if 1 <= subset_size <= num_tasks and subset_size == int(subset_size):
        return int(subset_size)
    found = f"subset size {subset_size}"
    raise ValueError(f"{found}: expected a share between 0 and 1, or a whole number from 1 to {num_tasks} tasks")


def draw_subsets(num_subsets: int | None, num_tasks: int, subset_size: float, seed: int) -> list[Subset]:
    """Different random subsets of one size (`tasks_in_subset`); None = 1,000, or as many as exist. Refuses (ValueError) a size
    or a number that do not exist."""
    size = tasks_in_subset(num_tasks, subset_size)
    existing = math.comb(num_tasks, size)
    num_subsets = min(DEFAULT_NUM_SUBSETS, existing) if num_subsets is None else num_subsets
    if num_subsets > existing:
        asked = f"{num_subsets:,} subsets of {size} out of {num_tasks} tasks are asked for, but only {existing:,} exist"
        raise ValueError(f"{asked}; ask for fewer (--number_of_subsets), or for another size (--subset_size)")
    rng = np.random.default_rng(seed)
    if existing <= 2 * num_subsets:  # drawing until all differ would take long
        everything = list(combinations(range(num_tasks), size))
        return [everything[i] for i in rng.choice(existing, num_subsets, replace=False)]
    drawn: dict[Subset, None] = {}  # a set that keeps the order
    while len(drawn) < num_subsets:
        drawn[tuple(sorted(rng.choice(num_tasks, size, replace=False).tolist()))] = None
    return list(drawn)


def load_or_draw_subsets(
    path: Path, num_subsets: int | None, num_tasks: int, subset_size: float, seed: int, tasks: Sequence[str] = ()
) -> list[Subset]:
    """The subsets of a file, whatever their number; drawn and written to it when it is not there. Arguments and errors as in
    `draw_subsets` and `read_subsets`."""
    if not path.exists():
        subsets = draw_subsets(num_subsets, num_tasks, subset_size, seed)
        write_subsets(path, subsets, f"{len(subsets)} random subsets of {num_tasks} tasks, seed {seed}", tasks)
    return read_subsets(path, num_tasks, tasks)


def write_subsets(path: Path, subsets: Iterable[Subset], comment: str = "", tasks: Sequence[str] = ()) -> None:
    """Write subsets as `read_subsets` reads them, all at once, below a comment and the names of the tasks."""
    names = [f"{task} = {name}" for task, name in enumerate(_on_one_line(tasks))]
    lines = [f"# {line}" for line in (*comment.splitlines(), *names)]
    for subset in subsets:
        if not subset:
            raise ValueError(f"{path}: an empty subset cannot be written")
        lines.append(" ".join(map(str, sorted(subset))))
    with atomic_write(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_subsets(path: Path, num_tasks: int, tasks: Sequence[str] = ()) -> list[Subset]:
    """The subsets of a text file, one a line: task ids separated by spaces, or names of tasks separated by commas.

    What follows a `#` is a comment. Where comments name the tasks, as `write_subsets` does, they are compared with `tasks`.
    FileNotFoundError: there is no such file. ValueError: a line holds something else, comments name other tasks, or there
    is no subset at all.
    """
    try:
        lines = require_file(path, "expected a file of task ids, one subset a line").read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    names, subsets = _on_one_line(tasks), []
    for number, line in enumerate(lines, start=1):
        at = f"{path}, line {number}"
        if names and (comment := re.fullmatch(r"\s*#\s*(\d+)\s*=\s*(.*)", line)):
            task, name = int(comment[1]), " ".join(comment[2].split())
            known = repr(names[task]) if task < len(names) else f"not among the {len(names)} tasks"
            if known != repr(name):
                cure = "draw or select the subsets again, or change the ids and remove the comments that name the tasks"
                raise ValueError(f"{at}: task {task} is {name!r} there, and {known} in the data; {cure}")
        if subset := parse_line(line.split("#")[0], num_tasks, tasks, at):
            subsets.append(subset)
    if not subsets:
        raise ValueError(f"{path} holds no subset; expected task ids separated by spaces, one subset a line")
    return subsets


def parse_line(text: str, num_tasks: int, tasks: Sequence[str], at: str) -> Subset:
    """The subset of a text: task ids separated by spaces, or names separated by commas. ValueError: it holds something else,
    or a task twice; `at` says where."""
    words, named, names = text.split(), _on_one_line(text.split(",")), _on_one_line(tasks)
    wrong = [word for word in words if not (word.isascii() and word.isdigit()) or int(word) >= num_tasks]
    unknown = [name for name in named if name not in names]
    if wrong and unknown:
        first = unknown[0] if len(unknown) < len(named) else wrong[0]
        expected = f"numbers from 0 to {num_tasks - 1}{', or names of tasks separated by commas' if tasks else ''}"
        raise ValueError(f"{at}: {first!r} is no task id; expected {expected}")
    subset = [names.index(name) for name in named] if wrong else [int(word) for word in words]
    if twice := [task for task in subset if subset.count(task) > 1]:
        raise ValueError(f"{at}: task {twice[0]} is named twice")
    return tuple(sorted(subset))


def _on_one_line(names: Iterable[str]) -> list[str]:
    return [" ".join(name.split()) for name in names]


def write_task_weights(path: Path, tasks: Sequence[str], shares: np.ndarray) -> None:
    """Write the share of the rows to draw from each task, (n,), as `read_task_weights` reads them."""
    frame = pd.DataFrame({"task": range(len(tasks)), "name": list(tasks), "share": shares})
    with atomic_write(path) as temporary:
        frame.to_csv(temporary, index=False)


def read_task_weights(path: Path, tasks: Sequence[str]) -> np.ndarray:
    """The share of the rows to draw from each task (n,), summing to 1; a task that the file does not name has none.
    FileNotFoundError, ValueError: no such file, or it holds something else.
    """
    made_by = "fast_estimate_forward_selection.py --weights writes one, for --task_weights"
    frame = pd.read_csv(require_file(path, made_by), dtype={"name": str}, keep_default_na=False)
    if missing := {"name", "share"} - set(frame.columns):
        raise ValueError(f"{path}: no column {min(missing)!r}; expected columns name and share")
    names, shares = frame["name"].tolist(), np.zeros(len(tasks))
    if unknown := [name for name in names if name not in tasks]:
        raise ValueError(f"{path}: task {unknown[0]!r} is not among the data's {len(tasks)} tasks")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{path}: task {twice[0]!r} stands there twice")
    shares[[list(tasks).index(name) for name in names]] = pd.to_numeric(frame["share"], errors="coerce")
    if not (np.isfinite(shares).all() and (shares >= 0).all() and shares.sum() > 0):
        raise ValueError(f"{path}: shares must be numbers, not negative and not all 0")
    return shares / shares.sum()


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


def cluster_samples(rows: np.ndarray, num_clusters: int, seed: int) -> np.ndarray:
    """Cluster samples by the direction of their projected gradients (N, d), to serve as tasks.

    Average linkage on cosine distance; above `MAX_LINKAGE_SAMPLES` samples k-means (with the seed) on rows of norm 1, which is
    about the same and needs no matrix of distances. A row of zeros has no direction and joins the largest cluster.
    Returns ids (N,) int32 in the order in which they first appear; refuses fewer rows with a direction than clusters, and
    rows that are not finite.
    """
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if not np.isfinite(norms).all():
        raise ValueError(f"row {int(np.argmin(np.isfinite(norms)))} is not finite, so samples cannot be clustered")
    directed = np.flatnonzero(norms)
    if not 1 <= num_clusters <= len(directed):
        asked = f"{num_clusters} clusters of {len(directed)} samples with a gradient"
        raise ValueError(f"{asked}: expected 1 to {len(directed)} clusters")
    from sklearn.cluster import AgglomerativeClustering, MiniBatchKMeans

    directions = rows[directed] / norms[directed]
    if len(directed) <= MAX_LINKAGE_SAMPLES:
        method = AgglomerativeClustering(num_clusters, metric="cosine", linkage="average")
    else:
        method = MiniBatchKMeans(num_clusters, random_state=seed, n_init=3)
    found = method.fit_predict(directions)
    clusters = np.full(len(rows), np.bincount(found).argmax())
    clusters[directed] = found
    return pd.factorize(clusters)[0].astype(np.int32)
