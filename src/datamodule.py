"""Examples become token ids, and token ids become batches.

Tokenising happens once; batches are padded to their longest row, never to a fixed length. Three orders exist:
shuffled in batches of equal row count (training), by length within a token budget (evaluation and gradients),
and by length in batches of equal row count (generation).

Letters: N samples, B batch, T tokens of the longest row.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, Sampler, WeightedRandomSampler

from src.cli import progress, say_once
from src.data import TaskData
from src.paths import (
    atomic_write,
    check_file,
    check_manifest,
    files_facts,
    read_manifest,
    whole_folder,
    write_json,
    write_manifest,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a position that is no part of the loss (the convention of torch and transformers)."""

Batch = dict[str, torch.Tensor]
Indices = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths in one flat array: `values` (sum of lengths,), `offsets` (N + 1,)."""

    values: np.ndarray
    offsets: np.ndarray

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Length of each row, (N,)."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class TokenizedData:
    """Token ids of every example: prompts and completions apart, special tokens included."""

    prompts: Ragged
    completions: Ragged
    notices: tuple[str, ...]


TOKENIZED_TOGETHER = 4096
"""Rows tokenised at once: their ids are lists of Python numbers until they are written."""


def tokenize(
    data: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    kind: str,
    folder: Path,
    *,
    max_length: int,
    max_target_length: int,
) -> None:
    """Tokenise every example's prompt and completion apart, into the files of `open_tokens`.

    A decoder's row is prompt + completion + end token; where it is longer than `max_length` the prompt loses
    tokens at its beginning first, then the completion at its end. An encoder-decoder's prompt is cut at
    `max_length`, its completion at `max_target_length`. Every cut is counted in a notice.

    Raises:
        ValueError: the tokenizer has no end token, or a completion has no token at all.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path} has no end-of-text token; add one and save it again"
        )
    decoder, end = kind == "decoder", tokenizer.eos_token_id
    cut_prompts = cut_completions = 0
    lengths: dict[str, list[int]] = {"prompt": [], "completion": []}
    rows = iter(progress(data.examples, desc="tokenising", total=len(data), unit="row"))
    with open(folder / "prompt.bin", "wb") as prompt_file, open(folder / "completion.bin", "wb") as completion_file:
        files = {"prompt": prompt_file, "completion": completion_file}
        while block := list(itertools.islice(rows, TOKENIZED_TOGETHER)):
            prompts = tokenizer([example.prompt for example in block], verbose=False)["input_ids"]
            completions = tokenizer(
                [example.completion for example in block], add_special_tokens=not decoder, verbose=False
            )["input_ids"]
            for example, prompt, completion in zip(block, prompts, completions, strict=True):
                if not [token for token in completion if token != end]:
                    raise ValueError(
                        f"sample {example.sample_index} (task {example.task}): the completion {example.completion!r} has "
                        "no token; give it a text that the tokenizer knows, or remove the row"
                    )
                if decoder or completion[-1] != end:
                    completion = [*completion, end]
                kept = completion[: max_length if decoder else max_target_length]
                room = max_length - len(kept) if decoder else max_length
                fitting = prompt[max(0, len(prompt) - room) :] if decoder else prompt[:room]
                cut_completions += len(kept) < len(completion)
                cut_prompts += len(fitting) < len(prompt)
                for part, ids in (("prompt", fitting), ("completion", kept)):
                    files[part].write(np.asarray(ids, np.int32).tobytes())
                    lengths[part].append(len(ids))
    for part, of_rows in lengths.items():
        np.save(folder / f"{part}_offsets.npy", np.concatenate([[0], np.cumsum(of_rows, dtype=np.int64)]))
    notices = []
    if cut_prompts or cut_completions:
        notices.append(
            f"{cut_prompts:,} prompts and {cut_completions:,} completions of {len(data):,} rows were cut to fit "
            f"--max_length {max_length}" + ("" if decoder else f" and --max_target_length {max_target_length}")
        )
    write_json(folder / "notices.json", notices)


def open_tokens(folder: Path) -> TokenizedData:
    """What `tokenize` wrote, memory-mapped."""

    def ragged(part: str) -> Ragged:
        path = folder / f"{part}.bin"
        values = np.memmap(path, np.int32, "r") if path.stat().st_size else np.zeros(0, np.int32)
        return Ragged(values, np.load(folder / f"{part}_offsets.npy"))

    notices = json.loads((folder / "notices.json").read_text(encoding="utf-8"))
    return TokenizedData(ragged("prompt"), ragged("completion"), tuple(notices))


def tokenize_once(
    cache: Path | None, data: TaskData, tokenizer: PreTrainedTokenizerBase, kind: str, **lengths: int
) -> TokenizedData:
    """Tokens of every example: what `tokenize` gave earlier for the same texts, tokenizer and lengths, kept in a folder
    below `cache`, else made there; without a cache they are made anew, and gone with the process."""
    if cache is None or getattr(tokenizer, "backend_tokenizer", None) is None:
        with tempfile.TemporaryDirectory() as folder:  # memory-mapped files may be removed
            tokenize(data, tokenizer, kind, Path(folder), **lengths)
            return open_tokens(Path(folder))
    request = json.dumps([data.fingerprint, tokenizer_fingerprint(tokenizer), kind, sorted(lengths.items())])
    made_from = hashlib.sha256(request.encode()).hexdigest()[:32]
    path, made_by = cache / made_from, "any stage"
    try:
        manifest = read_manifest(path, made_by)
        check_manifest(path, manifest, {"made_from": made_from}, "It is made anew.")
        for name in manifest["files"]:
            check_file(path, manifest, name, "It is made anew.")
    except FileNotFoundError:
        pass
    except ValueError as error:
        say_once(f"note: {error}")
    else:
        return open_tokens(path)
    with whole_folder(path) as folder:
        tokenize(data, tokenizer, kind, folder, **lengths)
        names = sorted(file.name for file in folder.iterdir())
        write_manifest(folder, {"made_from": made_from, "files": files_facts(folder, names)})
    return open_tokens(path)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over what decides a text's ids: the fast tokenizers' one description, or the vocabulary of others."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    whole = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    special = [tokenizer.eos_token_id, sorted(tokenizer.special_tokens_map.items(), key=str)]
    return hashlib.sha256(json.dumps([whole, special], default=str).encode()).hexdigest()


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a cached .npz, each checked against its checksum; None where there is no such file, or with a notice
    where it is damaged."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except OSError:
        raise
    except Exception as error:  # damage can make the zip reader raise anything
        say_once(f"note: {path} is damaged ({type(error).__name__}: {error}); it is made anew.")
        return None


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write a .npz as `read_arrays` reads it, atomically."""
    with atomic_write(path) as temporary:
        np.savez(temporary, **arrays)


def _pad(rows: Sequence[np.ndarray], value: int, left: bool = False) -> torch.Tensor:
    """Stack rows of ids to (B, T), filled with `value`."""
    width = max(len(row) for row in rows)
    padded = np.full((len(rows), width), value, dtype=np.int64)
    for index, row in enumerate(rows):
        span = slice(width - len(row), width) if left else slice(0, len(row))
        padded[index, span] = row
    return torch.from_numpy(padded)


class TaskDataModule(pl.LightningDataModule):
    """Batches of a `TaskData` for training, evaluation, generation and gradients.

    Args:
        data: The examples.
        tokenizer: Tokenizer of the model.
        kind: "decoder" or "encoder_decoder".
        batch_size: Rows of a training batch, per process.
        inference_batch_size: Rows of a generation batch.
        max_length: Longest row (decoder) or prompt (encoder-decoder) in tokens.
        max_target_length: Longest completion of an encoder-decoder in tokens.
        max_tokens_per_batch: Budget of an evaluation or gradient batch: rows x longest row.
        token_cache: Folder of `tokenize_once`; None = tokenise here and now.
        loss_on_prompt: Count the prompt in a decoder's loss (the published behaviour).
        train_indices: Sample indices to train on; None = every training row.
        seed: Seed of the training order.
    """

    def __init__(
        self,
        data: TaskData,
        tokenizer: PreTrainedTokenizerBase,
        kind: str,
        *,
        batch_size: int = 8,
        inference_batch_size: int = 32,
        max_length: int = 512,
        max_target_length: int = 512,
        max_tokens_per_batch: int = 4096,
        token_cache: Path | None = None,
        loss_on_prompt: bool = False,
        train_indices: np.ndarray | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.data, self.kind = data, kind
        self.batch_size, self.inference_batch_size = batch_size, inference_batch_size
        self.max_tokens_per_batch, self.loss_on_prompt = max_tokens_per_batch, loss_on_prompt
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        lengths = {"max_length": max_length, "max_target_length": max_target_length}
        self.tokens = tokenize_once(token_cache, data, tokenizer, kind, **lengths)
        self.select_training_rows(train_indices, seed)

    def select_training_rows(
        self, train_indices: np.ndarray | None, seed: int, shares: np.ndarray | None = None
    ) -> None:
        """Train on these rows from now on, in the order that `seed` draws; tokens are kept.

        Args:
            train_indices: Sample indices; None = every training row.
            seed: Seed of the order.
            shares: How often each of them is drawn (rows,), summing to 1, with replacement. An epoch then has as many
                rows as the shares are worth: 1 over the sum of their squares, all of them where shares are equal.
        """
        self.train_indices = self.data.indices("train") if train_indices is None else np.asarray(train_indices)
        self.seed, self.shares = seed, shares

    # --- collating ---------------------------------------------------------------------------------------

    def collate(self, indices: Indices, pad_left: bool = False) -> Batch:
        """Rows of the given sample indices as one batch.

        Returns:
            `sample_index` (B,), `input_ids` (B, T), `labels` (B, T or target length; `IGNORED` where there
            is no loss), and `attention_mask` (B, T), which is left out where every attention it could hide is
            hidden anyway: a decoder's padding on the right, or no padding.
        """
        prompts = [self.tokens.prompts[i] for i in indices]
        completions = [self.tokens.completions[i] for i in indices]
        batch: Batch = {"sample_index": torch.as_tensor(np.asarray(indices, dtype=np.int64))}
        if self.kind == "decoder":
            rows = [np.concatenate(pair) for pair in zip(prompts, completions, strict=True)]
            batch["input_ids"] = _pad(rows, self.pad_id, pad_left)
            hidden = [np.full_like(prompt, IGNORED) for prompt in prompts] if not self.loss_on_prompt else prompts
            labels = [np.concatenate(pair) for pair in zip(hidden, completions, strict=True)]
            batch["labels"] = _pad(labels, IGNORED, pad_left)
            masked = pad_left
        else:
            rows = prompts
            batch["input_ids"] = _pad(rows, self.pad_id, pad_left)
            batch["labels"] = _pad(completions, IGNORED)
            masked = len({len(row) for row in rows}) > 1
        if masked:
            batch["attention_mask"] = _pad([np.ones_like(row) for row in rows], 0, pad_left)
        return batch

    def collate_prompts(self, indices: Indices) -> Batch:
        """Prompts only, padded on the side that generation needs: `sample_index`, `input_ids`, `attention_mask`."""
        prompts = [self.tokens.prompts[i] for i in indices]
        left = self.kind == "decoder"
        return {
            "sample_index": torch.as_tensor(np.asarray(indices, dtype=np.int64)),
            "input_ids": _pad(prompts, self.pad_id, left),
            "attention_mask": _pad([np.ones_like(prompt) for prompt in prompts], 0, left),
        }

    # --- orders ------------------------------------------------------------------------------------------

    @cached_property
    def row_lengths(self) -> np.ndarray:
        """Tokens of each sample, prompt and completion together, (N,)."""
        return self.tokens.prompts.lengths + self.tokens.completions.lengths

    @cached_property
    def target_tokens(self) -> np.ndarray:
        """Number of tokens that each sample contributes to the loss, (N,)."""
        if self.kind != "decoder":
            return self.tokens.completions.lengths
        # the first token of a decoder's row is predicted by nothing
        ignored = 1 if self.loss_on_prompt else np.maximum(1, self.tokens.prompts.lengths)
        return self.row_lengths - ignored

    def by_length(self, indices: np.ndarray) -> np.ndarray:
        """The sample indices, longest row first (an oversized batch fails at once); ties by index."""
        return indices[np.lexsort((indices, -self.row_lengths[indices]))]

    def budgeted(self, indices: np.ndarray, max_tokens: int | None = None) -> list[np.ndarray]:
        """Cut the rows, by length, into batches of at most `max_tokens` padded tokens (at least one row each)."""
        max_tokens = max_tokens or self.max_tokens_per_batch
        ordered = self.by_length(np.asarray(indices))
        lengths = self.row_lengths[ordered]
        batches, start = [], 0
        while start < len(ordered):
            rows = max(1, max_tokens // int(lengths[start]))
            batches.append(ordered[start : start + rows])
            start += rows
        return batches

    def evaluation_batches(self, indices: np.ndarray, max_tokens: int | None = None) -> Iterator[Batch]:
        """Batches by length within the token budget: for losses and gradients, where order does not matter."""
        return (self.collate(rows) for rows in self.budgeted(indices, max_tokens))

    # --- Lightning ---------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader:
        """Shuffled training rows; under several processes each sees its own share."""
        rows: Any = self.train_indices
        sampler: Sampler[int]
        if self.shares is not None:
            world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)
            count = max(1, round(1 / float(np.square(self.shares).sum()) / world))
            generator = torch.Generator().manual_seed(self.seed * world + rank)
            sampler = WeightedRandomSampler(self.shares.tolist(), count, replacement=True, generator=generator)
        elif self.trainer is not None and self.trainer.world_size > 1:
            sampler = DistributedSampler(
                rows, self.trainer.world_size, self.trainer.global_rank, shuffle=True, seed=self.seed
            )
        else:
            sampler = RandomSampler(rows, generator=torch.Generator().manual_seed(self.seed))
        return DataLoader(rows, batch_size=self.batch_size, sampler=sampler, collate_fn=self.collate)

    def _evaluation_dataloaders(self, split: str) -> list[DataLoader]:
        """Rows of a split by length for the losses, and prompts for generation where completions are judged."""
        indices = self.data.indices(split)
        loaders = [self._shared_out(self.budgeted(indices), self.collate)]
        if self.data.judge is not None:
            ordered, size = self.by_length(indices), self.inference_batch_size
            prompts = [ordered[start : start + size] for start in range(0, len(ordered), size)]
            loaders.append(self._shared_out(prompts, self.collate_prompts))
        return loaders

    def _shared_out(self, batches: list[np.ndarray], collate: Callable[..., Batch]) -> DataLoader:
        """A loader of whole batches. Under several processes each takes every world-size-th; one that runs out
        repeats its last, so that all make the same number of steps."""
        if self.trainer is not None and (world := self.trainer.world_size) > 1:
            own = batches[self.trainer.global_rank :: world]
            steps = -(-len(batches) // world)
            batches = own + [(own or batches)[-1]] * (steps - len(own))
        return DataLoader(cast(Any, batches), batch_size=None, collate_fn=collate)

    def val_dataloader(self) -> list[DataLoader]:
        """Validation rows."""
        return self._evaluation_dataloaders("validation")

    def test_dataloader(self) -> list[DataLoader]:
        """Test rows."""
        return self._evaluation_dataloaders("test")
