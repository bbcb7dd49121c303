"""Language models as the method needs them: one object for both architectures.

A `LanguageModel` is a transformers model (usually with a peft LoRA adapter), its tokenizer and its kind. This
module knows how keys become weights, which layers an adapter sits on, which parameters are the p of the
gradients and in which order, and how logits meet labels.

Letters: B batch, T tokens, K target tokens of a batch, V vocabulary, H hidden, p parameters.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from src.cli import waiting_for
from src.datamodule import IGNORED, Batch

LORA_TARGETS = {
    "llama": ("q_proj", "k_proj", "v_proj"),
    "mistral": ("q_proj", "k_proj", "v_proj"),
    "qwen2": ("q_proj", "k_proj", "v_proj"),
    "qwen3": ("q_proj", "k_proj", "v_proj"),
    "gemma": ("q_proj", "k_proj", "v_proj"),
    "gemma2": ("q_proj", "k_proj", "v_proj"),
    "gemma3_text": ("q_proj", "k_proj", "v_proj"),
    "t5": ("q", "k", "v"),
    "mt5": ("q", "k", "v"),
    "gpt2": ("c_attn",),
    "gpt_neo": ("q_proj", "k_proj", "v_proj"),
    "gpt_neox": ("query_key_value",),
    "opt": ("q_proj", "k_proj", "v_proj"),
}
"""Layers that carry the adapter, by `config.model_type`: the attention's inputs, as in the paper."""

ADAPTER_CONFIG = "adapter_config.json"
"""What peft describes an adapter in, beside its weights."""


@dataclass(frozen=True)
class LoraShape:
    """Shape of the adapter. `alpha` scales the update by alpha / rank."""

    rank: int
    alpha: int
    dropout: float = 0.0
    target_modules: tuple[str, ...] | None = None


# --- which parameters, in which order ------------------------------------------------------------------------


@dataclass(frozen=True)
class AdaptedMatrix:
    """One matrix of the gradient: `shape` is (out, in), whatever way round the layer stores its weight."""

    name: str
    module_name: str
    shape: tuple[int, int]
    transposed: bool


@dataclass(frozen=True)
class ParameterLayout:
    """The matrices whose gradient is taken, ordered by name: the p coordinates of every gradient and solution."""

    matrices: tuple[AdaptedMatrix, ...]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Name -> (out, in), in layout order."""
        return {matrix.name: matrix.shape for matrix in self.matrices}

    @cached_property
    def num_parameters(self) -> int:
        """p."""
        return sum(out * inner for out, inner in self.shapes.values())

    def describe(self) -> dict[str, list[int]]:
        """The layout for a manifest."""
        return {name: list(shape) for name, shape in self.shapes.items()}


def parameter_layout(network: nn.Module) -> ParameterLayout:
    """The layout of a network: the trainable weights of its linear layers.

    An output layer that shares its weight with the embedding is left out: its gradient is not a linear layer's
    alone.

    Raises:
        ValueError: there is none, so that gradients would be empty.
    """
    found = []
    modules = dict(network.named_modules())
    for name, parameter in network.named_parameters():  # a shared weight appears once, under the embedding's name
        module_name, _, kind = name.rpartition(".")
        module = modules[module_name]
        if kind == "weight" and parameter.requires_grad and isinstance(module, (nn.Linear, Conv1D)):
            transposed = isinstance(module, Conv1D)
            rows, columns = parameter.shape
            shape = (columns, rows) if transposed else (rows, columns)
            found.append(AdaptedMatrix(name, module_name, shape, transposed))
    if not found:
        raise ValueError("the model has no trainable linear layer, so there is no gradient to take; pass --train_lora")
    return ParameterLayout(tuple(sorted(found, key=lambda matrix: matrix.name)))


# --- the model -----------------------------------------------------------------------------------------------


class LanguageModel(nn.Module):
    """A network, its tokenizer and its kind ("decoder" or "encoder_decoder")."""

    def __init__(self, network: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, key: str) -> None:
        super().__init__()
        self.network, self.tokenizer, self.key = network, tokenizer, key
        self.kind = "encoder_decoder" if network.config.is_encoder_decoder else "decoder"

    @property
    def has_adapter(self) -> bool:
        """Whether the network is a base model with a LoRA adapter on it."""
        return isinstance(self.network, PeftModel)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.network.parameters()).device

    @property
    def context(self) -> int | None:
        """Most tokens of a row that the model has positions for; None where there is no such number."""
        return getattr(self.network.config, "max_position_embeddings", None)

    @cached_property
    def layout(self) -> ParameterLayout:
        """The p parameters of this model's gradients, in order."""
        return parameter_layout(self.network)

    def checkpoint_activations(self) -> LanguageModel:
        """From now on keep only the layers' inputs for the backward, and compute the rest again: less memory, more time."""
        self.network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return self

    @property
    def is_sharded(self) -> bool:
        """Whether the weights are spread over processes."""
        return any(isinstance(parameter, DTensor) for parameter in self.network.parameters())

    def shard(self, mesh: DeviceMesh) -> None:
        """Spread the weights over the processes of a mesh (FSDP2): a group for each transformer block, one for the rest.

        The base model is the root, not the adapter's wrapper, so that generation, which calls it directly, gathers too.
        """
        if self.is_sharded:
            return
        base = self.network.get_base_model() if self.has_adapter else self.network
        for module in base.modules():
            if isinstance(module, GradientCheckpointingLayer):  # transformers' mark of a block
                fully_shard(module, mesh=mesh)
        fully_shard(base, mesh=mesh)

    def trainable_state(self) -> dict[str, Tensor]:
        """A whole copy of every trainable parameter on the CPU; of sharded weights, every process must ask."""
        return {
            name: whole(parameter.detach()).to("cpu", copy=True)
            for name, parameter in self.network.named_parameters()
            if parameter.requires_grad
        }

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Put a `trainable_state` back."""
        parameters = dict(self.network.named_parameters())
        with torch.no_grad():
            for name, value in state.items():
                parameter = parameters[name]
                if isinstance(parameter, DTensor):
                    value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
                parameter.copy_(value)

    def target_logits(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the target tokens only.

        The output layer is shown the hidden states of the K target positions alone, so that no (B, T, V)
        tensor is made. This is the one place where the two architectures differ in how logits meet labels:
        aligned for an encoder-decoder, shifted by one for a decoder.

        Args:
            batch: As `TaskDataModule.collate` makes it.

        Returns:
            logits (K, V), labels (K,), row of the batch that each belongs to (K,), ascending.
        """
        labels = batch["labels"]
        inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "use_cache": False}
        if (mask := batch.get("attention_mask")) is not None:
            inputs["attention_mask"] = mask
        if self.kind == "decoder":
            if mask is not None:
                inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp_(min=0)
            # the last position predicts nothing, the first label is predicted by nothing
            labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)
        else:
            inputs["decoder_input_ids"] = self.network.prepare_decoder_input_ids_from_labels(labels)
        rows, columns = (labels != IGNORED).nonzero(as_tuple=True)
        positions = rows * labels.shape[1] + columns

        def keep_targets(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden = arguments[0]
            return (hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions)[None], *arguments[1:])

        handle = self.network.get_output_embeddings().register_forward_pre_hook(keep_targets)
        try:
            logits = self.network(**inputs).logits[0]
        finally:
            handle.remove()
        return logits, labels[rows, columns], rows

    def valid_positions(self, batch: Batch) -> Tensor:
        """Which positions that the output layer sees are the sample's own and not padding, (B, T) bool."""
        if self.kind == "encoder_decoder":
            return batch["labels"] != IGNORED
        if "attention_mask" in batch:
            return batch["attention_mask"].bool()
        # padded on the right, or not at all: a row ends with its last label
        return (batch["labels"] != IGNORED).flip(1).cumsum(1).flip(1) > 0

    @torch.no_grad()
    def generate(self, batch: Batch, max_new_tokens: int) -> list[str]:
        """Greedy completions of a batch of prompts (`TaskDataModule.collate_prompts`), special tokens left out."""
        inputs = {name: batch[name].to(self.device) for name in ("input_ids", "attention_mask")}
        output = self.network.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            # every step gathers sharded weights, so that processes must make the same number of steps
            synced_gpus=self.is_sharded,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        if self.kind == "decoder":
            output = output[:, inputs["input_ids"].shape[1] :]
        return self.tokenizer.batch_decode(output, skip_special_tokens=True)


def per_sample_loss(logits: Tensor, labels: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Mean over a sample's target tokens of -log p(token), (B,) float32 (output function `loss`)."""
    losses = nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    return _mean_per_row(losses, rows, num_rows)


def per_sample_margin(logits: Tensor, labels: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Mean over a sample's target tokens of logit(token) - logsumexp(other logits), (B,) float32.

    The paper's output (log-odds of the correct token), exact: no probability is formed, so that a token of
    probability 1e-6 keeps the sign and the size of its gradient.
    """
    logits = logits.float()
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], float("-inf")).logsumexp(1)
    return _mean_per_row(own[:, 0] - others, rows, num_rows)


def _mean_per_row(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Mean of the values (K,) of each row, (num_rows,)."""
    counts = torch.bincount(rows, minlength=num_rows)
    return values.new_zeros(num_rows).index_add(0, rows, values) / counts


OUTPUT_FUNCTIONS = {"loss": per_sample_loss, "margin": per_sample_margin}


# --- loading and saving --------------------------------------------------------------------------------------


def resolve_model_key(model_key: str) -> str:
    """The local folder or hub id of a model key: `flan_t5_base` -> `google/flan-t5-base` (reasoning-teacher keys)."""
    if "/" in model_key or Path(model_key).exists():
        return model_key
    hyphens = model_key.replace("_", "-")
    return f"google/{hyphens}" if "flan" in model_key else hyphens


def model_kind(model_key: str) -> str:
    """ "decoder" or "encoder_decoder", from the model's configuration alone."""
    return "encoder_decoder" if _load_config(model_key).is_encoder_decoder else "decoder"


def _load_config(model_key: str) -> PretrainedConfig:
    with _clear_load_error(model_key):
        return AutoConfig.from_pretrained(resolve_model_key(model_key), trust_remote_code=False)


@contextlib.contextmanager
def _clear_load_error(model_key: str, part: str = "") -> Iterator[None]:
    """One clear error for everything that a wrong, damaged or unreachable model raises in the library."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        path = resolve_model_key(model_key)
        if (reason := _unreadable(Path(path))) is None:
            known = isinstance(error, (OSError, ValueError)) and str(error).strip()
            first_line = (known or repr(error)).splitlines()[0]
            if "ignore_mismatched_sizes" in str(error):
                first_line = "its weights have other shapes than its config.json says"
            reason = (
                f"cannot load {part}{path} ({first_line}); give a local Hugging Face folder, a hub id that this machine "
                "can reach, or make one with data/make_base_model.py"
            )
        raise FileNotFoundError(f"--model_key {model_key}: {reason}") from error


def _unreadable(path: Path) -> str | None:
    """What a file or folder holds that cannot be loaded, and what to do; None where it holds a model."""
    if gguf := [path] if path.suffix == ".gguf" and path.is_file() else sorted(path.glob("*.gguf")):
        return (
            f"{gguf[0]} is a GGUF file, which is for inference alone; make a folder of it with: python "
            f"data/convert_gguf.py {gguf[0]} FOLDER, and give that"
        )
    if not path.is_dir():
        return None
    if (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file():
        return f"{path} is an adapter without its base model; give the base model here, and the adapter as --load_model_dir"
    if not (path / "config.json").is_file():
        return f"{path} has no config.json; give a folder that save_pretrained wrote"
    others = [
        file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
    ]
    if others and not any(path.glob("*.safetensors")):
        return (
            f"{path} has its weights in {sorted(others)[0]}, and only safetensors are read, which cannot run code; convert "
            "them where they come from: load the model with transformers and save it with save_pretrained"
        )
    if not any("token" in file.name or "vocab" in file.name or file.suffix == ".model" for file in path.iterdir()):
        return f"{path} has no tokenizer; save the model's there with its save_pretrained"
    return None


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer; one without a pad token pads with its end token.

    Raises:
        FileNotFoundError: there is none, or it cannot be loaded.
    """
    with _clear_load_error(path, "the tokenizer of "):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@dataclass(frozen=True)
class BaseWeights:
    """How the base model's weights are held.

    Attributes:
        dtype: "float32" or "bfloat16"; an adapter on top stays float32.
        attn_implementation: Attention kernel; None = the library's choice.
        four_bit_device: Hold the linear layers in 4 bits (NF4 with double quantisation: Dettmers et al. 2023, QLoRA,
            arXiv:2305.14314) on this device and compute in bfloat16; None = as `dtype` says.
    """

    dtype: str = "float32"
    attn_implementation: str | None = None
    four_bit_device: str | None = None

    def options(self) -> dict[str, Any]:
        """What `from_pretrained` takes.

        Raises:
            ValueError: 4 bits, and bitsandbytes is not installed.
        """
        options = {"dtype": getattr(torch, self.dtype), "attn_implementation": self.attn_implementation}
        if self.four_bit_device is None:
            return options
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError(
                "--use_qlora: bitsandbytes is not installed; pip install -r requirements-qlora.txt, or leave the flag out"
            )
        quantized = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        placed = {"quantization_config": quantized, "device_map": {"": self.four_bit_device}}
        return {**options, **placed, "dtype": torch.bfloat16}


FULL_PRECISION = BaseWeights()


def load_base_model(model_key: str, weights: BaseWeights = FULL_PRECISION) -> LanguageModel:
    """Load a base model and its tokenizer from a hub id, a short key or a local folder.

    Raises:
        FileNotFoundError: neither a local folder nor reachable on the hub.
        ValueError: as `BaseWeights.options`.
    """
    config, path, options = _load_config(model_key), resolve_model_key(model_key), weights.options()
    architecture = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with _clear_load_error(model_key), waiting_for(f"loading {model_key}"):
        network = architecture.from_pretrained(path, use_safetensors=True, trust_remote_code=False, **options)
        for module in network.modules():
            # with AVX512-BF16, bitsandbytes packs a 4-bit layer for inference when it is first evaluated; a packed one
            # passes no gradient on, and one narrower than a block cannot be packed
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    tokenizer = load_tokenizer(path)
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= network.get_input_embeddings().num_embeddings:
        tokenizer.pad_token = tokenizer.eos_token  # one that was added, and the model not resized
    return LanguageModel(network, tokenizer, model_key)


def lora_targets(network: PreTrainedModel, shape: LoraShape) -> list[str] | str:
    """Layers that carry the adapter, as peft takes them: ends of names, or in one text `all-linear` or a pattern.

    Raises:
        ValueError: the architecture is not in `LORA_TARGETS` and no layers are named.
    """
    targets = shape.target_modules or LORA_TARGETS.get(network.config.model_type)
    if not targets:
        raise ValueError(
            f"no LoRA layers are known for the architecture {network.config.model_type}; name them with "
            "--lora_target_modules (all-linear is every linear layer; known: " + ", ".join(LORA_TARGETS) + ")"
        )
    if len(targets) == 1 and (targets[0] == "all-linear" or not re.fullmatch(r"[\w.-]+", targets[0])):
        return targets[0]
    return list(targets)


def add_adapter(model: LanguageModel, shape: LoraShape, seed: int) -> LanguageModel:
    """Put a fresh LoRA adapter on a base model; its random half depends on `seed` alone.

    Raises:
        ValueError: a layer that is named is not there, or cannot carry an adapter whose gradients are taken.
    """
    targets = lora_targets(model.network, shape)
    config = LoraConfig(
        task_type="SEQ_2_SEQ_LM" if model.kind == "encoder_decoder" else "CAUSAL_LM",
        r=shape.rank,
        lora_alpha=shape.alpha,
        lora_dropout=shape.dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.network.modules()),
    )
    outputs = model.network.get_output_embeddings()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            network = get_peft_model(model.network, config)
            named = network.targeted_module_names
            for target in [] if isinstance(targets, str) else targets:
                if not any(f".{name}".endswith(f".{target}") for name in named):
                    raise ValueError(f"no layer has the name {target}")
            for name in named:
                layer = network.get_base_model().get_submodule(name)
                if layer.get_base_layer() is outputs or not layer.lora_A:  # an embedding has none
                    raise ValueError(f"gradients are taken of linear layers but the output's, which {name} is not")
        except (ValueError, re.error) as error:
            raise ValueError(
                f"--lora_target_modules {' '.join(shape.target_modules or targets)}: {model.key} cannot carry an adapter "
                f"there ({error}); name some of its linear layers, or all-linear"
            ) from error
        return LanguageModel(network, model.tokenizer, model.key)


def load_model(
    model_key: str, lora: LoraShape | None, *, seed: int = 0, weights: BaseWeights = FULL_PRECISION
) -> LanguageModel:
    """The model that training starts from: a base model, with a fresh adapter where `lora` is given."""
    model = load_base_model(model_key, weights)
    return add_adapter(model, lora, seed) if lora else model


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is spread over processes, gathered; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def state_to_save(model: LanguageModel) -> dict[str, Tensor]:
    """What `save_model` writes, whole; of sharded weights, every process must ask."""
    state = model.network.state_dict()
    if model.has_adapter:
        state = {name: value for name, value in state.items() if "lora_" in name}
    return {name: whole(value) for name, value in state.items()}


def save_model(model: LanguageModel, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Save a checkpoint: the adapter as `PeftModel.from_pretrained` opens it, or the whole model, as safetensors.

    Args:
        model: The model.
        folder: Where to.
        state: Of `state_to_save`, where weights are sharded.
    """
    model.network.save_pretrained(folder, **({"state_dict": dict(state)} if state else {}))
    if not model.has_adapter:
        model.tokenizer.save_pretrained(folder)


def load_checkpoint(folder: Path, model_key: str, weights: BaseWeights = FULL_PRECISION) -> LanguageModel:
    """Load what `save_model` wrote: the adapter on its base model, or the whole model.

    Raises:
        ValueError: the adapter fits another model.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        model = load_base_model(str(folder), weights)
        return LanguageModel(model.network, model.tokenizer, model_key)
    base = load_base_model(model_key, weights)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            network = PeftModel.from_pretrained(base.network, folder, is_trainable=True)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, UserWarning) as error:  # other shapes or other names
        raise ValueError(
            f"the adapter {folder} does not fit the layers of {model_key}; pass the --model_key that it was trained on"
        ) from error
    return LanguageModel(network, base.tokenizer, model_key)


@contextlib.contextmanager
def displaced(model: LanguageModel, displacement: Mapping[str, Tensor]) -> Iterator[None]:
    """Evaluate at w + displacement: adds it to the layout's weights, takes the old weights back on exit.

    Args:
        model: The model.
        displacement: Name -> (out, in), as `Projection.lift` returns it.
    """
    parameters = dict(model.network.named_parameters())
    matrices = {matrix.name: matrix for matrix in model.layout.matrices}
    kept = {name: parameters[name].detach().clone() for name in displacement}
    try:
        with torch.no_grad():
            for name, change in displacement.items():
                change = change.T if matrices[name].transposed else change
                parameters[name].add_(change.to(parameters[name]))
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                parameters[name].copy_(value)
