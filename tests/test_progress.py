"""What a person sees while a stage works."""

import re
import time

import pytest
import torch

from src import console
from src.distributed import Hardware
from src.finetune import FineTuning, FitProgress, TrainingPlan, fit
from tests.commands import refused
from tests.test_models import adapted, make_datamodule


@pytest.fixture
def wait(monkeypatch):
    """Lets the clock of progress bars go on by so many seconds at once, whatever the machine does meanwhile."""
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def test_a_log_file_gets_a_line_now_and_then(wait, capsys):
    """Whole lines with share, pace and remaining time, no control characters, far fewer than steps; none for short work."""
    with console.progress(desc="gradients", total=60, initial=20, unit="sample") as bar:
        for _ in range(40):
            wait(1)
            bar.update(1)
    for _ in console.progress(iter(range(30)), desc="reading", unit="row"):
        wait(1)
    for _ in console.progress(range(3), desc="short"):
        wait(0.5)
    for _ in console.progress(range(4), desc="reading outside", unit="file"):
        for _ in console.progress(range(4), desc="reading inside", unit="row", leave=False):
            wait(8)
    lines = capsys.readouterr().err.splitlines()
    counted, uncounted = ([line for line in lines if line.startswith(name)] for name in ("gradients: ", "reading: "))
    nested = [line for line in lines if line.startswith(("reading outside: ", "reading inside: "))]
    assert len(counted) + len(uncounted) + len(nested) == len(lines) and len(nested) >= 8
    assert not set("\r\x1b") & set("".join(lines))
    assert counted == [
        "gradients: 58 %, 35 of 60 [00:15<00:25, 1 samples/s]",
        "gradients: 83 %, 50 of 60 [00:30<00:10, 1 samples/s]",
        "gradients: 100 %, 60 of 60 [00:40<00:00, 1 samples/s]",
    ]
    assert uncounted[-1].startswith("reading: 30 rows [") and len(uncounted) <= 3


def test_work_without_steps_says_what_it_is(capsys, monkeypatch):
    monkeypatch.setattr(console, "SHOWN_AFTER_SECONDS", 0.5)
    said, ends = "", time.monotonic() + 30
    with console.waiting_for("clustering"):
        while not said and time.monotonic() < ends:
            said = capsys.readouterr().err
            time.sleep(0.01)
    with console.waiting_for("nothing"):
        pass
    time.sleep(0.7)
    assert said + capsys.readouterr().err == "clustering …\n"


def test_a_fit_shows_its_steps_and_losses_and_each_evaluation(model_folders, tmp_path, capsys, monkeypatch):
    for name in ("SHOWN_AFTER_SECONDS", "LOG_INTERVAL_SECONDS"):
        monkeypatch.setattr(console, name, 0)
    model = adapted(model_folders["llama"])
    datamodule = make_datamodule(model, tmp_path, batch_size=4)
    steps = -(-len(datamodule.data.indices("train")) // 4)
    hardware = Hardware("cpu", 1, "auto", "32-true", 1)
    fit(model, datamodule, TrainingPlan(2, 1e-3), hardware, seed=0, callbacks=[FitProgress("fit")], validate=True)
    said = capsys.readouterr().err
    losses = r"val_loss=\d\.\d{3}, train_loss=\d\.\d{3}"
    assert re.search(rf"fit: 50 %, {steps} of {2 * steps} \[.*<.*, {losses}\]", said), said
    assert said.count("validation: 100 %, 1 of 1 [") == 3, said  # before training, and after each epoch


def test_losses_that_are_looked_at_later_are_named_all_the_same(model_folders, tmp_path):
    """As on a GPU, where a look at each step's would wait for it."""
    model = adapted(model_folders["llama"])
    module = FineTuning(model, make_datamodule(model, tmp_path).data, TrainingPlan(1, 1e-3))
    samples = [torch.tensor(pair) for pair in ((0, 1), (2, 5), (3, 4))]
    losses = torch.tensor([1.0, float("nan"), float("inf")])
    module._unseen = list(zip(losses, (7, 8, 9), samples, strict=True))
    refused(r"training loss is nan after 8 optimizer steps, at samples 2 \(a\), 5 \(a\); lower", module.look_at_losses)
