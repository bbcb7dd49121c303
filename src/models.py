"""Language models as the method needs them: loading, the parameters whose gradient is taken, and the output functions.

Letters: B batch, T tokens, K target tokens of a batch, V vocabulary, H hidden, p parameters.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from src.artifacts import ADAPTER_CONFIG, BASE
from src.console import is_out_of_memory, say_notices, waiting_for
from src.datamodule import IGNORED, Batch


@contextlib.contextmanager
def standing_in(name: str, module: Any) -> Iterator[None]:
    """Let imports find `module` in the place of one that is not loaded yet; None for a module that is not there."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = module
    try:
        yield
    finally:
        del sys.modules[name]


@contextlib.contextmanager
def _peft_for(network: PreTrainedModel | None) -> Iterator[None]:
    """Show peft no bitsandbytes unless the network is quantized: it would load it for any adapter, in about 2 s."""
    try:
        with contextlib.nullcontext() if getattr(network, "is_quantized", False) else standing_in("bitsandbytes", None):
            yield
    finally:
        for asked in (peft.import_utils.is_bnb_available, peft.import_utils.is_bnb_4bit_available):
            asked.cache_clear()


# transformers takes this one function for detecting objects, and SciPy's optimizers take half a second
_NO_OPTIMIZERS = SimpleNamespace(linear_sum_assignment=None)

with standing_in("bitsandbytes", None), standing_in("scipy.optimize", _NO_OPTIMIZERS):
    import peft.import_utils
    from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
    from peft.tuners.lora import LoraLayer
    from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.pytorch_utils import Conv1D

_LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt_neo", "opt")
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_LIKE_LLAMA, ("q_proj", "k_proj", "v_proj")),
    **{"t5": ("q", "k", "v"), "mt5": ("q", "k", "v"), "gpt2": ("c_attn",), "gpt_neox": ("query_key_value",)},
}
"""Layers that carry the adapter, by `config.model_type`: the attention's inputs, as in the paper (peft adapts fewer)."""


@dataclass(frozen=True)
class LoraShape:
    """Shape of the adapter. `alpha` scales the update by alpha / rank."""

    rank: int
    alpha: int
    target_modules: tuple[str, ...] | None = None


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

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Name -> (out, in), in layout order."""
        return {matrix.name: matrix.shape for matrix in self.matrices}

    @property
    def num_parameters(self) -> int:
        return sum(out * inner for out, inner in self.shapes.values())


class LanguageModel(nn.Module):
    """A network, its tokenizer and its kind ("decoder" or "encoder_decoder")."""

    def __init__(self, network: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, key: str) -> None:
        super().__init__()
        self.network, self.tokenizer, self.key = network, tokenizer, key
        self.kind = "encoder_decoder" if network.config.is_encoder_decoder else "decoder"

    @property
    def has_adapter(self) -> bool:
        return isinstance(self.network, PeftModel)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def context(self) -> int | None:
        """Most tokens of a row that the model has positions for; None where there is no limit."""
        return getattr(self.network.config, "max_position_embeddings", None)

    @property
    def is_sharded(self) -> bool:
        """Whether the weights are spread over processes."""
        return any(isinstance(parameter, DTensor) for parameter in self.network.parameters())

    @cached_property
    def layout(self) -> ParameterLayout:
        """The trainable weights of linear layers; of an adapter, its LoRA matrices below the output layer.

        An output layer that shares its weight with the embedding is left out: its gradient is not a linear layer's alone.
        ValueError: there is none, so that gradients would be empty.
        """
        of_output = {id(weight) for weight in self.network.get_output_embeddings().parameters()}
        found = []
        for name, weight in self.network.named_parameters():  # a shared weight appears once, as the embedding's
            module_name, _, kind = name.rpartition(".")
            module = self.network.get_submodule(module_name) if kind == "weight" and weight.requires_grad else None
            is_part = not self.has_adapter or (".lora_" in name and id(weight) not in of_output)
            if is_part and isinstance(module, (nn.Linear, Conv1D)):
                transposed = isinstance(module, Conv1D)
                out, inner = weight.shape[::-1] if transposed else weight.shape
                found.append(AdaptedMatrix(name, module_name, (out, inner), transposed))
        if not found:
            raise ValueError("the model has no trainable linear layer, and so no gradient; pass --train_lora")
        return ParameterLayout(tuple(sorted(found, key=lambda matrix: matrix.name)))

    def checkpoint_activations(self) -> LanguageModel:
        """From now on keep only the layers' inputs for the backward, and compute the rest again: less memory, more time."""
        self.network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return self

    def shard(self, mesh: DeviceMesh) -> None:
        """Spread the weights over the processes of a mesh (FSDP2): a group for each transformer block, one for the rest."""
        if self.is_sharded:
            return
        # the base model is the root, not the adapter's wrapper: generation calls it directly, and has to gather too
        base = self.network.get_base_model() if self.has_adapter else self.network
        for module in base.modules():
            if isinstance(module, GradientCheckpointingLayer):  # transformers' mark of a block
                fully_shard(module, mesh=mesh)
        fully_shard(base, mesh=mesh)

    def trainable_state(self) -> dict[str, Tensor]:
        """Copy every trainable parameter, unsharded, to the CPU; with sharded weights all processes must call it."""
        return {
            name: _whole(parameter.detach()).to("cpu", copy=True)
            for name, parameter in self.network.named_parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Put a `trainable_state` back."""
        for name, value in state.items():
            parameter = self.network.get_parameter(name)
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
            parameter.copy_(value)

    def targets(self, batch: Batch) -> Tensor:
        """Of a batch's K target tokens the labels, the rows of the batch, ascending, and the positions in all of its rows laid
        in one line, (3, K). Their number is not known before they are looked for: a GPU has to be waited for, so that they are
        taken before the batch is moved there, and go with it as `targets`."""
        labels = batch["labels"]
        if self.kind == "decoder":
            # the last position predicts nothing, the first label is predicted by nothing
            labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)
        rows, columns = (labels != IGNORED).nonzero(as_tuple=True)
        return torch.stack([labels[rows, columns], rows, rows * labels.shape[1] + columns])

    def target_logits(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the target tokens only.

        The output layer is shown the hidden states of the K target positions alone, so that no (B, T, V) tensor is made.
        Logits and labels are aligned for an encoder-decoder, shifted by one for a decoder.

        Returns:
            logits (K, V), labels (K,), row of the batch that each belongs to (K,), ascending.
        """
        labels, rows, positions = batch["targets"] if "targets" in batch else self.targets(batch)
        inputs: dict[str, Tensor] = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        if self.kind == "encoder_decoder":
            inputs["decoder_input_ids"] = self.network.prepare_decoder_input_ids_from_labels(batch["labels"])
        elif "attention_mask" in batch:
            inputs["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp_(min=0)

        def keep_targets(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden = arguments[0]
            return (hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions)[None], *arguments[1:])

        handle = self.network.get_output_embeddings().register_forward_pre_hook(keep_targets)
        try:
            logits = self.network(**inputs, use_cache=False).logits.squeeze(0)  # its backward copies nothing
        finally:
            handle.remove()
        return logits, labels, rows

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
        options = {"do_sample": False, "num_beams": 1, "use_cache": True, "pad_token_id": self.tokenizer.pad_token_id}
        # every step gathers sharded weights, so that processes must make the same number of steps
        options |= {"max_new_tokens": max_new_tokens, "synced_gpus": self.is_sharded}
        output = self.network.generate(**inputs, **options)
        if self.kind == "decoder":
            output = output[:, inputs["input_ids"].shape[1] :]
        return self.tokenizer.batch_decode(output, skip_special_tokens=True)


_LINES = 32  # of logits worked on at once


class _TokenLosses(torch.autograd.Function):
    """-log p(token), (K,) float32, of logits (K, V): as torch's cross entropy, which holds four arrays of that size at once in
    its backward, where this holds the logits and their gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        sums = torch.cat([lines.float().logsumexp(1) for lines in logits.split(_LINES)])
        ctx.save_for_backward(logits, labels, sums)
        return sums - logits.gather(1, labels[:, None])[:, 0]

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor, None]:
        (outer,), (logits, labels, sums) = output_gradients, ctx.saved_tensors
        gradients = torch.empty_like(logits)
        for place, *lines in zip(*(each.split(_LINES) for each in (gradients, logits, sums, outer)), strict=True):
            place.copy_((lines[0] - lines[1][:, None]).exp_().mul_(lines[2][:, None]))
        return gradients.scatter_add_(1, labels[:, None], -outer[:, None].to(logits.dtype)), None


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p(token) of every target token, (K,) float32, from logits (K, V)."""
    return _TokenLosses.apply(logits, labels)


def per_sample_loss(logits: Tensor, labels: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Mean over a sample's target tokens of -log p(token), (B,) float32."""
    return _mean_per_row(token_losses(logits, labels), rows, num_rows)


def per_sample_margin(logits: Tensor, labels: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Mean over a sample's target tokens of logit(token) - logsumexp(other logits), (B,) float32: the paper's log-odds, of
    which no probability is formed, so that an improbable token keeps its gradient."""
    logits = logits.float()
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], float("-inf")).logsumexp(1)
    return _mean_per_row(own[:, 0] - others, rows, num_rows)


def _mean_per_row(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    sums, counts = (values.new_zeros(num_rows).index_add(0, rows, each) for each in (values, torch.ones_like(values)))
    return sums / counts


class OutputFunction(NamedTuple):
    """What is differentiated: `function` maps `LanguageModel.target_logits` and the number of rows B to (B,) float32; a store,
    where lower is better, holds it times `sign`."""

    function: Callable[[Tensor, Tensor, Tensor, int], Tensor]
    sign: float


OUTPUT_FUNCTIONS = {"loss": OutputFunction(per_sample_loss, 1.0), "margin": OutputFunction(per_sample_margin, -1.0)}


def resolve_model_key(model_key: str) -> str:
    """The local folder or hub id of a model key: `flan_t5_base` -> `google/flan-t5-base` (reasoning-teacher keys)."""
    if "/" in model_key or Path(model_key).exists():
        return model_key
    hyphens = model_key.replace("_", "-")
    return f"google/{hyphens}" if "flan" in model_key else hyphens


def model_kind(model_key: str) -> str:
    """ "decoder" or "encoder_decoder", from the model's configuration alone."""
    with _clear_load_error(model_key):
        config = AutoConfig.from_pretrained(resolve_model_key(model_key), trust_remote_code=False)
    return "encoder_decoder" if config.is_encoder_decoder else "decoder"


@contextlib.contextmanager
def _clear_load_error(model_key: str, part: str = "") -> Iterator[None]:
    """Turn whatever a wrong, damaged or unreachable model raises into one clear error."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        path = Path(resolve_model_key(model_key))
        known = isinstance(error, (OSError, ValueError)) and str(error).strip()
        first_line = (known or repr(error)).splitlines()[0]
        if "ignore_mismatched_sizes" in str(error):
            first_line = "its weights have other shapes than its config.json says"
        reason = (
            f"cannot load {part}{path} ({first_line}); give a folder that save_pretrained wrote, with config.json, "
            "safetensors (pickled weights are not read) and tokenizer, or a hub id that this machine can reach, or make one "
            "with data/make_base_model.py"
        )
        if gguf := next(iter([path] if path.suffix == ".gguf" else path.glob("*.gguf")), None):
            reason = (
                f"{gguf} is a GGUF file, for inference alone; convert it: python data/convert_gguf.py {gguf} FOLDER"
            )
        elif (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file():
            reason = f"{path} is an adapter without its base model; give the base model here, the adapter as --load_model_dir"
        raise FileNotFoundError(f"--model_key {model_key}: {reason}") from error


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer; one without a pad token pads with its end token. FileNotFoundError: it cannot be loaded."""
    with _clear_load_error(path, "the tokenizer of "):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@dataclass(frozen=True)
class BaseWeights:
    """How the base model's weights are stored.

    Attributes:
        dtype: "float32" or "bfloat16"; an adapter on top stays float32.
        four_bit_device: Hold the linear layers in 4 bits (NF4 with double quantisation: Dettmers et al. 2023, QLoRA,
            arXiv:2305.14314) on this device and compute in bfloat16; None = as `dtype` says.
    """

    dtype: str = "float32"
    four_bit_device: str | None = None


FULL_PRECISION = BaseWeights()
_FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def load_base_model(model_key: str, weights: BaseWeights = FULL_PRECISION) -> LanguageModel:
    """Load a base model and its tokenizer from a hub id, a short key or a local folder. FileNotFoundError: it cannot be."""
    options: dict[str, Any] = {"dtype": getattr(torch, weights.dtype)}
    if weights.four_bit_device is not None:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError(
                "--use_qlora: bitsandbytes is not installed; pip install -r requirements-qlora.txt, or leave the flag out"
            )
        quantized = transformers.BitsAndBytesConfig(**_FOUR_BITS, bnb_4bit_compute_dtype=torch.bfloat16)
        placed = {"": weights.four_bit_device}
        options = {"dtype": torch.bfloat16, "quantization_config": quantized, "device_map": placed}
    is_decoder, path = model_kind(model_key) == "decoder", resolve_model_key(model_key)
    architecture = transformers.AutoModelForCausalLM if is_decoder else transformers.AutoModelForSeq2SeqLM
    with _clear_load_error(model_key), waiting_for(f"loading {model_key}"):
        network = architecture.from_pretrained(path, use_safetensors=True, trust_remote_code=False, **options)
    for module in network.modules():
        # with AVX512-BF16, bitsandbytes packs a 4-bit layer when it is first evaluated; a packed one passes no gradient on
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    tokenizer = load_tokenizer(path)
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= network.get_input_embeddings().num_embeddings:
        tokenizer.pad_token = tokenizer.eos_token  # one that was added, and the model not resized
    return LanguageModel(network, tokenizer, model_key)


def add_adapter(model: LanguageModel, shape: LoraShape, seed: int) -> LanguageModel:
    """Put a fresh LoRA adapter on a base model; its random half depends on `seed` alone.

    `shape.target_modules` are what peft takes: ends of layers' names, or one entry, `all-linear` or a pattern.
    ValueError: no layers are known, or one that is named is not there or cannot carry an adapter with gradients.
    """
    named = shape.target_modules or LORA_TARGETS.get(model.network.config.model_type)
    if not named:
        raise ValueError(
            f"no LoRA layers are known for the architecture {model.network.config.model_type}; name them with "
            f"--lora_target_modules (all-linear is every linear layer; known: {', '.join(LORA_TARGETS)})"
        )
    is_pattern = len(named) == 1 and (named[0] == "all-linear" or not re.fullmatch(r"[\w.-]+", named[0]))
    config = LoraConfig(
        task_type="SEQ_2_SEQ_LM" if model.kind == "encoder_decoder" else "CAUSAL_LM",
        r=shape.rank,
        lora_alpha=shape.alpha,
        target_modules=named[0] if is_pattern else list(named),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.network.modules()),
    )
    outputs = model.network.get_output_embeddings()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            with _peft_for(model.network):
                network = get_peft_model(model.network, config)
            carrying = network.targeted_module_names
            for target in () if is_pattern else named:
                if not any(f".{name}".endswith(f".{target}") for name in carrying):
                    raise ValueError(f"no layer has the name {target}")
            for name in carrying:
                layer = network.get_base_model().get_submodule(name)
                if layer.get_base_layer() is outputs or not layer.lora_A:  # an embedding has none
                    raise ValueError(f"gradients are taken of linear layers but the output's, which {name} is not")
        except (ValueError, re.error) as error:
            raise ValueError(
                f"--lora_target_modules {' '.join(named)}: {model.key} cannot carry an adapter there ({error}); name some "
                "of its linear layers, or all-linear"
            ) from error
    return LanguageModel(network, model.tokenizer, model.key)


def load_model(
    model_key: str, lora: LoraShape | None, *, seed: int = 0, weights: BaseWeights = FULL_PRECISION
) -> LanguageModel:
    """The model that training starts from: a base model, with a fresh adapter where `lora` is given."""
    model = load_base_model(model_key, weights)
    return add_adapter(model, lora, seed) if lora else model


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def state_to_save(model: LanguageModel) -> dict[str, Tensor]:
    """State that `save_model` writes, unsharded; with sharded weights all processes must call it."""
    state = model.network.state_dict()
    kept = ("lora_", "modules_to_save") if model.has_adapter else ("",)
    return {name: _whole(value) for name, value in state.items() if any(part in name for part in kept)}


def save_model(model: LanguageModel, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Save the adapter as `PeftModel.from_pretrained` opens it, or the whole model, as safetensors; `state` is
    `state_to_save` where weights are sharded."""
    model.network.save_pretrained(folder, **({"state_dict": dict(state)} if state else {}))
    if not model.has_adapter:
        model.tokenizer.save_pretrained(folder)


def load_checkpoint(
    folder: Path, model_key: str, weights: BaseWeights = FULL_PRECISION, untrained_seed: int | None = None
) -> LanguageModel:
    """Load what `save_model` or peft wrote: a LoRA adapter on its base model, or the whole model. With `untrained_seed`, the
    base model instead, with a fresh adapter of the same shape whose random half depends on that seed alone.

    What an adapter has besides the matrices of `LanguageModel.layout` (biases, `modules_to_save`, embeddings) is frozen as
    it was saved; a notice names it. ValueError: it fits another model, or is not plain LoRA (rsLoRA is).
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        model = load_base_model(str(folder) if untrained_seed is None else model_key, weights)
        return LanguageModel(model.network, model.tokenizer, model_key)
    try:
        config = PeftConfig.from_pretrained(folder)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder / ADAPTER_CONFIG} cannot be read ({error}); save it again with peft") from error
    # variants that use the matrices outside the layers whose gradients are taken
    fields = {field.name for field in dataclasses.fields(config) if field.metadata.get("is_lora_variant")}
    other = [name for name in sorted({*fields, "target_parameters"}) if getattr(config, name, None)]
    if other or not isinstance(config, LoraConfig):
        raise ValueError(
            f"{folder} is an adapter with {other[0] if other else config.peft_type}, expected plain LoRA of linear layers; "
            "merge it into its base model (peft's merge_and_unload) and give that as --model_key"
        )
    if not (folder / "adapter_model.safetensors").is_file():  # peft would look for it on the hub, or unpickle a .bin
        raise ValueError(f"{folder} has no adapter_model.safetensors; save the adapter with peft's save_pretrained")
    base = load_base_model(model_key, weights)
    try:
        with warnings.catch_warnings(), _peft_for(base.network):
            warnings.filterwarnings("error", "Found missing adapter keys")
            network = PeftModel.from_pretrained(base.network, folder, is_trainable=True)
    except (RuntimeError, ValueError, UserWarning) as error:  # other shapes or other names
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"the adapter {folder} does not fit the layers of {model_key}; pass the --model_key that it was trained on"
        ) from error
    model = LanguageModel(network, base.tokenizer, model_key)
    trainable = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    if frozen := [name for name in trainable if name not in model.layout.shapes]:
        for name in frozen:
            network.get_parameter(name).requires_grad_(False)
        named = f"{', '.join(frozen[:3])} and {len(frozen) - 3} more" if len(frozen) > 3 else ", ".join(frozen)
        if untrained_seed is not None:
            raise ValueError(
                f"{folder} has trained {named} besides LoRA, so that its base model is not known; leave {BASE} out"
            )
        say_notices([f"{folder}: gradients are of its LoRA matrices alone; {named} stay as saved"])
    if untrained_seed is not None:
        with torch.random.fork_rng():
            torch.manual_seed(untrained_seed)
            for module in network.modules():
                if isinstance(module, LoraLayer):
                    module.reset_lora_parameters(network.active_adapter, init_lora_weights=True)
    return model


@contextlib.contextmanager
def displaced(model: LanguageModel, displacement: Mapping[str, Tensor]) -> Iterator[None]:
    """Evaluate at w + displacement (name -> (out, in), as `Projection.lift` returns it); exit puts the old weights back."""
    matrices = {matrix.name: matrix for matrix in model.layout.matrices}
    parameters = {name: model.network.get_parameter(name) for name in displacement}
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        with torch.no_grad():
            for name, change in displacement.items():
                parameters[name].add_((change.T if matrices[name].transposed else change).to(parameters[name]))
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                parameters[name].copy_(value)
