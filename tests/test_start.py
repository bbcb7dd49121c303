"""A stage starts without the libraries that it does not use."""

import json
import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
from peft import import_utils

from tests.commands import COLLECT, COMPARE, ENSEMBLE, ESTIMATE, EXPORT, MEASURE, ROOT, SELECT, TRAIN

OF_TRAINING = {
    "pytorch_lightning",
    "lightning_fabric",
    "peft",
    "transformers",
    "datasets",
    "bitsandbytes",
    "torchmetrics",
}
SLOW = {"sklearn", "torch._dynamo", "scipy.signal", "scipy.stats"}
RUN = """
import json, runpy, sys
commands, watched = json.loads(sys.argv[1])
for script, *arguments in commands:
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
    print("loaded", json.dumps([script, sorted(set(watched) & set(sys.modules))]))
"""


def loaded(commands: list[list[str]], watched: set[str]) -> dict[str, list[str]]:
    """Run commands in one process, in turn; script -> which of these modules are there when it ends."""
    paths = [[str(ROOT / script), *arguments] for script, *arguments in commands]
    child = [sys.executable, "-c", RUN, json.dumps([paths, sorted(watched)])]
    here = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(child, capture_output=True, text=True, check=False, env=here)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("loaded ")]
    assert len(lines) == len(commands)
    return {Path(script).name: found for script, found in (json.loads(line.removeprefix("loaded ")) for line in lines)}


def test_tables_estimates_and_selections_load_no_library_of_training(copy):
    """One process runs them in turn, so that the first one that loads too much is named; tables alone need no torch."""
    name, selected = ["--save_name", "toy"], "sampled_tasks/toy_forward_selection.txt"
    estimates, truth = "results/toy/estimates.csv", "truth.csv"
    of_store = [
        [ESTIMATE, *name],
        [SELECT, *name],
        [EXPORT, *name, "--subset_file", selected],
        ["scripts/import_results.py", "measured.csv", *name, "--results_name", "imported"],
    ]
    of_tables = [["scripts/status.py"], [COMPARE, estimates, truth], [ENSEMBLE, "results/toy"]]
    of_tables.append(["scripts/report.py", "results/toy"])

    targets = ("up a", "down", "up b", "down/2", "goal")
    rows = [{"subset": "0 1", "target": target, "loss": 1.0} for target in targets]
    pd.DataFrame(rows).to_csv("measured.csv", index=False)
    watched = OF_TRAINING | SLOW
    assert not {script: found for script, found in loaded(of_store, watched).items() if found}
    table = pd.read_csv(estimates, dtype={"subset": str})
    table.columns = [column.replace("estimate/", "validation_loss/") for column in table.columns]
    table.to_csv(truth, index=False)
    assert not {script: found for script, found in loaded(of_tables, watched | {"torch"}).items() if found}


def test_gradients_load_no_trainer_and_training_no_extras_of_it(copy):
    """Of Lightning, peft and transformers only what is used; bitsandbytes and torchmetrics are there for who wants them."""
    extras = OF_TRAINING - {"pytorch_lightning", "lightning_fabric", "peft", "transformers"} | {
        "matplotlib",
        "scipy.signal",
        "scipy.optimize",
    }
    trainer = {"pytorch_lightning", "lightning_fabric"}
    collect = [MEASURE, *COLLECT[1:], "--save_name", "toy", "--project_dim", "16"]
    train = [TRAIN, "--save_name", "toy", "--task_idxes", "0"]
    assert loaded([collect, train], extras | trainer) == {MEASURE: [], TRAIN: sorted(trainer)}


def test_what_was_left_out_is_there_afterwards():
    """A model in four bits, an assignment and a metric of one's own are possible after an adapter and a trainer were loaded without them."""
    assert import_module("scipy.optimize").linear_sum_assignment([[1.0, 0.0], [0.0, 1.0]])[1].tolist() == [1, 0]
    torchmetrics = import_module("torchmetrics")
    assert issubclass(torchmetrics.MeanMetric, torchmetrics.Metric)
    assert import_utils.is_bnb_available() == (find_spec("bitsandbytes") is not None)
