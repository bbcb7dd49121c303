"""Gradients by several processes: the rows are those of one, and what a process that died has finished is kept."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
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
from tests.commands import COLLECT, ROOT, TRAIN
from tests.faults import Stages, node_environments, srun_environments, torchrun_environments
from tests.test_models import adapted, make_datamodule


def run_in(workspace: Path, *command: str, torchrun: int = 0) -> str:
    """What `python <command>` prints in a folder, started as a user does: alone, or by torchrun as so many processes."""
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={torchrun}"] if torchrun else []
    script, *arguments = command
    words = [sys.executable, *launcher, str(ROOT / script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = {"cwd": workspace, "env": environment, "capture_output": True, "text": True, "timeout": 240}
    ended = subprocess.run(words, check=False, **options)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def run_by(stages: Stages, workspace: Path, command: list[str], environments: list[dict[str, str]]) -> str:
    """The same in processes that a launcher's environment tells who they are."""
    outcomes = stages.run_together(workspace, command, environments)
    assert [outcome.status for outcome in outcomes] == [0] * len(environments), outcomes
    return "".join(outcome.output for outcome in outcomes)


def started(launcher: str, count: int, command: list[str]) -> tuple[list[str], list[dict[str, str]]]:
    """A command and the environments of its processes, as a launcher starts them, on one node or two."""
    nodes = 2 if launcher.endswith("on two nodes") else 1
    if launcher.startswith("by hand"):
        return [*command, "--num_nodes", str(nodes)], node_environments(nodes)
    environments = torchrun_environments if launcher.startswith("torchrun") else srun_environments
    return command, environments(count, nodes)


def check_rows(one: Path, several: Path, parts: Sequence[str] = ("step_step=8", "step_step=16")) -> None:
    """Two stores of the same run have the same rows and moments, and nothing is left beside the second."""
    for part in parts:
        for name in ("projected.npy", "outputs.npy"):
            expected, found = np.load(one / part / name), np.load(several / part / name)
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        expected, found = (np.load(store / part / "moments_tasks.npz")["sums"] for store in (one, several))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert not list(several.glob(".*"))


REALLY = pytest.param("ddp", 2, "torchrun, really", marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("strategy", "count", "launcher"),
    [
        ("fsdp", 2, "itself"),
        ("ddp", 2, "torchrun"),
        ("ddp", 3, "srun"),
        ("ddp", 2, "torchrun on two nodes"),
        ("ddp", 3, "srun on two nodes"),
        ("fsdp", 2, "by hand on two nodes"),
        REALLY,
    ],
)
def test_rows_are_those_of_one_process(strategy, count, launcher, track, stages, tmp_path):
    """The stage on the CPU (gloo), however it is started: the whole model in each process, or its weights spread."""
    folder, _ = track
    workspace = tmp_path / "workspace"
    shutil.copytree(folder, workspace, ignore=shutil.ignore_patterns("gradients"))
    options = ["--strategy", strategy, "--accelerator", "cpu", "--project_dim", "32", "--max_tokens_per_batch", "200"]
    command = [*COLLECT, "--save_name", "toy", *options]
    if launcher == "itself":
        printed = run_in(workspace, *command, "--devices", *map(str, range(count)))
    elif launcher == "torchrun, really":
        printed = run_in(workspace, *command, torchrun=count)
    else:
        printed = run_by(stages, workspace, *started(launcher, count, command))
    assert printed.count("Wrote gradients/") == 1  # one process speaks
    (one,), (several,) = ((root / "gradients").iterdir() for root in (folder, workspace))
    check_rows(one, several)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_spread_weights_give_the_same_rows(kind, model_folders, tmp_path):
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


def test_sharded_training_is_whole_training(track, stages, tmp_path):
    """--strategy fsdp (FSDP2, gloo) and --strategy ddp leave the same adapter, which peft opens, and the same truth."""
    folder, flags = track
    workspace = tmp_path / "workspace"
    shutil.copytree(folder, workspace, ignore=shutil.ignore_patterns("gradients", "external_lightning_logs"))
    (workspace / "two.txt").write_text("0\n1 2\n")
    training = (
        f"{TRAIN} --epochs 1 --batch_size 4 --lr 1e-2 --accelerator cpu".split() + flags[: flags.index("--epochs")]
    )
    for strategy in ("ddp", "fsdp"):
        command = [*training, "--strategy", strategy, "--save_name", strategy]
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
    tables = (pd.read_csv(workspace / "results" / name / "results.csv") for name in ("ddp", "fsdp"))
    truths = [table.drop(columns="seconds") for table in tables]
    pd.testing.assert_frame_equal(*truths, rtol=1e-4)


def test_waiting_is_in_step(model_folders, tmp_path):
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
        projection, options = make_projection("sketch", 8, 0), {"output_function": "loss", "processes": processes}
        collect_gradients(model, datamodule, projection, store, **options)
    assert waits == [1, 1, 0, 0]


def test_a_joining_process_waits_for_the_files_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system that shows them late; it neither removes nor makes anything, and says so where they never come."""
    samples = {"sample_index": np.arange(3), "key": np.array(list("abc")), "task": np.zeros(3, int)}
    samples |= {"target": np.full(3, -1), "target_tokens": np.ones(3, int)}
    monkeypatch.setattr("src.store.JOIN_SECONDS", 0.3)
    with pytest.raises(ValueError, match=r"\.part, which the first process made, is not seen here after .* they share"):
        StoreWriter(tmp_path / "part", {}, samples, 4, "", joins=True)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("src.store.JOIN_SECONDS", 30)
    first = StoreWriter(tmp_path / "part", {}, samples, 4, "")
    first.write(np.array([0]), np.ones((1, 4)), np.ones(1))
    first.flush()
    hidden = first.partial.rename(tmp_path / "hidden")
    comes = threading.Timer(0.5, hidden.rename, [first.partial])
    comes.start()
    joining = StoreWriter(tmp_path / "part", {}, samples, 4, "", joins=True)
    assert joining.missing().tolist() == [1, 2]
    comes.join()


@pytest.mark.parametrize("launcher", ["srun on two nodes", "by hand on two nodes"])
def test_training_on_two_nodes_is_training_on_one(
    launcher: str, track: tuple[Path, list[str]], stages: Stages, tmp_path: Path
) -> None:
    """Each process knows its own place only, without LOCAL_RANK; the adapters are those of two processes on one node."""
    folder, flags = track
    adapters = []
    for name in ("torchrun", launcher):
        workspace = tmp_path / name
        shutil.copytree(folder, workspace, ignore=shutil.ignore_patterns("gradients", "external_lightning_logs"))
        training = [*flags[: flags.index("--epochs")], "--epochs", "1", "--batch_size", "4", "--lr", "1e-2"]
        command = ["custom_train_alpaca.py", *training, "--accelerator", "cpu", "--save_name", "two"]
        run_by(stages, workspace, *started(name, 2, command))
        (run,) = workspace.glob("external_lightning_logs/*_run_0")
        adapters.append({path.parent.name: load_file(path) for path in run.glob("*/adapter_model.safetensors")})
    assert adapters[0].keys() == adapters[1].keys() and len(adapters[0]) >= 3
    for checkpoint, expected in adapters[0].items():
        for key, values in expected.items():
            np.testing.assert_allclose(adapters[1][checkpoint][key], values, rtol=1e-5, atol=1e-7)
