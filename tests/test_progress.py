"""What a person sees while a stage works."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from src import cli


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets the clock of progress bars go on by so many seconds at once, whatever the machine does meanwhile."""
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def test_a_log_file_gets_a_line_now_and_then(wait: Callable[[float], None], capsys: pytest.CaptureFixture) -> None:
    """Whole lines with share, pace and remaining time, no control characters, far fewer than steps; none for short work."""
    with cli.progress(desc="gradients", total=60, initial=20, unit="sample") as bar:
        for _ in range(40):
            wait(1)
            bar.update(1)
    for _ in cli.progress(iter(range(30)), desc="reading", unit="row"):
        wait(1)
    for _ in cli.progress(range(3), desc="short"):
        wait(0.5)
    for _ in cli.progress(range(4), desc="reading outside", unit="file"):
        for _ in cli.progress(range(4), desc="reading inside", unit="row", leave=False):
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


def test_work_without_steps_says_what_it_is(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "SHOWN_AFTER_SECONDS", 0.5)
    said, ends = "", time.monotonic() + 30
    with cli.waiting_for("clustering"):
        while not said and time.monotonic() < ends:
            said = capsys.readouterr().err
            time.sleep(0.01)
    with cli.waiting_for("nothing"):
        pass
    time.sleep(0.7)
    assert said + capsys.readouterr().err == "clustering …\n"
