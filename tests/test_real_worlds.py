"""The worlds of real data: what they hold, and that shuffled sources answer other questions."""

import json
from datetime import date
from pathlib import Path

import pandas as pd
import pytest

from tests.commands import load_script, refused, run_script


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_calendar_asks_the_target_for_days_of_its_own_in_the_words_of_cldr(workspace):
    pytest.importorskip("babel")
    run_script("data/make_calendar.py", "--rows", "40", "--target_rows", "90")
    texts = {
        path.stem: {row["messages"][1]["content"]: row["messages"][2]["content"] for row in rows_of(path)}
        for path in Path("data/calendar").glob("*/*.jsonl")
    }
    target = texts.pop("norwegian")
    assert len(texts) == 12 and all(target.keys().isdisjoint(asked) for asked in texts.values())
    for name in ("danish", "swedish", "german", "dutch"):
        right, wrong = texts[name], texts[f"{name}_shuffled"]
        assert right.keys() == wrong.keys() and sorted(right.values()) == sorted(wrong.values())
        assert all(right[question] != wrong[question] for question in right)
    refused("more days than a year has", run_script, "data/make_calendar.py", "--rows", "300", "--target_rows", "90")
    written, day = load_script("data/make_calendar.py").date_in, date(2024, 3, 15)
    assert written(day, "nb") == "fredag 15. mars" and written(day, "da") == "fredag den 15. marts"
    assert written(day, "es") == "viernes, 15 de marzo" and written(day, "en") == "Friday, March 15"
    refused("one that ends with the year", written, day, "hu")


def test_flan_world_holds_the_named_tasks(workspace):
    world = load_script("data/make_flan_world.py")
    flan = [
        {"inputs": f"{task} {number}", "targets": f"answer {number}", "_task_name": task}
        for task in (*world.FLAN_SOURCES, *world.TARGETS)
        for number in range(6)
    ]
    Path("flan.jsonl").write_text("".join(json.dumps(row) + "\n" for row in flan), encoding="utf-8")
    skills = [(name, f"{name} {i}", "", f"answer {i}") for name in (*world.SKILLS, "find") for i in range(5)]
    pd.DataFrame(skills, columns=["skill", "instruction", "input", "output"]).to_pickle("alpaca.pkl")
    here = ["--flan_file", "flan.jsonl", "--alpaca_file", "alpaca.pkl", "--output_dir", "world"]
    run_script("data/make_flan_world.py", *here, "--rows", "4", "--target_rows", "5")
    sources, targets = rows_of(Path("world/flan.jsonl")), rows_of(Path("world/target.jsonl"))
    assert len(sources) == 15 * 4 and len(targets) == 3 * 5
    assert {row["_task_name"] for row in targets} == set(world.TARGETS)
    for name in world.SHUFFLED:
        wrong = [row for row in sources if row["_task_name"] == f"{name}_shuffled"]
        assert len(wrong) == 4 and all(row["inputs"].split()[-1] != row["targets"].split()[-1] for row in wrong)
    refused("rows of at most 12 characters", run_script, "data/make_flan_world.py", *here, "--max_characters", "12")
