"""Gradients by several processes: the rows are those of one, and what a process that died has finished is kept."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM

from src.distributed import Processes
from src.gradients import GradientCollector, collect_gradients
from src.projection import make_projection
from src.store import StoreWriter
from tests.commands import ROOT
from tests.faults import Stages, srun_environments, torchrun_environments
from tests.test_models import adapted, make_datamodule
from tests.test_stages import track

__all__ = ["track"]  # the fixture: a workspace in which stages 1 and 2 have run


def run_in(workspace: Path, *command: str, torchrun: int = 0) -> str:
    """What `python <command>` prints in a folder, started as a user does: alone, or by torchrun as so many processes."""
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={torchrun}"] if torchrun else []
    script, *arguments = command
    words = [sys.executable, *launcher, str(ROOT / script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        words, cwd=workspace, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def run_by(stages: Stages, workspace: Path, command: list[str], environments: list[dict[str, str]]) -> str:
    """The same in processes that a launcher's environment tells who they are."""
    outcomes = stages.run_together(workspace, command, environments)
    assert [outcome.status for outcome in outcomes] == [0] * len(environments), outcomes
    return "".join(outcome.output for outcome in outcomes)


def check_rows(one: Path, several: Path) -> None:
    """Two stores of the same run have the same rows and moments, and nothing is left beside the second."""
    for part in ("step_step=8", "step_step=16"):
        for name in ("projected.npy", "outputs.npy"):
            expected, found = np.load(one / part / name), np.load(several / part / name)
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        with (
            np.load(one / part / "moments_tasks.npz") as expected,
            np.load(several / part / "moments_tasks.npz") as found,
        ):
            np.testing.assert_allclose(found["sums"], expected["sums"], rtol=1e-4, atol=1e-4)
    assert not list(several.glob(".*"))


@pytest.mark.parametrize(
    ("strategy", "count", "launcher"),
    [
        ("fsdp", 2, "itself"),
        ("ddp", 2, "torchrun"),
        ("ddp", 3, "srun"),
        pytest.param("ddp", 2, "torchrun, really", marks=pytest.mark.slow),
    ],
)
def test_rows_are_those_of_one_process(
    strategy: str, count: int, launcher: str, track: tuple[Path, list[str]], stages: Stages, tmp_path: Path
) -> None:
    """The stage on the CPU (gloo), however it is started: the whole model in each process, or its weights spread."""
    folder, _ = track
    workspace = tmp_path / "workspace"
    shutil.copytree(folder, workspace, ignore=shutil.ignore_patterns("gradients"))
    options = ["--strategy", strategy, "--accelerator", "cpu", "--project_dim", "32", "--max_tokens_per_batch", "200"]
    command = [
        "fast_estimate_eval_approximation_alpaca.py",
        "--compute_pretrained_outputs",
        "--save_name",
        "toy",
        *options,
    ]
    if launcher == "itself":
        printed = run_in(workspace, *command, "--devices", *map(str, range(count)))
    elif launcher == "torchrun, really":
        printed = run_in(workspace, *command, torchrun=count)
    else:
        environments = {"torchrun": torchrun_environments, "srun": srun_environments}[launcher](count)
        printed = run_by(stages, workspace, command, environments)
    assert printed.count("Wrote gradients/") == 1  # one process speaks
    (one,), (several,) = ((root / "gradients").iterdir() for root in (folder, workspace))
    check_rows(one, several)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_spread_weights_give_the_same_rows(kind: str, model_folders: dict[str, str], tmp_path: Path) -> None:
    """The weights are really spread, a process without a batch takes part, and no weight gets a gradient."""
    model = adapted(model_folders[kind])
    datamodule = make_datamodule(model, tmp_path)
    batch, projection = datamodule.collate(np.arange(6)), make_projection("sketch", 16, 0)
    with GradientCollector(model, projection) as collect:
        expected, _ = collect(batch)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        model.shard(init_device_mesh("cpu", (1,)))
        sharded = model
        assert sharded.is_sharded
        for _ in range(2):
            with GradientCollector(sharded, projection) as collect:
                found, _ = collect(batch)
            torch.testing.assert_close(found, expected)
        assert all(parameter.grad is None for parameter in sharded.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_sharded_training_is_whole_training(track: tuple[Path, list[str]], stages: Stages, tmp_path: Path) -> None:
    """--strategy fsdp (FSDP2, gloo) and --strategy ddp leave the same adapter, which peft opens, and the same truth."""
    folder, flags = track
    workspace = tmp_path / "workspace"
    shutil.copytree(folder, workspace, ignore=shutil.ignore_patterns("gradients", "external_lightning_logs"))
    (workspace / "two.txt").write_text("0\n1 2\n")
    training = [
        *flags[: flags.index("--epochs")],
        "--epochs",
        "1",
        "--batch_size",
        "4",
        "--lr",
        "1e-2",
        "--accelerator",
        "cpu",
    ]
    for strategy in ("ddp", "fsdp"):
        command = ["custom_train_alpaca.py", *training, "--strategy", strategy, "--save_name", strategy]
        for more in ([], ["--subset_file", "two.txt"]):
            printed = run_by(stages, workspace, [*command, *more], torchrun_environments(2))
            assert printed.count("\nWrote") + printed.startswith("Wrote") == 1, printed
    whole, sharded = (next(workspace.glob(f"external_lightning_logs/*_{name}_run_0")) for name in ("ddp", "fsdp"))
    names = {path.name for path in whole.iterdir()}
    assert names == {path.name for path in sharded.iterdir()} and any(name.startswith("step_step=") for name in names)
    for checkpoint in sorted(names - {"manifest.json"}):
        expected, found = (load_file(root / checkpoint / "adapter_model.safetensors") for root in (whole, sharded))
        assert expected.keys() == found.keys()
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-6)
    model_key = flags[flags.index("--model_key") + 1]
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_key), sharded / checkpoint)
    truths = [
        pd.read_csv(workspace / "results" / name / "results.csv").drop(columns="seconds") for name in ("ddp", "fsdp")
    ]
    pd.testing.assert_frame_equal(*truths, rtol=1e-4)


def test_a_dead_process_leaves_what_it_has_finished(model_folders: dict[str, str], tmp_path: Path) -> None:
    """Of two processes one dies in the middle; afterwards one process alone, or three, compute only what is missing."""
    model = adapted(model_folders["llama"])
    datamodule = make_datamodule(model, tmp_path, max_tokens_per_batch=60)
    data = datamodule.data
    rows = np.sort(np.concatenate([data.indices("train"), data.indices("validation")]))
    samples = {"sample_index": rows, "task": data.task_of_sample[rows], "target": data.target_of_sample[rows]}
    samples |= {"key": datamodule.row_keys(rows), "target_tokens": datamodule.target_tokens[rows]}
    projection = make_projection("sketch", 16, 0)

    def writer(name: str) -> StoreWriter:
        return StoreWriter(tmp_path / name, {"dim": 16}, samples, 16, "", representation_size=32)

    def take(store: StoreWriter, rank: int, world: int) -> None:
        """What one process does between two of its waits."""
        batches = datamodule.budgeted(store.missing())[rank::world]
        if batches:
            shard = store.shard(rank, np.concatenate(batches))
            collect_gradients(model, datamodule, projection, shard, output_function="loss")
            shard.flush()

    whole = writer("whole")
    collect_gradients(model, datamodule, projection, whole, output_function="loss")
    whole.finish({})
    cut = writer("cut")
    take(cut, 0, 2)
    dead = cut.shard(1, np.concatenate(datamodule.budgeted(cut.missing())[1::2]))
    collected = dead.missing()[:3]
    for batch in datamodule.evaluation_batches(collected):  # three samples are done, then it dies
        index = batch["sample_index"].numpy()
        position = np.searchsorted(rows, index)
        parts = (
            np.load(tmp_path / "whole" / f"{name}.npy")[position]
            for name in ("projected", "outputs", "representations")
        )
        dead.write(index, *parts)
    dead.flush()

    again = writer("cut")  # the same command, started again
    again.absorb()
    assert not set(collected) & set(again.missing()) and 0 < len(again.missing()) < len(rows) / 2
    shares = [np.concatenate(datamodule.budgeted(again.missing())[rank::3]) for rank in range(3)]
    assert sorted(np.concatenate(shares)) == sorted(again.missing())  # each sample once
    for rank in range(3):
        take(again, rank, 3)
    again.absorb()
    again.finish({})
    for name in ("projected", "outputs", "representations"):
        expected, found = (np.load(tmp_path / folder / f"{name}.npy") for folder in ("whole", "cut"))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert not list(tmp_path.glob(".cut*"))


def test_waiting_is_in_step(model_folders: dict[str, str], tmp_path: Path) -> None:
    """The first process takes shards over before and after; every process waits the same number of times."""
    model = adapted(model_folders["llama"])
    datamodule = make_datamodule(model, tmp_path)
    rows = datamodule.data.indices("train")
    samples = {"sample_index": rows, "task": datamodule.data.task_of_sample[rows], "target": np.full(len(rows), -1)}
    samples |= {"key": datamodule.row_keys(rows), "target_tokens": datamodule.target_tokens[rows]}
    waits = []
    for rank in (1, 0):
        store = StoreWriter(tmp_path / "store", {"dim": 8}, samples, 8, "")
        processes = Processes(rank, 2, "cpu", lambda rank=rank: waits.append(rank))
        collect_gradients(
            model, datamodule, make_projection("sketch", 8, 0), store, output_function="loss", processes=processes
        )
    assert waits == [1, 1, 0, 0]
