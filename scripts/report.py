"""One page to look at: what a run found, as a self-contained HTML file.

The question and the answer, estimates against fine-tuned values, the selection's way, scores, affinities, what was
fine-tuned, costs, and the commands that made it; figures are inside the file, and what a run has not made is named with the
command that makes it.

Reads   results/<name>/
Writes  results/<name>/report.html

    python scripts/report.py results/<name>
"""

from __future__ import annotations

import argparse
import base64
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

import pandas as pd

from src import console
from src.artifacts import (
    AFFINITY_FIGURE,
    COMPARISON_FIGURE,
    COMPARISON_FILE,
    ESTIMATES_FIGURE,
    ESTIMATES_FILE,
    REPORT_FILE,
    RESULTS_FILE,
    SCORES_FIGURE,
    SCORES_FILE,
    SELECTION_FIGURE,
    SELECTION_FILE,
    atomic_write,
    read_manifest,
    results_folder,
)
from src.evaluation import AVERAGE, MEAN, best_fine_tuned
from src.tables import (
    TEST_ACCURACY,
    TEST_LOSS,
    columns_of,
    mean_over_targets,
    names_of,
    own_targets,
    parse_subset,
    read_table,
)

STYLE = """
body { font: 16px/1.5 Georgia, serif; color: #222; max-width: 62rem; margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
p.lead { font-size: 1.1rem; } .muted { color: #777; }
figure { margin: .6rem 0; } img { max-width: 100%; } figcaption { color: #555; font-size: .9rem; }
table { border-collapse: collapse; font-size: .88rem; margin: .5rem 0; }
th, td { padding: .22rem .8rem .22rem 0; text-align: left; border-bottom: 1px solid #ddd; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.tasks span { background: #fde8d7; border-radius: .25rem; padding: .05rem .45rem; margin: 0 .3rem .3rem 0;
  display: inline-block; font: .85rem ui-monospace, monospace; }
pre { background: #f6f6f6; padding: .7rem; overflow-x: auto; font-size: .8rem; white-space: pre-wrap; }
"""


def table_html(frame: pd.DataFrame) -> str:
    """A frame as an HTML table, numbers with four significant digits."""

    def cell(value: object, tag: str, numeric: bool) -> str:
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        return f"<{tag}{' class=number' if numeric else ''}>{escape(text)}</{tag}>"

    numeric = [pd.api.types.is_numeric_dtype(frame[name]) for name in frame.columns]
    head = "".join(cell(name, "th", is_number) for name, is_number in zip(frame.columns, numeric, strict=True))
    lines = [
        "".join(cell(value, "td", is_number) for value, is_number in zip(row, numeric, strict=True))
        for row in frame.itertuples(index=False)
    ]
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def figure_html(path: Path, caption: str, made_by: str) -> str:
    """A figure inside the page, or what would make it."""
    if not path.is_file():
        return f"<p class=muted>{escape(caption)}: not made yet. <code>{escape(made_by)}</code></p>"
    data = base64.b64encode(path.read_bytes()).decode()
    text = escape(caption)
    return f"<figure><img alt='{text}' src='data:image/png;base64,{data}'><figcaption>{text}</figcaption></figure>"


def tasks_html(subset: Sequence[int], tasks: Sequence[str]) -> str:
    """Names of a subset's tasks."""
    return f"<p class=tasks>{''.join(f'<span>{escape(tasks[task])}</span>' for task in subset)}</p>"


def selected_html(folder: Path, tasks: Sequence[str]) -> str:
    """What forward selection and the random ensemble chose."""
    parts = []
    if (folder / SELECTION_FILE).is_file():
        steps = read_table(folder / SELECTION_FILE)
        for target, of_target in steps[steps["selected"]].groupby("target", sort=False):
            best = parse_subset(of_target.iloc[-1]["subset"])
            parts.append(f"<h2>Selected by estimates for {escape(str(target))}: {len(best)} of {len(tasks)} tasks</h2>")
            parts.append(tasks_html(best, tasks))
    if (folder / SCORES_FILE).is_file():
        scores = read_table(folder / SCORES_FILE)
        chosen = scores.loc[scores["selected"], "task"].tolist()
        parts.append(
            f"<h2>By the random ensemble's estimates: {len(chosen)} of {len(tasks)} tasks</h2>"
            + tasks_html(chosen, tasks)
        )
    return "".join(parts) or "<p class=muted>Nothing selected yet: fast_estimate_forward_selection.py</p>"


def fine_tuned_html(folder: Path, tasks: Sequence[str], shown: int = 15) -> str:
    """What was really fine-tuned: the best subsets by test loss, all tasks and the base model among them."""
    if not (folder / RESULTS_FILE).is_file():
        return "<p class=muted>Nothing fine-tuned yet: stage 1's script with --subset_file.</p>"
    truth = read_table(folder / RESULTS_FILE)
    targets = own_targets(columns_of(truth, TEST_LOSS), tasks)
    columns = {"test loss": mean_over_targets(truth, TEST_LOSS, targets)}
    if columns_of(truth, TEST_ACCURACY):
        columns["test accuracy"] = mean_over_targets(truth, TEST_ACCURACY, targets)
    frame = pd.DataFrame({"trained on": truth["subset"], **columns, "seconds": truth["seconds"].astype(float)})
    frame = frame.groupby("trained on", as_index=False).mean().sort_values("test loss")
    everything = " ".join(map(str, range(len(tasks))))
    is_marked = frame["trained on"].isin(["", everything])
    best = pd.concat([frame[~is_marked].head(shown), frame[is_marked]]).sort_values("test loss")
    called = {"": "nothing (base model)", everything: f"all {len(tasks)} tasks"}
    best["trained on"] = [called.get(text) or names_of(parse_subset(text), tasks, 6) for text in best["trained on"]]
    note = f"<p class=muted>The best {shown} of {len(frame)} by test loss.</p>" if len(frame) > len(best) else ""
    return table_html(best) + note


def answer_html(folder: Path, tasks: Sequence[str]) -> str:
    """What to do, where something was fine-tuned."""
    if not (folder / RESULTS_FILE).is_file():
        return ""
    headline, *more = best_fine_tuned(folder, tasks).lines
    return f"<h2>{escape(headline)}</h2><p>{escape(' '.join(more))}</p>"


def later_commands(folder: Path) -> list[str]:
    """What was typed after stage 3 for the tables that are there."""
    described = (folder / Path(name).with_suffix(".json") for name in (SELECTION_FILE, SCORES_FILE, COMPARISON_FILE))
    return [json.loads(path.read_text(encoding="utf-8"))["command"] for path in described if path.is_file()]


def page(folder: Path) -> str:
    """The page of a results folder."""
    manifest = read_manifest(folder, "stage 3 (fast_estimate_linear_regression*.py) with this --results_name")
    tasks, targets = manifest["tasks"], own_targets(manifest["targets"], manifest["tasks"])
    question = (
        f"Which of {len(tasks)} data sources should {manifest['model_key']} be fine-tuned on for {', '.join(targets)}?"
    )
    sections = [
        f"<h1>{escape(folder.name)}</h1><p class=lead>{escape(question)}</p>",
        answer_html(folder, tasks),
        selected_html(folder, tasks),
        "<h2>Are the estimates right?</h2>",
    ]
    if (folder / COMPARISON_FILE).is_file():
        compared = read_table(folder / COMPARISON_FILE)
        several = compared[compared["target"].isin([AVERAGE, MEAN])]
        shown = several if len(several) else compared
        kept = ["target", "predictor", "lds", "lds_low", "lds_high", "relative_error", "attainable"]
        sections.append(table_html(shown[kept]))
    truth = manifest["calibrate"] or "TRUTH.csv"
    compare = f"python notebook/compare_estimates.py {folder / ESTIMATES_FILE} {truth}"
    name = COMPARISON_FIGURE if (folder / COMPARISON_FIGURE).is_file() else ESTIMATES_FIGURE
    select = "fast_estimate_forward_selection.py with stage 3's flags"
    sections += [
        figure_html(folder / name, "Estimates against fine-tuned losses", compare),
        "<h2>How the selection went</h2>",
        figure_html(folder / SELECTION_FIGURE, "The estimate along forward selection", select),
        figure_html(
            folder / SCORES_FIGURE, "Random-ensemble scores and how soon they settle",
            f"python notebook/select_random_ensemble.py {folder}",
        ),
        figure_html(folder / AFFINITY_FIGURE, "How much each task alone helps each target", f"{select} --per_target"),
        "<h2>Really fine-tuned</h2>",
        fine_tuned_html(folder, tasks),
        "<h2>What it cost</h2>",
        table_html(pd.DataFrame({stage.replace("_", " ") + " (s)": [float(v)] for stage, v in manifest["seconds"].items()})),
        "<h2>To make it again</h2>",
        f"<pre>{escape(chr(10).join([*manifest['commands'], *later_commands(folder)]))}</pre>",
    ]  # fmt: skip
    head = f"<meta charset=utf-8><title>{escape(folder.name)}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(sections)}</body></html>\n"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The script's flags."""
    parser = console.Parser(__doc__, "RESULTS …")
    parser.add_argument("results", metavar="RESULTS", nargs="+", help="folders of stage 3's estimates, results/<name>")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """A page for each."""
    for name in args.results:
        folder = results_folder(name)
        with atomic_write(folder / REPORT_FILE) as temporary:
            temporary.write_text(page(folder), encoding="utf-8")
        print(f"Wrote {folder / REPORT_FILE}. Open it in a browser.")


if __name__ == "__main__":
    console.run_stage(main, parse_args())
