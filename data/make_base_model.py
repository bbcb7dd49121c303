"""A small base model as an ordinary Hugging Face folder, for trying every stage on a laptop and without a network.

The stage scripts take any model key that `from_pretrained` opens. This script makes such a folder from the user's own
jsonl files: a byte-level BPE tokenizer trained on their text, a Llama (decoder) or T5 (encoder-decoder) of any size
with seeded random weights, and, if asked, a short pretraining on that text. `make_synthetic.py` builds its base model
from the same parts.

    python data/make_base_model.py --data_files data/synthetic/flan.jsonl --output_dir data/base_model

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from src import cli
from src.paths import MANIFEST, file_fingerprint, whole_folder, write_manifest

SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CONTEXT_LENGTH = 2048  # the longest input the models take; memory is used for the tokens really given


# --- folders: complete, or absent ----------------------------------------------------------------------------


def is_made(output_dir: Path, arguments: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether `output_dir` is already complete and was made with these very arguments.

    A folder that is absent, empty, or to be replaced under `overwrite` counts as not made.

    Raises:
        FileExistsError: the folder holds something else, which is never replaced without being asked.
    """
    if not output_dir.exists() or not any(output_dir.iterdir()):
        return False
    if not (output_dir / MANIFEST).is_file():
        raise FileExistsError(
            f"{output_dir} is not empty and has no {MANIFEST}, so it was not made here; choose another --output_dir"
        )
    manifest = json.loads((output_dir / MANIFEST).read_text(encoding="utf-8"))
    found, asked = manifest["arguments"], json.loads(json.dumps(arguments))
    faults = [f"{name} is {found.get(name)!r}, not {asked[name]!r}" for name in asked if found.get(name) != asked[name]]
    faults = faults or [f"{name} is missing or changed" for name, digest in manifest["files"].items()
                        if not (output_dir / name).is_file() or file_fingerprint([output_dir / name]) != digest]  # fmt: skip
    if faults and not overwrite:
        raise FileExistsError(
            f"{output_dir} is another one ({'; '.join(faults)}); choose another --output_dir, or replace it with --overwrite"
        )
    return not faults


@contextmanager
def made_folder(output_dir: Path, arguments: Mapping[str, Any]) -> Iterator[Path]:
    """Yield an empty folder to fill; it becomes `output_dir` in one step, with a manifest, or not at all."""
    with whole_folder(output_dir) as folder:
        yield folder
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        versions = {library.__name__: library.__version__ for library in (np, tokenizers, torch, transformers)}
        digests = {path.relative_to(folder).as_posix(): file_fingerprint([path]) for path in files}
        write_manifest(folder, {"arguments": dict(arguments), "versions": versions, "files": digests})


# --- model and tokenizer -------------------------------------------------------------------------------------


def build_model(
    architecture: str, vocab_size: int, hidden_size: int, num_layers: int, num_heads: int, seed: int
) -> PreTrainedModel:
    """A randomly initialised `llama` or `t5`; the same seed gives the same weights.

    Raises:
        ValueError: the heads do not divide the hidden size into even parts (rotary positions need pairs).
    """
    if hidden_size % (2 * num_heads):
        raise ValueError(
            f"--hidden_size {hidden_size} with --num_heads {num_heads}: the hidden size must be a multiple of twice "
            f"the number of heads; {2 * num_heads * max(1, hidden_size // (2 * num_heads))} would do"
        )
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # the order of SPECIAL_TOKENS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if architecture == "t5":
            return T5ForConditionalGeneration(T5Config(
                vocab_size=vocab_size, d_model=hidden_size, d_kv=hidden_size // num_heads, d_ff=2 * hidden_size,
                num_layers=num_layers, num_heads=num_heads, feed_forward_proj="gated-gelu",
                decoder_start_token_id=ids["pad_token_id"], **ids,
            ))
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=2 * hidden_size,
            num_hidden_layers=num_layers, num_attention_heads=num_heads, num_key_value_heads=num_heads,
            max_position_embeddings=CONTEXT_LENGTH, tie_word_embeddings=True, **ids,
        ))


def wrap_tokenizer(backend: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer that `AutoTokenizer` opens. `backend` holds SPECIAL_TOKENS as its first ids, in that order."""
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=CONTEXT_LENGTH, **SPECIAL_TOKENS)


def pretrain(
    model: PreTrainedModel, batches: Iterator[dict[str, torch.Tensor]], num_steps: int, learning_rate: float
) -> None:
    """Train all weights in place: AdamW, 5 % warm-up, then a cosine down to zero.

    Args:
        batches: endless; each has `input_ids` (B, T) and `labels` (B, T or the decoder's T), with -100 where no loss
            is wanted, and `attention_mask` (B, T) where rows are padded.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, num_steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / num_steps))
    )
    model.train()
    progress = cli.progress(range(num_steps), desc="pretraining the base model", unit="step")
    for _ in progress:
        loss = model(**next(batches)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()


# --- text ----------------------------------------------------------------------------------------------------


def read_texts(data_files: list[str]) -> list[tuple[str, str]]:
    """(inputs, targets) of every row of the jsonl files, in file order.

    Raises:
        FileNotFoundError: a file is absent.
        ValueError: a line is no JSON object with the strings `inputs` and `targets`, or there is no line at all.
    """
    texts = []
    for path in map(Path, data_files):
        if not path.is_file():
            raise FileNotFoundError(f"--data_files: {path} does not exist")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                row = json.loads(line)
                texts.append((row["inputs"] + "", row["targets"] + ""))
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}: expected a JSON object with the strings 'inputs' and 'targets', "
                    f"found {line[:60]!r} ({type(error).__name__}: {error})"
                ) from error
    if not texts:
        raise ValueError(f"--data_files: no rows in {', '.join(data_files)}; the tokenizer needs text to train on")
    return texts


def train_tokenizer(texts: list[tuple[str, str]], vocab_size: int, append_eos: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be encoded, and decoding gives it back.

    Args:
        append_eos: end every encoded text with </s>, as T5 tokenizers do; causal models get theirs from the pipeline.

    Raises:
        ValueError: `vocab_size` has no room for the 256 bytes and the special tokens.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"--vocab_size {vocab_size}: the bytes and special tokens alone need {smallest}")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        (part for text in texts for part in text),
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS.values()), show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )
    if append_eos:
        eos = SPECIAL_TOKENS["eos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"$A {eos}", pair=f"$A {eos} $B {eos}", special_tokens=[(eos, backend.token_to_id(eos))]
        )
    return wrap_tokenizer(backend)


def text_blocks(
    texts: list[tuple[str, str]], tokenizer: PreTrainedTokenizerFast, architecture: str,
    block_size: int, batch_size: int, seed: int,
) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches of random windows (B, block_size) of the rows' text, written one after another with </s> between.

    A Llama predicts every token of its window; a T5 reads the first half and writes the second.
    """
    tokens: list[int] = []
    for inputs, targets in texts:
        tokens += tokenizer.encode(f"{inputs}\n{targets}", add_special_tokens=False) + [tokenizer.eos_token_id]
    tokens *= math.ceil(block_size / len(tokens))  # little text: repeat it until a window fits
    stream = torch.tensor(tokens)
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, len(stream) - block_size + 1, size=batch_size)
        windows = torch.stack([stream[start : start + block_size] for start in starts])  # (B, T)
        if architecture == "t5":
            read, written = windows.chunk(2, dim=1)
            yield {"input_ids": read, "labels": written}
        else:
            yield {"input_ids": windows, "labels": windows}


# --- command line --------------------------------------------------------------------------------------------


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that `make_synthetic.py` shares; it sets defaults of its own."""
    model = parser.add_argument_group("model")
    model.add_argument("--hidden_size", type=int, default=128, help="width; a multiple of twice --num_heads")
    model.add_argument("--num_layers", type=int, default=4, help="layers (T5: of the encoder and of the decoder)")
    model.add_argument("--num_heads", type=int, default=4, help="attention heads")
    training = parser.add_argument_group("pretraining")
    training.add_argument("--pretrain_steps", type=int, default=500, help="optimizer steps; 0 keeps the random weights")
    training.add_argument("--pretrain_batch_size", type=int, default=32, help="rows per step")
    training.add_argument("--pretrain_lr", type=float, default=2e-3, help="peak learning rate")


def add_output_arguments(parser: argparse.ArgumentParser, output_dir: str) -> None:
    """Where to write, from which seed, and whether an older folder may be replaced."""
    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", default=output_dir, help="folder to write")
    output.add_argument("--seed", type=int, default=0, help="decides every row and every initial weight")
    output.add_argument("--overwrite", action="store_true", help="replace an older folder this script has made")


def what_to_make(args: argparse.Namespace) -> dict[str, object]:
    """The arguments that decide the content of the folder: the ones a manifest is compared by."""
    return {name: value for name, value in vars(args).items() if name not in ("output_dir", "overwrite")}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_output_arguments(parser, "data/base_model")
    text = parser.add_argument_group("text")
    text.add_argument("--data_files", nargs="+", required=True, help="jsonl files with `inputs` and `targets`")
    text.add_argument("--vocab_size", type=int, default=2048, help="tokens of the BPE vocabulary, at most")
    text.add_argument("--block_size", type=int, default=128, help="tokens per row in pretraining")
    add_model_arguments(parser)
    parser.add_argument("--architecture", choices=("llama", "t5"), default="llama", help="decoder or encoder-decoder")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    output_dir = Path(args.output_dir)
    texts = read_texts(args.data_files)
    # The text itself is one of the arguments: a changed file under the same name is another model.
    arguments = what_to_make(args) | {"text_sha256": hashlib.sha256(json.dumps(texts).encode()).hexdigest()}
    if is_made(output_dir, arguments, args.overwrite):
        print(f"{output_dir} is complete and was made with the same arguments: nothing to do")
        return

    tokenizer = train_tokenizer(texts, args.vocab_size, append_eos=args.architecture == "t5")
    model = build_model(
        args.architecture, len(tokenizer), args.hidden_size, args.num_layers, args.num_heads, args.seed
    )
    with whole_folder(output_dir, arguments) as folder:
        if args.pretrain_steps:
            batches = text_blocks(
                texts, tokenizer, args.architecture, args.block_size, args.pretrain_batch_size, args.seed
            )
            pretrain(model, batches, args.pretrain_steps, args.pretrain_lr)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(
        f"Wrote {output_dir}: {args.architecture}, {model.num_parameters():,} parameters, {len(tokenizer):,} tokens; "
        f"use it with --model_key {output_dir}"
    )


if __name__ == "__main__":
    main(parse_args())
