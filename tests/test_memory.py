"""Memory that runs out: gradients go on in smaller batches, everything else ends in one line that says what helps."""

import argparse
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from src import gradients
from src.console import run_stage
from src.gradients import GradientCollector, collect_gradients, fitting_budget
from src.projection import make_projection
from src.store import StoreWriter
from tests.commands import COLLECT, TRAIN, refused
from tests.conftest import write_sources
from tests.faults import Outcome, Stages, torchrun_environments
from tests.test_models import adapted, make_datamodule
from tests.test_processes import check_rows

ON_CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError(ON_CPU),
    MemoryError("Unable to allocate 7.45 GiB for an array with shape (1000, 1000000) and data type float64"),
    OSError(12, "Cannot allocate memory"),
]


def fitting(rows: int, error: Exception) -> type[GradientCollector]:
    """A collector on a device that has memory for so many rows at once."""

    class Small(GradientCollector):
        taken: list[int] = []  # noqa: RUF012

        def __call__(self, batch: dict) -> tuple:
            if len(batch["labels"]) > rows:
                raise error
            self.taken.append(len(batch["labels"]))
            return super().__call__(batch)

    return Small


@pytest.fixture
def collecting(model_folders, tmp_path):
    """Takes the gradients of the training rows into a store of this name, in one batch where it fits, and gives them."""
    model = adapted(model_folders["llama"])
    datamodule = make_datamodule(model, tmp_path, max_tokens_per_batch=10_000)
    rows = datamodule.data.indices("train")
    samples = {"sample_index": rows, "key": datamodule.row_keys(rows), "target_tokens": datamodule.target_tokens[rows]}
    samples |= {"task": datamodule.data.task_of_sample[rows], "target": np.full(len(rows), -1)}

    def collect(name):
        store = StoreWriter(tmp_path / name, {}, samples, 16, "")
        collect_gradients(model, datamodule, make_projection("sketch", 16, 0), store, output_function="loss")
        assert not len(store.missing())
        return store.rows

    return collect


@pytest.mark.parametrize("error", ERRORS[:4], ids=lambda error: type(error).__name__)
def test_a_batch_that_ends_the_memory_is_halved(error, collecting, monkeypatch):
    """Three rows fit, more do not: the same rows as with memory for all; one that does not fit alone is named."""
    expected = collecting("all")
    monkeypatch.setattr(gradients, "GradientCollector", small := fitting(3, error))
    np.testing.assert_allclose(collecting("three"), expected, rtol=1e-4, atol=1e-6)
    assert 1 <= max(small.taken) <= 3 and sum(small.taken) == len(expected)
    monkeypatch.setattr(gradients, "GradientCollector", fitting(0, error))
    message = r"a batch of 1 row of up to \d+ tokens does not fit.*--gradient_checkpointing"
    refused(message, collecting, "none")
    monkeypatch.setattr(gradients, "GradientCollector", fitting(3, RuntimeError("shapes do not match")))
    refused("shapes do not match", collecting, "store", error=RuntimeError)  # other errors are not hidden


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_memory_that_runs_out_is_one_line(error):
    """With the flags of the script that help, and how much was asked for where that is known."""

    def main(_):
        raise error

    with pytest.raises(SystemExit) as ended:
        run_stage(main, argparse.Namespace(accumulate=1, gradient_checkpointing=False, strategy="auto"))
    assert str(ended.value).startswith("error: out of memory") and len(str(ended.value).splitlines()) == 1
    for flag in ("--batch_size with a larger --accumulate", "--gradient_checkpointing", "--strategy fsdp"):
        assert flag in str(ended.value)
    assert "--use_qlora" not in str(ended.value)  # none of the script's flags
    for size in ("2.50 GiB", "4096 bytes", "7.45 GiB"):
        assert (f"asked for {size} more" in str(ended.value)) == (size in str(error))


@pytest.mark.parametrize("rows", [0, 5, 1000])
def test_auto_doubles_the_budget_while_a_batch_fits(rows, model_folders, tmp_path):
    """Until the longest rows do not fit, or are all in one batch; what does not fit at the start is left to halving."""
    model = adapted(model_folders["llama"])
    datamodule = make_datamodule(model, tmp_path, max_tokens_per_batch=40)
    indices = np.arange(len(datamodule.data))
    found = fitting_budget(fitting(rows, ERRORS[0])(model, make_projection("sketch", 16, 0)), datamodule, indices)
    batch, doubled = (len(datamodule.budgeted(indices, budget)[0]) for budget in (found, 2 * found))
    assert found == 40 if rows == 0 else batch <= rows < doubled or batch == len(indices)


def test_memory_that_really_runs_out(model_folders, stages, workspace):
    """A process that may take 100 MB more: a batch of gradients is halved, a training step ends in one line."""
    write_sources(workspace / "sources.jsonl", {f"{name} {'long ' * 30}": 200 for name in ("up", "down")})
    flags = ["--data_files", "sources.jsonl", "--model_key", model_folders["llama"], "--train_lora"]
    training = [TRAIN, *flags, "--epochs", "1", "--checkpoint_at", "0", "--stop_after_checkpoints"]
    outcome = stages.run(workspace, [*training, "--batch_size", "320", "--save_name", "large"], memory=100 << 20)
    assert outcome.status == 1 and "Traceback" not in outcome.output, outcome.output
    assert "error: out of memory" in outcome.output.splitlines()[-1]
    assert stages.run(workspace, [*training, "--batch_size", "8"]).status == 0
    gradients = [*COLLECT, "--project_dim", "16", "--max_tokens_per_batch"]
    outcome = stages.run(workspace, [*gradients, "80000"], memory=100 << 20)
    assert outcome.status == 0 and "batches are halved" in outcome.output, outcome.output


SMALL = '''
"""Stage 2, where the memory of the process RUNS_OUT ends at more rows of a batch than FIT."""
import os
import sys

import torch

from src import gradients
from src.console import load_script

stage = load_script("fast_estimate_eval_approximation_alpaca.py")
parse_args, (moment, fit) = stage.parse_args, os.environ.get("RUNS_OUT", "never 0").split()
rows = 0


def run_out(at):
    if rows > int(fit) and at == moment:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")


class Small(gradients.GradientCollector):
    def __call__(self, batch):
        global rows
        rows = len(batch["labels"])
        run_out("before")
        taken = super().__call__(batch)
        run_out("after")
        rows = 0
        return taken


def at(name, function):
    def with_less_memory(*arguments, **options):
        run_out(name)
        return function(*arguments, **options)
    return with_less_memory


def main(args):
    gradients.GradientCollector = Small
    gradients.Projection.add = at("backward", gradients.Projection.add)
    gradients._InStep.allocate = at("gathering", gradients._InStep.allocate)
    collect = gradients.collect_gradients

    def with_memory_ending_in_the_second_block(model, datamodule, projection, store, **options):
        last = model.network.get_base_model().model.layers[1].mlp
        last.forward = at("forward", last.forward)
        datamodule.max_tokens_per_batch = 40
        fitting = gradients.fitting_budget(Small(model, projection), datamodule, store.to_compute)
        print("tokens that fit:", fitting, file=sys.stderr)
        datamodule.max_tokens_per_batch = 400
        collect(model, datamodule, projection, store, **options)

    gradients.collect_gradients = with_memory_ending_in_the_second_block
    stage.main(args)
'''


@pytest.fixture
def spread(track: tuple[Path, list[str]], stages: Stages, tmp_path: Path):
    """Takes gradients with the weights spread over two processes, whose memory ends as said of each; what they end with."""
    workspace = shutil.copytree(track[0], tmp_path / "spread", ignore=shutil.ignore_patterns("gradients"))
    (workspace / "small.py").write_text(SMALL)

    def run(*runs_out: str) -> list[Outcome]:
        places = torchrun_environments(2)
        environments = [place | {"RUNS_OUT": words} for place, words in zip(places, runs_out, strict=True)]
        (checkpoint,) = workspace.glob("external_lightning_logs/*/step_step=8")
        flags = f"{COLLECT[1]} --save_name toy --project_dim 32 --strategy fsdp --accelerator cpu --load_model_dir {checkpoint}"
        return stages.run_together(workspace, [str(workspace / "small.py"), *flags.split()], environments)

    return run


NEVER = "never 0"


@pytest.mark.parametrize(
    "runs_out",
    [
        (NEVER, "before 5"),
        ("gathering 5", NEVER),
        ("backward 7", "forward 5"),
        (NEVER, "after 5"),
    ],
)
def test_processes_that_share_weights_halve_together(runs_out, spread, track, tmp_path):
    """Wherever one of two runs out, the other is not left waiting for it; the rows are those of one process."""
    outcomes = spread(*runs_out)
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes
    assert "do not fit into memory: batches are halved" in outcomes[0].output
    (one,), (several,) = ((root / "gradients").iterdir() for root in (track[0], tmp_path / "spread"))
    check_rows(one, several, ["step_step=8"])
    found = [re.findall(r"tokens that fit: (\d+)", outcome.output) for outcome in outcomes]
    assert found == [["160"]] * 2  # doubled in step, too


def test_a_row_that_does_not_fit_ends_all_that_share_weights(spread):
    outcomes = spread(NEVER, "forward 0")
    assert [outcome.status for outcome in outcomes] == [1, 1], outcomes
    for outcome in outcomes:
        assert "error: a batch of 1 row of up to" in outcome.output.splitlines()[-1], outcome.output
