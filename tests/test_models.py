"""Logits meet labels, padding changes nothing, checkpoints come back as they went."""

import itertools
import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from src import models
from src.artifacts import folder_fingerprint
from src.config import RunConfig
from src.data import Example, TaskData
from src.datamodule import IGNORED, TaskDataModule
from src.gradients import GradientCollector
from src.instruction import load_instruction
from src.models import (
    OUTPUT_FUNCTIONS,
    LanguageModel,
    LoraShape,
    load_base_model,
    load_checkpoint,
    load_model,
    token_losses,
)
from src.projection import make_projection
from src.run_model import check_base, check_vocabulary
from tests.commands import refused
from tests.conftest import write_sources

KINDS = ("llama", "t5", "gpt2")


def shaken(model: LanguageModel, seed: int = 0) -> LanguageModel:
    """Away from an adapter's start, where half of the gradient is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def adapted(folder: str) -> LanguageModel:
    return shaken(load_model(folder, LoraShape(rank=4, alpha=8), seed=0))


def of_peft(folder: str, **options: object) -> LanguageModel:
    """A model with any adapter that peft can make."""
    base = load_base_model(folder)
    shape = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    torch.manual_seed(0)
    return shaken(LanguageModel(get_peft_model(base.network, LoraConfig(**(shape | options))), base.tokenizer, folder))


def make_datamodule(model: LanguageModel, path: Path, **options: object) -> TaskDataModule:
    data = load_instruction([write_sources(path / "sources.jsonl", {"a": 12, "b": 11})])
    return TaskDataModule(data, model.tokenizer, model.kind, **options)


def test_rows_are_drawn_in_their_shares(model_folders, tmp_path):
    """An epoch has as many rows as the shares are worth; over many epochs each row comes up as often as its share says."""
    model = adapted(model_folders["llama"])
    datamodule = make_datamodule(model, tmp_path, batch_size=4)
    rows = datamodule.data.indices("train")
    shares = np.arange(1.0, len(rows) + 1)
    shares /= shares.sum()
    worth = round(1 / np.square(shares).sum())
    counts = np.zeros(len(datamodule.data))
    for seed in range(300):
        datamodule.select_training_rows(rows, seed, shares)
        drawn = np.concatenate([batch["sample_index"].numpy() for batch in datamodule.training_batches()])
        assert len(drawn) == worth < len(rows)
        np.add.at(counts, drawn, 1)
    np.testing.assert_allclose(counts[rows] / counts.sum(), shares, atol=0.01)
    datamodule.select_training_rows(rows, 0, np.full(len(rows), 1 / len(rows)))
    assert sum(len(batch["sample_index"]) for batch in datamodule.training_batches()) == len(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_target_logits_are_the_models_own_loss(kind, model_folders, tmp_path):
    """Selecting hidden states before the output layer gives the loss that transformers computes from everything."""
    model = adapted(model_folders[kind])
    datamodule = make_datamodule(model, tmp_path)
    batch = datamodule.collate(np.arange(7))
    with torch.no_grad():
        logits, labels, _ = model.target_logits(batch)
        ours = torch.nn.functional.cross_entropy(logits, labels)
        theirs = model.network(**{k: v for k, v in batch.items() if k != "sample_index"}).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert len(labels) == int((batch["labels"] != IGNORED).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_weights_come_back_from_a_checkpoint_and_after_a_displacement(kind, model_folders, tmp_path):
    model = adapted(model_folders[kind])
    before, parameters = model.trainable_state(), dict(model.network.named_parameters())
    models.save_model(model, tmp_path / "checkpoint")
    state = load_checkpoint(tmp_path / "checkpoint", model_folders[kind]).trainable_state()
    change = {name: torch.randn(shape) for name, shape in model.layout.shapes.items()}
    with models.displaced(model, change):
        for matrix in model.layout.matrices:
            moved = parameters[matrix.name] - before[matrix.name]
            torch.testing.assert_close(moved.T if matrix.transposed else moved, change[matrix.name], atol=1e-5, rtol=0)
    assert state.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(state[name], value) and torch.equal(parameters[name], value)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_batches_keep_to_their_budget(kind, model_folders):
    """Every row once; padded tokens within the budget unless a row alone is longer; a decoder's batches are full."""
    tokenizer = models.load_tokenizer(model_folders[kind])
    model_kind = "encoder_decoder" if kind == "t5" else "decoder"
    names = ("input_ids", "labels") if kind == "t5" else ("input_ids",)
    sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))

    @settings(max_examples=40, deadline=None)
    @given(st.lists(sizes, min_size=1, max_size=30), st.integers(1, 300))
    def check(rows, budget):
        examples = [Example(i, "a", "train", "p" * p, "c" * c) for i, (p, c) in enumerate(rows)]
        datamodule = TaskDataModule(TaskData(tuple(examples)), tokenizer, model_kind)

        def padded(batch):
            return sum(datamodule.collate(batch)[name].numel() for name in names)

        batches = datamodule.budgeted(np.arange(len(rows)), budget)
        assert sorted(np.concatenate(batches).tolist()) == list(range(len(rows)))
        assert all(padded(batch) <= budget or len(batch) == 1 for batch in batches)
        for batch, following in itertools.pairwise(batches):
            assert padded(np.append(batch, following[0])) > budget

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_do_not_depend_on_padding(kind, model_folders, tmp_path):
    """A row alone, in a batch padded on the right, and in one padded on the left: one value of each function."""
    model = adapted(model_folders[kind])
    datamodule = make_datamodule(model, tmp_path)

    @torch.no_grad()
    def values(indices, left=False):
        target = model.target_logits(datamodule.collate(indices, pad_left=left))
        return torch.stack([output.function(*target, len(indices)) for output in OUTPUT_FUNCTIONS.values()])

    alone = torch.cat([values([index]) for index in range(9)], dim=1)
    assert alone.std(dim=1).min() > 0.01
    for left in (False, True):
        torch.testing.assert_close(values(list(range(9)), left), alone, rtol=1e-4, atol=1e-5)


def test_margin_is_exact_for_an_improbable_token():
    """For p = 1e-9 the margin is log(p / (1 - p)) and its gradient still pulls the token up."""
    logits = torch.tensor([[0.0, 20.0, -1.0]], requires_grad=True)
    margin = OUTPUT_FUNCTIONS["margin"].function(logits, torch.tensor([0]), torch.tensor([0]), 1)
    expected = torch.log_softmax(logits.double(), 1)[0, 0]
    expected = expected - torch.log1p(-expected.exp())
    torch.testing.assert_close(margin[0].double(), expected, rtol=1e-6, atol=1e-6)
    margin.sum().backward()
    assert logits.grad[0, 0] == pytest.approx(1.0)


def test_adapter_start_depends_on_the_seed_alone(model_folders):
    starts = (load_model(model_folders["llama"], LoraShape(4, 8), seed=seed).trainable_state() for seed in (0, 0, 1))
    first, again, other = (torch.cat([part.flatten() for part in start.values()]) for start in starts)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_pad_tokens_that_the_embedding_lacks_are_not_used(model_folders, tmp_path):
    """Tokens were added and the model was not resized: it trains as before as long as no row has them."""
    shutil.copytree(model_folders["llama"], tmp_path / "model")
    tokenizer = models.load_tokenizer(model_folders["llama"])
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "extra_special_tokens": ["<|turn|>"]})
    tokenizer.save_pretrained(tmp_path / "model")
    model = load_model(str(tmp_path / "model"), None)
    assert model.tokenizer.pad_token == model.tokenizer.eos_token
    data = TaskData((Example(0, "a", "train", "a b c", "d"), Example(1, "a", "train", "a", "<|turn|> d")))
    size = len(models.load_tokenizer(model_folders["llama"]))
    message = rf"{size + 2} tokens, the embedding {size} rows, .*<\|turn\|> in sample 1"
    refused(message, check_vocabulary, model, TaskDataModule(data, model.tokenizer, model.kind))
    check_vocabulary(model, datamodule := TaskDataModule(TaskData(data.examples[:1]), model.tokenizer, model.kind))
    with torch.no_grad():
        model.target_logits(datamodule.collate([0]))


def test_layers_of_the_adapter_are_named_as_in_peft(model_folders):
    for kind, named, expected in [
        ("llama", ["all-linear"], "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
        ("t5-untied", ["all-linear"], "q k v o wi wo"),
        ("gpt2", ["all-linear"], "c_attn c_proj c_fc"),
        ("phi3", ["all-linear"], "qkv_proj o_proj gate_up_proj down_proj"),
        ("llama", ["self_attn.q_proj", "o_proj"], "q_proj o_proj"),
        ("llama", [r".*layers\.1\..*(q|up)_proj"], "q_proj up_proj"),
        ("llama", ["q_proj"], "q_proj"),
    ]:
        model = load_model(model_folders[kind], LoraShape(4, 8, target_modules=tuple(named)))
        assert {matrix.module_name.split(".")[-3] for matrix in model.layout.matrices} == set(expected.split())


def test_layers_that_cannot_carry_it_are_named(model_folders):
    """Before it is trained: stage 2 takes no gradients there."""
    for kind, named, message in (
        ("llama", ("q_proj", "nothing"), "no layer has the name nothing"),
        ("llama", ("q_proj|(",), r"q_proj\|\(: .* cannot carry an adapter there \(missing"),
        ("llama", ("q_proj", "embed_tokens"), "linear layers but the output's, which model.embed_tokens is not"),
        ("t5-untied", ("q", "lm_head"), "linear layers but the output's, which lm_head is not"),
    ):
        shape = LoraShape(2, 4, target_modules=named)
        refused(rf"--lora_target_modules .*{message}", load_model, model_folders[kind], shape)


def test_an_adapter_of_another_model_is_refused(model_folders, tmp_path):
    """Where that is certain: other weights in a folder, another name on the hub."""
    one = model_folders["llama"]
    copy, two = (str(shutil.copytree(one, tmp_path / name)) for name in ("copy", "two"))
    weights = load_file(f"{two}/model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, f"{two}/model.safetensors", {"format": "pt"})
    moved = {"model_key": "gone", "base_fingerprint": folder_fingerprint(Path(one))}
    for manifest, trained_on, model_key, is_refused in (
        ({}, one, two, True),
        ({}, one, copy, False),
        ({}, "/gone/model", one, False),
        ({}, "one/model", two, False),  # a folder may be a copy of what is on the hub
        ({}, "one/model", "other/Model", False),  # a mirror
        ({}, "one/model", "one/model-chat", True),
        ({"model_key": one}, one, two, True),
        (moved, "gone", one, False),
        (moved, "gone", two, True),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": trained_on}))
        expected = pytest.raises(ValueError, match=rf"{trained_on}.*{model_key}.*pass --model_key {trained_on}")
        with expected if is_refused else nullcontext():
            check_base(RunConfig(model_key=model_key), tmp_path, manifest)


ADAPTERS = [
    ({"use_rslora": True}, None),
    ({"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 32}}, None),
    ({"layers_to_transform": [1]}, None),
    ({"lora_bias": True}, r"layers.0.self_attn.q_proj.lora_B.default.bias, .* and 1 more"),
    ({"modules_to_save": ["lm_head", "embed_tokens"]}, r"embed_tokens.modules_to_save.*lm_head.modules_to_save"),
    ({"target_modules": ["q_proj", "lm_head"]}, r"lm_head.lora_A.*, .*lm_head.lora_B"),
]


@pytest.mark.parametrize(("options", "frozen"), ADAPTERS)
def test_an_adapter_of_peft_has_the_gradients_of_its_lora_matrices(options, frozen, model_folders, tmp_path, capsys):
    """What else it has counts in outputs, is named, does not train, and is saved with it again."""
    theirs = of_peft(model_folders["llama"], **options)
    theirs.network.save_pretrained(tmp_path / "theirs")
    batch = make_datamodule(theirs, tmp_path).collate([3])
    models.save_model(load_checkpoint(tmp_path / "theirs", theirs.key), tmp_path / "again")
    said = capsys.readouterr().out
    assert re.search(frozen, said) if frozen else not said
    for name in ("theirs", "again"):
        model = load_checkpoint(tmp_path / name, theirs.key).eval()
        assert {n for n, p in model.network.named_parameters() if p.requires_grad} == set(model.layout.shapes)
        with GradientCollector(model, make_projection("none", None, 0, shapes=model.layout.shapes)) as collect:
            rows, outputs = collect(batch)
        loss = OUTPUT_FUNCTIONS["loss"].function(*theirs.target_logits(batch), 1).sum()
        weights = [theirs.network.get_parameter(name) for name in model.layout.shapes]
        expected = torch.cat([slope.flatten() for slope in torch.autograd.grad(loss, weights)])
        torch.testing.assert_close(outputs[0], loss.detach())
        torch.testing.assert_close(rows[0], expected, rtol=1e-4, atol=1e-6)


def test_adapters_that_cannot_be_taken_are_one_clear_error(model_folders, tmp_path):
    llama = model_folders["llama"]
    of_peft(llama, use_dora=True).network.save_pretrained(tmp_path / "dora")
    get_peft_model(load_base_model(llama).network, IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "ia3")
    for name in ("lora", "damaged", "pickled"):
        of_peft(llama).network.save_pretrained(tmp_path / name)
    (tmp_path / "damaged" / "adapter_config.json").write_text("{")
    (tmp_path / "pickled" / "adapter_model.safetensors").rename(tmp_path / "pickled" / "adapter_model.bin")
    for name, key, message in (
        ("dora", llama, "an adapter with use_dora, expected plain LoRA"),
        ("ia3", llama, "an adapter with .*IA3, expected plain LoRA"),
        ("damaged", llama, "adapter_config.json cannot be read"),
        ("pickled", llama, "has no adapter_model.safetensors"),
        ("lora", model_folders["gpt2"], r"does not fit the layers of .*; pass the --model_key"),  # other names
        ("lora", model_folders["opt"], r"does not fit the layers of .*; pass the --model_key"),  # other shapes
    ):
        refused(message, load_checkpoint, tmp_path / name, key)


def test_model_keys(workspace):
    (workspace / "a_folder").mkdir()
    known = {"flan_t5_base": "google/flan-t5-base", "gpt2_medium": "gpt2-medium"}
    others = ("TinyLlama/TinyLlama-1.1B", "a_folder")
    assert [models.resolve_model_key(key) for key in (*known, *others)] == [*known.values(), *others]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_losses_and_their_gradients_are_those_of_cross_entropy(dtype):
    logits = (4 * torch.randn(70, 300, generator=torch.Generator().manual_seed(0))).to(dtype)
    labels, outer = torch.arange(70) * 4, torch.linspace(-1, 2, 70)
    gradients, losses = [], []
    for function in (
        token_losses,
        lambda own, labels: torch.nn.functional.cross_entropy(own.float(), labels, reduction="none"),
    ):
        own = logits.clone().requires_grad_()
        losses.append(function(own, labels))
        losses[-1].backward(outer)
        gradients.append(own.grad)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-7)
