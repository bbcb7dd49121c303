"""The paper's tables on a pretrained model: what is measured, what is counted, and that documents show the kept results."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from src.cot import load_cot
from tests.commands import ROOT, load_script, refused, run_script

TINY = "synthetic:9,num_tasks=6,pretrain_steps=30,rows_per_task=12,target_rows=12"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_error_is_measured_on_the_whole_way_of_a_training(here):
    """At the start, half-way and at the end, in random directions and towards two halves; a second run replaces its rows."""
    other = pd.DataFrame({"world": ["another"], "model": ["own"], "distance": [0.5]})
    other.to_csv("kept.csv", index=False)
    flags = [
        "--world",
        TINY,
        "--epochs",
        "1",
        "--project_dim",
        "32",
        "--halves",
        "2",
        "--seeds",
        "1",
        "--keep",
        "kept.csv",
    ]
    for _ in range(2):
        run_script("scripts/benchmark_approximation.py", *flags)
    kept = pd.read_csv("kept.csv", keep_default_na=False)
    assert kept["world"][0] == "another" and len(kept) == 1 + 3 * (5 + 2 * (5 + 1))
    kept = kept[1:].astype({"distance": float, "first_order": float, "zero_order": float, "change": float})
    assert kept["checkpoint"].unique().tolist() == ["base model", "half-way", "end"] and set(
        kept["rows"].astype(float)
    ) == {12}
    np.testing.assert_allclose(kept["change"], np.sqrt(kept["first_order"] / kept["zero_order"]), rtol=1e-3)
    whole = kept[kept["whole_way"].astype(str) == "True"]
    assert whole["toward"].nunique() == 2 and len(whole) == 6
    assert (whole.groupby("checkpoint")["distance"].min() > 0).all()


def test_a_documents_tables_are_those_of_its_files(here):
    records = [("base model", seed, "", False, 0.02, seed / 4) for seed in (1, 3)]
    records += [("base model", "", "half", whole, at, 0.01) for whole, at in ((False, 0.02), (True, 0.3))]
    names = ["checkpoint", "seed", "toward", "whole_way", "distance", "change"]
    frame = pd.DataFrame(records, columns=names).assign(data="toy", first_order=0.25, zero_order=1.0)
    frame.to_csv("errors.csv", index=False)
    mark = "<!-- errors.csv by_distance toy -->"
    document = Path("page.md")
    document.write_text(f"before\n{mark}\nold\n<!-- end -->\nafter\n")
    run_script("scripts/render_table.py", "--into", "page.md")
    lines = document.read_text().splitlines()
    assert lines[:2] == ["before", mark] and lines[-2:] == ["<!-- end -->", "after"]
    assert lines[2] == "| checkpoint | direction | error | 2 % | length of the way | whole way |"
    assert lines[6] == "| base model | random | of the change | 50 % |  |  |"  # the mean of 25 and 75 %
    assert lines[9] == "| base model | towards halves | of the change | 1 % | 30 % | 1 % |"
    document.write_text(f"{mark}\nno end\n")
    refused("1 tables begin and 0 have an end", run_script, "scripts/render_table.py", "--into", "page.md")
    document.write_text("<!-- errors.csv sideways -->\n<!-- end -->\n")
    refused("no view sideways", run_script, "scripts/render_table.py", "--into", "page.md")


def test_a_documents_selections_have_intervals_where_seeds_are_several(here):
    records = [("ours", 3.0, 0.25, 1.5, 0.125, 0.0, 1200), ("all", 6.0, np.nan, 2.0, np.nan, 1.0, 900)]
    names = ["method", "tasks", "test_accuracy_half", "test_loss", "test_loss_half", "regret", "passes"]
    pd.DataFrame(records, columns=names).assign(data="toy", test_accuracy=0.5).to_csv(
        "kept.csv", index=False, na_rep="nan"
    )
    Path("page.md").write_text("<!-- kept.csv by_selection toy -->\n<!-- end -->\n")
    run_script("scripts/render_table.py", "--into", "page.md")
    assert Path("page.md").read_text().splitlines()[1:-1] == [
        "| trained on | sources | test loss | test accuracy | regret | passes |",
        "| --- | --- | --- | --- | --- | --- |",
        "| ours | 3 | 1.500 ± 0.125 | 0.500 ± 0.250 | 0.00 | 1,200 |",
        "| all | 6 | 2.000 | 0.500 | 1.00 | 900 |",
    ]


def test_a_documents_engines_are_in_steps_and_the_fastest_first(here):
    facts = {
        "time_least": "0.5",
        "time_greatest": "2.5",
        "memory": "",
        "product_error": "",
        "numbers": "",
        "version": "",
    }
    records = [("", "step", "1.0", ""), ("100", "slow", "2.0", "gradients are off by 0.01"), ("100", "fast", "0.875", ""),
               ("100", "none", "", "cannot: why")]  # fmt: skip
    frame = pd.DataFrame(records, columns=["dim", "engine", "time", "remark"]).assign(model="toy", **facts)
    frame.loc[1, ["version", "memory", "numbers", "product_error"]] = "1.2", "0.5", "1200", "0.125"
    frame.loc[3, ["time_least", "time_greatest"]] = ""
    frame.to_csv("peers.csv", index=False)
    Path("page.md").write_text("<!-- peers.csv by_engine toy -->\n<!-- end -->\n")
    run_script("scripts/render_table.py", "--into", "page.md")
    assert Path("page.md").read_text().splitlines()[1:-1] == [
        "| d | engine | time | memory | numbers of a row | error of inner products | gradients |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "|  | step | 1.00 (0.50 to 2.50) |  |  |  |  |",
        "| 100 | fast | 0.88 (0.50 to 2.50) |  |  |  |  |",
        "| 100 | slow 1.2 | 2.00 (0.50 to 2.50) | 0.50 | 1,200 | 0.12 | gradients are off by 0.01 |",
        "| 100 | none |  |  |  |  | cannot: why |",
    ]


@pytest.mark.parametrize("name", ["accuracy.md", "paper.md", "speed.md"])
def test_pages_show_what_is_kept(name):
    """Nobody types a figure: rendering a page again changes nothing."""
    page = ROOT / "docs" / name
    before = page.read_text()
    assert ".csv " in before
    copy = load_script("scripts/render_table.py").rendered_document(page)
    assert copy == before


def test_cost_counts_every_fine_tuning():
    """Against a loop over the fine-tunings that the alternatives would run."""
    script = load_script("scripts/cost.py")
    setting = script.Setting(1000, 60, 10, 6, 3, 7, checkpoints=2, subsets=5, steps=4, dim=8)
    found = script.samples(setting)
    assert found["the stages"] == (3 * 60 + 2 * (60 + 7), 0)
    both = forward = fine_tunings = 0
    chosen: list[int] = []
    for _ in range(4):
        for task in range(6):
            if task not in chosen:
                both += 3 * 10 * len([*chosen, task])
                forward += 7
                fine_tunings += 1
        chosen.append(next(task for task in range(6) if task not in chosen))
    assert found["every candidate fine-tuned"] == (both, forward)
    assert script.number_of_fine_tunings(setting)["every candidate fine-tuned"] == fine_tunings
    assert found["every subset fine-tuned"] == (5 * 3 * 30, 5 * 7)
    # an adapter: forward 2, backward 2 operations for each weight and token; every weight: 2 and 4
    assert script.operations(setting, 1, 1, False) == 1000 * 10 * (4 + 2)
    every = script.Setting(**{**vars(setting), "all_weights": True})
    assert script.operations(every, 1, 1, False) == 1000 * 10 * (6 + 2)
    algebra = script.operations(setting, 0, 0, True)
    assert algebra == pytest.approx(2 * (67 * 2 * 64 + 5 * (8**3 / 3 + 2 * 6 * 64)))


@pytest.mark.parametrize("dataset_key", ["strategy_qa", "commonsense_qa"])
def test_short_questions_are_a_split_that_can_be_read(here, shared_data, dataset_key):
    worlds, script = load_script("scripts/worlds.py"), load_script("scripts/benchmark_estimates.py")
    source = shared_data / "chain_of_thought"
    args = script.parse_args(["--model_key", "m", "--cot_dir", str(source)])
    world = worlds.parse_world(f"real:{dataset_key},rows=20,test_rows=5", args)
    split = json.loads((world.folder / "split" / f"{dataset_key}__default.json").read_text())
    assert len(split["train"]) == 20 and len(split["test"]) == 5
    data = load_cot(dataset_key, "ft_cot", architecture="decoder", data_dir=world.folder, saved_dir=world.folder / "saved",
                    heldout_share=0.2)  # fmt: skip
    sizes = [len(row.prompt) + len(row.completion) for row in data.examples if row.split == "train"]
    assert len(data.indices("train")) == 16 and max(sizes) <= 260 + 20
    refused("questions to train on", worlds.parse_world, f"real:{dataset_key},rows=2000", args)
