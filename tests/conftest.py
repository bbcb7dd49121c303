"""Tiny real components: a character tokenizer, two-layer models built from a config, ten-row data."""

import os
import shutil
import string
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from src import console

console.quiet_libraries()  # before it is imported, which reads what this sets

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

from tests.commands import COLLECT, TRAIN, run_script, write_jsonl
from tests.faults import Stages

torch.set_num_threads(1)  # tiny models lose more than they gain by a second thread

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


LONGEST_FIRST = ("test_quickstart", "test_processes", "test_faults", "test_tables", "test_bad_input", "test_benchmarks")
TOGETHER = {"test_faults": "stages", "test_processes": "stages", "test_memory": "stages"}
"""Modules that share a fixture which is dear to make."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is none. On several cores a module's tests stay together, the longest
    modules first."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))
        item.add_marker(pytest.mark.xdist_group(TOGETHER.get(item.path.stem, item.path.stem)))
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="session")
def stages():
    """Runs stages in processes of their own that need no imports."""
    with Stages() as running:
        yield running


@pytest.fixture(scope="session")
def shared_data():
    """Real data beside the project; tests that need it skip where it is not there."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared/data")
    return SHARED


def character_tokenizer(end_appended: bool) -> PreTrainedTokenizerFast:
    """One token per printable character; the end token is appended for an encoder-decoder only."""
    characters = [*string.printable, "→"]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    if end_appended:
        ends = {"single": "$A </s>", "pair": "$A </s> $B </s>", "special_tokens": [("</s>", 1)]}
        tokenizer.post_processor = processors.TemplateProcessing(**ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def build_model_folder(kind: str, folder: Path) -> Path:
    """A tiny model of an architecture as an ordinary Hugging Face folder."""
    torch.manual_seed(0)
    tokenizer = character_tokenizer(end_appended=kind.startswith("t5"))
    size = len(tokenizer)
    if kind == "gpt2":
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "bos_token_id": 1}
    elif kind.startswith("t5"):
        shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
        shape |= {"tie_word_embeddings": kind == "t5"}
    else:
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        shape |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "bos_token_id": None}
        if kind == "llama-wide":  # every layer takes at least a block of 64 numbers, as quantisers want it
            shape |= {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
        if kind == "opt":
            shape |= {"ffn_dim": 48, "word_embed_proj_dim": 32}
    config = AutoConfig.for_model(kind.split("-")[0], vocab_size=size, pad_token_id=0, eos_token_id=1, **shape)
    architecture = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = architecture.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # away from the symmetric initialisation, where little would be tested
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class _Folders(dict[str, str]):
    """Made when first asked for."""

    def __init__(self, build: Callable[[str], str]) -> None:
        self.build = build

    def __missing__(self, kind: str) -> str:
        self[kind] = self.build(kind)
        return self[kind]


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory):
    """Architecture -> folder of a tiny model."""
    root = tmp_path_factory.mktemp("models")
    return _Folders(lambda kind: str(build_model_folder(kind, root / kind)))


WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu", "xi", "omicron",
         "pi", "rho", "sigma", "tau"]  # fmt: skip


def write_sources(path: Path | str, tasks: dict[str, int]) -> Path:
    """A FLAN-layout jsonl with so many rows for each task; rows differ in length."""
    rows, alike = [], {"_task_source": "test", "_template_idx": None, "_template_type": "zs_noopt"}
    for position, (task, count) in enumerate(tasks.items()):
        for row in range(count):
            word = " ".join(WORDS[(row * 7 + position + k) % len(WORDS)] for k in range(1 + row % 3))
            answer = word[::-1] if position % 2 else word.upper()
            rows.append({"inputs": f"{task} {row}: {word}", "targets": answer, "_task_name": task, **alike})
    return write_jsonl(path, rows)


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    """What is said once is said once in each test."""
    monkeypatch.setattr(console, "_said", set())


TOY_TRAINING = "--train_lora --lora_rank 4 --lora_alpha 8 --epochs 2 --batch_size 8 --lr 1e-2"


def write_toy(folder: Path) -> str:
    """Four sources and a target; the flags that name them."""
    write_sources(folder / "sources.jsonl", {"up a": 20, "down": 20, "up b": 20, "down/2": 20})
    write_sources(folder / "target.jsonl", {"goal": 20})
    return "--data_files sources.jsonl --target_files target.jsonl"


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """An empty current folder, so that stages write below it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def track(tmp_path_factory, model_folders):
    """A workspace in which stages 1 and 2 of the run "toy" have run, and the flags that were typed for stage 1."""
    folder = tmp_path_factory.mktemp("track")
    data = f"{write_toy(folder)} --heldout_share 0.1"
    flags = f"{data} --model_key {model_folders['llama']} {TOY_TRAINING}".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_script(TRAIN, *flags, "--save_name", "toy", "--checkpoint_at", "0.5", "1.0")
        run_script(*COLLECT, "--save_name", "toy", "--project_dim", "32")
    return folder, flags


@pytest.fixture
def here(track, monkeypatch):
    """The flags of `track`, in its workspace."""
    monkeypatch.chdir(track[0])
    return track[1]


@pytest.fixture
def copy(track, tmp_path, monkeypatch):
    """The flags of `track`, in a workspace of its own, to change."""
    monkeypatch.chdir(shutil.copytree(track[0], tmp_path / "copy"))
    return track[1]
