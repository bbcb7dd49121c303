"""Long use: memory, open files, disk and time per call stay as they are. Slow: python -m pytest -m slow tests/test_soak.py -s"""

from __future__ import annotations

import gc
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from src import config
from src.selection import forward_selection
from src.stage_estimate import Estimator
from tests.commands import ESTIMATE, SELECT, load_script, run_script
from tests.faults import Stages
from tests.test_faults import NAMED, World, world

__all__ = ["world"]


def use(folder: Path) -> dict[str, float]:
    """Resident bytes, open files, bytes and files on disk."""
    gc.collect()  # figures are rings of objects, which wait for it
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {"memory": resident, "open": len(os.listdir("/proc/self/fd")), "files": len(files),
            "bytes": sum(path.stat().st_size for path in files)}  # fmt: skip


def check_flat(what: str, call: Callable[[int], object], times: int, folder: Path) -> None:
    """Call it so often; after the first tenth nothing grows. Prints the figures."""
    tenths, started = [], time.process_time()
    for number in range(times):
        call(number)
        if (number + 1) % (times // 10) == 0:
            tenths.append({**use(folder), "seconds": (time.process_time() - started) / (times // 10)})
            started = time.process_time()
    second, last = tenths[1], tenths[-1]
    print(f"\n{what}, {times} times: " + ", ".join(f"{name} {second[name]:g} -> {last[name]:g}" for name in last))
    assert last["memory"] - second["memory"] < 30 << 20
    assert (last["open"], last["files"]) == (second["open"], second["files"])
    assert abs(last["bytes"] - second["bytes"]) < 1000
    assert last["seconds"] < 2 * second["seconds"] + 0.01


@pytest.mark.slow
def test_long_use_grows_nothing(world: World, stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 estimates and selections, 200 estimating and selecting stages, and 40 fine-tunings in one process."""
    folder = world.after(4, "soak")
    monkeypatch.chdir(folder)
    typed = config.typed_flags(load_script(ESTIMATE).parse_args(NAMED))
    estimating, store = config.from_store(config.EstimateConfig, typed)
    estimator = Estimator(estimating, store)
    rng, tasks = np.random.default_rng(0), len(estimator.tasks)

    def estimate_and_select(_: int) -> None:
        estimator(rng.random((20, tasks)) < 0.5, [0])
        forward_selection(lambda subsets: estimator(subsets, [0]).mean(axis=1), tasks)

    check_flat("estimates and selections", estimate_and_select, 2000, folder)
    check_flat("stages 3 and 4", lambda number: run_script((ESTIMATE, SELECT)[number % 2], *NAMED), 200, folder)

    def fine_tune(_: int) -> None:
        run_script("custom_train_alpaca.py", *NAMED, "--task_idxes", "0", "--results_name", "soak")
        for path in Path("results/soak").rglob("*.csv"):
            path.unlink()

    check_flat("fine-tunings", fine_tune, 40, folder)
