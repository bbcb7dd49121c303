"""Per-sample projected gradients by this project's engine and by its peers, on one model and the same rows.

The peers are bergson, dattri (LoGra) and dattri-LLM in the versions that `requirements-peers.txt` pins; others are refused.
They need an environment of their own, which this script's Python must be:

    python -m venv .venv-peers
    .venv-peers/bin/pip install -r requirements.txt
    .venv-peers/bin/pip install --no-deps -r requirements-peers.txt
    OMP_NUM_THREADS=1 .venv-peers/bin/python scripts/benchmark_peers.py --model llama --dims 100 1024
    OMP_NUM_THREADS=1 .venv-peers/bin/python scripts/benchmark_peers.py --model data/smollm2 --dims 400 4000 --samples 8

First what is right: on a few rows every engine's gradients without a projection against a loop of backward passes, both in
float64 (in float32 a unit of T5 that is nearly zero may fall on either side), and the inner products of its projected rows
against the exact ones. Then what it takes: a pass over all rows, engines and a plain
training step (forward and backward, transformers' own loss, no optimizer) in turn, in multiples of the step of the same round;
beside them the step of this project's trainer, whose output layer sees the target tokens alone. Memory is the peak above the
loaded model, each engine in a process of its own.

Every engine gets the same batches, padded alike, and the loss of a row is the mean over its target tokens; peers take it from
transformers' logits. One that projects each matrix by itself to k x k numbers gets the least k that gives at least d in all.

Writes  a table; with --keep also its rows into a table of all models, where what a run leaves out stays as it was
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from src import config, console
from src.gradients import GradientCollector
from src.projection import make_projection
from src.tables import write_table

gradients = console.load_script("scripts/benchmark_gradients.py")
Bench: Any = gradients.Bench

PINS = console.ROOT / "requirements-peers.txt"
STEP, OWN_STEP, OURS = "transformers' training step", "this project's training step", "this project"
AGREES = 1e-4
"""Relative error of a row's gradient up to which it is the loop's."""
Parts = Mapping[str, Tensor]
Engine = Callable[[Mapping[str, Tensor]], Parts]
"""Rows of a batch, by module (B, numbers of that module), or all in one."""


def pinned_versions() -> dict[str, str]:
    """Name and version of every pin of the peers' environment."""
    return dict(re.findall(r"^([\w-]+)==(\S+)", PINS.read_text(encoding="utf-8"), re.MULTILINE))


def check_versions() -> None:
    """ValueError: this environment lacks a peer, or has another version of it."""
    wrong = []
    for name, pinned in pinned_versions().items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            found = "none"
        wrong += [f"{name} {found} instead of {pinned}"] if found != pinned else []
    if wrong:
        raise ValueError(
            f"this environment has {', '.join(wrong)}; make the peers' environment as this script's --help says and run "
            "the script with its Python"
        )


def side(dim: int, matrices: int) -> int:
    """The least k whose k x k numbers of each matrix are at least d in all."""
    return math.ceil(math.sqrt(dim / matrices))


# --- engines -------------------------------------------------------------------------------------------------
# Each is a context, entered for a pass over batches and left without a trace on the model, that gives the rows of a batch. A
# dimension of None is no projection: then each module's rows are its flattened gradients. `kept` outlives a pass.


@contextlib.contextmanager
def our_engine(bench: Any, dim: int | None, kept: dict) -> Iterator[Engine]:
    shapes = bench.model.layout.shapes
    projection = kept.setdefault("projection", make_projection(gradients.DEFAULT if dim else "none", dim, 0, shapes))
    with GradientCollector(bench.model, projection) as collect:

        def rows_of(batch: Mapping[str, Tensor]) -> Parts:
            rows, _ = collect(dict(batch))
            if dim:
                return {"all": rows}
            modules = [matrix.module_name for matrix in bench.model.layout.matrices]
            return dict(zip(modules, rows.split([math.prod(shape) for shape in shapes.values()], 1), strict=True))

        yield rows_of


@contextlib.contextmanager
def bergson(bench: Any, dim: int | None, kept: dict, target: str = "per_module") -> Iterator[Engine]:
    """As `CollectorComputer` runs it: all weights frozen but the input embedding's, rows gathered in its builder."""
    from bergson.collector.in_memory_collector import InMemoryCollector
    from bergson.config import IndexConfig
    from bergson.gradients import GradientProcessor

    modules = {matrix.module_name for matrix in bench.model.layout.matrices}
    size = dim if target == "global" else dim and side(dim, len(modules))
    processor = kept.setdefault("processor", GradientProcessor(projection_dim=size, projection_target=target))
    network, count = bench.model.network, sum(len(rows) for rows in bench.batches)
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    network.requires_grad_(False)
    network.get_input_embeddings().requires_grad_(True)
    settings = IndexConfig(run_path="none", projection_dim=size or 0, projection_target=target, loss_reduction="mean")
    collector = InMemoryCollector(
        model=network, data=range(count), cfg=settings, target_modules=modules, processor=processor
    )
    taken = 0

    def rows_of(batch: Mapping[str, Tensor]) -> Parts:
        nonlocal taken
        with collector.with_batch(batch["labels"] != -100):
            losses = bench.row_losses(batch)
            losses.sum().backward()
            network.zero_grad()
        parts = dict(collector.mod_grads)
        collector.process_batch(list(range(taken, taken := taken + len(losses))), losses=losses)
        return parts

    try:
        yield rows_of
    finally:
        network.requires_grad_(False)
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def dattri_logra(bench: Any, dim: int | None, kept: dict) -> Iterator[Engine]:
    """As `LoGraAttributor.cache` runs it, which wants batches of one size; its factor B asks for the mean over a batch. Its
    `torch.compile` is left out: with a guard for each of the matrices it takes a tenth longer on a CPU."""
    from dattri.algorithm.block_projected_if.core.compressor import setup_model_compressors
    from dattri.algorithm.block_projected_if.core.hook import HookManager

    modules = [matrix.module_name for matrix in bench.model.layout.matrices]
    if "compressors" not in kept:
        whole = {"device": "cpu", "proj_max_batch_size": 64, "proj_dim": -1, "proj_type": "identity"}
        factors = {**whole, "proj_dim": side(dim, len(modules)), "proj_type": "normal"} if dim else whole
        batch = bench.collated(bench.batches[-1])
        kept["compressors"] = setup_model_compressors(bench.model.network, modules, factors, whole, batch)
    hooks = HookManager(bench.model.network, modules)
    hooks.set_compressors(kept["compressors"])

    def rows_of(batch: Mapping[str, Tensor]) -> Parts:
        bench.model.network.zero_grad()
        bench.row_losses(batch).mean().backward()
        return dict(zip(modules, hooks.get_compressed_grads(), strict=True))

    try:
        with torch.compiler.set_stance("force_eager"):
            yield rows_of
    finally:
        hooks.remove_hooks()


@contextlib.contextmanager
def dattri_llm(bench: Any, dim: int | None, kept: dict) -> Iterator[Engine]:
    """Its hooks for gradients alone (`invasive_linear_io`), each layer captured the cheaper way (`auto`)."""
    from dattri_llm import CaptureCallback, HookManager, HookManagerConfig

    modules = [matrix.module_name for matrix in bench.model.layout.matrices]
    projection = {"style": "logra", "proj_max_batch_size": 64, "proj_dim": dim and side(dim, len(modules))}
    settings = HookManagerConfig(
        hook_types=dict.fromkeys(modules, "invasive_linear_io"),
        projection_kwargs={"__default__": projection} if dim else None,
        capture_style="auto",
    )
    captured = CaptureCallback()
    manager = HookManager(bench.model.network, settings, callbacks=[captured])

    def rows_of(batch: Mapping[str, Tensor]) -> Parts:
        captured.record = None
        bench.row_losses(batch).sum().backward()
        bench.model.network.zero_grad()
        if captured.record is None:
            raise RuntimeError("no record of the batch was captured")
        return {name: part.flatten(1) for name, part in captured.record.gradient.materialize().data.items()}

    try:
        with manager.collect():
            yield rows_of
    finally:
        manager.remove()


ENGINES: dict[str, tuple[str, Callable[[Any, int | None, dict], contextlib.AbstractContextManager[Engine]]]] = {
    OURS: ("", our_engine),
    "bergson, each matrix": ("bergson", bergson),
    "bergson, all in one": ("bergson", partial(bergson, target="global")),
    "dattri LoGra": ("dattri", dattri_logra),
    "dattri-LLM": ("dattri-llm", dattri_llm),
}
"""Name in the table -> distribution, and the engine."""


class PeersBench(Bench):
    """The rows and the model of the gradients' benchmark, with a pass by any engine; `kept` is what engines draw or compile
    once and keep from pass to pass."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.kept: dict[tuple[str, int], dict] = {}

    def collated(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """A batch as models take it."""
        return self._collate(rows)

    def peer(self, name: str, dim: str | int) -> None:
        """One pass over all batches to d numbers."""
        self.model.eval()
        for _ in self.rows(ENGINES[name][1](self, int(dim), self.kept.setdefault((name, int(dim)), {}))):
            pass

    def rows(self, engine: contextlib.AbstractContextManager[Engine]) -> Iterator[Parts]:
        """The parts of every batch, and their rows in one."""
        with engine as rows_of:
            for rows in self.batches:
                parts = rows_of(self.collated(rows))
                torch.cat(list(parts.values()), dim=1)
                yield parts


# --- what is right -------------------------------------------------------------------------------------------


def loop_of_backwards(bench: PeersBench) -> dict[str, Tensor]:
    """The gradients of every row of the batches by a backward of its own, by module (rows, out x in)."""
    matrices, found = bench.model.layout.matrices, dict[str, list[Tensor]]()
    bench.model.eval()
    for rows in bench.batches:
        for row in rows:
            bench.model.network(**bench.collated([row])).loss.backward()
            for matrix in matrices:
                gradient = bench.model.network.get_parameter(matrix.name).grad
                found.setdefault(matrix.module_name, []).append(gradient.flatten().clone())
            bench.model.zero_grad(set_to_none=True)
    return {name: torch.stack(several) for name, several in found.items()}


def gradient_error(found: Parts, exact: Parts) -> float:
    """The greatest relative error of a row's gradient, |found - exact| / |exact|, over all modules of `exact`.

    ValueError: a module is missing, or its rows have another shape.
    """
    for name, rows in exact.items():
        if name not in found or found[name].shape != rows.shape:
            raise ValueError(f"no gradients of {name}" if name not in found else f"{name}: {tuple(found[name].shape)}")
    whole = torch.cat(list(exact.values()), 1).double()
    difference = torch.cat([found[name] for name in exact], 1).double() - whole
    return float((difference.norm(dim=1) / whole.norm(dim=1)).max())


def product_error(rows: Tensor, exact: Tensor) -> float:
    """Root mean square error of the rows' inner products, each over the product of the exact norms."""
    norms = exact.norm(dim=1)
    return float(((rows @ rows.T - exact @ exact.T) / torch.outer(norms, norms)).square().mean().sqrt())


def judged(error: float) -> str:
    """What the table says about an engine's gradients."""
    return "gradients agree" if error <= AGREES else f"gradients are off by {error:.2g}"


def check(bench: PeersBench, dims: Sequence[int], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By engine the error of its gradients; by d the numbers of a row and the error of the inner products; and a remark.

    Whatever a peer raises is its remark: it cannot do this case.
    """

    def rows(name: str, dim: int | None) -> Parts:
        several = list(bench.rows(ENGINES[name][1](bench, dim, {})))
        return {module: torch.cat([parts[module] for parts in several]).double() for module in several[0]}

    bench.model.double()
    exact, found = loop_of_backwards(bench), dict[str, dict[str, Any]]()
    whole = torch.cat(list(exact.values()), 1)
    for dim in (None, *dims):
        for name in names:
            facts = found.setdefault(name, {"remark": "", "numbers": {}, "product_error": {}})
            try:
                if dim is None:
                    facts["gradient_error"] = gradient_error(rows(name, None), exact)
                    facts["remark"] = judged(facts["gradient_error"])
                elif "gradient_error" in facts:
                    projected = torch.cat(list(rows(name, dim).values()), 1)
                    facts["numbers"][dim], facts["product_error"][dim] = (
                        projected.shape[1],
                        product_error(projected, whole),
                    )
            except Exception as refusal:
                if name == OURS:
                    raise
                facts["remark"] = f"cannot: {(str(refusal).strip() or repr(refusal)).splitlines()[0]}"
        bench.model.float()
    return found


# --- the table -----------------------------------------------------------------------------------------------


def measured(args: argparse.Namespace, folder: Path) -> pd.DataFrame:
    """A row of every engine at every d, the step's before them."""
    arguments = (args.model, args.dims[0], "cpu", args.samples, args.max_tokens, folder)
    bench = PeersBench(*arguments)
    every = bench.batches
    bench.batches, checked = [batch[: args.checked_rows] for batch in every[-1:]], {}  # the shortest rows
    if "check" not in args.leave_out:
        checked = check(bench, args.dims, args.engines)
    bench.batches = every
    step = (STEP, "")
    ways: dict[tuple, Callable[[], None]] = {step: bench.floor}
    ways |= {(OWN_STEP, ""): bench.own_step} if OURS in args.engines else {}
    ways |= {
        (name, dim): partial(bench.peer, name, dim)
        for dim in args.dims
        for name in args.engines
        if not checked or dim in checked[name]["numbers"]
    }
    timed, weighed = (ways if part not in args.leave_out else {} for part in ("time", "memory"))
    seconds = gradients.in_turn(timed, args.repeats, "cpu", clock=gradients.CLOCKS[args.clock])
    ratios, medians = gradients.over(seconds, step) if timed else {}, gradients.medians(seconds)
    of_steps = {STEP: "floor", OWN_STEP: "own_step"}
    memory = {
        (name, dim): gradients.peak_memory(of_steps.get(name, f"peer:{name}:{dim}"), arguments, "cpu", PeersBench)
        for name, dim in weighed
    }
    setting = {
        "parameters": bench.model.layout.num_parameters,
        "rows": args.samples,
        "tokens": bench.datamodule.padded_tokens(every),
        "rounds": args.repeats if timed else "",
        "clock": args.clock if timed else "",
        "threads": torch.get_num_threads() if timed else "",
        "torch": torch.__version__,
        "command": console.command_typed() if timed else "",
        "memory_command": console.command_typed() if weighed else "",
    }
    records = []
    steps = [step, (OWN_STEP, "")] if OURS in args.engines else []
    for name, dim in [*steps, *((name, dim) for dim in args.dims for name in args.engines)]:
        key, facts = (name, dim), checked.get(name, {})
        package = "transformers" if name == STEP else ENGINES.get(name, ("",))[0]
        record = {"model": Path(args.model).name, "dim": dim, "engine": name}
        record["version"] = metadata.version(package) if package else ""
        record["numbers"] = facts.get("numbers", {}).get(dim, "")
        for column, value in zip(("time", "time_least", "time_greatest"), ratios.get(key, ("", "", "")), strict=True):
            record[column] = f"{value:.3f}" if key in ratios else ""
        record["seconds"] = f"{medians[key]:.2f}" if key in medians else ""
        record["memory"] = f"{memory[key] / memory[step]:.2f}" if key in memory else ""
        record["megabytes"] = f"{memory[key] / 1e6:.0f}" if key in memory else ""
        record["gradient_error"] = f"{facts['gradient_error']:.1e}" if "gradient_error" in facts else ""
        product_error = facts.get("product_error", {}).get(dim)
        record["product_error"] = f"{product_error:.2g}" if product_error else ""
        records.append({**record, "remark": facts.get("remark", ""), **setting})
    return pd.DataFrame(records)


def keep(file: Path, table: pd.DataFrame) -> None:
    """Put rows into a table of all models, in the place of those of the same engine, whose cells stay where the new are empty."""
    table = table.astype(str)
    if file.is_file():
        there, same = pd.read_csv(file, dtype=str, keep_default_na=False), ["model", "dim", "engine"]
        there = there.set_index(same, drop=False)
        table.index = pd.MultiIndex.from_frame(table[same])
        table = table.mask(table == "", there.reindex(table.index).fillna(""))
        table = pd.concat([there.loc[~there.index.isin(table.index)], table])
    write_table(file, table)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The script's flags."""
    parser = console.Parser(__doc__)
    group = parser.add_argument_group("what is measured")
    group.add_argument(
        "--model", default="llama", help="a small llama or t5, or a folder with a model (default: llama)"
    )
    group.add_argument("--dims", nargs="+", type=config.COUNT, default=[100], metavar="D", help="projection dimensions "
                       "(default: 100)")  # fmt: skip
    group.add_argument("--engines", nargs="+", choices=tuple(ENGINES), default=tuple(ENGINES), metavar="NAME",
                       help=f"some of: {'; '.join(ENGINES)} (default: all)")  # fmt: skip
    group.add_argument("--samples", type=config.COUNT, default=64, help="rows of a pass (default: 64)")
    group.add_argument("--checked_rows", type=config.COUNT, default=8, help="rows that are compared with the loop "
                       "(default: 8)")  # fmt: skip
    group.add_argument("--max_tokens", type=config.COUNT, default=2048, help="token budget of a batch (default: 2048)")
    group.add_argument("--repeats", type=config.COUNT, default=7, help="timed rounds (default: 7)")
    group.add_argument("--leave_out", nargs="+", choices=("check", "time", "memory"), default=(), help="what not to measure "
                       "(default: nothing)")  # fmt: skip
    group.add_argument("--clock", choices=tuple(gradients.CLOCKS), default="wall", help=gradients.CLOCK_HELP)
    group.add_argument("--keep", metavar="CSV", help="table of all models to put the rows into (default: none)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Check, measure, show and keep."""
    check_versions()
    for name in ("bergson", "dattri", "dattri_llm"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "Full backward hook is firing")  # dattri-LLM's, at the lowest matrices
    with tempfile.TemporaryDirectory() as name:
        table = measured(args, Path(name))
    print(table.iloc[:, : table.columns.get_loc("remark") + 1].to_string(index=False))
    if args.keep:
        keep(Path(args.keep), table)


if __name__ == "__main__":
    console.run_stage(main, parse_args())
