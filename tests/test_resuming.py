"""Trainings that are cut off, in the middle of an epoch or between two, go on and leave what an undisturbed one leaves."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.conftest import build_model_folder, write_sources
from tests.faults import Stages, torchrun_environments
from tests.test_faults import assert_same, error_line

DATA = ["--data_files", "sources.jsonl", "--target_files", "target.jsonl", "--heldout_share", "0.1"]
LORA = ["--train_lora", "--lora_rank", "4", "--lora_alpha", "8"]
TRAIN = ["custom_train_alpaca.py", *DATA, "--lr", "1e-2", "--save_name", "toy", "--epochs", "3"]
SHARES = ["--checkpoint_at", "0", "0.5", "1.0"]
EVERY_STEP = ["--save_every", "0"]
TRAININGS = {
    "adapter": [*LORA, "--batch_size", "8", *SHARES],
    "whole model, two batches a step, the last one smaller": ["--batch_size", "6", "--accumulate", "2", *SHARES],
    "truth of three subsets": [*LORA, "--batch_size", "4", "--subset_file", "three.txt"],
    "model on shares of tasks": [*LORA, "--batch_size", "4", "--task_weights", "shares.csv"],
}


class Folders:
    """Folders with data beside a model that has dropout, so that a random number too many or too few shows."""

    def __init__(self, root: Path, stages: Stages) -> None:
        self.root, self.stages, self.undisturbed = root, stages, dict[str, Path]()
        build_model_folder("gpt2", root / "model")
        (root / "empty").mkdir()
        write_sources(root / "empty" / "sources.jsonl", {"up a": 20, "down": 20, "up b": 20, "down/2": 20})
        write_sources(root / "empty" / "target.jsonl", {"goal": 20})
        (root / "empty" / "three.txt").write_text("0\n1\n2 3\n")
        (root / "empty" / "shares.csv").write_text("name,share\nup a,0.5\ndown,0.3\nup b,0.2\n")

    def new(self, name: str) -> Path:
        folder = self.root / name
        shutil.rmtree(folder, ignore_errors=True)
        return Path(shutil.copytree(self.root / "empty", folder))

    def whole(self, training: str) -> Path:
        """What a training leaves that nothing disturbs."""
        if training not in self.undisturbed:
            folder = self.new(f"whole {training}")
            outcome = self.stages.run(folder, command(training))
            assert outcome.status == 0, outcome.output
            self.undisturbed[training] = folder
        return self.undisturbed[training]


def command(training: str, *more: str) -> list[str]:
    return [*TRAIN, "--model_key", "../model", *TRAININGS[training], *more]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, stages: Stages) -> Folders:
    return Folders(tmp_path_factory.mktemp("resuming"), stages)


def states(folder: Path) -> list[Path]:
    return sorted(folder.rglob("unfinished*.ckpt"))


@pytest.mark.parametrize("training", TRAININGS)
def test_a_killed_training_leaves_what_an_undisturbed_one_leaves(training: str, folders: Folders) -> None:
    """Killed again and again, at every step of which a state is kept, until it comes to its end: the same bytes, nothing
    is left over, and it really went on each time."""
    expected, folder, steps = folders.whole(training), folders.new("killed"), []
    for _ in range(20):
        outcome = folders.stages.run(folder, command(training, *EVERY_STEP), kill_at=55)
        steps += [int(found) for found in re.findall(r"Going on after (\d+) of", outcome.output)]
        if outcome.status == 0:
            break
        assert outcome.status == -signal.SIGKILL, outcome.output
    assert outcome.status == 0 and len(steps) >= 2 and len(set(steps)) > 1, steps
    assert_same(folder, expected)


def test_without_a_flag_a_training_goes_on_at_its_last_epoch(folders: Folders) -> None:
    """Killed before the best model of the second epoch is there: the first is not trained again."""
    folder = folders.new("between")
    outcome = folders.stages.run(folder, command("adapter"), stop_at="epoch_epoch=1/manifest.json")
    assert outcome.status is None, outcome.output

    os.kill(outcome.process, signal.SIGKILL)
    outcome = folders.stages.run(folder, command("adapter"))
    assert outcome.status == 0 and "Going on after 8 of 24 optimizer steps" in outcome.output
    assert_same(folder, folders.whole("adapter"))


@pytest.mark.parametrize("training", ["adapter", "truth of three subsets"])
def test_sigterm_keeps_the_state_and_ends_in_one_line(training: str, folders: Folders) -> None:
    """The signal comes in the middle of an epoch, as SLURM's does before the limit of time."""
    folder = folders.new("terminated")
    outcome = folders.stages.run(folder, command(training), kill_at=16, kill_with=signal.SIGTERM)
    assert outcome.status == 128 + signal.SIGTERM, outcome.output
    said = [line for line in outcome.output.splitlines() if "SIGTERM" in line]
    (steps,) = re.findall(r"^ended by SIGTERM after (\d+) optimizer steps?; the same command goes on there$", *said)
    assert states(folder)
    outcome = folders.stages.run(folder, command(training))
    assert outcome.status == 0 and f"Going on after {steps} of" in outcome.output
    assert_same(folder, folders.whole(training))


def cut(folders: Folders, training: str = "adapter") -> Path:
    """A folder with a state in it."""
    folder = folders.new("cut")
    folders.stages.run(folder, command(training, *EVERY_STEP), kill_at=45)
    assert states(folder)
    return folder


@pytest.mark.parametrize(
    ("training", "more", "differing"),
    [
        ("adapter", ["--lr", "1e-3"], "lr: found 0.01, expected 0.001"),
        ("adapter", ["--batch_size", "4", "--accumulate", "2"], "batch_size: found 8, expected 4"),
        ("truth of three subsets", ["--weight_decay", "0.1"], "weight_decay: found 0.0, expected 0.1"),
    ],
)
def test_the_state_of_another_training_is_refused(
    training: str, more: list[str], differing: str, folders: Folders
) -> None:
    folder = cut(folders, training)
    outcome = folders.stages.run(folder, command(training, *more))
    assert outcome.status == 1
    line = error_line(outcome.output)
    assert differing in line and "Choose another --" in line and "remove" in line
    outcome = folders.stages.run(folder, command(training))  # nothing was lost
    assert outcome.status == 0 and "Going on after" in outcome.output
    assert_same(folder, folders.whole(training))


class Hostile:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("executed"),)


def damaged(state: Path) -> None:
    state.write_bytes(state.read_bytes()[:-100])


def hostile(state: Path) -> None:
    torch.save({**torch.load(state, weights_only=True), "epoch": Hostile()}, state)


def checkpoint_gone(state: Path) -> None:
    shutil.rmtree(state.parent / "step_step=0")


@pytest.mark.parametrize(
    ("change", "message"),
    [(damaged, "is damaged"), (hostile, "holds more than data"), (checkpoint_gone, "step_step=0 is gone")],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_state_that_is_not_what_was_written_is_refused(change, message: str, folders: Folders) -> None:
    """Half copied, made to run something when it is read, without the checkpoints that came before it."""
    folder = cut(folders)
    (state,) = states(folder)
    change(state)
    outcome = folders.stages.run(folder, command("adapter"))
    assert outcome.status == 1 and message in error_line(outcome.output), outcome.output
    assert not (folder / "executed").exists()
    for path in (state, *state.parent.glob("*step=*")):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
    assert folders.stages.run(folder, command("adapter")).status == 0
    assert_same(folder, folders.whole("adapter"))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("signal_sent", [signal.SIGKILL, signal.SIGTERM])
def test_several_processes_go_on_together(strategy: str, signal_sent: int, folders: Folders) -> None:
    """Two processes (gloo), of which the first is told to end: the other ends with it, and both go on in step."""
    several = command("adapter", *EVERY_STEP, "--strategy", strategy, "--accelerator", "cpu")
    name = f"two {strategy}"
    if name not in folders.undisturbed:
        folders.undisturbed[name] = folders.new(name)
        outcomes = folders.stages.run_together(folders.undisturbed[name], several, torchrun_environments(2))
        assert [outcome.status for outcome in outcomes] == [0, 0], outcomes
    folder = folders.new("several")
    outcomes = folders.stages.run_together(folder, several, torchrun_environments(2), kill_at=40, kill_with=signal_sent)
    assert outcomes[0].status == {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 128 + signal.SIGTERM}[signal_sent]
    assert signal_sent == signal.SIGKILL or outcomes[1].status == 0
    outcomes = folders.stages.run_together(folder, several, torchrun_environments(2))
    assert [outcome.status for outcome in outcomes] == [0, 0] and "Going on after" in outcomes[0].output, outcomes
    assert not states(folder)
    weights = sorted(folders.undisturbed[name].glob("external_lightning_logs/*/*/adapter_model.safetensors"))
    assert len(weights) == 4
    for path in weights:
        expected, found = load_file(path), load_file(folder / path.relative_to(folders.undisturbed[name]))
        for key, values in expected.items():
            np.testing.assert_allclose(found[key], values, rtol=1e-5, atol=1e-7)


def test_the_state_is_plain_data_of_what_trains(folders: Folders) -> None:
    (state,) = states(cut(folders))
    found = torch.load(state, weights_only=True)
    assert found["state_dict"] and all("lora_" in name for name in found["state_dict"])
    assert found["optimizer_states"][0]["state"]  # the moments
    with pytest.raises(pickle.UnpicklingError):
        hostile(state)
        torch.load(state, weights_only=True)
