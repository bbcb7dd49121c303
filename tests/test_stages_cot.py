"""Every stage of the chain-of-thought track as a user runs it, for both architectures."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from src.cot import load_cot
from src.models import load_checkpoint
from tests import commands
from tests.commands import COT, COT_COLLECT, COT_ESTIMATE, ENSEMBLE, SELECT, refused, run_script


def write_reasoning_teacher(folder: Path) -> None:
    """30 additions in the reasoning-teacher layout, 24 to train on: two completions each, every fifth second one with a
    wrong answer."""
    questions = [(f"What is {a} + {b}?", str(a + b)) for a in range(5) for b in range(6)]
    dataset, completions = [], {}
    for i, (question, answer) in enumerate(questions):
        sample = {"sample_index": i, "question": question, "answer": answer}
        dataset.append({**sample, "rationale": f"It is {answer}."})
        completions[str(i)] = [
            {**sample, "completion_index": k, "teacher": f"teacher {k}", "reasoning_completion": f" Count {way} to {answer}.",
             "completion": " 999." if k and i % 5 == 0 else f" {answer}."} for k, way in enumerate(("on", "up"))]  # fmt: skip
    split, metadata = {"train": list(range(24)), "test": list(range(24, 30))}, {"completion_key": "zs_cot_t70"}
    commands.write_cot(folder, "addsub", dataset, split, metadata, completions)


@pytest.fixture(scope="module", params=["t5", "llama"])
def track(request, tmp_path_factory, model_folders):
    """A workspace in which stages 1 and 2 have run, the flags they share, and the best checkpoint."""
    folder = tmp_path_factory.mktemp(request.param)
    write_reasoning_teacher(folder)
    flags = f"--dataset_key addsub --preset_key ft_cot_t70_2aug --train_key ft_cot --model_key {model_folders[request.param]} "
    flags = (flags + "--train_lora --lora_rank 4 --lora_alpha 8").split()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        size = "--epochs 2 --batch_size 8 --inference_batch_size 5 --max_new_tokens 6"
        run_script(f"{COT} {size} --lr 1e-2 --save_name new", *flags)
        (best,) = Path("external_lightning_logs").glob("*/epoch_epoch=*")
        checkpoint = f"{best.parent.name}/{best.name}"
        run_script(f"{COT_COLLECT} --project_dim 24 --device 2 --load_model_dir {checkpoint}", *flags)
    return folder, flags, checkpoint


@pytest.fixture
def here(track, monkeypatch):
    monkeypatch.chdir(track[0])
    return track[1:]


def test_training_names_its_run_and_keeps_predictions(here):
    _, checkpoint = here
    assert "_addsub_ft_cot_t70_2aug_lora_r_4_new_run_0/epoch_epoch=" in checkpoint
    predictions = sorted(Path("saved/completion_data").glob("B_models0-*__C_ft_cot/*.json"))
    assert [path.name for path in predictions] == [f"D_addsub__T_ft_cot__E_00{e}__Lora_r_4.json" for e in (0, 1)]
    assert len(list(Path("cache/tokens").iterdir())) == 1  # both stages read the same tokens
    content = commands.read_json(predictions[-1])
    assert content["metadata"]["prediction_template"] == "ft_cot_token" and content["metadata"]["epoch"] == 1
    data = load_cot("addsub", "ft_cot_t70_2aug", architecture="decoder")
    validation = {str(data.examples[i].record_index) for i in data.indices("validation")}
    assert set(content["data"]) == validation


def test_clusters_estimates_selection_and_fine_tuning(here, capsys):
    flags, checkpoint = here
    (store,) = Path("gradients").iterdir()
    data = load_cot("addsub", "ft_cot_t70_2aug", architecture="decoder")
    num_train, num_validation = len(data.indices("train")), len(data.indices("validation"))
    part = Path(checkpoint).name
    assert np.load(store / part / "projected.npy").shape == (num_train + num_validation, 24)

    clusters = ["--load_clusters", "--num_clusters", "4", "--project_dim", "24"]
    estimation = [*flags, "--load_model_dir", checkpoint, *clusters, "--save_name", "toy"]
    drawn = ["--number_of_subsets", "5", "--subset_size", "0.5", "--scale", "0.4"]
    run_script(COT_ESTIMATE, *estimation, *drawn)
    next_flags = "--save_name toy --load_clusters --num_clusters 4"
    assert f"Next: python {SELECT} {next_flags}, or" in capsys.readouterr().out
    assignment = np.load(store / "clusters_4.npz")["clusters"]
    assert sorted(set(assignment.tolist())) == [-1, 0, 1, 2, 3] and (assignment >= 0).sum() == num_train
    made = (store / "clusters_4.npz").stat().st_mtime_ns
    frame = pd.read_csv("results/toy/estimates.csv")
    assert list(frame.columns) == ["subset", "run", "estimate/addsub"] and len(frame) == 5

    run_script(COT_ESTIMATE, *estimation, *drawn, "--evaluate", "displaced", "--max_new_tokens", "4")
    assert (store / "clusters_4.npz").stat().st_mtime_ns == made
    frame = pd.read_csv("results/toy/estimates.csv")
    assert list(frame.columns)[2:] == ["estimate/addsub", "displaced_loss/addsub", "displaced_accuracy/addsub"]
    assert np.isfinite(frame.iloc[:, 2:].to_numpy(float)).all() and frame["displaced_loss/addsub"].std() > 0

    run_script(SELECT, *estimation)
    assert f"python {COT} {next_flags} --subset_file sampled_tasks/toy_forward" in capsys.readouterr().out
    run_script(ENSEMBLE, "results/toy", "--ratio", "0.5")
    fine_tuning = [*clusters, "--save_name", "new", "--results_name", "toy"]
    for method in ("forward_selection", "random_ensemble"):
        chosen = [*fine_tuning, "--subset_file", f"sampled_tasks/toy_{method}.txt"]
        run_script(COT, *chosen, "--max_new_tokens", "4")
    results = pd.read_csv("results/toy/results.csv", dtype={"subset": str})
    refused(r"max_new_tokens: found .*--results_name", run_script, COT, *chosen, "--max_new_tokens", "5")
    metrics = [f"{split}_{metric}/addsub" for split in ("validation", "test") for metric in ("loss", "accuracy")]
    assert list(results.columns) == ["subset", "run", "num_rows", *metrics, "seconds"]
    for subset, rows in zip(results["subset"], results["num_rows"], strict=True):
        assert rows == np.isin(assignment, [int(task) for task in subset.split()]).sum()
    assert Path("results/toy/selection.png").is_file()


def test_displaced_small_steps_follow_the_first_order(here):
    """Both evaluations of a tiny displacement move the loss by the same amount."""
    flags, checkpoint = here
    options = ["--load_model_dir", checkpoint, "--project_dim", "24", "--load_clusters", "--num_clusters", "4"]
    options += ["--number_of_subsets", "5", "--max_new_tokens", "2", "--save_name", "stiff", "--rho", "1e3"]
    run_script(COT_ESTIMATE, *flags, *options, "--evaluate", "displaced")
    frame = pd.read_csv("results/stiff/estimates.csv")
    # levels are another matter: estimates are shifted to measured losses, and the displaced model is not
    predicted, measured = (frame[name] - frame[name].mean() for name in ("estimate/addsub", "displaced_loss/addsub"))
    assert predicted.abs().max() > 0
    np.testing.assert_allclose(measured, predicted, rtol=0.05, atol=2e-6)
    # the checkpoint is as it was
    load_checkpoint(Path("external_lightning_logs") / checkpoint, flags[flags.index("--model_key") + 1])


def test_clusters_of_other_rows_are_made_anew(here):
    """They are kept by the store's name; a store that was made anew may hold other rows."""
    _, checkpoint = here
    (store,) = Path("gradients").iterdir()
    command = [COT_ESTIMATE, "--load_model_dir", checkpoint, "--load_clusters", "--num_clusters", "3"]
    command += ["--number_of_subsets", "2", "--results_name", "other"]
    run_script(*command)
    path = store / "clusters_3.npz"
    kept = dict(np.load(path))
    np.savez(path, clusters=kept["clusters"][::-1], key=kept["key"][::-1])
    run_script(*command)
    np.testing.assert_array_equal(np.load(path)["clusters"], kept["clusters"])
    path.write_bytes(path.read_bytes()[:-100])  # damaged
    run_script(*command)
    np.testing.assert_array_equal(np.load(path)["clusters"], kept["clusters"])
