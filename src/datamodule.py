"""Examples become token ids once, and token ids become batches, padded to their longest row.

N samples, B rows of a batch, T tokens of its longest row.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, Sampler, WeightedRandomSampler
from transformers import PreTrainedTokenizerBase

from src.artifacts import whole_folder, write_json
from src.console import progress, say_once
from src.data import TaskData

IGNORED = -100  # label of a position that is not part of the loss, as torch and transformers have it
TOKENIZATION = 2  # raised whenever `tokenize` gives the same texts other ids
BLOCK = 4096  # rows tokenised at once: their ids are lists of Python numbers until they are written

Batch = dict[str, torch.Tensor]
Indices = Sequence[int] | np.ndarray
Ids = list[int]


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


def tokenize(
    data: TaskData, tokenizer: PreTrainedTokenizerBase, kind: str, folder: Path, *, max_length: int, max_target_length: int
) -> None:  # fmt: skip
    """Tokenise every example into the files that `open_tokens` reads.

    A decoder's row is one text: its ids decode to prompt + completion (`_joined`); an encoder-decoder's is two. Special
    tokens that the tokenizer puts before a text stand there once, also where the text brings them. A row has one end
    token: the tokenizer's, or another special token that the completion ends with, such as a chat template's end of
    turn; white space and repetitions behind it are dropped.

    A decoder's row longer than `max_length` loses the prompt's first tokens, except the beginning-of-text token, and then
    the completion's last. An encoder-decoder's prompt is cut at `max_length`, before its last special tokens, its
    completion at `max_target_length`. A notice counts the cut rows. ValueError: the tokenizer has no end token or cannot
    read a text, a completion has no token, or `max_length` leaves no room for one.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {tokenizer.name_or_path} has no end-of-text token; add one to it")
    decoder = kind == "decoder"
    text = data.examples[0].completion
    [inner], whole = _ids([text], tokenizer), tokenizer(text, verbose=False)["input_ids"]
    at = next((start for start in range(len(whole)) if whole[start : start + len(inner)] == inner), 0)
    before, behind = whole[:at], whole[at + len(inner) :]  # the special tokens around a text
    if decoder and max_length < (least := max(2, len(before) + 1)):  # no token is predicted at the first position
        raise ValueError(f"--max_length {max_length} leaves no room for a completion; pass at least {least}")
    ends = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends[tokenizer.eos_token] = tokenizer.eos_token_id
    ends.pop(tokenizer.unk_token, None)  # stands in published texts for a word
    ending = re.compile(rf"({'|'.join(map(re.escape, ends))})(\s*\1)*\s*\Z")
    lengths, cut = [(0, 0)], np.zeros(2, int)
    rows = iter(progress(data.examples, desc="tokenising", total=len(data), unit="row"))
    with open(folder / "prompt.bin", "wb") as prompt_file, open(folder / "completion.bin", "wb") as completion_file:
        while block := list(itertools.islice(rows, BLOCK)):
            texts = [ending.sub("", example.completion) for example in block]
            prompts = _ids([example.prompt for example in block], tokenizer)
            wholes = [e.prompt + text for e, text in zip(block, texts, strict=True)] if decoder else texts
            completions = _ids(wholes, tokenizer)
            for example, text, prompt, completion in zip(block, texts, prompts, completions, strict=True):
                if decoder:
                    prompt, completion = _joined(example.prompt, text, prompt, completion, tokenizer)
                if not completion:
                    raise ValueError(
                        f"sample {example.sample_index} (task {example.task}): the completion {example.completion!r} "
                        "has no token; give it a text that the tokenizer knows, or remove the row"
                    )
                end = ends[match[1]] if (match := ending.search(example.completion)) else tokenizer.eos_token_id
                if prompt[: len(before)] != before:
                    prompt = before + prompt
                if decoder:
                    completion = [*completion, end]
                    begin = len(before) or int(prompt[:1] == [tokenizer.bos_token_id])
                    kept = completion[: max_length - begin]
                    start = len(prompt) - (max_length - begin - len(kept))  # of the prompt's part that has room
                    fitting = prompt[:begin] + prompt[max(begin, start) :]
                else:
                    completion = before + completion + (behind if end in behind else [end])
                    kept = completion[:max_target_length]
                    fitting = (prompt[: max(0, max_length - len(behind))] + behind)[:max_length]
                    prompt = prompt + behind
                cut += (len(fitting) < len(prompt), len(kept) < len(completion))
                lengths.append((len(fitting), len(kept)))
                prompt_file.write(np.array(fitting, np.int32).tobytes())
                completion_file.write(np.array(kept, np.int32).tobytes())
    np.save(folder / "offsets.npy", np.cumsum(lengths, axis=0))
    limits = f"--max_length {max_length}" + ("" if decoder else f" and --max_target_length {max_target_length}")
    notice = f"{cut[0]:,} prompts and {cut[1]:,} completions of {len(data):,} rows were cut to fit {limits}"
    write_json(folder / "notices.json", [notice] if cut.any() else [])


def _ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Ids]:
    """Ids of each text, without special tokens around it."""
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if len(texts) else []


def token_counts(data: TaskData, rows: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> dict[int, int]:
    """Count the tokens of rows' prompts and completions, uncut, without special tokens: row -> number."""
    counts: dict[int, int] = {}
    for start in progress(range(0, len(rows), BLOCK), desc="counting tokens", unit="block"):
        block = [data.examples[row] for row in rows[start : start + BLOCK]]
        ids = _ids([example.prompt + example.completion for example in block], tokenizer)
        counts |= {example.sample_index: len(of_row) for example, of_row in zip(block, ids, strict=True)}
    return counts


def _joined(prompt: str, completion: str, head: Ids, whole: Ids, tokenizer: PreTrainedTokenizerBase) -> tuple[Ids, Ids]:
    """Ids of a prompt and of the completion behind it, which together decode as `whole`, the ids of both texts, does.

    A completion tokenised alone may begin with a space that the text does not have, so its ids are those of the whole
    behind the prompt's, `head`. Where a token of the whole reaches over the end of the prompt, the completion is
    tokenised behind another text, which ends as the prompt does, or is a line end, or a letter: the model sees the
    prompt's own ids, as in generation. If none of them gives the text, the token that reaches over belongs to the
    completion. Only a text with an unknown token at the end of its prompt is tokenised in two.
    """
    if whole[: len(head)] == head and head[-1:] != [tokenizer.unk_token_id]:
        return head, whole[len(head) :]
    for context in (prompt[-1:], "\n", "a"):
        first, joined = _ids([context, context + completion], tokenizer)
        tail = joined[len(first) :]
        texts = (tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (head + tail, whole))
        if tail and joined[: len(first)] == first and len(set(texts)) == 1:
            return head, tail
    differing = (at for at, (ours, theirs) in enumerate(zip(head, whole, strict=False)) if ours != theirs)
    same = next(differing, min(len(head), len(whole)))
    return head[:same], whole[same:] if same < len(head) else _ids([completion], tokenizer)[0]


def open_tokens(folder: Path) -> TokenizedData:
    """What `tokenize` wrote, memory-mapped; raises ValueError where a file has another size than it should have."""

    def ragged(name: str, offsets: np.ndarray) -> Ragged:
        size = (folder / name).stat().st_size
        if size != 4 * offsets[-1]:
            raise ValueError(f"{folder / name} has {size:,} bytes, expected {4 * offsets[-1]:,}")
        return Ragged(np.memmap(folder / name, np.int32, "r") if size else np.zeros(0, np.int32), offsets)

    of_prompts, of_completions = np.load(folder / "offsets.npy").T
    notices = json.loads((folder / "notices.json").read_text(encoding="utf-8"))
    return TokenizedData(ragged("prompt.bin", of_prompts), ragged("completion.bin", of_completions), tuple(notices))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over what decides a row's ids: the fast tokenizers' one description, or the vocabulary of others."""
    backend, whole = getattr(tokenizer, "backend_tokenizer", None), sorted(tokenizer.get_vocab().items())
    if backend is not None:  # its first use resets the truncation and padding that are saved with it
        whole = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps([TOKENIZATION, whole, special], default=str).encode()).hexdigest()


def tokenize_once(
    cache: Path | None, data: TaskData, tokenizer: PreTrainedTokenizerBase, kind: str, **lengths: int
) -> TokenizedData:
    """What `tokenize` gives, from a folder below `cache` that earlier calls with the same arguments share; without a
    cache, or with a tokenizer in Python, which has no fingerprint, from files that are gone with the process."""
    if cache is None or getattr(tokenizer, "backend_tokenizer", None) is None:
        with tempfile.TemporaryDirectory() as temporary:  # memory-mapped files may be removed
            tokenize(data, tokenizer, kind, Path(temporary), **lengths)
            return open_tokens(Path(temporary))
    request = json.dumps([data.fingerprint, tokenizer_fingerprint(tokenizer), kind, sorted(lengths.items())])
    folder = cache / hashlib.sha256(request.encode()).hexdigest()[:32]
    if folder.is_dir():
        try:
            return open_tokens(folder)
        except (FileNotFoundError, EOFError, ValueError) as error:
            say_once(f"note: {folder} is damaged ({error}); it is made again.")
    with whole_folder(folder) as unfinished:
        tokenize(data, tokenizer, kind, unfinished, **lengths)
    return open_tokens(folder)


def _pad(rows: Sequence[np.ndarray], value: int, left: bool = False) -> torch.Tensor:
    """Stack rows of ids to (B, T), filled with `value`."""
    tensors = [torch.from_numpy(row.astype(np.int64)) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side="left" if left else "right")


class _Batches(BatchSampler):
    """Batches of a sampler's rows: at first those from `epoch` and batch `start` on, where a training goes on there."""

    def __init__(self, sampler: Sampler[int], batch_size: int, epoch: int, start: int) -> None:
        super().__init__(sampler, batch_size, drop_last=False)
        self.start = start
        for _ in range(epoch):  # each draws the numbers after the last one's; a whole iteration would draw one too many
            list(itertools.islice(super().__iter__(), len(self)))

    def __iter__(self) -> Iterator[list[int]]:
        start, self.start = self.start, 0
        return itertools.islice(super().__iter__(), start, None)


class TaskDataModule:
    """Batches of a `TaskData` for training, evaluation, generation and gradients.

    Args:
        kind: "decoder" or "encoder_decoder".
        batch_size: Rows of a training batch, per process; `inference_batch_size` of a generation batch.
        max_length: Longest row (decoder) or prompt (encoder-decoder) in tokens.
        max_target_length: Longest completion of an encoder-decoder in tokens.
        max_tokens_per_batch: Most padded tokens of an evaluation or gradient batch, prompts and completions together.
        token_cache: Folder of `tokenize_once`.
        loss_on_prompt: Count the prompt in a decoder's loss (the published behaviour).
    """

    def __init__(
        self, data: TaskData, tokenizer: PreTrainedTokenizerBase, kind: str, *, batch_size: int = 8, max_length: int = 512,
        inference_batch_size: int = 32, max_target_length: int = 512, max_tokens_per_batch: int = 4096,
        token_cache: Path | None = None, loss_on_prompt: bool = False,
    ) -> None:  # fmt: skip
        self.data, self.kind, self.decoder = data, kind, kind == "decoder"
        self.batch_size, self.inference_batch_size = batch_size, inference_batch_size
        self.max_tokens_per_batch, self.loss_on_prompt = max_tokens_per_batch, loss_on_prompt
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        lengths = {"max_length": max_length, "max_target_length": max_target_length}
        self.tokens = tokenize_once(token_cache, data, tokenizer, kind, **lengths)
        self.row_lengths = self.tokens.prompts.lengths + self.tokens.completions.lengths  # (N,)
        self.select_training_rows(None, 0)

    def select_training_rows(self, rows: np.ndarray | None, seed: int, shares: np.ndarray | None = None) -> None:
        """Train on these sample indices (None: every training row) from now on, in the order that `seed` draws.

        `shares` (rows,), which sum to 1, say how often each of them is drawn, with replacement. An epoch then has as
        many rows as the shares are worth: 1 over the sum of their squares, all of them where shares are equal.
        """
        self.train_indices = self.data.indices("train") if rows is None else np.asarray(rows)
        self.seed, self.shares = seed, shares

    def collate(self, indices: Indices, pad_left: bool = False) -> Batch:
        """Rows of the given sample indices as one batch: `sample_index` (B,), `input_ids` (B, T), `labels` (B, T or
        target length; `IGNORED` without a loss), and `attention_mask` (B, T) unless the causal mask hides padding."""
        prompts, completions = ([part[i] for i in indices] for part in (self.tokens.prompts, self.tokens.completions))
        rows, labels = prompts, completions
        masked = len({len(prompt) for prompt in prompts}) > 1
        if self.decoder:
            hidden = prompts if self.loss_on_prompt else [np.full_like(prompt, IGNORED) for prompt in prompts]
            rows, labels = (list(map(np.append, part, completions)) for part in (prompts, hidden))
            masked = pad_left
        batch = {
            "sample_index": torch.as_tensor(np.asarray(indices, dtype=np.int64)),
            "input_ids": _pad(rows, self.pad_id, pad_left),
            "labels": _pad(labels, IGNORED, pad_left and self.decoder),
        }
        return batch | ({"attention_mask": _pad(list(map(np.ones_like, rows)), 0, pad_left)} if masked else {})

    def collate_prompts(self, indices: Indices) -> Batch:
        """Prompts only, padded on the side that generation needs: `sample_index`, `input_ids`, `attention_mask`."""
        prompts = [self.tokens.prompts[i] for i in indices]
        return {
            "sample_index": torch.as_tensor(np.asarray(indices, dtype=np.int64)),
            "input_ids": _pad(prompts, self.pad_id, self.decoder),
            "attention_mask": _pad(list(map(np.ones_like, prompts)), 0, self.decoder),
        }

    @cached_property
    def target_tokens(self) -> np.ndarray:
        """Label tokens that each sample's loss is a mean over, (N,); a decoder predicts no row's first token."""
        if not self.decoder:
            return self.tokens.completions.lengths
        return self.row_lengths - np.maximum(1, 0 if self.loss_on_prompt else self.tokens.prompts.lengths)

    def row_keys(self, indices: Indices) -> np.ndarray:
        """A hash of each row's prompt ids, completion ids and `loss_on_prompt`, (len(indices),) hexadecimal bytes."""

        def key(prompt: np.ndarray, completion: np.ndarray) -> bytes:
            head = np.array([len(prompt), self.loss_on_prompt], np.int64).tobytes()
            return hashlib.blake2b(head + prompt.tobytes() + completion.tobytes(), digest_size=16).hexdigest().encode()

        return np.array([key(self.tokens.prompts[i], self.tokens.completions[i]) for i in indices], dtype="S32")

    def by_length(self, indices: np.ndarray) -> np.ndarray:
        """The sample indices, longest row first (an oversized batch fails at once); ties by index."""
        return indices[np.lexsort((indices, -self.row_lengths[indices]))]

    def budgeted(self, indices: np.ndarray, max_tokens: int | None = None) -> list[np.ndarray]:
        """Cut the rows, by length, into batches of at most `max_tokens` padded tokens (at least one row each)."""
        max_tokens = max_tokens or self.max_tokens_per_batch
        ordered = self.by_length(np.asarray(indices))
        padded = [self.row_lengths] if self.decoder else [self.tokens.prompts.lengths, self.tokens.completions.lengths]
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

    def training_batches(self, rank: int = 0, world: int = 1, epoch: int = 0, start: int = 0) -> DataLoader:
        """Shuffled training rows, from batch `start` of an epoch on; of `world` processes each sees its own share."""
        rows: Any = self.train_indices
        sampler: Sampler[int]
        if self.shares is not None:
            count = max(1, round(1 / float(np.square(self.shares).sum()) / world))
            generator = torch.Generator().manual_seed(self.seed * world + rank)
            sampler = WeightedRandomSampler(self.shares.tolist(), count, replacement=True, generator=generator)
        elif world > 1:
            sampler = DistributedSampler(rows, world, rank, shuffle=True, seed=self.seed)
        else:
            sampler = RandomSampler(rows, generator=torch.Generator().manual_seed(self.seed))
        batches = _Batches(sampler, self.batch_size, epoch, start)
        return DataLoader(rows, batch_sampler=batches, collate_fn=self.collate)

    def held_out_batches(self, split: str, rank: int = 0, world: int = 1) -> list[DataLoader]:
        """Rows of a split by length for the losses, and prompts for generation where completions are judged. Under
        several processes each takes every world-size-th batch; one that runs out repeats its last, so that all make the
        same number of steps."""
        indices = self.data.indices(split)
        parts: list[tuple[list[np.ndarray], Callable[..., Batch]]] = [(self.budgeted(indices), self.collate)]
        if self.data.judge is not None:
            ordered, size = self.by_length(indices), self.inference_batch_size
            parts.append(([ordered[i : i + size] for i in range(0, len(ordered), size)], self.collate_prompts))
        loaders = []
        for batches, collate in parts:
            own = batches[rank::world]
            own += (own or batches)[-1:] * (-(-len(batches) // world) - len(own))
            loaders.append(DataLoader(cast(Any, own), batch_size=None, collate_fn=collate))
        return loaders
