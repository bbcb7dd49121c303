"""A small base model as an ordinary Hugging Face folder, for trying every stage on a laptop and without a network.

The stage scripts take any model key that `from_pretrained` opens. This script makes such a folder from the user's own
files: a byte-level BPE tokenizer trained on their text, a Llama (decoder) or T5 (encoder-decoder) of any size
with seeded random weights, then pretrained briefly on that text or on answering it (--pretrain_steps 0: not at all).
`make_synthetic.py` builds its base model from the same parts.

    python data/make_base_model.py --data_files data/synthetic/flan.jsonl --output_dir data/base_model
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

from src import config, console
from src.artifacts import MANIFEST, file_fingerprint, whole_folder, write_manifest
from src.data import TaskData, require_file
from src.datamodule import TaskDataModule
from src.instruction import Columns, files_of, load_instruction

SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CHAT_TEMPLATE = (  # a line for each turn, so that data of conversations can be tried too
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
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


def nothing_to_do(args: argparse.Namespace, more: Mapping[str, Any] | None = None) -> bool:
    """Whether the folder of `--output_dir` is there already, or `--dry_run` asked what would be written; says so.

    Args:
        args: Flags of a script with `add_output`.
        more: What else the folder depends on.
    """
    output_dir = Path(args.output_dir)
    if is_made(output_dir, content_arguments(args) | dict(more or {}), args.overwrite):
        print(f"{output_dir} is complete and was made with these arguments: nothing to do")
        return True
    return False


@contextmanager
def made_folder(args: argparse.Namespace, more: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """Yield an empty folder to fill; it becomes that of `--output_dir` in one step, with a manifest, or not at all.

    Arguments as in `nothing_to_do`.
    """
    with whole_folder(Path(args.output_dir)) as folder:
        yield folder
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        versions = {library.__name__: library.__version__ for library in (np, tokenizers, torch, transformers)}
        digests = {path.relative_to(folder).as_posix(): file_fingerprint([path]) for path in files}
        write_manifest(
            folder, {"arguments": content_arguments(args) | dict(more or {}), "versions": versions, "files": digests}
        )


# --- model and tokenizer -------------------------------------------------------------------------------------


def build_model(args: argparse.Namespace, architecture: str, vocab_size: int) -> PreTrainedModel:
    """A `llama` or `t5` of the size that `add_base_model`'s flags ask for, with weights drawn from `--seed`.

    Raises:
        ValueError: the heads do not divide the width into even parts (rotary positions go in pairs).
    """
    if args.hidden_size % (2 * args.num_heads):
        raise ValueError(
            f"--hidden_size {args.hidden_size} with --num_heads {args.num_heads}: expected a multiple of twice the "
            f"heads, for example {2 * args.num_heads * math.ceil(args.hidden_size / (2 * args.num_heads))}"
        )
    ids = {f"{name}_id": position for position, name in enumerate(SPECIAL_TOKENS)}
    del ids["unk_token_id"]  # the tokenizer's alone
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        if architecture == "t5":
            config = T5Config(
                vocab_size=vocab_size,
                d_model=args.hidden_size,
                d_kv=args.hidden_size // args.num_heads,
                d_ff=2 * args.hidden_size,
                num_layers=args.num_layers,
                num_heads=args.num_heads,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,  # so small a model has nothing to spare
                decoder_start_token_id=ids["pad_token_id"],
                **ids,
            )
            return T5ForConditionalGeneration(config)
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=args.hidden_size,
            intermediate_size=2 * args.hidden_size,
            num_hidden_layers=args.num_layers,
            num_attention_heads=args.num_heads,
            max_position_embeddings=CONTEXT_LENGTH,
            tie_word_embeddings=True,
            **ids,
        )
        return LlamaForCausalLM(config)


def wrap_tokenizer(backend: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer that `AutoTokenizer` opens. `backend` holds SPECIAL_TOKENS as its first ids, in that order."""
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=CONTEXT_LENGTH, chat_template=CHAT_TEMPLATE, **SPECIAL_TOKENS
    )


def pretrain(
    model: PreTrainedModel,
    batches: Iterator[dict[str, torch.Tensor]],
    num_steps: int,
    learning_rate: float,
) -> None:
    """Train all weights in place: AdamW, 5 % warm-up, then a cosine down to zero.

    Args:
        batches: At least `num_steps`; each has `input_ids` (B, T) and `labels` (B, T), the decoder's T for a T5, with
            -100 where no loss is wanted.
        num_steps: Optimizer steps; 0 leaves the weights as they are.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, num_steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / max(1, num_steps)))
    )
    model.train()
    progress = console.progress(range(num_steps), desc="pretraining the base model", unit="step")
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


def pretrain_and_save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    batches: Iterator[dict[str, torch.Tensor]],
    args: argparse.Namespace,
    folder: Path,
) -> None:
    """Pretrain as the flags of `add_base_model` say, and write the Hugging Face folder."""
    pretrain(model, batches, args.pretrain_steps, args.pretrain_lr)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def training_texts(data: TaskData) -> list[tuple[str, str]]:
    """(prompt, completion) of every training row; rows that later stages hold out stay unseen."""
    return [(data.examples[i].prompt, data.examples[i].completion) for i in data.indices("train")]


def train_tokenizer(texts: Iterable[tuple[str, str]], vocab_size: int, *, append_eos: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every text can be encoded, and decoding gives it back.

    Args:
        texts: What the merges are learned from.
        vocab_size: Tokens, at most; little text has fewer merges to offer.
        append_eos: End every encoded text with </s>, as T5 tokenizers do; causal models get theirs from the pipeline.

    Raises:
        ValueError: `vocab_size` has no room for the 256 bytes and the special tokens.
    """
    alphabet, special_tokens = sorted(pre_tokenizers.ByteLevel.alphabet()), list(SPECIAL_TOKENS.values())
    if vocab_size < len(alphabet) + len(special_tokens):
        raise ValueError(
            f"--vocab_size {vocab_size}: the {len(alphabet)} bytes and {len(special_tokens)} special tokens alone need "
            f"{len(alphabet) + len(special_tokens)}"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator((part for text in texts for part in text), trainer)
    if append_eos:
        eos = SPECIAL_TOKENS["eos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"$A {eos}", pair=f"$A {eos} $B {eos}", special_tokens=[(eos, backend.token_to_id(eos))]
        )
    return wrap_tokenizer(backend)


def text_windows(
    texts: Iterable[tuple[str, str]],
    tokenizer: PreTrainedTokenizerFast,
    architecture: str,
    *,
    window: int,
    batch_size: int,
    seed: int,
) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches of random windows (B, window) of all texts, written one after another with </s> between them.

    A Llama predicts every token of its window; a T5 reads the first half and writes the second.

    Raises:
        ValueError: a window of one token has nothing to predict.
    """
    if window < 2:
        raise ValueError(f"--window {window}: expected at least 2 tokens, as the first only predicts the next")
    rows = ([*tokenizer.encode("".join(text), add_special_tokens=False), tokenizer.eos_token_id] for text in texts)
    stream = torch.tensor([token for row in rows for token in row])
    stream = stream.repeat(math.ceil(window / len(stream)))  # little text is repeated until a window fits
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, len(stream) - window, size=batch_size, endpoint=True)
        windows = torch.stack([stream[start : start + window] for start in starts])  # (B, T)
        read, written = windows.chunk(2, dim=1) if architecture == "t5" else (windows, windows)
        yield {"input_ids": read, "labels": written.contiguous()}  # T5's loss flattens them by `view`


def completion_batches(
    data: TaskData, tokenizer: PreTrainedTokenizerFast, architecture: str, *, batch_size: int, seed: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches of random training rows, prompt read and completion written, as fine-tuning batches them."""
    kind = "encoder_decoder" if architecture == "t5" else "decoder"
    rows, rng = data.indices("train"), np.random.default_rng(seed)
    datamodule = TaskDataModule(data, tokenizer, kind, max_length=CONTEXT_LENGTH)
    while True:
        batch = datamodule.collate(rng.choice(rows, size=batch_size))
        del batch["sample_index"]
        yield batch


# --- command line --------------------------------------------------------------------------------------------


def add_output(parser: argparse.ArgumentParser, output_dir: str) -> None:
    """Where to write, from which seed, and whether an older folder may be replaced."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output_dir", default=output_dir, metavar="FOLDER", help="folder to write (default: %(default)s)"
    )
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of everything random: rows, weights, pretraining (default: %(default)s)",
    )
    group.add_argument("--overwrite", action="store_true", help="replace an older folder made by this script (default: "
                       "refuse to)")  # fmt: skip


def add_base_model(
    parser: argparse.ArgumentParser,
    *,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    pretrain_steps: int,
    batch_size: int,
    lr: float,
) -> None:
    """How large the model is and how long it is pretrained; the defaults are the script's."""
    group = parser.add_argument_group("base model")
    for flag, kind, default, meaning in (
        ("--hidden_size", config.COUNT, hidden_size, "width, a multiple of twice --num_heads"),
        ("--num_layers", config.COUNT, num_layers, "layers; T5: of the encoder, and as many of the decoder"),
        ("--num_heads", config.COUNT, num_heads, "attention heads"),
        (
            "--pretrain_steps",
            config.number(int, 0),
            pretrain_steps,
            "optimizer steps of pretraining; 0 keeps random weights",
        ),
        ("--pretrain_batch_size", config.COUNT, batch_size, "rows per step"),
        ("--pretrain_lr", config.POSITIVE, lr, "highest learning rate"),
    ):
        group.add_argument(flag, type=kind, default=default, help=f"{meaning} (default: %(default)s)")


def content_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that decide what the folder holds."""
    return {name: value for name, value in vars(args).items() if name not in ("output_dir", "overwrite", "dry_run")}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The script's flags."""
    parser = console.Parser(__doc__)
    add_output(parser, "data/base_model")
    group = parser.add_argument_group("text")
    group.add_argument("--data_files", nargs="+", required=True, metavar="SOURCE", help="instruction data to learn the "
                       "text of, as custom_train_alpaca.py takes them (required)")  # fmt: skip
    for name, meaning in (("prompt", "prompts"), ("completion", "completions")):
        group.add_argument(
            f"--{name}_column", metavar="NAME", help=f"column of the {meaning} (default: the usual names)"
        )
    group.add_argument("--vocab_size", type=config.COUNT, default=2048, help="tokens, at most (default: %(default)s)")
    group.add_argument("--window", type=config.COUNT, default=128, help="length of a row in pretraining, in tokens "
                       "(default: %(default)s)")  # fmt: skip
    group.add_argument("--pretrain_on", choices=("text", "completions"), default="text", help="windows of the running text, "
                       "every token predicted; or whole rows, where only completions count (default: %(default)s)")  # fmt: skip
    add_base_model(parser, hidden_size=128, num_layers=4, num_heads=4, pretrain_steps=500, batch_size=32, lr=2e-3)
    architecture = parser.add_argument_group("architecture")
    architecture.add_argument("--architecture", choices=("llama", "t5"), default="llama", help="decoder or "
                              "encoder-decoder (default: %(default)s)")  # fmt: skip
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Tokenizer, model, pretraining, folder."""
    # another file under the same name is another model
    files = [file for source in args.data_files for file in files_of(source)]
    more = {"data_sha256": file_fingerprint(require_file(Path(file)) for file in files)}
    if nothing_to_do(args, more):
        return
    data = load_instruction(
        files,
        columns=Columns(prompt=args.prompt_column, completion=args.completion_column),
        load_tokenizer=lambda: train_tokenizer([], 0x200, append_eos=False),  # bytes; all that is asked is the template
    )
    texts = training_texts(data)
    tokenizer = train_tokenizer(texts, args.vocab_size, append_eos=args.architecture == "t5")
    model = build_model(args, args.architecture, len(tokenizer))
    if args.pretrain_on == "text":
        batches = text_windows(
            texts, tokenizer, args.architecture, window=args.window, batch_size=args.pretrain_batch_size, seed=args.seed
        )
    else:
        batches = completion_batches(
            data, tokenizer, args.architecture, batch_size=args.pretrain_batch_size, seed=args.seed
        )
    with made_folder(args, more) as folder:
        pretrain_and_save(model, tokenizer, batches, args, folder)
    print(
        f"Wrote {args.output_dir}: {args.architecture}, {model.num_parameters():,} parameters, {len(tokenizer):,} tokens. "
        f"Next: stage 1, for example python custom_train_alpaca.py --data_files {' '.join(args.data_files)} --model_key "
        f"{args.output_dir} --train_lora"
    )


if __name__ == "__main__":
    console.run_stage(main, parse_args())
