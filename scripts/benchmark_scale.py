"""A store of millions of rows: writing it with its moments, estimating from it, and the memory that takes; or texts, which are
read and tokenised.

The rows are random, and written as the gradient stage writes them, in batches of a shuffled order; everything after the
gradients themselves is real. Memory is anonymous memory: pages of the mapped rows belong to the file and can be dropped.

    python scripts/benchmark_scale.py --rows 5000000 --dim 256 --tasks 2000 --subsets 1000
    python scripts/benchmark_scale.py --texts 200000

Writes  a temporary store (rows x d x 4 bytes), or a file of texts and their tokens; one line of JSON on stdout
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from src import config, console
from src.artifacts import read_manifest
from src.estimation import estimate
from src.store import StoredPart, StoreWriter


def anonymous_bytes() -> int:
    """Anonymous memory of this process (Linux)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class PeakMemory:
    """The highest anonymous memory while it is entered, above what there was."""

    def __enter__(self) -> PeakMemory:
        self.start, self.peak, self._over = anonymous_bytes(), 0, threading.Event()

        def watch() -> None:
            while not self._over.wait(0.05):
                self.peak = max(self.peak, anonymous_bytes() - self.start)

        self._watcher = threading.Thread(target=watch)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watcher.join()


def write_store(folder: Path, args: argparse.Namespace) -> None:
    """Random rows through the store's writer, every tenth a target's."""
    rng = np.random.default_rng(0)
    tasks = rng.integers(args.tasks, size=args.rows, dtype=np.int32)
    is_target = np.arange(args.rows) % 10 == 0
    samples = {
        "sample_index": np.arange(args.rows),
        "task": np.where(is_target, -1, tasks),
        "target": np.where(is_target, tasks % args.targets, -1),
        "target_tokens": rng.integers(1, 100, args.rows),
        "key": np.arange(args.rows).astype("S32"),
    }
    names = {"tasks": list(map(str, range(args.tasks))), "targets": list(map(str, range(args.targets)))}
    writer = StoreWriter(folder, {"dim": args.dim, "output_function": "loss"}, samples, args.dim, "", names=names)
    means = rng.standard_normal((args.tasks, args.dim), np.float32)
    order = rng.permutation(args.rows)
    for start in console.progress(range(0, args.rows, 4096), desc="rows", unit="batch"):
        index = np.sort(order[start : start + 4096])
        rows = rng.standard_normal((len(index), args.dim), np.float32) + means[tasks[index]]
        writer.write(index, rows, rng.random(len(index), np.float32))
    writer.finish({"step": 0})


def tokenise(folder: Path, texts: int) -> dict[str, float]:
    """Rows of 120 random words, read and tokenised by the small models' tokenizer: what that takes."""
    from src.datamodule import TaskDataModule
    from src.instruction import load_instruction

    gradients = console.load_script("scripts/benchmark_gradients.py")
    tokenizer = gradients.build_model("llama", "cpu").tokenizer
    words = gradients.words_of_one_token(tokenizer)
    file = gradients.write_samples(folder / "texts.jsonl", texts, words, longest=121, shortest=121)
    started = time.perf_counter()
    with PeakMemory() as reading:
        data = load_instruction([file], heldout_share=0.0)
    read = time.perf_counter()
    with PeakMemory() as tokenising:
        TaskDataModule(data, tokenizer, "decoder", token_cache=folder / "tokens")
    return {
        "texts": texts,
        "file_mb": round(file.stat().st_size / 1e6, 1),
        "reading_seconds": round(read - started, 1),
        "reading_mb": round(reading.peak / 1e6, 1),
        "tokenising_seconds": round(time.perf_counter() - read, 1),
        "tokenising_mb": round(tokenising.peak / 1e6, 1),
    }


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The script's flags."""
    parser = console.Parser(__doc__)
    group = parser.add_argument_group("size")
    for flag, default, meaning in (
        ("--rows", 5_000_000, "projected gradients of the store"),
        ("--dim", 256, "projection dimension d"),
        ("--tasks", 2000, "tasks that the rows belong to"),
        ("--targets", 10, "targets"),
        ("--subsets", 1000, "subsets to estimate"),
    ):
        group.add_argument(flag, type=config.COUNT, default=default, help=f"{meaning} (default: {default:,})")
    group.add_argument("--texts", type=config.COUNT, help="rows of 120 words to read and tokenise (default: a store)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Write, estimate, report."""
    with tempfile.TemporaryDirectory(dir=".") as name:
        if args.texts:
            print(json.dumps(tokenise(Path(name), args.texts)))
            return
        folder = Path(name) / "part"
        started = time.perf_counter()
        with PeakMemory() as writing:
            write_store(folder, args)
        written = time.perf_counter()
        with PeakMemory() as estimating:
            part = StoredPart(folder, read_manifest(folder, "")).estimation_part()
            membership = np.random.default_rng(1).random((args.subsets, args.tasks)) < 0.5
            estimates = estimate([part], membership)
        figures = {
            **{flag: getattr(args, flag) for flag in ("rows", "dim", "tasks", "targets", "subsets")},
            "writing_seconds": round(written - started, 1),
            "writing_gb": round(writing.peak / 1e9, 2),
            "estimating_seconds": round(time.perf_counter() - written, 1),
            "estimating_gb": round(estimating.peak / 1e9, 2),
            "finite": bool(np.isfinite(estimates).all()),
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    console.run_stage(main, parse_args())
