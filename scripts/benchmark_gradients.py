"""How long projected per-sample gradients take and how much memory, as multiples of a training step.

The floor is one plain training step (forward and backward of the LoRA model through transformers' own loss, no
optimizer) on the same samples in the same batches: by length, within a token budget, padded to the longest. Our own
step is that of this project's trainer, whose output layer sees the target tokens alone.
The steps and the engine are timed in turn, several times, in one process, and figures are medians; the loops and the
whole stage are timed once. Memory is the peak above the loaded model, each way in a process of its own.

    python scripts/benchmark_gradients.py --model llama --dim 100
    python scripts/benchmark_gradients.py --model t5 --dim 1024 --json
    python scripts/benchmark_gradients.py --model llama --dim 400 --device cuda    # TinyLlama shape, bf16
    python scripts/benchmark_gradients.py --model data/smollm2 --dim 4000 --samples 12 --quick --kinds sketch
    python scripts/benchmark_gradients.py --count_kernels           # what a GPU would be given and have to be waited for
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import multiprocessing
import os
import random
import re
import resource
import statistics
import tempfile
import threading
import time
import unittest.mock
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from src import config, console, projection
from src.datamodule import TaskDataModule
from src.gradients import GradientCollector, collect_gradients
from src.instruction import load_instruction
from src.models import LanguageModel, LoraShape, add_adapter, load_model, token_losses
from src.projection import Projection, make_projection
from src.store import StoreWriter

VOCABULARY = 4096
SMALL = ("llama", "t5")
KINDS = ("sketch", "two_sided", "dense")
DEFAULT = "sketch"
LORA = LoraShape(16, 32)
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
CLOCK_HELP = (
    "wall, or CPU seconds of the process, which other processes lengthen less: with OMP_NUM_THREADS=1 (default: wall)"
)
ENGINE = f"engine:{DEFAULT}"


def build_model(architecture: str, device: str) -> LanguageModel:
    """A LoRA model from a configuration: p = 147k (llama) or 442k (t5) on the CPU, TinyLlama's shape on a GPU; or from a
    folder that holds a model."""
    model = _small_model(architecture, device) if architecture in SMALL else load_model(architecture, LORA)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # B starts at zero, and zeros can be cheaper than numbers
            if parameter.requires_grad:
                parameter.normal_(std=0.02)
    return model.to(device)


def _small_model(architecture: str, device: str) -> LanguageModel:
    words = ["<pad>", "</s>", "<unk>", *(f"w{number}" for number in range(VOCABULARY - 3))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    torch.manual_seed(0)
    if architecture == "t5":
        config = T5Config(
            vocab_size=VOCABULARY, d_model=256, d_kv=32, d_ff=1024, num_layers=6, num_heads=8, dropout_rate=0.0,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
        network, lora = T5ForConditionalGeneration(config), LORA
    elif device == "cuda":
        config = LlamaConfig(
            vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
            num_key_value_heads=4, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )  # fmt: skip
        network, lora = LlamaForCausalLM(config), LoraShape(128, 512)
    else:
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=8,
            num_key_value_heads=8, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )  # fmt: skip
        network, lora = LlamaForCausalLM(config), LORA
    return add_adapter(LanguageModel(network, fast, architecture), lora, seed=0)


def words_of_one_token(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Words that the tokenizer takes for one token each, after a space where it marks spaces; sorted."""
    tokens = tokenizer.get_vocab()
    spaced = [token[1:] for token in tokens if token[:1] in ("Ġ", "▁")]
    return sorted(word for word in spaced or tokens if re.fullmatch("[a-z]+[0-9]*", word))


def write_samples(path: Path, count: int, words: Sequence[str], longest: int = 256, shortest: int = 20) -> Path:
    """Rows of 20 to 256 tokens, half of them the prompt, of random words in FLAN layout."""
    generator = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for row in range(count):
            drawn = [generator.choice(words) for _ in range(generator.randint(shortest, longest) - 1)]
            half = len(drawn) // 2
            line = {"inputs": " ".join(drawn[:half]), "targets": " ".join(drawn[half:]), "_task_name": f"t{row % 10}"}
            file.write(json.dumps(line) + "\n")
    return path


class Bench:
    """A model ("llama", "t5" or a folder) and its samples, in batches of `max_tokens`, and the ways to take a pass over them."""

    def __init__(self, architecture: str, dim: int, device: str, samples: int, max_tokens: int, folder: Path) -> None:
        self.dim, self.device, self.folder, self.max_tokens = dim, device, folder, max_tokens
        self.model = build_model(architecture, device)
        words = words_of_one_token(self.model.tokenizer)
        self.file = write_samples(folder / f"samples_{samples}.jsonl", samples, words)
        self.autocast = "bfloat16" if device == "cuda" else None
        self.projections: dict[str, Projection] = {}
        self.datamodule = self.make_datamodule()
        self.batches = self.datamodule.budgeted(self.datamodule.data.indices("train"))

    def make_datamodule(self) -> TaskDataModule:
        """Read and tokenise the samples."""
        data = load_instruction([self.file], heldout_share=0.0)
        return TaskDataModule(data, self.model.tokenizer, self.model.kind, max_tokens_per_batch=self.max_tokens)

    def _autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast("cuda", torch.bfloat16) if self.autocast else contextlib.nullcontext()

    def _collate(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        batch = {name: value.to(self.device) for name, value in self.datamodule.collate(rows).items()}
        del batch["sample_index"]
        return batch

    def floor(self) -> None:
        """Forward and backward of the LoRA model, as a trainer does it."""
        self.model.train()
        for rows in self.batches:
            with self._autocast():
                loss = self.model.network(**self._collate(rows)).loss
            loss.backward()
            self.model.zero_grad(set_to_none=True)

    def own_step(self) -> None:
        """Forward and backward as this project's trainer does it: logits of the target tokens alone."""
        self.model.train()
        for rows in self.batches:
            with self._autocast():
                logits, labels, _ = self.model.target_logits(self._collate(rows))
                loss = token_losses(logits, labels).mean()
            loss.backward()
            self.model.zero_grad(set_to_none=True)

    def row_losses(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean loss over the target tokens of each row, (B,), from transformers' logits of all positions."""
        batch = dict(batch)
        labels, network = batch.pop("labels"), self.model.network
        if self.model.kind == "decoder":
            logits, targets = network(**batch).logits[:, :-1], labels[:, 1:]
        else:
            shifted = network.prepare_decoder_input_ids_from_labels(labels)
            logits, targets = network(**batch, decoder_input_ids=shifted).logits, labels
        # classes last: along another dimension torch adds up 49,152 of them with an error of 5e-4
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return losses.view_as(targets).sum(1) / (targets != -100).sum(1)

    def engine(self, kind: str) -> None:
        """This project's collector."""
        drawn = self.projections.setdefault(kind, make_projection(kind, self.dim, 0))
        with GradientCollector(self.model, drawn, "loss", self.autocast) as collect:
            for rows in self.batches:
                collect(self.datamodule.collate(rows))

    def for_loop(self) -> None:
        """One sample, one backward; the gradient is projected by the same sketch."""
        signs = torch.randint(0, 2, (self.model.layout.num_parameters,), device=self.device).float() * 2 - 1
        bins = torch.randint(0, self.dim, (self.model.layout.num_parameters,), device=self.device)
        self.model.eval()
        for index in np.concatenate(self.batches).tolist():
            with self._autocast():
                loss = self.model.network(**self._collate(np.array([index]))).loss
            loss.backward()
            flat = torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None]).float()
            torch.zeros(self.dim, device=self.device).index_add_(0, bins, flat * signs)
            self.model.zero_grad(set_to_none=True)

    def published(self, batch_size: int = 8, width: int = 256) -> None:
        """The published loop: batches of 8 padded to 256, one autograd.grad per sample through the batch's graph,
        a dense float64 projection matrix."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if not hasattr(self, "_matrix"):
            shape = (self.model.layout.num_parameters, self.dim)
            self._matrix = np.random.default_rng(0).integers(0, 2, shape).astype(np.float64)
            self._matrix = (self._matrix * 2 - 1) / np.sqrt(self.dim)
        self.model.eval()
        rows = np.concatenate(self.batches)
        for start in range(0, len(rows), batch_size):
            batch = self._collate(rows[start : start + batch_size])
            for name, fill in (("input_ids", 0), ("labels", -100), ("attention_mask", 0)):
                if name in batch:
                    missing = width - batch[name].shape[1]
                    batch[name] = torch.nn.functional.pad(batch[name], (0, max(0, missing)), value=fill)
            outputs = self.row_losses(batch)
            for row in range(len(outputs)):
                gradients = torch.autograd.grad(outputs[row], parameters, retain_graph=True)
                flat = torch.cat([gradient.flatten() for gradient in gradients]).cpu().numpy().astype(np.float64)
                flat @ self._matrix

    def stage(self, kind: str = DEFAULT) -> None:
        """The whole stage: read, tokenise, take gradients, write the store."""
        self.datamodule = self.make_datamodule()
        data = self.datamodule.data
        rows = data.indices("train")
        samples = {"sample_index": rows, "task": data.task_of_sample[rows], "target": data.target_of_sample[rows]}
        samples |= {"key": self.datamodule.row_keys(rows), "target_tokens": self.datamodule.target_tokens[rows]}
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            drawn = make_projection(kind, self.dim, 0)
            names = {"tasks": data.tasks, "targets": data.targets}
            store = StoreWriter(Path(folder) / "store", {"dim": self.dim}, samples, self.dim, "", names=names)
            collect_gradients(self.model, self.datamodule, drawn, store, output_function="loss", autocast=self.autocast)
            store.finish({})


# Operations that change no number, and those at which a CPU waits for a GPU, however often.
VIEWS = {"alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "lift_fresh", "narrow", "permute",
         "reshape", "resolve_conj", "resolve_neg", "select", "slice", "split", "squeeze", "t", "to", "transpose", "unbind",
         "unsqueeze", "view", "_unsafe_view", "_reshape_alias", "result_type", "is_nonzero", "item", "unfold", "flatten"}  # fmt: skip
WAITS = {"_local_scalar_dense", "nonzero", "bincount"}


def count_kernels(way: Callable[[], object]) -> tuple[int, int]:
    """Operations of a way that would be kernels of a GPU, those made of others not counted; and those that wait for it."""
    way()  # draws signs and makes what is kept
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        way()
    leaves = [event.name.removeprefix("aten::") for event in profiled.events() if not event.cpu_children]
    names = [name for event in profiled.events() if (name := event.name.removeprefix("aten::")) in WAITS]
    return sum(name not in VIEWS | WAITS for name in leaves), len(names)


def kernels_of_a_batch(bench: Bench) -> dict[str, tuple[int, int]]:
    """`count_kernels` of a training step and of the engine on the first batch, in chunks as a CPU and as a GPU gets them."""
    batch, drawn = bench.datamodule.collate(bench.batches[0]), make_projection(DEFAULT, bench.dim, 0)
    batch, bench.batches = {**batch, "targets": bench.model.targets(batch)}, bench.batches[:1]  # found on the host
    counts = {"training step": count_kernels(bench.floor)}
    for device, entries in {"CPU": projection._CHUNK_ENTRIES, "GPU": projection._CUDA_CHUNK_ENTRIES}.items():
        with (
            unittest.mock.patch.object(projection, "_CHUNK_ENTRIES", entries),
            GradientCollector(bench.model, drawn) as collect,
        ):
            counts[f"engine, chunks of a {device}"] = count_kernels(partial(collect, batch))
    return counts


def seconds_of(way: Callable[[], None], device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one pass by a clock; on a GPU by CUDA events."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        way()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    started = clock()
    way()
    return clock() - started


def in_turn(
    ways: dict[str, Callable[[], None]],
    repeats: int,
    device: str,
    warm_up: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each way in every round, timed in turn, by default after a round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways.items())
    for repeat in range(-warm_up, repeats):
        order.reverse()  # memory that one way leaves behind favours the next
        for name, way in order:
            value = seconds_of(way, device, clock)
            if repeat >= 0:
                seconds[name].append(value)
    return seconds


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    """The median of each way."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def over(seconds: dict[str, list[float]], floor: str) -> dict[str, tuple[float, float, float]]:
    """Each way in multiples of the floor, round by round: median, least and greatest."""
    ratios = {
        name: [value / unit for value, unit in zip(values, seconds[floor], strict=True)]
        for name, values in seconds.items()
    }
    return {name: (statistics.median(values), min(values), max(values)) for name, values in ratios.items()}


def peak_memory(way: str, arguments: tuple, device: str, kind: type[Bench] = Bench) -> int:
    """Peak bytes above the loaded model of one way, in a process of its own (on a GPU: of the allocator)."""
    if device == "cuda":
        bench = kind(*arguments)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        getattr(bench, way.split(":")[0])(*way.split(":")[1:])
        return torch.cuda.max_memory_allocated() - before
    # blocks above this size go back to the system when freed; else glibc keeps an amount that varies from run to run
    with (
        unittest.mock.patch.dict(os.environ, MALLOC_MMAP_THRESHOLD_="131072"),
        multiprocessing.get_context("spawn").Pool(1) as pool,
    ):
        return pool.apply(_peak_in_this_process, (way, arguments, kind))


def resident_bytes() -> int:
    """Memory of this process that is in RAM (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak_in_this_process(way: str, arguments: tuple, kind: type[Bench]) -> int:
    console.quiet_libraries()
    bench = kind(*arguments)
    every, bench.batches = bench.batches, bench.batches[-1:]
    run = getattr(bench, way.split(":")[0])
    run(*way.split(":")[1:])  # the shortest rows: loads code, draws signs and makes buffers that stay
    bench.batches = every
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before, peak, over = resident_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.002):
            peak = max(peak, resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    run(*way.split(":")[1:])
    over.set()
    watcher.join()
    return peak - before


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The script's flags."""
    parser = console.Parser(__doc__)
    group = parser.add_argument_group("what is measured")
    group.add_argument("--model", default="llama", help="architecture, llama or t5, or a folder with a model "
                       "(default: llama)")  # fmt: skip
    group.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="projections (default: all)")
    group.add_argument("--dim", type=config.COUNT, default=100, help="projection dimension d (default: 100)")
    group.add_argument("--samples", type=config.COUNT, default=256, help="rows of a pass (default: 256)")
    group.add_argument("--stage_samples", type=config.COUNT, default=2000, help="rows of the whole stage "
                       "(default: 2000)")  # fmt: skip
    group.add_argument("--max_tokens", type=config.COUNT, default=2048, help="token budget of a batch; on 2 cores "
                       "a training step is about its fastest at the default (default: 2048)")  # fmt: skip
    group.add_argument("--repeats", type=config.COUNT, default=5, help="timed rounds (default: 5)")
    group.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help=CLOCK_HELP)
    group.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device; on cuda with the shape of "
                       "TinyLlama, in bfloat16 (default: cpu)")  # fmt: skip
    group.add_argument("--quick", action="store_true", help="only the steps, the engine and their memory (default: also "
                       "the loops and the whole stage)")  # fmt: skip
    group.add_argument("--count_kernels", action="store_true", help="of one batch, only the kernels and the waits for a "
                       "GPU, counted on the CPU (default: times and memory)")  # fmt: skip
    group.add_argument("--json", action="store_true", help="only the last line, the figures as JSON (default: the table "
                       "too)")  # fmt: skip
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Measure and print the table; the last line is JSON."""
    with tempfile.TemporaryDirectory() as name:
        arguments = (args.model, args.dim, args.device, args.samples, args.max_tokens, Path(name))
        bench = Bench(*arguments)
        if args.count_kernels:
            for way, (kernels, waits) in kernels_of_a_batch(bench).items():
                print(json.dumps({"model": args.model, "way": way, "kernels": kernels, "waits": waits}))
            return
        ways: dict[str, Callable[[], None]] = {"floor": bench.floor, "own_step": bench.own_step}
        ways |= {f"engine:{kind}": partial(bench.engine, kind) for kind in {DEFAULT: 0} | dict.fromkeys(args.kinds, 0)}
        by_round = in_turn(ways, args.repeats, args.device, clock=CLOCKS[args.clock])
        seconds, ranges, own = medians(by_round), over(by_round, "floor"), over(by_round, "own_step")[ENGINE]
        memory = {way: peak_memory(way, arguments, args.device) for way in ("floor", "own_step", ENGINE)}
        stage_over_floor = None
        if not args.quick:
            slow = {"for loop": bench.for_loop, "published loop": bench.published}
            seconds |= medians(in_turn(slow, 1, args.device, warm_up=False))
            large = (*arguments[:3], args.stage_samples, *arguments[4:])
            staged = Bench(*large)
            whole = medians(in_turn({"floor": staged.floor, "stage": staged.stage}, 1, args.device, warm_up=False))
            stage_over_floor = whole["stage"] / whole["floor"]
            for label, changed in {
                "a quarter of the samples": (*arguments[:3], args.samples // 4, *arguments[4:]),
                "ten times d": (args.model, 10 * args.dim, *arguments[2:]),
            }.items():
                memory[f"{ENGINE}, {label}"] = peak_memory(ENGINE, changed, args.device)
    if not args.json:
        print(f"{'way':<40}{'seconds':>10}{'/ floor':>10}{'range':>14}")
        for way, value in seconds.items():
            middle, least, greatest = ranges.get(way, [value / seconds["floor"]] * 3)
            print(f"{way:<40}{value:>10.2f}{middle:>10.2f}{f'{least:.2f} to {greatest:.2f}':>14}")
        print(f"{'engine, in steps of our own':<40}{'':>10}{own[0]:>10.2f}{f'{own[1]:.2f} to {own[2]:.2f}':>14}")
        if stage_over_floor:
            label = f"stage, {args.stage_samples:,} samples (floor {whole['floor']:.1f} s)"
            print(f"{label:<40}{whole['stage']:>10.2f}{stage_over_floor:>10.2f}")
        print(f"\n{'peak memory above the model':<40}{'MB':>10}{'/ floor':>10}")
        for way, value in memory.items():
            print(f"{way:<40}{value / 1e6:>10.0f}{value / memory['floor']:>10.2f}")
    figures = {
        "model": args.model,
        "dim": args.dim,
        "engine_over_floor": round(ranges[ENGINE][0], 3),
        "engine_over_own_step": round(own[0], 3),
        "stage_over_floor": stage_over_floor and round(stage_over_floor, 3),
        "published_over_engine": None if args.quick else round(seconds["published loop"] / seconds[ENGINE], 2),
        "memory_over_floor": round(memory[ENGINE] / memory["floor"], 3),
        "memory_over_own_step": round(memory[ENGINE] / memory["own_step"], 3),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(parse_args())
