"""One page that answers first: which sources to train on, beside all of them and the base model, and how sure that is.

Below it: what it cost and what to run next; estimates against fine-tuned values, the search's path, every source in a table
that can be sorted, affinities, what was fine-tuned, costs, commands. The page is one file with its figures inside; what a run
has not made is named with the command that makes it.

Reads   results/<name>/
Writes  results/<name>/report.html

    python scripts/report.py results/<name>
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from src import artifacts, console, evaluation, tables
from src.artifacts import results_folder
from src.tables import parse_subset, read_table, subset_text

html = console.load_script("scripts/html_page.py")


@dataclass
class Run:
    """What a results folder holds; `facts` are of the selection, empty where there is none."""

    folder: Path
    manifest: dict[str, Any]

    def __post_init__(self) -> None:
        self.tasks: list[str] = self.manifest["tasks"]
        self.facts, self.summary = self.described(artifacts.SELECTION_FILE), self.described(artifacts.SUMMARY_FILE)
        self.steps, self.truth = (
            self.table(artifacts.SELECTION_FILE),
            self.table(artifacts.RESULTS_FILE, of_subsets=True),
        )
        self.scores, self.estimates = self.table(artifacts.SCORES_FILE), self.table(artifacts.ESTIMATES_FILE)
        self.measured, self.everything = set(self.truth.get("subset", ())), subset_text(range(len(self.tasks)))
        self.seeds = self.truth["run"].nunique() if self.measured else 0
        kept, known = evaluation.kept_targets(self.folder)[0], tables.columns_of(self.truth, tables.VALIDATION_LOSS)
        own = [name for name in tables.own_targets(self.manifest["targets"], self.tasks) if name not in kept]
        self.targets = [name for name in own if name in known] or own
        self.model = str(self.manifest["model_key"]).rstrip("/").rpartition("/")[2]

    def described(self, name: str) -> dict[str, Any]:
        """What stands beside a table."""
        return artifacts.described(self.folder, str(Path(name).with_suffix(".json")), "make it again")

    def table(self, name: str, of_subsets: bool = False) -> pd.DataFrame:
        """A table, empty where it is not there."""
        path = self.folder / name
        return read_table(path, of_subsets) if path.is_file() else pd.DataFrame()

    @cached_property
    def selected(self) -> dict[str, tuple[str, float]]:
        """Of each search, by target: the subset and its estimate."""
        found = {}
        for target, steps in self.steps.groupby("target", sort=False) if len(self.steps) else ():
            last = steps[steps["selected"]].iloc[-1:]
            value = tables.SCORE if tables.SCORE in steps else tables.ESTIMATE
            nothing = next(iter(self.references(str(target)).values()), math.nan)
            found[str(target)] = (last["subset"].item(), float(last[value].item())) if len(last) else ("", nothing)
        return found

    def references(self, target: str) -> dict[str, float]:
        """Of a search: the estimates, or losses, of the base model and of all tasks."""
        return self.facts.get("references", {}).get(target, {})

    @property
    def is_measured(self) -> bool:
        """Whether what is selected, or something else where nothing is, was fine-tuned."""
        texts = {text for text, _ in self.selected.values()}
        return texts <= self.measured | {""} and bool(self.measured - {"", self.everything} | (self.measured & texts))

    @cached_property
    def answer(self) -> evaluation.Answer:
        """The best of what was fine-tuned, or what is selected by estimates."""
        if self.is_measured:
            return evaluation.best_fine_tuned(self.folder, self.tasks)
        lines, ranks_only = [], self.manifest["ranks_only"]
        for target, (text, estimate) in self.selected.items():
            subset, references = parse_subset(text), self.references(target)
            names, count = (
                tables.names_of(subset, self.tasks) or "no source",
                f"{len(subset)} of {len(self.tasks)} sources",
            )
            what = tables.RANKING_ONLY.capitalize() if ranks_only else "Estimated validation loss"
            beside = "".join(f", {value:.4g} of {name}" for name, value in references.items())
            lines += [
                f"Estimated to be best for {target}: {names} ({count}).",
                f"{what}: {estimate:.4g} of these{beside}.",
            ]
            if not ranks_only and estimate >= next(iter(references.values()), math.inf):
                lines[-1] += " No selection is estimated to beat the base model."
        lines += ["It has not been fine-tuned yet."] if lines else ["Nothing is selected yet."]
        only = next(iter(self.selected.values()))[0] if len(self.selected) == 1 else ""
        return evaluation.Answer(parse_subset(only), tuple(lines))

    @property
    def judged(self) -> list[str]:
        """The subsets that have both an estimate and a fine-tuned loss."""
        return sorted((self.measured & set(self.estimates.get("subset", ()))) - {""})

    def losses(self, metric: str, texts: Sequence[str]) -> pd.DataFrame:
        """Losses by subset and run, the mean over targets."""
        if not self.measured:
            return pd.DataFrame()
        rows = self.truth.assign(loss=tables.mean_over_targets(self.truth, metric, self.targets))
        return rows.pivot_table(index="subset", columns="run", values="loss").loc[list(texts)]

    def chart(self) -> str:
        """The answer's loss beside that of the other selections, of all sources, random subsets, and the base model."""
        best, estimates = subset_text(self.answer.subset), {}
        others = [(self.everything, f"all {len(self.tasks)} sources"), ("", "base model")]
        by_search = {text for text, _ in self.selected.values()}
        if len(self.scores) and (text := subset_text(self.scores.loc[self.scores["selected"], "task"].tolist())):
            both = "search and " if text in by_search else "random "
            others.insert(0, (text, f"by the {both}ensemble ({len(parse_subset(text))})"))
        if len(self.selected) == 1:
            ((target, (text, estimate)),) = self.selected.items()
            if not self.manifest["ranks_only"]:
                known = zip(("", self.everything), self.references(target).values(), strict=False)
                estimates = {**dict(known), text: estimate}
            others[:0] = [(text, f"by the search ({len(parse_subset(text))})")] if text else []
        named = {best: f"this answer ({console.counted(len(self.answer.subset), 'source')})" if best else "base model"}
        named |= {text: name for text, name in others if text != best and text in {*self.measured, *estimates}}
        if not set(named) <= {*self.measured, *estimates}:
            return "<p class=muted>No losses are known yet, so there is no chart: nothing is fine-tuned.</p>"
        of_test = (
            set(self.targets) <= set(tables.columns_of(self.truth, tables.TEST_LOSS)) and set(named) <= self.measured
        )
        metric = tables.TEST_LOSS if of_test else tables.VALIDATION_LOSS
        found, bars = self.losses(metric, sorted(self.measured)), []
        for text, name in named.items():
            if text in self.measured:
                runs = found.loc[text].dropna().to_numpy()
                spread = runs.std(ddof=1) / math.sqrt(len(runs)) if len(runs) > 1 else math.nan
                half = stdtrit(max(len(runs) - 1, 1), 0.95) * spread
                bars.append(html.Bar(name, runs.mean(), runs.mean() - half, runs.mean() + half))
            else:
                bars.append(html.Bar(name, estimates[text], measured=text == ""))
        caption = f"Mean {metric.replace('_', ' ')} of {', '.join(self.targets)} in nats per token, lower is better."
        random = sorted((self.measured & set(self.estimates["subset"])) - set(named))
        if len(random) > 1:
            means, label = found.loc[random].mean(axis=1), f"random subsets (mean of {len(random)})"
            bars.insert(-1 if best else len(bars), html.Bar(label, means.mean(), means.min(), means.max()))
            caption += " The line of the random subsets goes from the lowest to the highest."
        caption += "" if all(bar.measured for bar in bars) else " Pale bars are estimates."
        caption += f" Lines are 90 % intervals over {self.seeds} seeds." if self.seeds > 1 else ""
        caption += (
            " One seed each: bars have no intervals, those of differences stand above." if self.seeds == 1 else ""
        )
        return html.bar_chart(bars, caption)

    def trust(self) -> str:
        """How far estimates can be trusted: against what was fine-tuned, and by the agreement of checkpoints."""
        common, prefix = self.judged, tables.estimate_prefix(self.estimates)
        said = "How well estimates rank subsets was not measured here: that takes three random subsets, fine-tuned."
        if len(common) >= 3 and set(self.targets) <= set(tables.columns_of(self.estimates, prefix)):
            guess = tables.mean_over_targets(self.estimates.set_index("subset").loc[common], prefix, self.targets)
            true = self.losses(tables.VALIDATION_LOSS, common).mean(axis=1).to_numpy()
            low, high = evaluation.bootstrap_interval(np.stack([guess, true], axis=1))
            spearman = (
                f"{evaluation.linear_datamodeling_score(guess, true):.2f} (90 % interval {low:.2f} to {high:.2f})"
            )
            said = f"Over {len(common)} subsets that were really fine-tuned, estimates rank losses with Spearman {spearman}."
        return f"{said} {self.facts.get('trust', '')}{self.worse()}"

    def worse(self) -> str:
        """What to do where the search's own subset was fine-tuned and is not the answer."""
        texts = {text for text, _ in self.selected.values()} - {""}
        if not self.is_measured or not texts or subset_text(self.answer.subset) in texts:
            return ""
        return " What the search selected is worse than this answer: docs/worse.md says how to find out why."

    def seconds(self) -> dict[str, float]:
        """What each stage took."""
        known = {name: value for name, value in self.summary.get("seconds", {}).items() if "fine_tuning" not in name}
        known |= self.manifest["seconds"]
        for stage, name in (
            ("forward_selection", artifacts.SELECTION_FILE),
            ("random_ensemble", artifacts.SCORES_FILE),
        ):
            known |= {stage: facts["seconds"]} if (facts := self.described(name)) else {}
        known |= {"fine-tuning": float(self.truth["seconds"].astype(float).sum())} if self.measured else {}
        return {name.replace("_", " "): value for name, value in known.items() if value}

    def next_html(self) -> str:
        """What to run next."""
        training, file = self.facts.get("training", "python custom_train*.py"), self.facts.get("subset_file", "FILE")
        chosen, flags = " ".join(map(str, self.answer.subset)), training.partition(".py")[2]
        subset = f"--task_idxes {chosen}" if chosen else f"--subset_file {file}"
        commands = {"See whether another seed says the same": f"{training} {subset} --runs {self.seeds + 1}"}
        if not self.selected:
            commands = {"Search for the best subset": self.manifest.get("next", "stage 4")}
        elif not self.is_measured:
            commands = {"Fine-tune what is selected": f"{training} --subset_file {file}"}
        elif chosen:
            write = f"python scripts/export_selection.py{flags} --task_idxes {chosen}"
            commands = {"Write the rows to train on": write, **commands}
        return "".join(f"{escape(why)}:<pre>{escape(command)}</pre>" for why, command in commands.items())

    def sources_html(self) -> str:
        """Every source, a table for each target of a search."""
        sources, parts = self.table(artifacts.SOURCES_FILE), []
        for target, frame in sources.groupby("target", sort=False) if len(sources) else ():
            columns = {"source": frame["name"], "rows": frame["rows"], "tokens": frame["tokens"]}
            if len(self.scores):
                columns["random-ensemble score"] = frame["name"].map(self.scores.set_index("name")["score"])
            columns["alone, lowers the loss by"] = frame["affinity"]
            columns["in or out"] = frame["selected"].map({True: "in", False: "out"})
            columns["change of the loss if taken out or put in"] = frame["change"]
            table = html.table(pd.DataFrame(columns), True, frame["selected"].tolist())
            parts.append(html.details(f"For {target}", table) if sources["target"].nunique() > 1 else table)
        what = "scores that only rank" if self.manifest["ranks_only"] else "estimates"
        note = f"<p class=muted>Losses are {what}. A heading sorts by its column.</p>"
        return "".join(parts) + note if parts else "<p class=muted>Not known yet: stage 4 writes it.</p>"

    def fine_tuned_html(self, shown: int = 15) -> str:
        """What was really fine-tuned: the best subsets by test loss, all tasks and the base model among them."""
        if not self.measured:
            return "<p class=muted>Nothing fine-tuned yet: stage 1's script with --subset_file.</p>"
        targets, truth = self.targets, self.truth
        known = (tables.VALIDATION_LOSS, tables.TEST_LOSS, tables.TEST_ACCURACY)
        metrics = [metric for metric in known if set(targets) <= set(tables.columns_of(truth, metric))]
        columns = {metric.replace("_", " "): tables.mean_over_targets(truth, metric, targets) for metric in metrics}
        frame = pd.DataFrame({"trained on": truth["subset"], **columns, "seconds": truth["seconds"].astype(float)})
        order = "test loss" if "test loss" in columns else "validation loss"
        frame = frame.groupby("trained on", as_index=False).mean().sort_values(order)
        marked = frame["trained on"].isin(["", self.everything])
        best = pd.concat([frame[~marked].head(shown), frame[marked]]).sort_values(order)
        called = {"": "nothing (base model)", self.everything: f"all {len(self.tasks)} sources"}
        texts = best["trained on"]
        best["trained on"] = [called.get(text) or tables.names_of(parse_subset(text), self.tasks, 6) for text in texts]
        note = f"<p class=muted>The best {shown} of {len(frame)} by {order}.</p>" if len(frame) > len(best) else ""
        return html.table(best, sortable=True) + note


def search_html(run: Run) -> str:
    """The path of the search as a figure and as a table, and what it does to other targets."""
    figure, caption = run.folder / artifacts.SELECTION_FIGURE, "The estimate along the search, step by step"
    path = html.figure(figure, caption, run.manifest.get("next", ""))
    if len(run.steps):
        path += html.details("The path as a table", html.table(run.steps.drop(columns=["task"])))
    if (figure := run.folder / artifacts.TRADEOFF_FIGURE).is_file():
        caption = "The target's estimate against the rise of the worst of the targets to keep, step by step"
        path += "<h2>What the selection does to other targets</h2>" + html.figure(figure, caption, "")
    return path


def judged_html(run: Run) -> str:
    """Estimates against fine-tuned values."""
    compared, parts = run.table(artifacts.COMPARISON_FILE), []
    if len(compared):
        several = compared[compared["target"].isin([evaluation.AVERAGE, evaluation.MEAN])]
        kept = ["target", "predictor", "lds", "lds_low", "lds_high", "relative_error", "attainable"]
        parts.append(html.table((several if len(several) else compared)[kept]))
    truth = run.manifest["calibrate"] or (run.folder / artifacts.RESULTS_FILE if run.measured else "TRUTH.csv")
    command = f"python notebook/compare_estimates.py {run.folder / artifacts.ESTIMATES_FILE} {truth}"
    figures = (run.folder / name for name in (artifacts.COMPARISON_FIGURE, artifacts.ESTIMATES_FIGURE))
    figure = next((path for path in figures if path.is_file()), run.folder / artifacts.COMPARISON_FIGURE)
    if not run.manifest["calibrate"] and len(run.judged) < 3:
        command = "Fine-tune a few random subsets first: docs/worse.md has the commands."
    return html.figure(figure, "Estimates against fine-tuned losses, a point for each subset", command) + "".join(parts)


def affinity_html(run: Run) -> str:
    """How much each source alone helps each target."""
    select = f"{run.facts.get('command') or run.manifest.get('next', '')} --per_target"
    figure, caption = run.folder / artifacts.AFFINITY_FIGURE, "How much each source alone lowers each target's loss"
    heat = html.figure(figure, caption, select)
    table = run.table(artifacts.AFFINITY_FILE)
    return heat + (html.details("The heat map as a table", html.table(table, sortable=True)) if len(table) else "")


def page(folder: Path) -> str:
    """The page of a results folder."""
    stage_3 = "fast_estimate_linear_regression.py or fast_estimate_linear_regression_alpaca.py"
    run = Run(folder, artifacts.read_manifest(folder, stage_3))
    targets, (headline, *more) = ", ".join(run.targets), run.answer.lines
    seconds = run.seconds()
    costs = ", ".join(f"{stage} {console.duration(value)}" for stage, value in seconds.items())
    later = (artifacts.SELECTION_FILE, artifacts.SCORES_FILE, artifacts.COMPARISON_FILE)
    commands = [*run.manifest["commands"], *(facts["command"] for name in later if (facts := run.described(name)))]
    caption = "Random-ensemble scores of the sources with standard errors, and how soon their ranking settles"
    ensemble = f"python notebook/select_random_ensemble.py {folder}"
    scores = html.figure(folder / artifacts.SCORES_FIGURE, caption, ensemble)
    stages = html.table(pd.DataFrame({"stage": list(seconds), "seconds": list(seconds.values())}))
    facts = {
        "How far to trust it": f"<p>{html.prose(run.trust())}</p>",
        "What it cost": f"<p>{console.duration(sum(seconds.values()))} ({escape(costs)}).</p>",
        "What to run next": run.next_html(),
    }
    sections = {
        "Are the estimates right?": judged_html(run),
        "How the search went": search_html(run),
        "Every source": run.sources_html() + scores,
        "What each source does to each target": affinity_html(run),
        "Really fine-tuned": run.fine_tuned_html(),
        "What it cost, stage by stage": stages,
        "To make it again": f"<pre>{escape(chr(10).join(commands))}</pre>",
    }
    question = f"Which of {len(run.tasks)} data sources should {run.model} be fine-tuned on for {targets}?"
    title = f"{run.model} for {targets}: which of {len(run.tasks)} data sources"
    body = (
        f"<h1>{escape(question)}</h1><h2 class=answer>{escape(headline)}</h2>"
        f"{''.join(f'<p>{html.prose(line)}</p>' for line in more)}{run.chart()}"
        f"<dl>{''.join(f'<dt>{name}</dt><dd>{content}</dd>' for name, content in facts.items())}</dl>"
        f"{''.join(f'<h2>{name}</h2>{content}' for name, content in sections.items())}"
    )
    return html.document(title, body)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The script's flags."""
    parser = console.Parser(__doc__, "RESULTS …")
    parser.add_argument("results", metavar="RESULTS", nargs="+", help="folders of stage 3's estimates, results/<name>")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """A page for each."""
    for name in args.results:
        folder = results_folder(name)
        content = page(folder)
        with artifacts.atomic_write(folder / artifacts.REPORT_FILE) as temporary:
            temporary.write_text(content, encoding="utf-8")
        print(f"Wrote {folder / artifacts.REPORT_FILE}. Open it in a browser.")


if __name__ == "__main__":
    console.run_stage(main, parse_args())
