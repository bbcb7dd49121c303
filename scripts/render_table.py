"""A table of the paper from the results of its stages, as Markdown and CSV; published figures stand beside ours. Or the
tables of a document, from the results that are kept beside it.

Called by the shell files in `scripts/tables/`, which make the results. In a document a table stands between
`<!-- FILE.csv VIEW WORD… -->`, which names the file below its folder, and `<!-- end -->`.

Reads   results/tables/<name>/<data set>/; with --into the files that the document names
Writes  results/tables/<name>/table.md and table.csv; with --into the tables of the document

    python scripts/render_table.py correlation --results strategy_qa commonsense_qa instruction
    python scripts/render_table.py --into docs/paper.md
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from src import console
from src.artifacts import (
    APPROXIMATION_FILE,
    COMPARISON_FILE,
    ESTIMATES_FILE,
    RESULTS_FILE,
    SCORES_FILE,
    atomic_write,
    read_manifest,
    results_dir,
    subset_file,
)
from src.evaluation import AVERAGE, MEAN
from src.subsets import read_subsets
from src.tables import (
    ESTIMATE,
    TEST_ACCURACY,
    TEST_LOSS,
    columns_of,
    mean_over_targets,
    own_targets,
    read_table,
    subset_text,
    write_table,
)

PUBLISHED = {
    "approximation_error": "Published: relative squared error of margins below 1 % (arXiv:2409.19458); here of losses.",
    "correlation": "Published, read off the plots of arXiv:2409.19458: Spearman 0.63 to 0.72 on four data sets.",
}


def approximation_error(sets: dict[str, Path]) -> pd.DataFrame:
    """Mean over seeds of the first-order error of the outputs (losses), a row for each distance; beside each data set's
    column the error of taking the outputs not to change at all."""
    columns: dict[str, pd.Series] = {}
    for name, folder in sets.items():
        means = read_table(folder / APPROXIMATION_FILE).groupby("scale")[["first_order", "zero_order"]].mean()
        columns |= {name: means["first_order"], f"{name}, no change": means["zero_order"]}
    return pd.DataFrame(columns).reset_index(names="distance")


def correlation(sets: dict[str, Path]) -> pd.DataFrame:
    """Estimates and constant, per data set: the mean over targets where there are several."""
    records = []
    for name, folder in sets.items():
        table = read_table(folder / COMPARISON_FILE)
        for target in [AVERAGE, MEAN] if AVERAGE in set(table["target"]) else table["target"].unique():
            for predictor in (ESTIMATE, "constant"):
                (row,) = table[(table["target"] == target) & (table["predictor"] == predictor)].to_dict("records")
                records.append({"data set": name, **row})
    kept = ["subsets", "lds", "lds_low", "lds_high", "relative_error", "squared_relative_error", "attainable"]
    return pd.DataFrame(records)[["data set", "target", "predictor", *kept]]


def fine_tuned(sets: dict[str, Path]) -> pd.DataFrame:
    """Test loss, and accuracy where answers are judged, of the base model, all tasks and the two selections."""
    records = []
    for name, folder in sets.items():
        truth, scores = read_table(folder / RESULTS_FILE), read_table(folder / SCORES_FILE)
        stem, num_tasks = f"tables/fine_tuned/{name}", len(scores)
        methods = {"base model": "", "all tasks": subset_text(range(num_tasks))}
        for method in ("forward_selection", "random_ensemble"):
            methods[method.replace("_", " ")] = subset_text(read_subsets(subset_file(f"{stem}_{method}"), num_tasks)[0])
        targets = own_targets(columns_of(truth, TEST_LOSS), scores["name"].tolist())
        for method, text in methods.items():
            rows = truth[truth["subset"] == text]
            record = {"data set": name, "trained on": method, "tasks": len(text.split())}
            for label, metric in (("test loss", TEST_LOSS), ("test accuracy", TEST_ACCURACY)):
                if columns_of(truth, metric):
                    record[label] = mean_over_targets(rows, metric, targets).mean()
            records.append({**record, "seconds": rows["seconds"].astype(float).mean()})
    return pd.DataFrame(records)


def cost(sets: dict[str, Path]) -> pd.DataFrame:
    """Seconds of everything behind the estimates of so many subsets, beside fine-tuning each of them."""
    records = []
    for name, folder in sets.items():
        seconds, truth = read_manifest(folder, "stage 3")["seconds"], read_table(folder / RESULTS_FILE)
        num_subsets = len(read_table(folder / ESTIMATES_FILE))
        one = truth.loc[truth["subset"] != "", "seconds"].astype(float).mean()
        estimating = sum(seconds.values())
        records.append(
            {
                "data set": name,
                "subsets": num_subsets,
                **{f"{stage.replace('_', '-')} (s)": value for stage, value in seconds.items()},
                "one fine-tuning (s)": one,
                "all subsets fine-tuned (s)": one * num_subsets,
                "times faster": one * num_subsets / estimating,
            }
        )
    return pd.DataFrame(records)


TABLES = {table.__name__: table for table in (approximation_error, correlation, fine_tuned, cost)}


# --- tables of a document ------------------------------------------------------------------------------------


def percent(share: float) -> str:
    """A share in per cent, to two digits, or whole where it is large."""
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def by_distance(kept: pd.DataFrame, data: str) -> pd.DataFrame:
    """Mean errors of one data set by distance in norms of the weights, for each checkpoint and kind of direction."""
    kept = kept[kept["data"] == data]
    kind = kept["toward"].where(kept["toward"] == "", "towards halves").replace("", "random")
    distance = [percent(value) for value in kept["distance"]]
    kept = kept.assign(kind=kind, at=pd.Series(distance, kept.index).where(~kept["whole_way"], "whole way"))
    records = []
    for (checkpoint, direction), of_kind in kept.groupby(["checkpoint", "kind"], sort=False):
        whole = of_kind.loc[of_kind["whole_way"], "distance"]
        means = of_kind.groupby("at", sort=False)[["first_order", "zero_order", "change"]].mean()
        for column, label in (("first_order", "first order"), ("zero_order", "no change"), ("change", "of the change")):
            shown = {
                at: f"{value:.2g}" if column != "change" else percent(value) for at, value in means[column].items()
            }
            records.append({"checkpoint": checkpoint, "direction": direction, "error": label, **shown,
                            "length of the way": percent(whole.mean()) if len(whole) else ""})  # fmt: skip
    return pd.DataFrame(records).fillna("")


def by_method(kept: pd.DataFrame) -> pd.DataFrame:
    """What selecting costs, for each setting and method."""
    named = ["setting", "method", "forward and backward", "forward alone", "operations", "times", "seconds"]
    counts = {name: [f"{count:,}" for count in kept[name]] for name in named[2:4]}
    times = {"times": [f"{value:.3g}" for value in kept["times"]]}
    seconds = {"seconds": ["" if pd.isna(value) else f"{value:,.0f}" for value in pd.to_numeric(kept["seconds"])]}
    return kept.assign(**counts, **times, **seconds)[named]


def by_selection(kept: pd.DataFrame, data: str) -> pd.DataFrame:
    """What every method's selection is worth on one data set: means over seeds with 90 % intervals."""
    kept = kept[kept["data"] == data]
    columns = {"trained on": kept["method"], "sources": [f"{number:g}" for number in kept["tasks"]]}
    for name in ("test_loss", "test_accuracy"):
        if name in kept and kept[name].notna().any():
            pairs = zip(kept[name], kept[f"{name}_half"], strict=True)
            columns[name.replace("_", " ")] = [
                f"{mean:.3f} ± {half:.3f}" if half == half else f"{mean:.3f}" for mean, half in pairs
            ]
    columns |= {
        "regret": ["" if pd.isna(value) else f"{value:.2f}" for value in kept["regret"]],
        "passes": [f"{count:,}" for count in kept["passes"]],
    }
    return pd.DataFrame(columns)


def by_estimator(kept: pd.DataFrame, data: str) -> pd.DataFrame:
    """How every estimator ranks the halves of one data set, by itself and calibrated, each half on the others."""
    kept = kept[kept["data"] == data]

    def shown(column: str, form: Callable[[float], str] = "{:.2f}".format) -> list[str]:
        return ["" if pd.isna(value) else form(value) for value in kept[column]]

    lows = [f" ({low:.2f})" for low in kept["lds_low"]]
    return pd.DataFrame({
        "estimator": kept["estimator"], "LDS": [a + b for a, b in zip(shown("lds"), lows, strict=True)],
        "top quarter": shown("lds_top_quarter"), "regret": shown("regret"), "LDS, calibrated": shown("lds_calibrated"),
        "relative error": shown("relative_error_calibrated", percent), "in 90 % interval": shown("coverage", percent),
        "attainable": shown("attainable"),
    })  # fmt: skip


def by_engine(kept: pd.DataFrame, model: str) -> pd.DataFrame:
    """What per-sample gradients of one model take by engine, in multiples of a training step, the fastest first; and whether
    they are right."""
    kept = kept[kept["model"] == model].astype({"dim": str})

    def shown(column: str, form: str = "{:.2f}") -> list[str]:
        return [form.format(float(value)) if str(value) else "" for value in kept[column]]

    ranges = zip(shown("time"), shown("time_least"), shown("time_greatest"), strict=True)
    table = pd.DataFrame(
        {
            "d": [f"{int(dim):,}" if dim else "" for dim in kept["dim"]],
            "engine": [" ".join(filter(None, names)) for names in zip(kept["engine"], kept["version"], strict=True)],
            "time": [f"{middle} ({least} to {greatest})" if middle else "" for middle, least, greatest in ranges],
            "memory": shown("memory"),
            "numbers of a row": shown("numbers", "{:,.0f}"),
            "error of inner products": shown("product_error", "{:.2g}"),
            "gradients": kept["remark"].tolist(),
        }
    )
    order = pd.DataFrame(
        {"d": [int(dim or 0) for dim in kept["dim"]], "time": pd.to_numeric(kept["time"].tolist(), errors="coerce")}
    )
    return table.loc[order.sort_values(["d", "time"], kind="stable").index]


VIEWS = {view.__name__: view for view in (by_distance, by_engine, by_estimator, by_method, by_selection)}


def rendered_document(path: Path) -> str:
    """A document with every table put anew. ValueError: a comment names an unknown view, or has no end."""
    text = path.read_text(encoding="utf-8")
    marks = re.findall(r"<!-- (\S+\.csv .*?) -->", text)

    def rendered(match: re.Match[str]) -> str:
        file, view, *words = match[1].split()
        if view not in VIEWS:
            raise ValueError(f"{path}: {match[1]}: no view {view}; choose one of {', '.join(VIEWS)}")
        table = VIEWS[view](read_table(path.parent / file), *words)
        return f"<!-- {match[1]} -->\n{markdown(table)}\n<!-- end -->"

    new, count = re.subn(r"<!-- (\S+\.csv [^>]*?) -->\n(?:(?!<!--).)*<!-- end -->", rendered, text, flags=re.DOTALL)
    if count < len(marks):
        raise ValueError(f"{path}: {len(marks)} tables begin and {count} have an end; put <!-- end --> below each")
    return new


def markdown(table: pd.DataFrame) -> str:
    """A table in Markdown, numbers to four digits."""
    lines = [[str(name) for name in table.columns], ["---"] * len(table.columns)]
    for row in table.itertuples(index=False):
        lines.append([f"{value:.4g}" if isinstance(value, float) else str(value) for value in row])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The script's flags."""
    parser = console.Parser(__doc__, "TABLE")
    parser.add_argument("name", nargs="?", choices=tuple(TABLES), help="which table; none with --into")
    group = parser.add_argument_group("data sets")
    group.add_argument("--results", nargs="+", metavar="SET", help="data sets, folders below results/tables/<name>/ "
                       "(required with a table's name)")  # fmt: skip
    group = parser.add_argument_group("documents")
    group.add_argument("--into", metavar="FILE", help="put the tables of a document anew (default: none)")
    args = parser.parse_args(argv)
    if bool(args.into) == bool(args.name) or bool(args.results) != bool(args.name):
        parser.error("give a table's name with --results, or --into alone")
    return args


def main(args: argparse.Namespace) -> None:
    """Read, put together, write, show."""
    if args.into:
        text = rendered_document(Path(args.into))
        with atomic_write(Path(args.into)) as temporary:
            temporary.write_text(text, encoding="utf-8")
        print(f"Wrote the tables of {args.into}.")
        return
    folder = results_dir(f"tables/{args.name}")
    table = TABLES[args.name]({name: folder / name for name in args.results})
    text = "\n\n".join([markdown(table), *([PUBLISHED[args.name]] if args.name in PUBLISHED else [])])
    write_table(folder / "table.csv", table)
    with atomic_write(folder / "table.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    print(f"{text}\nWrote {folder}/table.md and table.csv.")


if __name__ == "__main__":
    console.run_stage(main, parse_args())
