"""Every stage of the instruction track as a user runs it, on a tiny model, and the exact files it leaves."""

import json
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from peft import PeftModel
from safetensors.numpy import load_file
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM

from src import finetune, stage_train
from src.console import run_stage
from src.estimation import estimate, solutions
from src.evaluation import Calibration
from src.gradients import outputs_of
from src.models import load_checkpoint
from src.store import open_store
from src.subsets import read_subsets
from tests import commands
from tests.commands import COLLECT, COMPARE, ESTIMATE, SELECT, TRAIN, refused, run_script, training
from tests.conftest import write_sources

TOY = ("--save_name", "toy")
ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors", "manifest.json"}


def files_below(folder: Path) -> set[str]:
    """Every file below a folder, as relative paths, without locks."""
    found = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock"))
    return {str(path.relative_to(folder)) for path in found}


def table(name: str, **options: object) -> pd.DataFrame:
    return pd.read_csv(f"results/{name}.csv", dtype={"subset": str}, **options)


def facts(name: str) -> dict:
    return json.loads(Path(f"results/{name}.json").read_text())


def parts_of(pattern: str) -> list:
    """The stored gradients of a run."""
    (store,) = Path("gradients").glob(pattern)
    return open_store(store, None, "")


def losses_of(model: Path, target: str = "") -> np.ndarray:
    """Losses of test rows of a target, or of every row of a target that the toy's gradients were taken of."""
    made = training(*TOY, "--task_idxes")
    tuned, data = load_checkpoint(model, made.model_key), stage_train.load_data(made)
    if target:
        rows = data.indices("test")
        rows = rows[data.target_of_sample[rows] == data.targets.index(target)]
    else:
        part = parts_of("*_toy_dim_full_run_0")[0]
        rows = part.samples["sample_index"][part.samples["target"] >= 0]
    return outputs_of(tuned, stage_train.make_datamodule(made, data, tuned), rows, "loss")


def test_training_leaves_checkpoints_that_peft_opens_and_is_not_done_twice(here, model_folders, capsys):
    (run,) = Path("external_lightning_logs").glob("*_sources_lora_r_4_toy_run_0")
    best = next(path.name for path in run.iterdir() if path.name.startswith("epoch_epoch="))
    names = (best, "step_step=8", "step_step=16")
    assert files_below(run) == {"manifest.json"} | {f"{name}/{file}" for name in names for file in ADAPTER}
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folders["llama"]), run / best)
    run_script(TRAIN, *TOY)
    assert "nothing to train" in capsys.readouterr().out
    refused(r"--epochs 2 there, (--epochs )?3 typed.*another --save_name", run_script, f"{TRAIN} --epochs 3", *TOY)


def test_fine_tunings_can_take_equal_steps(copy):
    """Four steps are two epochs of a source of sixteen rows, and one of two such; rows of the two kinds do not mix."""
    for name, *flags in (("epochs", "--epochs", "2"), ("steps", "--epochs", "7", "--max_steps", "4")):
        run_script(TRAIN, *copy, *flags, "--task_idxes", "1", "--save_name", f"of_{name}", "--results_name", name)
    columns = ["num_rows", "validation_loss/goal", "test_loss/goal"]
    assert table("steps/results")[columns].equals(table("epochs/results")[columns])
    run_script(
        TRAIN, *copy, "--epochs", "1", "--task_idxes", "1", "3", "--save_name", "of_both", "--results_name", "both"
    )
    command = [TRAIN, *copy, "--max_steps", "4", "--save_name", "of_steps", "--results_name", "steps"]
    run_script(*command, "--epochs", "7", "--task_idxes", "1", "3")
    assert table("steps/results")[columns].iloc[1].equals(table("both/results")[columns].iloc[0])
    refused("epochs: found None, expected 7", run_script, TRAIN, *copy, "--epochs", "7", "--task_idxes", "1", "--save_name", "of_steps",
            "--results_name", "steps")  # fmt: skip


def test_meta_training_can_end_with_its_checkpoints(here):
    """The same weights at the last checkpoint as in a training that goes on, and nothing after it."""
    for name, stop in (("whole", []), ("stopped", ["--stop_after_checkpoints"])):
        run_script(TRAIN, *here, "--checkpoint_at", "0", "0.25", "--save_name", name, *stop)
    whole, stopped = (next(Path("external_lightning_logs").glob(f"*_{name}_run_0")) for name in ("whole", "stopped"))
    weights = [load_file(folder / "step_step=4" / "adapter_model.safetensors") for folder in (whole, stopped)]
    for name, values in weights[0].items():
        np.testing.assert_array_equal(values, weights[1][name])
    assert json.loads((stopped / "manifest.json").read_text())["trajectory"] == ["step_step=0", "step_step=4"]


def test_meta_training_leaves_alone_what_others_put_into_its_folder(copy, capsys):
    """Files and checkpoints copied there are named, and where it would write over one it does not start."""
    (source,) = Path("external_lightning_logs").glob("*_toy_run_0/step_step=8")
    run = Path(str(source.parent).replace("_toy_", "_guest_"))
    shutil.copytree(source, run / "step_step=777")
    (run / "notes.txt").write_text("mine")
    (run / "step_step=5").mkdir()  # half a checkpoint of a training that was cut off
    run_script(TRAIN, *copy, "--save_name", "guest", "--checkpoint_at", "0.5")
    assert "guest_run_0 holds notes.txt, step_step=777, not written by this training" in capsys.readouterr().out
    assert (run / "notes.txt").read_text() == "mine" and (run / "step_step=777" / "manifest.json").is_file()
    assert not (run / "step_step=5").exists()
    taken = Path(str(source.parent).replace("_toy_", "_taken_"))
    shutil.copytree(source, taken / "epoch_epoch=0")
    refused("epoch_epoch=0 is not of this training", run_script, TRAIN, *copy, "--save_name", "taken")


def test_gradients_leave_one_part_per_checkpoint(here, capsys):
    (store,) = Path("gradients").glob("*_toy_dim_32_run_0")
    parts = {"manifest.json", "outputs.npy", "projected.npy", "samples.npz"}
    found = {name for name in files_below(store) if "moments_" not in name}
    assert found == {f"{step}/{file}" for step in ("step_step=8", "step_step=16") for file in parts}
    rows = np.load(store / "step_step=8" / "projected.npy")
    assert rows.shape == (4 * 16 + 4 * 2 + 10, 32) and np.isfinite(rows).all()
    run_script(*COLLECT, *TOY, "--project_dim", "32")
    assert "nothing to compute" in capsys.readouterr().out
    refused(r"--max_length 512 there, (--max_length )?100 typed", run_script, *COLLECT, *TOY, "--max_length", "100")


def test_a_source_can_be_added_dropped_and_corrected_later(copy, capsys):
    """Gradients are taken of new rows alone, equal to those of a store made from the start, and nothing is trained again."""
    write_sources(Path("late.jsonl"), {"late": 10})
    lines = Path("sources.jsonl").read_text().splitlines(keepends=True)
    Path("sources.jsonl").write_text("".join(lines).replace("up a 3:", "up a three:"))
    two = ["--data_files", "sources.jsonl", "late.jsonl"]
    run_script(*COLLECT, *TOY, "--project_dim", "32", *two)
    said = capsys.readouterr().out
    part = parts_of("*_toy_dim_32_run_0")[0]
    assert "rows were there already" in said and "late" in part.manifest["tasks"]
    shutil.rmtree("gradients")
    run_script(*COLLECT, *TOY, "--project_dim", "32", *two)
    again = parts_of("*_toy_dim_32_run_0")[0]
    np.testing.assert_allclose(part.rows, again.rows, rtol=1e-4, atol=1e-6)
    run_script(ESTIMATE, *TOY, "--number_of_subsets", "4")
    run_script(SELECT, *TOY, "--target_task", "goal")
    assert "late" in facts("toy/manifest")["tasks"]
    run_script(TRAIN, *TOY, "--subset_file", "sampled_tasks/toy_forward_selection.txt", "--epochs", "2")
    assert Path("results/toy/results.csv").is_file()


def test_clusters_are_tasks_up_to_the_fine_tuning(copy, capsys):
    """Each stage is the one that the stage before it names as the next."""
    run_script(ESTIMATE, *TOY, "--load_clusters", "--num_clusters", "3", "--number_of_subsets", "3")
    for script in (SELECT, TRAIN):
        command = re.search(rf"Next: .*?python ({script} [^,\n]*)", capsys.readouterr().out)[1]
        run_script(command)
    (store,) = Path("gradients").glob("*_toy_dim_32_run_0")
    clusters = np.load(store / "clusters_3.npz")["clusters"]
    (subset,) = read_subsets(Path("sampled_tasks/toy_forward_selection.txt"), 3)
    (found,) = table("toy/results").to_dict("records")
    assert found["subset"] == " ".join(map(str, subset)) and found["num_rows"] == np.isin(clusters, subset).sum() > 0


def test_estimates_selection_and_the_one_fine_tuning(copy):
    before = files_below(Path())
    sampled = ["--sampled_tasks", "sampled_tasks/toy.txt", "--number_of_subsets", "6", "--subset_size", "2"]
    run_script(ESTIMATE, *TOY, *sampled)
    frame = table("toy/estimates")
    targets = ["down", "down/2", "goal", "up a", "up b"]
    assert list(frame.columns) == ["subset", "run", *(f"estimate/{target}" for target in targets)]
    assert len(frame) == 6 and np.isfinite(frame.iloc[:, 2:].to_numpy(float)).all()
    Path("sampled_tasks/toy.txt").write_text("# edited by hand\n0 1\n3\n")
    run_script(ESTIMATE, *TOY, *sampled, "--target_task", "goal")
    frame = table("toy/estimates")
    assert frame["subset"].tolist() == ["0 1", "3"] and list(frame.columns) == ["subset", "run", "estimate/goal"]
    Path("sampled_tasks/toy.txt").write_text("0 1\n2 3\n1 2\n3 2\n")
    run_script(ESTIMATE, *TOY, *sampled)
    assert table("toy/estimates")["subset"].tolist() == ["0 1", "2 3", "1 2"]
    run_script(COLLECT[0], *TOY, "--scale", "0.05")
    run_script(SELECT, *TOY)
    run_script(commands.ENSEMBLE, "results/toy", "--top_k", "2")
    for file in ("sampled_tasks/toy_forward_selection.txt", "sampled_tasks/toy_random_ensemble.txt"):
        run_script(TRAIN, *TOY, "--subset_file", file)
    run_script(TRAIN, *TOY, "--task_idxes")
    run_script(TRAIN, *TOY, "--task_idxes", "1", "3")
    run_script("scripts/report.py", "results/toy")
    page = Path("results/toy/report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "not made yet" in page
    results = table("toy/results", keep_default_na=False)
    columns = [f"{split}_loss/{target}" for split in ("validation", "test") for target in targets]
    assert list(results.columns) == ["subset", "run", "num_rows", *columns, "seconds"]
    assert {"", "1 3"} <= set(results["subset"]) and len(results) == results["subset"].nunique()
    row = results[results["subset"] == "1 3"].iloc[0]
    assert int(row["num_rows"]) == 32
    (model,) = Path("results/toy/models").glob("tasks_1_3_run_0")
    assert losses_of(model, "goal").mean() == pytest.approx(float(row["test_loss/goal"]), rel=1e-5)
    found = table("toy/losses/tasks_1_3_run_0").groupby("target")["loss"].mean()
    assert found["goal"] == pytest.approx(float(row["validation_loss/goal"]), rel=1e-6)
    kept = {path.name for path in Path("results/toy/models").iterdir()}
    assert kept == {f"{name}_run_0" for name in ("toy_forward_selection", "toy_random_ensemble", "tasks_1_3")}
    others = ("moments_", "/models/", "/losses/")
    new = {name for name in files_below(Path()) - before if not any(part in name for part in others)}
    drawn = {f"sampled_tasks/toy{end}.txt" for end in ("", "_forward_selection", "_random_ensemble")}
    tables = {f"results/toy/{name}" for name in ("estimates.csv", "manifest.json", "report.html", "sources.csv")}
    described = ("approximation_error", "selection", "scores")
    tables |= {f"results/toy/{name}.{end}" for name in described for end in ("csv", "json", "png")}
    assert new == drawn | tables | {"results/toy/results.csv", "results/toy/results.json"}


def test_each_source_has_the_estimates_of_subsets_that_differ_by_it(copy):
    """Those that stage 3 gives of these subsets; and its rows and the tokens that are trained on are all of the data's."""
    run_script(SELECT, *TOY)
    sources, steps = table("toy/sources"), table("toy/selection")
    chosen = set(map(int, steps.loc[steps["selected"], "subset"].iloc[-1].split()))
    described = facts("toy/selection")
    assert set(sources.index[sources["selected"]]) == chosen and sources["name"].tolist() == described["tasks"]
    assert described["trust"].startswith("Estimates are from")
    assert described["training"] == f"python {TRAIN} --save_name toy"
    estimates = {(): described["references"]["goal"]["base model (measured)"]}
    asked = [chosen, *({task} for task in range(4)), *(chosen ^ {task} for task in range(4))]
    texts = {" ".join(map(str, sorted(subset))) for subset in asked if subset}
    Path("asked.txt").write_text("\n".join(sorted(texts)) + "\n")
    run_script(ESTIMATE, *TOY, "--sampled_tasks", "asked.txt", "--target_task", "goal")
    found = table("toy/estimates").set_index("subset")["estimate/goal"]
    estimates |= {tuple(map(int, text.split())): value for text, value in found.items()}
    of = [estimates[tuple(sorted(chosen ^ {task}))] - estimates[tuple(sorted(chosen))] for task in range(4)]
    np.testing.assert_allclose(sources["change"], of, atol=1e-5)
    np.testing.assert_allclose(sources["affinity"], [estimates[()] - estimates[task,] for task in range(4)], atol=1e-5)
    part = parts_of("*_toy_dim_32_run_0")[0]
    for task, row in sources.iterrows():
        own = part.samples["task"] == task
        assert (row["rows"], row["tokens"]) == (own.sum(), part.samples["target_tokens"][own].sum())


def test_estimates_are_compared_and_calibrated(copy, capsys):
    """Every pair of tasks estimated and fine-tuned: the table holds what the library says of the two columns."""
    pairs = ["0 1", "0 2", "0 3", "1 2", "1 3", "2 3"]
    Path("pairs.txt").write_text("\n".join(pairs) + "\n")
    run_script(TRAIN, *TOY, "--epochs", "2", "--runs", "2", "--subset_file", "pairs.txt")
    run_script(TRAIN, *TOY, "--runs", "2", "--task_idxes")
    drawn = [*TOY, "--sampled_tasks", "pairs.txt"]
    run_script(ESTIMATE, *drawn, "--calibrate", "results/toy/results.csv")
    truth = table("toy/results", keep_default_na=False)
    estimates = table("toy/estimates")
    means = truth[truth["subset"] != ""].groupby("subset")["validation_loss/goal"].mean().loc[pairs]
    manifest = facts("toy/manifest")
    assert manifest["calibrated_on"] == pairs and manifest["rho"] == 1e-3
    members = np.array([[str(task) in pair for task in range(4)] for pair in pairs])
    targets = [name.partition("/")[2] for name in estimates if name.startswith("estimate/")]
    kinds = ("estimate", "calibrated", "low", "high")
    raw, *found = (estimates[[f"{kind}/{target}" for target in targets]].to_numpy() for kind in kinds)
    losses = [f"validation_loss/{target}" for target in targets]
    fine_tuned = truth.groupby("subset")[losses].mean().loc[pairs].to_numpy()
    of_parts = [solutions(part.estimation_part(), members) for part in parts_of("*_toy_dim_*_run_0")]
    features = np.concatenate([x / np.sqrt(x.var(axis=0).sum()) for x in of_parts], axis=1)
    for pair in range(6):  # each is calibrated on the others
        others = np.arange(6) != pair
        expected = Calibration(raw[others], features[others], fine_tuned[others])(raw[[pair]], features[[pair]])
        np.testing.assert_allclose(np.array(found)[:, [pair]], expected, rtol=1e-4)
    run_script(COMPARE, "results/toy/estimates.csv", "results/toy/results.csv")
    assert "calibrated: 6 subsets of 6 calibrated the others" in capsys.readouterr().out
    compared = table("toy/comparison").set_index(["target", "predictor"])
    assert set(compared.index.get_level_values("predictor")) == {"estimate", "calibrated", "base model", "constant"}
    found = compared.loc[("goal", "estimate")]
    assert found["lds"] == pytest.approx(spearmanr(estimates["estimate/goal"], means).statistic)
    assert found["subsets"] == 6 and np.isfinite(found["attainable"])
    base = truth[truth["subset"] == ""]["validation_loss/goal"].mean()
    assert compared.loc[("goal", "base model"), "relative_error"] == pytest.approx((abs(base - means) / means).mean())
    Path("few.csv").write_text("subset,run,validation_loss/goal\n0,0,1.0\n1,0,1.1\n2,0,1.2\n")
    drawn += ["--target_task", "goal", "--calibrate", "few.csv"]
    refused("at least 5 fine-tuned subsets, found 3", run_script, ESTIMATE, *drawn)


def test_a_truth_run_goes_on_at_the_next_missing_line(copy, monkeypatch, capsys):
    """Killed after one line, started again: the finished line is kept, the others are as if nothing had happened; a line
    that stands there twice is trained once."""
    Path("three.txt").write_text("0\n1\n2 3\n1\n")
    run_script(TRAIN, *TOY, "--subset_file", "three.txt", "--results_name", "whole")
    assert "three.txt: 1 line with a subset that appears before" in capsys.readouterr().out
    original, calls = finetune.fine_tune_on_subset, []

    def killed_at_the_second(*arguments, **options):
        calls.append(arguments[3])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(finetune, "fine_tune_on_subset", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run_script(TRAIN, *TOY, "--subset_file", "three.txt", "--results_name", "cut")
    run_script(TRAIN, *TOY, "--subset_file", "three.txt", "--results_name", "cut")
    assert calls == [(0,), (1,), (1,), (2, 3)]
    whole, cut = (pd.read_csv(f"results/{name}/results.csv").drop(columns="seconds") for name in ("whole", "cut"))
    pd.testing.assert_frame_equal(whole, cut)


def test_rows_of_one_table_are_of_one_training(copy):
    """What counts is the number of rows in a step, not how they come together."""
    flags = copy[: copy.index("--batch_size")]
    command = [TRAIN, *flags, "--lr", "1e-2", "--task_idxes", "0", "--save_name", "free", "--accelerator", "cpu"]
    run_script(*command, "--batch_size", "8")
    written = Path("results/free/results.csv").read_bytes()
    run_script(*command, "--batch_size", "4", "--accumulate", "2")
    assert Path("results/free/results.csv").read_bytes() == written
    refused(r"rows_per_step: found 8, expected 4.*--results_name", run_script, *command, "--batch_size", "4")
    other = ["--batch_size", "8", "--precision", "bf16"]
    refused("precision: found 32-true, expected bf16-mixed", run_script, *command, *other)


def test_a_model_that_is_replaced_and_a_file_of_other_data_are_named(copy, capsys):
    for text, replaced in (("0\n", False), ("0\n", False), ("1\n", True)):
        Path("choice.txt").write_text(text)
        run_script(TRAIN, *TOY, "--subset_file", "choice.txt")
        said = "models/choice_run_0 does not fit what is asked for: subset: found [0], expected [1]. It is replaced"
        assert (said in capsys.readouterr().out) == replaced
    Path("other.txt").write_text("# 0 = down\n# 1 = up a\n1\n")
    for command in ([TRAIN, *TOY, "--subset_file"], [ESTIMATE, *TOY, "--sampled_tasks"]):
        message = r"other\.txt, line 2: task 1 is 'up a' there, and 'down/2' in the data"
        refused(message, run_script, *command, "other.txt")


def test_a_subset_that_two_selections_took_is_fine_tuned_once(copy, monkeypatch):
    """The model is copied, whole, to the second's name; that of another subset is not, nor one whose weights are gone."""
    for name, text in (("first", "0 1\n"), ("second", "0 1\n"), ("third", "2\n")):
        Path(f"{name}.txt").write_text(text)
    run_script(TRAIN, *TOY, "--subset_file", "first.txt")
    first, second = (Path(f"results/toy/models/{name}_run_0") for name in ("first", "second"))
    trained = []
    fine_tune = finetune.fine_tune_on_subset
    monkeypatch.setattr(
        finetune, "fine_tune_on_subset", lambda *given, **named: trained.append(given[3]) or fine_tune(*given, **named)
    )
    for name in ("second", "third"):
        run_script(TRAIN, *TOY, "--subset_file", f"{name}.txt")
    assert trained == [(2,)]
    assert {path.name: path.read_bytes() for path in second.iterdir()} == {
        path.name: path.read_bytes() for path in first.iterdir()
    }
    shutil.rmtree(second)
    (first / "adapter_model.safetensors").unlink()
    run_script(TRAIN, *TOY, "--subset_file", "second.txt")
    assert trained == [(2,), (0, 1)] and (second / "adapter_model.safetensors").is_file()


def test_selection_for_each_target_and_backward(copy):
    """A subset for each target, the same as when that target is asked for alone; rows are kept within a budget."""
    run_script(SELECT, *TOY, "--results_name", "each", "--per_target", "--target_task", "goal", "down")
    subsets = read_subsets(Path("sampled_tasks/each_forward_selection.txt"), 4)
    for target, subset in zip(("goal", "down"), subsets, strict=True):
        run_script(SELECT, *TOY, "--results_name", "one", "--target_task", target)
        assert read_subsets(Path("sampled_tasks/one_forward_selection.txt"), 4) == [subset]
    affinity = table("each/affinity")
    assert list(affinity.columns) == ["task", "goal", "down"]
    assert affinity["task"][affinity["down"].argmax()] in ("down", "down/2")
    run_script(SELECT, *TOY, "--results_name", "one", "--direction", "backward", "--budget_rows", "40")
    (backward,) = read_subsets(Path("sampled_tasks/one_backward_selection.txt"), 4)
    assert 1 <= len(backward) <= 2  # of 16 rows each
    path = table("one/selection")
    sizes = path["subset"].str.split().str.len().tolist()
    assert sizes == sorted(sizes, reverse=True)
    assert path["selected"].tolist() == [size >= len(backward) for size in sizes]


def test_candidates_are_really_fine_tuned_as_the_run_was(copy):
    """--refine lets the truth decide among the best estimates."""
    run_script(SELECT, *TOY, "--results_name", "refined", "--target_task", "goal", "--refine", "2")
    path = table("refined/selection")
    results = table("refined/results").set_index("subset")
    assert set(results.index) == set(path.nsmallest(2, "estimate")["subset"])
    (chosen,) = read_subsets(Path("sampled_tasks/refined_forward_selection.txt"), 4)
    assert results["validation_loss/goal"].idxmin() == " ".join(map(str, chosen))
    tuned = facts("refined/results")
    assert [tuned[key] for key in ("epochs", "rows_per_step", "lr")] == [2, 8, 1e-2]


def test_mixture_weights_are_what_training_draws(copy):
    run_script(SELECT, *TOY, "--weights", "--target_task", "goal")
    weights = pd.read_csv("sampled_tasks/toy_weights.csv")
    assert weights["name"].tolist() == ["down", "down/2", "up a", "up b"] and weights["share"].sum() == pytest.approx(1)
    (estimate,) = json.loads(Path("sampled_tasks/toy_weights.json").read_text())["estimates"]
    run_script(commands.EXPORT, *TOY, "--task_weights", "sampled_tasks/toy_weights.csv", "--for", "trl")
    assert json.loads(Path("results/toy/export_trl/mixture.json").read_text())["estimates"] == [estimate]
    assert estimate["target"] == "goal" and np.isfinite(estimate["estimate"])
    run_script(TRAIN, *TOY, "--task_weights", "sampled_tasks/toy_weights.csv")
    result = table("toy/results")
    some = " ".join(str(task) for task, share in enumerate(weights["share"]) if share > 0)
    assert result["subset"].tolist() == [some]
    np.testing.assert_allclose(facts("toy/results")["task_shares"], weights["share"], atol=1e-6)


def test_selected_rows_are_exported(copy):
    """Every training row of the subset and nothing else, with the weights of the sources."""
    export = [commands.EXPORT, *TOY]
    run_script(*export, "--task_idxes", "1", "3")
    rows = pd.read_json("results/toy/selected.jsonl", lines=True)
    data = stage_train.load_data(training(*TOY, "--task_idxes"))
    expected = [data.examples[index] for index in data.indices("train", [1, 3])]
    assert rows["completion"].tolist() == [example.completion for example in expected]
    assert rows["prompt"].tolist() == [example.prompt for example in expected]
    sources = [{"source": name, "rows": 16, "weight": 0.5} for name in ("down/2", "up b")]
    assert facts("toy/mixture")["sources"] == sources
    Path("shares.csv").write_text("name,share\nup a,3\nup b,1\n")
    run_script(*export, "--task_weights", "shares.csv")
    found = {source["source"]: source["weight"] for source in facts("toy/mixture")["sources"]}
    assert found == {"up a": 0.75, "up b": 0.25}
    refused("found 0 subsets to export", run_script, *export)


def test_margins_representations_signs_and_checkpointing(copy):
    """The flags of stage 2: what each leaves, and the estimators that live on it."""
    margins = ["--output_function", "margin", "--project_dim", "16"]
    run_script(*COLLECT, *TOY, *margins, "--representations", "--save_projection_matrix", "--gradient_checkpointing")
    (store,) = Path("gradients").glob("*_dim_16_margin_run_0")
    arrays = {f"{name}.npy" for name in ("outputs", "projected", "representations")}
    parts = {"manifest.json", "samples.npz", "projection_signs.npz"} | arrays
    found = {name for name in files_below(store) if "moments_" not in name}
    assert found == {f"{step}/{file}" for step in ("step_step=8", "step_step=16") for file in parts}
    representations = np.load(store / "step_step=8" / "representations.npy")
    np.testing.assert_allclose(np.linalg.norm(representations, axis=1), 1, rtol=1e-5)
    Path("four.txt").write_text("0\n1\n2\n3\n")
    drawn = [ESTIMATE, *TOY, "--sampled_tasks", "four.txt"]
    for estimator in ("logistic", "representation"):
        run_script(*drawn, "--output_function", "margin", "--results_name", estimator, "--estimator", estimator)
        assert np.isfinite(pd.read_csv(f"results/{estimator}/estimates.csv").iloc[:, 2:].to_numpy(float)).all()
    # "down" and "down/2" answer with other letters than "up a" and "up b"
    own = table("representation/estimates")
    assert own["score/down"][:2].max() < own["score/down"][2:].min()
    assert own["score/up a"][2:].max() < own["score/up a"][:2].min()
    drawn += ["--project_dim", "32", "--estimator", "representation"]
    refused("representations", run_script, *drawn, error=FileNotFoundError)


def test_fewer_rows_than_dimensions_use_their_kernel(copy):
    """At d above the number of rows no d x d matrix is kept, and the estimates are those of the moments."""
    (checkpoint,) = Path("external_lightning_logs").glob("*_toy_run_0/step_step=8")
    wide = [*TOY, "--load_model_dir", checkpoint, "--project_dim", "100"]
    run_script(*COLLECT, *wide)
    Path("five.txt").write_text("0\n1\n0 1 2\n")
    run_script(ESTIMATE, *wide, "--sampled_tasks", "five.txt", "--results_name", "wide")
    (stored,) = parts_of("*_dim_100_run_0")
    expected = estimate([stored.estimation_part()], np.array([[1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 0]]))
    found = table("wide/estimates").iloc[:, 2:].to_numpy(float)
    np.testing.assert_allclose(np.diff(found, axis=0), np.diff(expected, axis=0), rtol=1e-3, atol=1e-5)


def test_unprojected_gradients_go_through_the_stages(copy):
    """--projection none keeps all p coordinates, in a store of its own."""
    (checkpoint,) = Path("external_lightning_logs").glob("*_toy_run_0/step_step=8")
    exact = [*TOY, "--projection", "none", "--load_model_dir", checkpoint]
    run_script(*COLLECT, *exact)
    (rows,) = Path("gradients").glob("*_dim_full_run_0/step_step=8/projected.npy")
    assert np.load(rows, mmap_mode="r").shape[1] == 1280
    run_script(ESTIMATE, *exact, "--sampled_tasks", "two.txt", "--number_of_subsets", "2")
    assert len(table("toy/estimates")) == 2
    run_script(COLLECT[0], *exact, "--scale", "0.01", "0.1")
    errors = table("toy/approximation_error")
    assert errors["scale"].tolist() == [0.01, 0.1] and (errors["first_order"] < errors["zero_order"]).all()
    # the first-order residual falls with the fourth power of the distance, the zero-order one with the square
    assert errors["first_order"][1] > 100 * errors["first_order"][0]


def test_the_error_towards_a_fine_tuned_model(copy, model_folders):
    """At the model itself, the whole way, the outputs are its own; g.delta is that of the stored gradients."""
    (checkpoint,) = Path("external_lightning_logs").glob("*_toy_run_0/step_step=8")
    exact = [*TOY, "--projection", "none", "--load_model_dir", checkpoint]
    run_script(*COLLECT, *exact)
    run_script(TRAIN, *TOY, "--task_idxes", "0", "1")
    model = Path("results/toy/models/tasks_0_1_run_0")
    run_script(COLLECT[0], *exact, "--scale", "0.01", "0.1", "--toward", model)
    found = table("toy/approximation_error", keep_default_na=False)
    assert found["toward"].tolist() == 2 * [""] + 3 * ["tasks_0_1_run_0"]
    assert found["whole_way"].tolist() == 4 * [False] + [True]
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (checkpoint, model)]
    way = {name: weights[1][name] - weights[0][name] for name in sorted(weights[0])}
    length, norm = (np.sqrt(sum((part**2).sum() for part in of.values())) for of in (way, weights[0]))
    whole = found.iloc[4]
    assert whole["scale"] == pytest.approx(length / norm, rel=1e-5)
    (part,) = parts_of("*_toy_dim_full_run_0")
    rows, moved = part.samples["target"] >= 0, losses_of(model)
    change = np.concatenate([part.flatten() for part in way.values()]) @ part.rows[rows].astype(float).T
    residual, moves = (np.linalg.norm(moved - part.outputs[rows] - linear) for linear in (change, 0))
    assert whole["first_order"] == pytest.approx((residual / np.linalg.norm(moved)) ** 2, rel=1e-3)
    assert whole["zero_order"] == pytest.approx((moves / np.linalg.norm(moved)) ** 2, rel=1e-3)
    assert whole["change"] == pytest.approx(residual / moves, rel=1e-3)
    of_way = found[found["toward"] != ""]["change"].tolist()
    assert of_way[0] < 0.1 * of_way[1]  # falls with the distance
    refused("no folder", run_script, COLLECT[0], *exact, "--toward", "nowhere", error=FileNotFoundError)


def test_each_run_has_its_gradients_and_its_status(copy, capsys):
    """Two meta-trainings of the same data and model; a stage without a name takes the last, and says so."""
    run_script(TRAIN, *copy, "--lr", "5e-2", "--save_name", "hot", "--checkpoint_at", "1.0")
    run_script(*COLLECT, "--save_name", "hot", "--project_dim", "32")
    Path("chain.txt").write_text("0 1\n1 2\n2 3\n")
    checkpoints = {}
    for name in ("hot", "toy"):
        run_script(ESTIMATE, "--save_name", name, "--sampled_tasks", "chain.txt")
        checkpoints[name] = len(json.loads(Path(f"results/{name}/manifest.json").read_text())["checkpoints"])
    assert checkpoints == {"hot": 1, "toy": 2}
    capsys.readouterr()
    run_script(SELECT)
    said = capsys.readouterr().out
    assert "going on from gradients/" in said and "hot_dim_32" in said and "results/hot/selection.csv" in said
    run_script("scripts/status.py")
    said = capsys.readouterr().out
    assert "hot: " in said and "toy: " in said
    assert "next        python custom_train_alpaca.py --save_name hot --subset_file sampled_tasks/hot_forward" in said
    assert "next        python fast_estimate_forward_selection.py --save_name toy" in said


def test_an_interruption_is_a_line(here, monkeypatch, capsys):
    """Ctrl-C in the middle of a fit, where Lightning catches it: one line, exit status 130."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("src.finetune.FineTuning.training_step", interrupted)
    script, handler = commands.load_script(TRAIN), signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as stopped:
            run_stage(script.main, script.parse_args([*here, "--save_name", "cut"]))
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores further ones
    assert stopped.value.code == 130
    assert "interrupted; the same command goes on, or starts again" in capsys.readouterr().err


def test_flags_that_contradict_a_file_of_subsets_are_named(here, capsys):
    text, size = "0 1\n1 2\n0 3\n", "holds subsets of 2 tasks, and --subset_size {} asks for {}"
    Path("drawn.txt").write_text(text)
    for flags, notices in {
        "--number_of_subsets 3 --subset_size 0.5": [],
        "--subset_size 0.25": [size.format(0.25, 1)],
        "--number_of_subsets 2 --subset_size 3": [
            "holds 3 subsets, and --number_of_subsets asks for 2",
            size.format(3, 3),
        ],
    }.items():
        run_script(f"{ESTIMATE} {flags} --project_dim 32 --sampled_tasks drawn.txt", *TOY)
        said = [line for line in capsys.readouterr().out.splitlines() if "drawn.txt" in line and "is taken" in line]
        assert [line.partition("drawn.txt ")[2].partition(";")[0] for line in said] == notices
    assert Path("drawn.txt").read_text() == text
