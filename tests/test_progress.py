"""What a person sees while a stage works."""

from __future__ import annotations

import time

import pytest

from src import cli


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bars and lines that come after hundredths of a second instead of seconds."""
    monkeypatch.setattr(cli, "SHOWN_AFTER_SECONDS", 0.02)
    monkeypatch.setattr(cli, "LOG_INTERVAL_SECONDS", 0.05)


def test_a_log_file_gets_a_line_now_and_then(quickly: None, capsys: pytest.CaptureFixture) -> None:
    """Whole lines with share, pace and remaining time, no control characters, far fewer than steps; none for short work."""
    with cli.progress(desc="gradients", total=60, unit="sample") as bar:
        for _ in range(60):
            time.sleep(0.005)
            bar.update(1)
    for _ in cli.progress(iter(range(30)), desc="reading", unit="row"):
        time.sleep(0.005)
    for _ in cli.progress(range(3), desc="short"):
        pass
    for _ in cli.progress(range(4), desc="reading outside", unit="file"):
        for _ in cli.progress(range(4), desc="reading inside", unit="row", leave=False):
            time.sleep(0.02)
    lines = capsys.readouterr().err.splitlines()
    counted, uncounted = ([line for line in lines if line.startswith(name)] for name in ("gradients: ", "reading: "))
    nested = [line for line in lines if line.startswith(("reading outside: ", "reading inside: "))]
    assert len(counted) + len(uncounted) + len(nested) == len(lines) and len(nested) >= 4
    assert not set("\r\x1b") & set("".join(lines))
    assert 2 <= len(counted) <= 15 and "100 %, 60 of 60 [" in counted[-1]
    assert all("samples/s" in line and "<" in line for line in counted)
    assert 1 <= len(uncounted) <= 10 and "30 rows [" in uncounted[-1]


def test_work_without_steps_says_what_it_is(quickly: None, capsys: pytest.CaptureFixture) -> None:
    with cli.waiting_for("clustering"):
        time.sleep(0.1)
    with cli.waiting_for("nothing"):
        pass
    time.sleep(0.05)
    assert capsys.readouterr().err == "clustering …\n"
