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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, Sampler, WeightedRandomSampler

from src.cli import progress, say_once
from src.data import Example, TaskData
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
    """Tokenise every example into the files of `open_tokens`.

    A decoder's row is one text: its ids decode to prompt + completion (`_joined`). An encoder-decoder's completion is a
    text of its own. Special tokens that the tokenizer puts before a text stand there once, also where the text brings
    them. A row has one end token: the tokenizer's, or another special token with which the completion ends, such as a
    chat template's end of turn; white space and repetitions behind it are dropped.

    A decoder's row longer than `max_length` loses the prompt's first tokens, but for the beginning-of-text token, and
    then the completion's last. An encoder-decoder's prompt is cut at `max_length`, before the special tokens at its end,
    its completion at `max_target_length`. Every cut is counted in a notice.

    Raises:
        ValueError: the tokenizer has no end token or cannot read a text, a completion has no token at all, or
            `max_length` leaves no room for one.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path} has no end-of-text token; add one and save it again"
        )
    decoder = kind == "decoder"
    before, behind = _special_ids_around(data.examples[0].completion, tokenizer)
    if decoder and max_length < (least := max(2, len(before) + 1)):  # no token is predicted at the first position
        raise ValueError(f"--max_length {max_length} leaves no room for a completion; pass at least {least}")
    cut_prompts = cut_completions = 0
    lengths: dict[str, list[int]] = {"prompt": [], "completion": []}
    rows = iter(progress(data.examples, desc="tokenising", total=len(data), unit="row"))
    with open(folder / "prompt.bin", "wb") as prompt_file, open(folder / "completion.bin", "wb") as completion_file:
        files = {"prompt": prompt_file, "completion": completion_file}
        while block := list(itertools.islice(rows, TOKENIZED_TOGETHER)):
            for prompt, completion, end in _tokenized(block, data, tokenizer, decoder):
                if prompt[: len(before)] != before:
                    prompt = [*before, *prompt]
                if decoder:
                    completion = [*completion, end]
                    begin = prompt[: len(before) or int(prompt[:1] == [tokenizer.bos_token_id])]
                    kept = completion[: max_length - len(begin)]
                    room = max_length - len(begin) - len(kept)
                    fitting = [*begin, *prompt[max(len(begin), len(prompt) - room) :]]
                else:
                    completion = [*before, *completion, *(behind if end in behind else [end])]
                    kept = completion[:max_target_length]
                    prompt = [*prompt, *behind]
                    room = max(0, max_length - len(behind))
                    fitting = prompt if len(prompt) <= max_length else [*prompt[:room], *behind][:max_length]
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


def _ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of each text, without special tokens around it."""
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _special_ids_around(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and behind a text."""
    try:
        [inner], whole = _ids([text], tokenizer), tokenizer(text, verbose=False)["input_ids"]
    except Exception:  # of the text, and told with its place when its row is tokenised
        return [], []
    start = next((start for start in range(len(whole)) if whole[start : start + len(inner)] == inner), 0)
    return whole[:start], whole[start + len(inner) :]


def _tokenized(
    block: Sequence[Example], data: TaskData, tokenizer: PreTrainedTokenizerBase, decoder: bool
) -> list[tuple[list[int], list[int], int]]:
    """Ids of each row's prompt and of its completion, without special tokens around them, and its end token."""
    ends = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends[tokenizer.eos_token] = tokenizer.eos_token_id
    ends.pop(tokenizer.unk_token, None)  # stands in published texts for a word
    prompts, completions, end_ids = [], [], []
    for example in block:
        text, end = example.completion, tokenizer.eos_token
        if found := [token for token in ends if text.rstrip().endswith(token)]:
            end = max(found, key=len)
            while (bare := text.rstrip()).endswith(end):
                text = bare.removesuffix(end)
        prompts.append(example.prompt)
        completions.append(text)
        end_ids.append(ends[end])
    try:
        if decoder:
            pairs = _joined(prompts, completions, tokenizer)
        else:
            pairs = list(zip(_ids(prompts, tokenizer), _ids(completions, tokenizer), strict=True))
    except Exception:
        for example in block:
            try:
                _ids([example.prompt, example.completion], tokenizer)
            except Exception as error:
                raise ValueError(
                    f"{data.where(example.sample_index)}: the tokenizer of {tokenizer.name_or_path} cannot read this text "
                    f"({type(error).__name__}: {error}); mend the text, or remove the row"
                ) from error
        raise
    for example, (_, ids) in zip(block, pairs, strict=True):
        if not ids:
            raise ValueError(
                f"sample {example.sample_index} (task {example.task}): the completion {example.completion!r} has "
                "no token; give it a text that the tokenizer knows, or remove the row"
            )
    return [(*pair, end) for pair, end in zip(pairs, end_ids, strict=True)]


def _joined(
    prompts: Sequence[str], completions: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], list[int]]]:
    """Ids of each prompt and of the completion behind it, which together decode as the ids of prompt + completion do.

    A completion tokenised apart may begin with a space that the text has not. So its ids are those of the whole text
    behind the prompt's. Where they begin in another way, because a token would reach over the end of the prompt, the
    completion is tokenised behind another text, which ends as the prompt does, or in a line's end, or in a letter:
    the model sees the prompt's own ids, as in generation. If none of them gives the text, the token that reaches over
    belongs to the completion. Only a text that has an unknown token at the end of its prompt is tokenised in two.
    """

    def text(ids: list[int]) -> str:
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    heads = _ids(prompts, tokenizer)
    wholes = _ids([prompt + completion for prompt, completion in zip(prompts, completions, strict=True)], tokenizer)
    pairs: dict[int, tuple[list[int], list[int]]] = {}
    for row, (head, whole) in enumerate(zip(heads, wholes, strict=True)):
        if whole[: len(head)] == head and (not head or head[-1] != tokenizer.unk_token_id):
            pairs[row] = head, whole[len(head) :]
    for last in ("", "\n", "a"):
        rows = [row for row in range(len(heads)) if row not in pairs]
        contexts = [last or prompts[row][-1:] for row in rows]
        joined = [context + completions[row] for row, context in zip(rows, contexts, strict=True)]
        for row, context, behind in zip(rows, _ids(contexts, tokenizer), _ids(joined, tokenizer), strict=True):
            tail = behind[len(context) :]
            if tail and behind[: len(context)] == context and text([*heads[row], *tail]) == text(wholes[row]):
                pairs[row] = heads[row], tail
    for row in range(len(heads)):
        if row not in pairs:
            head, whole = heads[row], wholes[row]
            same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(head, whole, strict=False)))
            tail = whole[same:] if same < len(head) else _ids([completions[row]], tokenizer)[0]
            pairs[row] = head[:same], tail
    return [pairs[row] for row in range(len(heads))]


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


TOKENIZATION = 2
"""Raised whenever `tokenize` gives the same texts other ids."""


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over what decides a row's ids: the fast tokenizers' one description, or the vocabulary of others."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # its first use resets the truncation and padding that are saved with it
    whole = (
        json.loads(backend.to_str()) | {"truncation": None, "padding": None}
        if backend is not None
        else sorted(tokenizer.get_vocab().items())
    )
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps([TOKENIZATION, whole, special], default=str).encode()).hexdigest()


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
        max_tokens_per_batch: Budget of an evaluation or gradient batch: rows x longest row, of an encoder-decoder rows x
            (longest prompt + longest completion).
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

    @property
    def target_tokens(self) -> np.ndarray:
        """Label tokens that each sample's loss is a mean over, (N,); a decoder predicts no row's first token."""
        completions = self.tokens.completions.lengths
        if self.kind != "decoder":
            return completions
        return self.row_lengths - np.maximum(1, 0 if self.loss_on_prompt else self.tokens.prompts.lengths)

    def row_keys(self, indices: np.ndarray) -> np.ndarray:
        """Hash of each row's token ids and labels, (len(indices),) of hex text."""
        keys = []
        for index in indices:
            parts = self.tokens.prompts[index], self.tokens.completions[index]
            digest = hashlib.blake2b(f"{len(parts[0])} {self.loss_on_prompt}".encode(), digest_size=16)
            for ids in parts:
                digest.update(ids.tobytes())
            keys.append(digest.hexdigest())
        return np.array(keys, dtype="<U32")

    def by_length(self, indices: np.ndarray) -> np.ndarray:
        """The sample indices, longest row first (an oversized batch fails at once); ties by index."""
        return indices[np.lexsort((indices, -self.row_lengths[indices]))]

    def budgeted(self, indices: np.ndarray, max_tokens: int | None = None) -> list[np.ndarray]:
        """Cut the rows, by length, into batches of at most `max_tokens` padded tokens (at least one row each); an
        encoder-decoder pads prompts and completions apart."""
        max_tokens = max_tokens or self.max_tokens_per_batch
        ordered = self.by_length(np.asarray(indices))
        padded = (
            [self.row_lengths]
            if self.kind == "decoder"
            else [self.tokens.prompts.lengths, self.tokens.completions.lengths]
        )
        batches, start, widths = [], 0, [0] * len(padded)
        for position, lengths in enumerate(zip(*(part[ordered].tolist() for part in padded), strict=True)):
            widths = list(map(max, widths, lengths))
            if start < position and (position + 1 - start) * sum(widths) > max_tokens:
                batches.append(ordered[start:position])
                start, widths = position, list(lengths)
        return [*batches, ordered[start:]] if len(ordered) else []

    def padded_tokens(self, batches: Iterable[np.ndarray]) -> int:
        """Tokens of these batches of sample indices, padding included."""
        return sum(len(batch) * int(self.row_lengths[batch].max()) for batch in batches)

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
