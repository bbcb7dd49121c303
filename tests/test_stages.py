"""Every stage of the instruction track as a user runs it, on a tiny model, and the exact files it leaves."""

from __future__ import annotations

import json
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

from src.cli import run_stage
from src.datamodule import TaskDataModule, tokenize_once
from src.estimation import estimate
from src.gradients import outputs_of
from src.instruction import load_instruction
from src.models import LanguageModel, load_base_model, load_checkpoint
from src.stages import load_data, make_datamodule
from src.store import open_store
from src.subsets import read_subsets
from tests.commands import load_script, run_script
from tests.conftest import write_sources

ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors", "manifest.json"}


def files_below(folder: Path) -> set[str]:
    """Every file below a folder, as relative paths."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def track(tmp_path_factory: pytest.TempPathFactory, model_folders: dict[str, str]) -> tuple[Path, list[str]]:
    """A workspace in which stages 1 and 2 have run, and the flags they share."""
    folder = tmp_path_factory.mktemp("track")
    write_sources(folder / "sources.jsonl", {"up a": 20, "down": 20, "up b": 20, "down/2": 20})
    write_sources(folder / "target.jsonl", {"goal": 20})
    flags = [
        "--data_files",
        "sources.jsonl",
        "--target_files",
        "target.jsonl",
        "--heldout_share",
        "0.1",
        "--data_key",
        "toy",
    ]
    flags += ["--model_key", model_folders["llama"], "--train_lora", "--lora_rank", "4", "--lora_alpha", "8"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        training = ["--epochs", "2", "--batch_size", "8", "--lr", "1e-2", "--checkpoint_at", "0.5", "1.0"]
        run_script("custom_train_alpaca.py", *flags, *training)
        stage_2 = ["fast_estimate_eval_approximation_alpaca.py", "--compute_pretrained_outputs", *flags]
        run_script(*stage_2, "--project_dim", "32")
    return folder, flags


@pytest.fixture
def here(track: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(track[0])
    return track[1]


def test_training_leaves_checkpoints_that_peft_opens(here: list[str], model_folders: dict[str, str]) -> None:
    (run,) = Path("external_lightning_logs").iterdir()
    assert run.name.endswith("_toy_lora_r_4_run_0")
    best = next(path.name for path in run.iterdir() if path.name.startswith("epoch_epoch="))
    expected = {"manifest.json"} | {
        f"{name}/{file}" for name in (best, "step_step=8", "step_step=16") for file in ADAPTER
    }
    assert files_below(run) == expected
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folders["llama"]), run / best)


def test_texts_are_tokenised_once(here: list[str]) -> None:
    """Both stages and both checkpoints share one cached file, and its ids are what tokenising gives."""
    (cached,) = Path("cache/tokens").iterdir()
    args = load_script("custom_train_alpaca.py").parse_args(here)
    data, model = load_data(args), load_base_model(args.model_key)
    lengths = {"max_length": args.max_length, "max_target_length": args.max_target_length}
    expected = tokenize_once(None, data, model.tokenizer, model.kind, **lengths)
    found = tokenize_once(Path("cache/tokens"), data, model.tokenizer, model.kind, **lengths)
    assert [list(found.prompts[i]) for i in range(len(data))] == [list(expected.prompts[i]) for i in range(len(data))]
    np.testing.assert_array_equal(found.completions.values, expected.completions.values)
    assert found.notices == expected.notices and len(list(cached.parent.iterdir())) == 1


def test_other_texts_or_lengths_are_tokenised_anew(model_folders: dict[str, str], tmp_path: Path) -> None:
    model = load_base_model(model_folders["llama"])
    lengths = {"max_length": 512, "max_target_length": 512}
    for count, rows, longest in ((1, 5, 512), (2, 6, 512), (3, 6, 8)):
        data = load_instruction([write_sources(tmp_path / "sources.jsonl", {"a": rows})])
        tokens = tokenize_once(
            tmp_path / "cache", data, model.tokenizer, "decoder", **lengths | {"max_length": longest}
        )
        assert len(tokens.prompts.lengths) == rows and bool(tokens.notices) == (longest == 8)
        again = tokenize_once(tmp_path / "cache", data, model.tokenizer, "decoder", **lengths | {"max_length": longest})
        assert again.notices == tokens.notices
        assert len(list((tmp_path / "cache").iterdir())) == count


def test_training_again_does_nothing_and_other_flags_are_refused(
    here: list[str], capsys: pytest.CaptureFixture
) -> None:
    training = ["--batch_size", "8", "--lr", "1e-2", "--checkpoint_at", "0.5", "1.0"]
    run_script("custom_train_alpaca.py", *here, *training, "--epochs", "2")
    assert "nothing to train" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"epochs: found 2, expected 3.*--save_name"):
        run_script("custom_train_alpaca.py", *here, *training, "--epochs", "3")


def test_meta_training_can_end_with_its_checkpoints(here: list[str]) -> None:
    """The same weights at the last checkpoint as in a training that goes on, and nothing after it."""
    training = ["--epochs", "2", "--batch_size", "8", "--lr", "1e-2", "--checkpoint_at", "0", "0.25"]
    for name, stop in (("whole", []), ("stopped", ["--stop_after_checkpoints"])):
        run_script("custom_train_alpaca.py", *here, *training, "--save_name", name, *stop)
    whole, stopped = (next(Path("external_lightning_logs").glob(f"*_{name}_run_0")) for name in ("whole", "stopped"))
    weights = [load_file(folder / "step_step=4" / "adapter_model.safetensors") for folder in (whole, stopped)]
    for name, values in weights[0].items():
        np.testing.assert_array_equal(values, weights[1][name])
    manifest = json.loads((stopped / "manifest.json").read_text())
    assert manifest["trajectory"] == ["step_step=0", "step_step=4"]


def test_meta_training_leaves_alone_what_others_put_into_its_folder(
    here: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Files, and checkpoints copied there: they are named, and where it would write over one it does not start. Half a
    checkpoint and those of a training that was cut off go."""
    from src import finetune

    (source,) = Path("external_lightning_logs").glob("*_toy_lora_r_4_run_0/step_step=8")
    run = Path(str(source.parent).replace("toy_lora_r_4_run", "toy_lora_r_4_guest_run"))
    shutil.copytree(source, run / "step_step=777")
    (run / "notes.txt").write_text("mine")
    (run / "step_step=5").mkdir()
    before = {name: (run / name).read_bytes() for name in files_below(run)}
    train = ["custom_train_alpaca.py", *here, "--save_name", "guest", "--epochs", "1", "--batch_size", "8"]
    original = finetune.FineTuning.on_validation_epoch_end

    def cut_off(module: finetune.FineTuning) -> None:
        if not module.trainer.sanity_checking:  # the base model's validation, before training
            raise ZeroDivisionError
        original(module)

    monkeypatch.setattr(finetune.FineTuning, "on_validation_epoch_end", cut_off)
    with pytest.raises(ZeroDivisionError):
        run_script(*train, "--checkpoint_at", "0.5")
    assert "guest_run_0 holds notes.txt, step_step=777, not written by this training" in capsys.readouterr().out
    assert (run / "step_step=4" / "manifest.json").is_file() and not (run / "step_step=5").exists()
    monkeypatch.setattr(finetune.FineTuning, "on_validation_epoch_end", original)
    run_script(*train, "--checkpoint_at", "0.25")
    assert {path.name for path in run.iterdir()} == {
        "manifest.json", "notes.txt", "step_step=777", "step_step=2", "epoch_epoch=0",
    }  # fmt: skip
    assert {name: (run / name).read_bytes() for name in before} == before
    taken = Path(str(run).replace("guest", "taken"))
    shutil.copytree(source, taken / "epoch_epoch=0")
    with pytest.raises(ValueError, match=r"taken_run_0/epoch_epoch=0 is not of this training.*--save_name"):
        run_script(*train, "--save_name", "taken")
    assert (taken / "epoch_epoch=0" / "manifest.json").read_bytes() == (source / "manifest.json").read_bytes()


def test_gradients_leave_one_part_per_checkpoint(here: list[str], capsys: pytest.CaptureFixture) -> None:
    (store,) = Path("gradients").iterdir()
    parts = {"manifest.json", "outputs.npy", "projected.npy", "samples.npz"}
    found = {name for name in files_below(store) if "moments_" not in name}
    assert found == {f"{step}/{file}" for step in ("step_step=8", "step_step=16") for file in parts}
    rows = np.load(store / "step_step=8" / "projected.npy")
    assert rows.shape == (4 * 16 + 4 * 2 + 10, 32) and np.isfinite(rows).all()
    stage_2 = [
        "fast_estimate_eval_approximation_alpaca.py",
        "--compute_pretrained_outputs",
        *here,
        "--project_dim",
        "32",
    ]
    run_script(*stage_2)
    assert "nothing to compute" in capsys.readouterr().out
    with pytest.raises(ValueError, match="max_length: found 512, expected 100"):
        run_script(*stage_2, "--max_length", "100")
    with pytest.raises(ValueError, match=r"an adapter of rank 4.*--lora_rank 4"):
        run_script(*stage_2[:2], *[flag if flag != "4" else "8" for flag in here], "--load_model_dir",
                   next(Path("external_lightning_logs").glob("*/step_step=8")))  # fmt: skip


def held_out_rows(flags: list[str], model: LanguageModel) -> tuple[TaskDataModule, np.ndarray]:
    """The data as the stages see it, and the test rows of the target "goal"."""
    args = load_script("custom_train_alpaca.py").parse_args(flags)
    data = load_data(args)
    test = data.indices("test")
    return make_datamodule(args, data, model), test[data.target_of_sample[test] == data.targets.index("goal")]


def test_estimates_selection_and_the_one_fine_tuning(here: list[str]) -> None:
    before = files_below(Path())
    estimation = [*here, "--project_dim", "32", "--save_name", "toy"]
    sampled = ["--sampled_tasks", "sampled_tasks/toy.txt", "--number_of_subsets", "6", "--subset_size", "2"]
    run_script("fast_estimate_linear_regression_alpaca.py", *estimation, *sampled)
    frame = pd.read_csv("results/toy/estimates.csv", dtype={"subset": str})
    targets = ["down", "down/2", "goal", "up a", "up b"]
    assert list(frame.columns) == ["subset", "run", *(f"estimate/{target}" for target in targets)]
    assert len(frame) == 6 and np.isfinite(frame.iloc[:, 2:].to_numpy(float)).all()

    Path("sampled_tasks/toy.txt").write_text("# edited by hand\n0 1\n3\n")
    run_script("fast_estimate_linear_regression_alpaca.py", *estimation, *sampled, "--target_task", "goal")
    frame = pd.read_csv("results/toy/estimates.csv", dtype={"subset": str})
    assert frame["subset"].tolist() == ["0 1", "3"] and list(frame.columns) == ["subset", "run", "estimate/goal"]
    Path("sampled_tasks/toy.txt").write_text("0 1\n2 3\n1 2\n3 2\n")
    run_script("fast_estimate_linear_regression_alpaca.py", *estimation, *sampled)

    assert pd.read_csv("results/toy/estimates.csv")["subset"].tolist() == ["0 1", "2 3", "1 2"]
    run_script("fast_estimate_eval_approximation_alpaca.py", *estimation, "--scale", "0.05")
    assert Path("results/toy/approximation_error.png").is_file()
    run_script("fast_estimate_forward_selection.py", *estimation)
    run_script("notebook/select_random_ensemble.py", "results/toy", "--top_k", "2")
    training = ["--epochs", "1", "--batch_size", "8", "--lr", "1e-2", "--save_name", "toy"]
    for file in ("sampled_tasks/toy_forward_selection.txt", "sampled_tasks/toy_random_ensemble.txt"):
        run_script("custom_train_alpaca.py", *here, *training, "--subset_file", file)
    run_script("custom_train_alpaca.py", *here, *training, "--task_idxes")
    run_script("custom_train_alpaca.py", *here, *training, "--task_idxes", "1", "3")
    run_script("scripts/report.py", "results/toy")
    page = Path("results/toy/report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "not made yet" in page  # nothing was compared
    assert (
        "Selected by estimates for goal" in page
        and "python custom_train_alpaca.py" not in page.split("To make it again")[0]
    )
    results = pd.read_csv("results/toy/results.csv", dtype={"subset": str}, keep_default_na=False)
    columns = [f"{split}_loss/{target}" for split in ("validation", "test") for target in targets]
    assert list(results.columns) == ["subset", "run", "num_rows", *columns, "seconds"]
    assert {"", "1 3"} <= set(results["subset"]) and len(results) == results["subset"].nunique()
    assert int(results.loc[results["subset"] == "1 3", "num_rows"].iloc[0]) == 32
    (model,) = Path("results/toy/models").glob("tasks_1_3_run_0")
    tuned = load_checkpoint(model, here[here.index("--model_key") + 1])
    losses = outputs_of(tuned, *held_out_rows(here, tuned), "loss")
    row = results[results["subset"] == "1 3"].iloc[0]
    assert losses.mean() == pytest.approx(float(row["test_loss/goal"]), rel=1e-5)
    kept = {path.name for path in Path("results/toy/models").iterdir()}
    assert kept == {f"{name}_run_0" for name in ("toy_forward_selection", "toy_random_ensemble", "tasks_1_3")}
    made = {
        name
        for name in files_below(Path()) - before
        if not any(part in name for part in ("moments_", "/models/", "/losses/"))
    }
    kept = {path.name for path in Path("results/toy/losses").iterdir()}
    labels = ["base_model", *(f"tasks_{text.replace(' ', '_')}" for text in results["subset"] if text)]
    assert kept == {f"{label}_run_0.csv" for label in labels}
    found = pd.read_csv("results/toy/losses/tasks_1_3_run_0.csv").groupby("target")["loss"].mean()
    assert found["goal"] == pytest.approx(float(row["validation_loss/goal"]), rel=1e-6)
    assert made == {
        "sampled_tasks/toy.txt",
        "sampled_tasks/toy_forward_selection.txt",
        "sampled_tasks/toy_random_ensemble.txt",
        "results/toy/approximation_error.csv",
        "results/toy/approximation_error.json",
        "results/toy/approximation_error.png",
        "results/toy/estimates.csv",
        "results/toy/manifest.json",
        "results/toy/selection.csv",
        "results/toy/selection.json",
        "results/toy/selection.png",
        "results/toy/scores.csv",
        "results/toy/scores.json",
        "results/toy/scores.png",
        "results/toy/results.csv",
        "results/toy/results.json",
        "results/toy/report.html",
    }


def test_estimates_are_compared_and_calibrated(here: list[str], capsys: pytest.CaptureFixture) -> None:
    """Every pair of tasks estimated and fine-tuned: the table holds what the library says of the two columns."""
    pairs = ["0 1", "0 2", "0 3", "1 2", "1 3", "2 3"]
    Path("pairs.txt").write_text("\n".join(pairs) + "\n")
    training = ["--epochs", "1", "--batch_size", "8", "--lr", "1e-2", "--save_name", "judged", "--runs", "2"]
    run_script("custom_train_alpaca.py", *here, *training, "--subset_file", "pairs.txt")
    run_script("custom_train_alpaca.py", *here, *training, "--task_idxes")
    stage_3 = ["fast_estimate_linear_regression_alpaca.py", *here, "--project_dim", "32", "--save_name", "judged"]
    stage_3 += ["--sampled_tasks", "pairs.txt"]
    run_script(*stage_3, "--calibrate", "results/judged/results.csv")
    truth = pd.read_csv("results/judged/results.csv", dtype={"subset": str}, keep_default_na=False)
    estimates = pd.read_csv("results/judged/estimates.csv", dtype={"subset": str})
    calibrated = estimates["calibrated/goal"]
    assert ((estimates["low/goal"] < calibrated) & (calibrated < estimates["high/goal"])).all()
    means = truth[truth["subset"] != ""].groupby("subset")["validation_loss/goal"].mean().loc[pairs]
    manifest = json.loads(Path("results/judged/manifest.json").read_text())
    assert manifest["calibrated_on"] == pairs and manifest["rho"] == 1e-3
    at_rho = [*stage_3, "--save_name", "judged/at_rho", "--rho", str(manifest["rho_calibrated"])]
    run_script(*at_rho)
    alike = pd.read_csv("results/judged/at_rho/estimates.csv")["estimate/goal"]
    for pair in range(6):  # each is estimated by a line through the others, which never falls
        others = np.arange(6) != pair
        slope, level = np.polyfit(alike[others], means.to_numpy()[others], 1)
        expected = slope * alike[pair] + level if slope > 0 else means.to_numpy()[others].mean()
        assert calibrated[pair] == pytest.approx(expected, rel=1e-6)

    run_script("notebook/compare_estimates.py", "results/judged/estimates.csv", "results/judged/results.csv")
    said = capsys.readouterr().out
    assert "comparison.png" in said and "calibrated: 6 subsets of 6 calibrated the others" in said
    table = pd.read_csv("results/judged/comparison.csv").set_index(["target", "predictor"])
    assert set(table.index.get_level_values("predictor")) == {"estimate", "calibrated", "base model", "constant"}
    found = table.loc[("goal", "estimate")]
    assert found["lds"] == pytest.approx(spearmanr(estimates["estimate/goal"], means).statistic)
    assert found["subsets"] == 6 and np.isfinite(found["attainable"])
    base = truth[truth["subset"] == ""]["validation_loss/goal"].mean()
    assert table.loc[("goal", "base model"), "relative_error"] == pytest.approx((abs(base - means) / means).mean())
    with pytest.raises(ValueError, match="no target in common"):
        run_script("notebook/compare_estimates.py", "results/judged/estimates.csv", "results/judged/results.csv",
                   "--metric", "test_accuracy", "--target_task", "goal")  # fmt: skip
    with pytest.raises(ValueError, match="at least 5 fine-tuned subsets, found 3"):
        Path("few.csv").write_text("subset,run,validation_loss/goal\n0,0,1.0\n1,0,1.1\n2,0,1.2\n")
        run_script(*stage_3, "--target_task", "goal", "--calibrate", "few.csv")


def test_a_truth_run_goes_on_at_the_next_missing_line(here: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after one line, started again: the finished line is kept, the others are as if nothing had happened."""
    from src import stages

    Path("three.txt").write_text("0\n1\n2 3\n")
    training = ["--epochs", "1", "--batch_size", "8", "--lr", "1e-2", "--subset_file", "three.txt"]
    run_script("custom_train_alpaca.py", *here, *training, "--save_name", "whole")
    original, calls = stages.fine_tune_on_subset, []

    def killed_at_the_second(*arguments: object, **options: object) -> dict[str, float]:
        calls.append(arguments[3])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(stages, "fine_tune_on_subset", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run_script("custom_train_alpaca.py", *here, *training, "--save_name", "cut")
    run_script("custom_train_alpaca.py", *here, *training, "--save_name", "cut")
    assert calls == [(0,), (1,), (1,), (2, 3)]
    whole, cut = (pd.read_csv(f"results/{name}/results.csv").drop(columns="seconds") for name in ("whole", "cut"))
    pd.testing.assert_frame_equal(whole, cut)


def test_a_subset_that_stands_twice_is_trained_once(
    here: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from src import stages

    Path("twice.txt").write_text("0 1\n2\n1 0\n2\n")
    calls: list[object] = []
    monkeypatch.setattr(
        stages, "fine_tune_on_subset", lambda *given, **_: calls.append(given[3]) or ({"num_rows": 1}, None)
    )
    run_script("custom_train_alpaca.py", *here, "--subset_file", "twice.txt", "--save_name", "twice", "--epochs", "1")
    assert calls == [(0, 1), (2,)]
    assert "twice.txt: 2 lines with a subset that stands there before" in capsys.readouterr().out


def test_a_subset_file_of_other_data_is_refused(here: list[str]) -> None:
    Path("other.txt").write_text("# 0 = down\n# 1 = up a\n1\n")
    with pytest.raises(ValueError, match=r"other\.txt, line 2: task 1 is 'up a' there, and 'down/2' in the data"):
        run_script("custom_train_alpaca.py", *here, "--subset_file", "other.txt", "--save_name", "other")
    stage_3 = ["fast_estimate_linear_regression_alpaca.py", *here, "--project_dim", "32"]
    with pytest.raises(ValueError, match=r"other\.txt, line 2: task 1 is 'up a' there"):
        run_script(*stage_3, "--sampled_tasks", "other.txt", "--save_name", "other")


def test_selection_for_each_target_and_backward(here: list[str]) -> None:
    """A subset for each target, the same as when that target is asked for alone; rows are kept within a budget."""
    select = ["fast_estimate_forward_selection.py", *here, "--project_dim", "32"]
    run_script(*select, "--save_name", "each", "--per_target", "--target_task", "goal", "down")
    subsets = read_subsets(Path("sampled_tasks/each_forward_selection.txt"), 4)
    for target, subset in zip(("goal", "down"), subsets, strict=True):
        run_script(*select, "--save_name", "one", "--target_task", target)
        assert read_subsets(Path("sampled_tasks/one_forward_selection.txt"), 4) == [subset]
    affinity = pd.read_csv("results/each/affinity.csv")
    assert list(affinity.columns) == ["task", "goal", "down"] and affinity["task"][affinity["down"].argmax()] in (
        "down",
        "down/2",
    )
    assert Path("results/each/affinity.png").is_file()
    run_script(*select, "--save_name", "one", "--direction", "backward", "--budget_rows", "40")
    (backward,) = read_subsets(Path("sampled_tasks/one_backward_selection.txt"), 4)
    assert 1 <= len(backward) <= 2  # of 16 rows each
    path = pd.read_csv("results/one/selection.csv", dtype={"subset": str})
    sizes = path["subset"].str.split().str.len().tolist()
    assert sizes == sorted(sizes, reverse=True) and path["selected"].tolist() == [
        size >= len(backward) for size in sizes
    ]


def test_candidates_are_really_fine_tuned(here: list[str]) -> None:
    """--refine lets the truth decide among the best estimates."""
    select = ["fast_estimate_forward_selection.py", *here, "--project_dim", "32", "--save_name", "refined"]
    run_script(*select, "--target_task", "goal", "--refine", "2", "--epochs", "1", "--batch_size", "8", "--lr", "1e-2")
    candidates = read_subsets(Path("sampled_tasks/refined_candidates.txt"), 4)
    path = pd.read_csv("results/refined/selection.csv", dtype={"subset": str})
    assert len(candidates) == 2
    assert {" ".join(map(str, subset)) for subset in candidates} == set(path.nsmallest(2, "estimate")["subset"])
    results = pd.read_csv("results/refined/results.csv", dtype={"subset": str}).set_index("subset")
    (chosen,) = read_subsets(Path("sampled_tasks/refined_forward_selection.txt"), 4)
    assert results["validation_loss/goal"].idxmin() == " ".join(map(str, chosen))


@pytest.mark.parametrize("typed", [[], ["--lr", "5e-3", "--accumulate", "2"]])
def test_candidates_are_trained_as_the_meta_training_was(here: list[str], typed: list[str]) -> None:
    """What is typed counts, the rest is what meta-training was given: of the instruction track too, with as many rows in a
    step."""
    name = f"as_before_{len(typed)}"
    select = ["fast_estimate_forward_selection.py", *here, "--project_dim", "32", "--results_name", name]
    run_script(*select, "--refine", "1", "--target_task", "goal", *typed)
    facts = json.loads(Path(f"results/{name}/results.json").read_text())
    assert [facts[key] for key in ("epochs", "rows_per_step", "weight_decay")] == [2, 8, 0]
    assert facts["lr"] == (5e-3 if typed else 1e-2)


def test_candidates_without_a_known_meta_training_need_flags(
    here: list[str], track: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(track[0], tmp_path / "copy", ignore=shutil.ignore_patterns("results"))
    monkeypatch.chdir(tmp_path / "copy")
    select = ["fast_estimate_forward_selection.py", *here, "--project_dim", "32", "--refine", "1"]
    with pytest.raises(
        ValueError, match=r"max_length: found 512, expected 99\. Give --refine the flags of meta-training"
    ):
        run_script(*select, "--max_length", "99")
    for manifest in Path("external_lightning_logs").glob("*/manifest.json"):
        manifest.unlink()
    with pytest.raises(ValueError, match=r"--refine fine-tunes, .*: pass --epochs --batch_size$"):
        run_script(*select, "--lr", "1e-3")


def test_rows_of_one_table_are_of_one_training(here: list[str], capsys: pytest.CaptureFixture) -> None:
    """On one device, on several or with accumulated batches: what counts is the number of rows in a step."""
    Path("one.txt").write_text("0\n1\n")
    command = ["custom_train_alpaca.py", *here, "--epochs", "1", "--lr", "1e-2", "--subset_file", "one.txt"]
    command += ["--results_name", "one_training", "--accelerator", "cpu"]
    run_script(*command, "--batch_size", "8")
    written = Path("results/one_training/results.csv").read_bytes()
    four = ["--devices", "0", "1", "2", "3"]
    for same in (["--batch_size", "4", "--accumulate", "2"], ["--batch_size", "2", *four]):
        run_script(*command, *same)
    assert Path("results/one_training/results.csv").read_bytes() == written
    for other in (["--batch_size", "8", *four], ["--batch_size", "4"], ["--batch_size", "8", "--accumulate", "2"]):
        with pytest.raises(ValueError, match=r"rows_per_step: found 8, expected \d+.*--results_name"):
            run_script(*command, *other)
    with pytest.raises(ValueError, match="precision: found 32-true, expected bf16-mixed"):
        run_script(*command, "--batch_size", "8", "--precision", "bf16")


def test_a_model_that_is_replaced_is_named(here: list[str], capsys: pytest.CaptureFixture) -> None:
    """The subset file has changed since the model was kept under its name."""
    train = [
        "custom_train_alpaca.py",
        *here,
        "--epochs",
        "1",
        "--results_name",
        "replaced",
        "--subset_file",
        "choice.txt",
    ]
    for text, replaced in (("0\n", False), ("0\n", False), ("1\n", True)):
        Path("choice.txt").write_text(text)
        run_script(*train)
        said = (
            "models/choice_run_0 holds a model of another training (subset: found [0], expected [1]), which is replaced"
        )
        assert (said in capsys.readouterr().out) == replaced


def test_mixture_weights_are_what_training_draws(here: list[str]) -> None:
    select = ["fast_estimate_forward_selection.py", *here, "--project_dim", "32", "--save_name", "mixed"]
    run_script(*select, "--weights", "--target_task", "goal")
    weights = pd.read_csv("sampled_tasks/mixed_weights.csv")
    assert weights["name"].tolist() == ["down", "down/2", "up a", "up b"] and weights["share"].sum() == pytest.approx(1)
    training = ["--epochs", "1", "--batch_size", "8", "--lr", "1e-2", "--save_name", "mixed"]
    run_script("custom_train_alpaca.py", *here, *training, "--task_weights", "sampled_tasks/mixed_weights.csv")
    result = pd.read_csv("results/mixed/results.csv", dtype={"subset": str})
    assert len(result) == 1 and np.isfinite(result["test_loss/goal"]).all()
    with pytest.raises(ValueError, match=r"task_shares: found .*, expected None"):
        run_script("custom_train_alpaca.py", *here, *training, "--task_idxes", "0")
    for text, message in (
        ("name,share\nup a,1\nup c,1\n", "task 'up c' is not among the data's 4 tasks"),
        ("name,share\nup a,1\nup a,1\n", "'up a' stands there twice"),
        ("name,share\nup a,-1\n", "must be numbers, not negative"),
        ("name\nup a\n", "no column 'share'"),
    ):
        Path("bad.csv").write_text(text)
        with pytest.raises(ValueError, match=message):
            run_script("custom_train_alpaca.py", *here, *training, "--task_weights", "bad.csv")


@pytest.mark.parametrize("format_", ["jsonl", "parquet"])
def test_selected_rows_are_exported(here: list[str], format_: str) -> None:
    """Every training row of the subset and nothing else, with the weights of the sources."""
    export = ["scripts/export_selection.py", *here, "--save_name", "exported", "--format", format_]
    run_script(*export, "--task_idxes", "1", "3")
    path = f"results/exported/selected.{format_}"
    rows = pd.read_json(path, lines=True) if format_ == "jsonl" else pd.read_parquet(path)
    data = load_data(load_script("custom_train_alpaca.py").parse_args(here))
    expected = [data.examples[index] for index in data.indices("train", [1, 3])]
    assert rows["completion"].tolist() == [example.completion for example in expected]
    assert rows["prompt"].tolist() == [example.prompt for example in expected]
    assert set(rows["task"]) == {"down/2", "up b"}
    mixture = json.loads(Path("results/exported/mixture.json").read_text())
    assert mixture["sources"] == [{"source": name, "rows": 16, "weight": 0.5} for name in ("down/2", "up b")]
    Path("shares.csv").write_text("name,share\nup a,3\nup b,1\n")
    run_script(*export, "--task_weights", "shares.csv")
    mixture = json.loads(Path("results/exported/mixture.json").read_text())
    assert {source["source"]: source["weight"] for source in mixture["sources"]} == {"up a": 0.75, "up b": 0.25}
    with pytest.raises(ValueError, match="found 0 subsets to export"):
        run_script(*export)


def test_margins_representations_signs_and_checkpointing(here: list[str]) -> None:
    """The flags of stage 2: what each leaves, and the estimators that live on it."""
    margins = ["--output_function", "margin", "--project_dim", "16"]
    kept = ["--representations", "--save_projection_matrix", "--gradient_checkpointing"]
    stage_2 = ["fast_estimate_eval_approximation_alpaca.py", "--compute_pretrained_outputs", *here, *margins]
    run_script(*stage_2, *kept)
    (store,) = Path("gradients").glob("*_dim_16_margin_run_0")
    parts = {"manifest.json", "outputs.npy", "projected.npy", "samples.npz", "representations.npy"}
    parts |= {"projection_signs.npz", "moments_tasks.npz", "moments_targets.npz"}
    assert files_below(store) == {f"{step}/{file}" for step in ("step_step=8", "step_step=16") for file in parts}
    representations = np.load(store / "step_step=8" / "representations.npy")
    np.testing.assert_allclose(np.linalg.norm(representations, axis=1), 1, rtol=1e-5)
    stage_3 = ["fast_estimate_linear_regression_alpaca.py", *here, "--sampled_tasks", "four.txt"]
    Path("four.txt").write_text("0\n1\n2\n3\n")
    for estimator in ("logistic", "representation"):
        run_script(*stage_3, *margins, "--save_name", estimator, "--estimator", estimator)
        assert np.isfinite(pd.read_csv(f"results/{estimator}/estimates.csv").iloc[:, 2:].to_numpy(float)).all()
    # "down" and "up a" answer with other letters: each task is nearest to itself
    own = pd.read_csv("results/representation/estimates.csv")
    assert own["score/down"].argmin() == 0 and own["score/up a"].argmin() == 2
    with pytest.raises(ValueError, match="take the gradients with --output_function margin too"):
        run_script(*stage_3, "--project_dim", "32", "--estimator", "logistic")
    with pytest.raises(FileNotFoundError, match="take the gradients again with --representations"):
        run_script(*stage_3, "--project_dim", "32", "--estimator", "representation")


def test_fewer_rows_than_dimensions_use_their_kernel(here: list[str]) -> None:
    """At d above the number of rows no d x d matrix is kept, and the estimates are those of the moments."""
    wide = [
        *here,
        "--project_dim",
        "100",
        "--load_model_dir",
        str(next(Path("external_lightning_logs").glob("*/step_step=8"))),
    ]
    run_script("fast_estimate_eval_approximation_alpaca.py", "--compute_pretrained_outputs", *wide)
    stage_3 = ["fast_estimate_linear_regression_alpaca.py", *wide, "--sampled_tasks", "five.txt", "--save_name", "wide"]
    Path("five.txt").write_text("0\n1\n0 1 2\n")
    run_script(*stage_3)
    (part,) = Path("gradients").glob("*_dim_100_run_0/step_step=8")
    assert {path.name for path in part.glob("moments_*")} == {"moments_tasks_sums.npz", "moments_targets_sums.npz"}
    (stored,) = open_store(part.parent, None, "")
    expected = estimate([stored.estimation_part()], np.array([[1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 0]]))
    found = pd.read_csv("results/wide/estimates.csv").iloc[:, 2:].to_numpy(float)
    np.testing.assert_allclose(np.diff(found, axis=0), np.diff(expected, axis=0), rtol=1e-3, atol=1e-5)


def test_unprojected_gradients_go_through_the_stages(here: list[str]) -> None:
    """--projection none keeps all p coordinates, in a store of its own."""
    exact = [
        *here,
        "--projection",
        "none",
        "--load_model_dir",
        str(next(Path("external_lightning_logs").glob("*/step_step=8"))),
    ]
    run_script("fast_estimate_eval_approximation_alpaca.py", "--compute_pretrained_outputs", *exact)
    (rows,) = Path("gradients").glob("*_dim_full_run_0/step_step=8/projected.npy")
    assert np.load(rows, mmap_mode="r").shape[1] == 1280
    run_script("fast_estimate_linear_regression_alpaca.py", *exact, "--save_name", "exact", "--sampled_tasks", "two.txt",
               "--number_of_subsets", "2", "--estimator", "kernel")  # fmt: skip
    assert len(pd.read_csv("results/exact/estimates.csv")) == 2
    run_script("fast_estimate_eval_approximation_alpaca.py", *exact, "--save_name", "exact", "--scale", "0.01", "0.1")
    errors = pd.read_csv("results/exact/approximation_error.csv")
    assert errors["scale"].tolist() == [0.01, 0.1]
    assert (errors["first_order"] < errors["zero_order"]).all()
    # the first-order residual falls with the fourth power of the distance, the zero-order one with the square
    assert errors["first_order"][1] > 100 * errors["first_order"][0]
    assert Path("results/exact/approximation_error.png").is_file()


def test_a_dry_run_writes_nothing_and_names_what_the_stage_then_writes(
    here: list[str], capsys: pytest.CaptureFixture
) -> None:
    """Of every stage: the files it names are there after the real run, and were not before."""
    at = ["--project_dim", "20", "--save_name", "dry"]
    small = ["--epochs", "1", "--batch_size", "8", "--checkpoint_at", "1.0"]
    estimation = ("fast_estimate_linear_regression_alpaca.py", *here, *at, "--number_of_subsets", "6")
    one_task = [*here, "--save_name", "dry", "--task_idxes", "0"]
    data_files = here[here.index("--data_files") : here.index("--data_files") + 2]
    stages = [
        ("custom_train_alpaca.py", *here, *small, "--save_name", "dry"),
        ("fast_estimate_eval_approximation_alpaca.py", "--compute_pretrained_outputs", *here, *at),
        ("fast_estimate_eval_approximation_alpaca.py", *here, *at, "--scale", "0.1"),
        (*estimation, "--sampled_tasks", "dry.txt"),
        ("fast_estimate_forward_selection.py", *here, *at),
        ("notebook/select_random_ensemble.py", "results/dry"),
        ("custom_train_alpaca.py", *small, *one_task),
        ("scripts/export_selection.py", *one_task),
        ("custom_train_alpaca.py", *here, *small, "--save_name", "dry_truth", "--subset_file", "dry.txt"),
        ("notebook/compare_estimates.py", "results/dry/estimates.csv", "results/dry_truth/results.csv"),
        ("scripts/report.py", "results/dry"),
        ("data/make_base_model.py", *data_files, "--output_dir", "dry_model", "--pretrain_steps", "0"),
    ]
    for stage in stages:
        before = files_below(Path())
        capsys.readouterr()
        run_script(*stage, "--dry_run")
        printed = capsys.readouterr().out
        assert {name for name in files_below(Path()) - before if not name.startswith("cache")} == set()
        named = [line.split("  ")[1] for line in printed.splitlines() if line.startswith("would write")]
        assert named and "would read" in printed and not any(Path(name).exists() for name in named), printed
        run_script(*stage)
        assert all(Path(name).exists() for name in named), stage[0]


def test_losses_are_logged_where_asked(here: list[str]) -> None:
    training = ["--epochs", "1", "--batch_size", "8", "--checkpoint_at", "1.0"]
    run_script("custom_train_alpaca.py", *here, *training, "--save_name", "logged", "--logger", "csv")
    (run,) = Path("external_lightning_logs").glob("*_logged_run_0")
    logged = pd.read_csv(run / "logs" / "metrics.csv")
    assert logged["train_loss"].count() == 8 and logged["val_loss"].count() == 1
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["peak_memory"] > 1e8 and manifest["seconds"] > 0
    with pytest.raises(ValueError, match="--logger wandb: its package is not installed; pip install wandb"):
        run_script("custom_train_alpaca.py", *here, *training, "--save_name", "other", "--logger", "wandb")


def test_gradients_belong_to_the_meta_training_of_their_name(here: list[str], capsys: pytest.CaptureFixture) -> None:
    """Two meta-trainings of the same data and model have a store each; estimates under a third name use the unnamed one,
    and say so. A second table of the named one has a name of its own."""
    small = ["--epochs", "1", "--batch_size", "8", "--checkpoint_at", "1.0"]
    run_script("custom_train_alpaca.py", *here, *small, "--lr", "5e-2", "--save_name", "hot")
    at = ["--project_dim", "32"]
    Path("chain.txt").write_text("0 1\n1 2\n2 3\n")
    run_script(
        "fast_estimate_eval_approximation_alpaca.py",
        "--compute_pretrained_outputs",
        *here,
        *at,
        "--save_name",
        "hot",
    )
    tables = {}
    for name in ("hot", "cool"):
        drawn = ["--sampled_tasks", "chain.txt", "--save_name", name]
        run_script("fast_estimate_linear_regression_alpaca.py", *here, *at, *drawn)
        manifest = json.loads(Path(f"results/{name}/manifest.json").read_text())
        tables[name] = len(manifest["checkpoints"])
    assert tables == {"hot": 1, "cool": 2}
    assert "no meta-training is called cool" in capsys.readouterr().out
    named = ["--save_name", "hot", "--results_name", "hot/other"]
    before = Path("results/hot/estimates.csv").read_bytes()
    run_script(
        "fast_estimate_linear_regression_alpaca.py", *here, *at, *named, "--sampled_tasks", "chain.txt", "--rho", "9"
    )
    run_script("fast_estimate_forward_selection.py", *here, *at, *named)
    run_script("notebook/select_random_ensemble.py", "results/hot/other")
    selected = Path("sampled_tasks/hot-other_forward_selection.txt")
    run_script("scripts/export_selection.py", *here, *named, "--subset_file", selected)
    run_script("custom_train_alpaca.py", *here, *small, *named, "--subset_file", selected)
    assert {"estimates.csv", "selection.csv", "scores.csv", "selected.jsonl", "results.csv"} <= files_below(
        Path("results/hot/other")
    )
    assert Path("results/hot/estimates.csv").read_bytes() == before
    assert "no meta-training" not in capsys.readouterr().out
    (store,) = Path("gradients").glob("*_hot_dim_32_run_0")
    (plain,) = set(Path("gradients").glob("*_dim_32_run_0")) - {store}
    (part,) = store.iterdir()
    shutil.copytree(part, mixed := plain / "step_step=999")
    try:
        with pytest.raises(ValueError, match=r"several meta-trainings .*_hot_run_0.*--load_model_dir"):
            open_store(plain, None, "")
    finally:
        shutil.rmtree(mixed)


def test_a_folder_of_files_is_a_source_for_each(
    workspace: Path, model_folders: dict[str, str], capsys: pytest.CaptureFixture
) -> None:
    """Files with columns of different names, the target among them, in any order; nothing in it is one clear error."""
    Path("my").mkdir()
    frames = {
        "plain.jsonl": pd.DataFrame({"prompt": [f"p {i}" for i in range(20)], "completion": "a b"}),
        "asked.csv": pd.DataFrame({"question": [f"q {i}" for i in range(20)], "answer": "c"}),
        "goal.jsonl": pd.DataFrame({"prompt": [f"g {i}" for i in range(20)], "completion": "d e"}),
    }
    for name, frame in frames.items():
        frame.to_csv(f"my/{name}", index=False) if name.endswith("csv") else frame.to_json(
            f"my/{name}", orient="records", lines=True
        )
    flags = [
        "--target_files",
        "my/goal.jsonl",
        "--model_key",
        model_folders["llama"],
        "--train_lora",
        "--lora_rank",
        "4",
    ]
    named = ["--prompt_column", "question", "--completion_column", "answer"]
    script = load_script("custom_train_alpaca.py")
    folder, files = (
        load_data(script.parse_args(["--data_files", *sources, *flags, *named]))
        for sources in (["my"], ["my/plain.jsonl", "my/asked.csv"])
    )
    assert folder.tasks == ("asked", "plain") and folder.targets == ("goal",)
    assert sorted((e.task, e.prompt, e.split) for e in folder.examples) == sorted(
        (e.task, e.prompt, e.split) for e in files.examples
    )
    with pytest.raises(ValueError, match=r"--prompt_column nowhere: none of my/.* has such a column"):
        load_data(script.parse_args(["--data_files", "my/plain.jsonl", *flags, "--prompt_column", "nowhere"]))
    Path("none").mkdir()
    with pytest.raises(ValueError, match=r"none is a folder without data files; expected files that end in \.jsonl"):
        load_data(script.parse_args(["--data_files", "none", *flags]))


def test_an_interruption_is_a_line(
    here: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Ctrl-C in the middle of a fit, where Lightning catches it: one line, exit status 130."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("src.finetune.FineTuning.training_step", interrupted)
    script = load_script("custom_train_alpaca.py")
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as stopped:
            run_stage(script.main, script.parse_args([*here, "--epochs", "1", "--save_name", "cut"]))
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores further ones
    assert stopped.value.code == 130
    assert "interrupted; the same command goes on, or starts again" in capsys.readouterr().err
