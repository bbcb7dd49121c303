"""What every stage that needs a model begins with: the model that a configuration names, and its data in tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from src import artifacts, console, models
from src.config import ModelConfig, RunConfig, TrainConfig
from src.data import TaskData
from src.datamodule import TaskDataModule


def make_datamodule(config: RunConfig, data: TaskData, model: models.LanguageModel) -> TaskDataModule:
    """Tokenise the data for a model; notices are printed. ValueError: a row is longer than the model reads, or the
    embedding has no row for a token of the data."""
    names = ("max_length", "max_target_length", "batch_size", "inference_batch_size", "loss_on_prompt")
    options = {name: getattr(config, name) for name in names}
    datamodule = TaskDataModule(data, model.tokenizer, model.kind, token_cache=artifacts.TOKENS, **options)
    longest = int(datamodule.row_lengths.max())
    if model.kind == "decoder" and model.context is not None and longest > model.context:
        found = f"a row has {longest} tokens, and {model.key} reads {model.context}"
        repair = f"pass --max_length {model.context}, which cuts prompts at their beginning"
        raise ValueError(f"--max_length {config.max_length}: {found}; {repair}")
    check_vocabulary(model, datamodule)
    console.say_notices((*data.notices, *datamodule.tokens.notices))
    return datamodule


def check_vocabulary(model: models.LanguageModel, datamodule: TaskDataModule) -> None:
    """Refuse data with tokens that the embedding has no row for; a tokenizer may have more of them than the data."""
    size = model.network.get_input_embeddings().weight.shape[0]
    for ids in (datamodule.tokens.prompts, datamodule.tokens.completions):
        if ids.values.max(initial=0) >= size:
            position = int(np.argmax(ids.values >= size))
            token = model.tokenizer.convert_ids_to_tokens(int(ids.values[position]))
            row = int(np.searchsorted(ids.offsets, position, "right")) - 1
            raise ValueError(
                f"{model.key}: the tokenizer has {len(model.tokenizer)} tokens, the embedding {size} rows, and none for "
                f"{token} in sample {row} ({datamodule.data.where(row)}); enlarge the model with "
                f"resize_token_embeddings({len(model.tokenizer)}) and save it, or take the tokenizer that belongs to it"
            )


def base_weights(config: RunConfig) -> models.BaseWeights:
    """How the base model's weights are stored."""
    return models.BaseWeights(config.base_dtype, config.hardware.device if config.use_qlora else None)


def base_fingerprint(config: ModelConfig) -> str | None:
    """`folder_fingerprint` of the base model; None for a hub id."""
    return artifacts.folder_fingerprint(Path(models.resolve_model_key(config.model_key)))


def check_base(config: ModelConfig, checkpoint: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse an adapter of another base model. Two folders are compared by what is in them, two models of the hub by their
    names without the organisation, as mirrors keep those; a folder may hold any of the hub's."""
    described = artifacts.described(checkpoint, artifacts.ADAPTER_CONFIG)
    key = manifest.get("model_key") or described.get("base_model_name_or_path")
    if not (described and key):
        return
    theirs, ours = (Path(models.resolve_model_key(name)) for name in (key, config.model_key))
    trained_on = manifest.get("base_fingerprint") or artifacts.folder_fingerprint(theirs)
    given = artifacts.folder_fingerprint(ours)
    on_hub = not (trained_on or given or key.startswith((".", "/", "~")))  # a path that is gone may have been any
    if trained_on != given if trained_on and given else on_hub and theirs.name.lower() != ours.name.lower():
        other = f"and --model_key is {config.model_key}; pass --model_key {key}"
        raise ValueError(f"{checkpoint} is an adapter of the base model {key}, {other}")


def model_at(config: RunConfig, checkpoint: Path, untrained_seed: int | None = None) -> models.LanguageModel:
    """The model of a checkpoint, or what it was before training (`models.load_checkpoint`): one of ours, or any folder that
    peft or transformers saved. FileNotFoundError: it is not finished. ValueError: its weights were cut, or its base model or
    shape is not the configuration's."""
    manifest: dict[str, Any] = {}
    if (checkpoint / artifacts.MANIFEST).is_file() or artifacts.META_INITIALIZATIONS in checkpoint.parents:
        manifest = artifacts.read_manifest(checkpoint, config.training_script)
        artifacts.check_files(checkpoint, manifest, "Remove the run's folder and train it again.")
    check_base(config, checkpoint, manifest)
    described = artifacts.described(checkpoint, artifacts.ADAPTER_CONFIG)
    found = (described["r"], described["lora_alpha"]) if described else None
    if found != ((config.lora_rank, config.lora_alpha) if config.train_lora else None):
        has = f"an adapter of rank {found[0]} and alpha {found[1]}" if found else "no adapter"
        flags = f"--train_lora --lora_rank {found[0]} --lora_alpha {found[1]}" if found else "no --train_lora"
        raise ValueError(f"{checkpoint} has {has}, which the flags do not say; pass {flags}")
    model = models.load_checkpoint(checkpoint, config.model_key, base_weights(config), untrained_seed)
    return model.checkpoint_activations() if config.gradient_checkpointing else model


def starting_model(config: TrainConfig, seed: int) -> models.LanguageModel:
    """The base model with a fresh adapter, or the checkpoint of `--load_model_dir`."""
    if config.load_model_dir:
        return model_at(config, artifacts.resolve_checkpoint(config.load_model_dir))
    modules = tuple(config.lora_target_modules) if config.lora_target_modules else None
    shape = models.LoraShape(config.lora_rank, config.lora_alpha, target_modules=modules) if config.train_lora else None
    model = models.load_model(config.model_key, shape, seed=seed, weights=base_weights(config))
    return model.checkpoint_activations() if config.gradient_checkpointing else model
