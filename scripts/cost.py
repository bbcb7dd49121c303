"""What selecting costs by the stages, and by really fine-tuning what they estimate: samples, floating-point operations, seconds.

N rows of L tokens in n tasks of one size, E epochs, V validation rows, k checkpoints, P parameters, m subsets of half of the
tasks, s steps of forward selection. In samples forward and backward (F: forward alone):

    the stages                  E N + k (N + V)
    every subset fine-tuned     m (E N / 2), and F m V
    every candidate fine-tuned  sum over steps i = 1 .. s of (n - i + 1) candidates, each E N i / n, and F V each

A sample's forward takes 2 P L operations; its backward 2 P L where an adapter is trained, since the frozen weights have no
gradient, and 4 P L where every weight is. The linear algebra of d numbers takes 2 k (N + V) d^2 for the moments and
k m (d^3 / 3 + 2 n d^2) for the estimates.

    python scripts/cost.py --parameters 134.5e6 --rows 180 --tokens 40 --tasks 15 --epochs 2 --validation_rows 36
    python scripts/cost.py --parameters 1.1e9 --rows 100000 --tokens 256 --tasks 100 --epochs 10 --validation_rows 5000

Writes  nothing but a table; with --keep also its rows into a table of all settings
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd

from src import config, console
from src.tables import read_table, write_table


@dataclass(frozen=True)
class Setting:
    """Sizes, as the formulas name them."""

    parameters: float
    rows: int
    tokens: float
    tasks: int
    epochs: int
    validation_rows: int
    checkpoints: int = 3
    subsets: int = 1000
    steps: int = 10
    dim: int = 400
    all_weights: bool = False


def samples(setting: Setting) -> dict[str, tuple[float, float]]:
    """By method the samples that go forward and backward, and those that go forward alone; the one fine-tuning on what was
    selected is every method's alike, and left out."""
    s = setting
    tried = [(s.tasks - step + 1, s.epochs * s.rows * step / s.tasks) for step in range(1, s.steps + 1)]
    return {
        "the stages": (s.epochs * s.rows + s.checkpoints * (s.rows + s.validation_rows), 0),
        "every subset fine-tuned": (s.subsets * s.epochs * s.rows / 2, s.subsets * s.validation_rows),
        "every candidate fine-tuned": (
            sum(candidates * passes for candidates, passes in tried),
            sum(candidates for candidates, _ in tried) * s.validation_rows,
        ),
    }


def number_of_fine_tunings(setting: Setting) -> dict[str, int]:
    """By method how many models are fine-tuned and evaluated, the stages' left out."""
    tried = sum(setting.tasks - step + 1 for step in range(1, setting.steps + 1))
    return {"every subset fine-tuned": setting.subsets, "every candidate fine-tuned": tried}


def operations(setting: Setting, both: float, forward: float, of_estimates: bool) -> float:
    """Floating-point operations of so many samples forward and backward, and forward alone; with the estimates' algebra."""
    s = setting
    backward = 4 if s.all_weights else 2
    network = 2 * s.parameters * s.tokens * (both * (1 + backward / 2) + forward)
    moments = 2 * s.checkpoints * (s.rows + s.validation_rows) * s.dim**2
    solves = s.checkpoints * s.subsets * (s.dim**3 / 3 + 2 * s.tasks * s.dim**2)
    return network + of_estimates * (moments + solves)


def costs(setting: Setting, name: str, seconds: dict[str, float] | None = None) -> pd.DataFrame:
    """A row for each method, with how many times the stages' operations it takes; seconds where they are known."""
    records, ours = [], 0.0
    for method, (both, forward) in samples(setting).items():
        found = operations(setting, both, forward, method == "the stages")
        ours = ours or found
        record = {
            "setting": name,
            "method": method,
            "forward and backward": round(both),
            "forward alone": round(forward),
        }
        record |= {"operations": f"{found:.2g}", "times": f"{found / ours:.3g}"}
        records.append(record | {"seconds": f"{seconds[method]:.0f}" if seconds else ""})
    return pd.DataFrame(records)


def keep(file: Path, table: pd.DataFrame, setting: Setting) -> None:
    """Put a setting's rows into a table of all settings, in the place of those it has."""
    table = table.assign(**asdict(setting), command=console.command_typed())
    there = read_table(file) if file.is_file() else table[:0]
    others = there[~there["setting"].isin(table["setting"])]
    write_table(file, pd.concat([others, table]) if len(others) else table)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The script's flags."""
    parser = console.Parser(__doc__)
    group = parser.add_argument_group("sizes")
    group.add_argument("--name", default="own", help="what the setting is called (default: own)")
    group.add_argument("--parameters", type=config.POSITIVE, required=True, metavar="P", help="of the model (required)")
    for flag, what in (("rows", "training rows N"), ("tasks", "n"), ("epochs", "E"), ("validation_rows", "V")):
        group.add_argument(f"--{flag}", type=config.COUNT, required=True, help=f"{what} (required)")
    group.add_argument("--tokens", type=config.POSITIVE, required=True, metavar="L", help="of a row (required)")
    for flag, default, what in (("checkpoints", 3, "k"), ("subsets", 1000, "m"), ("steps", 10, "of forward selection, s"),
                                ("dim", 400, "d")):  # fmt: skip
        group.add_argument(f"--{flag}", type=config.COUNT, default=default, help=f"{what} (default: {default})")
    group.add_argument("--all_weights", action="store_true", help="every weight is trained (default: an adapter)")
    group = parser.add_argument_group("measured")
    group.add_argument(
        "--stages_seconds", type=config.POSITIVE, help="of the stages together, measured (default: unknown)"
    )
    group.add_argument("--seconds_per_sample", type=config.POSITIVE, help="of a fine-tuning, by sample and epoch, measured "
                       "(default: unknown)")  # fmt: skip
    group.add_argument("--seconds_each", type=config.NOT_NEGATIVE, default=0.0, help="of a fine-tuning however many samples it "
                       "has, such as those of evaluating it (default: 0)")  # fmt: skip
    group.add_argument("--keep", metavar="CSV", help="table of all settings to put the rows into (default: none)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """The table of one setting."""
    if bool(args.stages_seconds) != bool(args.seconds_per_sample):
        raise ValueError("--stages_seconds and --seconds_per_sample belong together; give both or neither")
    setting = Setting(**{name: getattr(args, name) for name in Setting.__dataclass_fields__})
    seconds = None
    if args.stages_seconds:
        counts = number_of_fine_tunings(setting)
        taken = {name: both * args.seconds_per_sample for name, (both, _) in samples(setting).items()}
        seconds = {name: taken[name] + count * args.seconds_each for name, count in counts.items()}
        seconds["the stages"] = args.stages_seconds
    table = costs(setting, args.name, seconds)
    print(table.to_string(index=False))
    if args.keep:
        keep(Path(args.keep), table, setting)


if __name__ == "__main__":
    console.run_stage(main, parse_args())
