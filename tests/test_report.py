"""The page of a run: the answer first, names as text, and in a browser tables that sort and nothing that overflows."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from src import artifacts
from tests.commands import run_script

HOSTILE = [
    "<script>parent.taken = 1</script>",
    '"><img src=x onerror="parent.taken = 1">',
    "it's' onload='parent.taken = 1",
]
NAMES = [*HOSTILE, "a_name_that_goes_on_" * 6, "plain"]
TARGET = '<svg onload="parent.taken = 1">'
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVERYTHING = "0 1 2 3 4"


@pytest.fixture
def run(workspace: Path) -> Path:
    """What the stages leave of a run that selected the sources 1 and 4: two halves and the base model are fine-tuned."""
    folder = artifacts.results_dir("run")
    folder.mkdir(parents=True)
    stage_3 = {"model_key": "models/<b>tiny", "tasks": NAMES, "ranks_only": False, "seconds": {"gradients": 90.0},
               "targets": [TARGET], "calibrate": None, "commands": ["python stage_3.py <i>"], "next": "python go.py"}  # fmt: skip
    artifacts.write_manifest(folder, stage_3)
    estimates = {"subset": ["0 1", "1 2", "0 3", "2 3"], "run": 0, f"estimate/{TARGET}": [2.2, 1.9, 2.4, 2.6]}
    pd.DataFrame(estimates).to_csv(folder / "estimates.csv")
    return folder


def select(folder: Path) -> None:
    """Add what stage 4 and the random ensemble write."""
    steps = {"target": TARGET, "step": [1, 2, 3], "task": [4, 1, 0], "name": [NAMES[task] for task in (4, 1, 0)],
             "estimate": [2.0, 1.5, 1.7], "selected": [True, True, False], "subset": ["4", "1 4", "0 1 4"]}  # fmt: skip
    pd.DataFrame(steps).to_csv(folder / "selection.csv", index=False)
    references = {TARGET: {"base model (measured)": 3.0, "all tasks (estimated)": 2.5}}
    facts = {"references": references, "trust": "Trust is <middling>.", "seconds": 30.0, "command": "python stage_4.py",
             "training": "python train.py --save_name run", "subset_file": "sampled_tasks/run.txt"}  # fmt: skip
    (folder / "selection.json").write_text(json.dumps(facts))
    sources = {"target": TARGET, "name": NAMES, "rows": [9, 10, 100, 20, 1000], "tokens": [5, 4, 3, 2, 1],
               "affinity": [0.5, -0.25, 1e-3, -20.0, 3.0], "selected": [False, True, False, False, True],
               "change": 0.1}  # fmt: skip
    pd.DataFrame(sources).to_csv(folder / "sources.csv", index=False)
    scores = {"task": [4, 1, 0, 2, 3], "name": [NAMES[task] for task in (4, 1, 0, 2, 3)], "score": [1.0, 2, 3, 4, 5],
              "standard_error": 0.1, "selected": [True, True, False, False, False]}  # fmt: skip
    pd.DataFrame(scores).to_csv(folder / "scores.csv", index=False)
    (folder / "scores.json").write_text(json.dumps({"seconds": 1.0, "command": "python ensemble.py"}))


def fine_tune(folder: Path, losses: dict[str, float], runs: int = 2) -> None:
    """Add stage 1's table."""
    rows = [{"subset": text, "run": number, "num_rows": 5, f"validation_loss/{TARGET}": loss + 0.01 * number,
             f"test_loss/{TARGET}": loss + 0.1 + 0.01 * number, "seconds": 60.0}
            for text, loss in losses.items() for number in range(runs)]  # fmt: skip
    pd.DataFrame(rows).to_csv(folder / "results.csv", index=False)


def made(folder: Path) -> str:
    run_script("scripts/report.py", folder)
    return (folder / artifacts.REPORT_FILE).read_text(encoding="utf-8")


def bars(page: str) -> str:
    """What the chart of losses says to those who do not see it."""
    return html.unescape(re.search(r'aria-label="(Bar chart[^"]*)"', page)[1])


def in_order(page: str, *texts: str) -> None:
    places = [page.index(html.escape(text)) for text in texts]
    assert places == sorted(places), dict(zip(texts, places, strict=True))


def test_before_anything_is_selected_the_page_says_what_to_run(run):
    page = made(run)
    in_order(page, "Which of 5 data sources should ", "Nothing is selected yet", "python go.py")
    assert "<svg" not in page and "1.5 min" in page


def test_before_anything_is_fine_tuned_the_answer_is_an_estimate(run):
    select(run)
    page = made(run)
    in_order(page, f"best for {TARGET}: {NAMES[1]}, plain (2 of 5 sources)", "1.5 of these", "not been fine-tuned",
             "this answer (2 sources)", "Trust is <middling>.", "2.0 min", "train.py --save_name run --subset_file sampled")  # fmt: skip
    found = "this answer (2 sources): 1.500 estimated; all 5 sources: 2.500 estimated; base model: 3.000."
    assert bars(page) == f"Bar chart. {found}"


def test_what_was_measured_is_the_answer(run):
    """A random subset is better than what was selected; bars are of test losses with intervals over the seeds."""
    select(run)
    fine_tune(run, {"": 3.0, EVERYTHING: 2.0, "1 4": 1.2, "0 1": 1.0, "1 2": 1.1, "0 3": 1.3})
    page = made(run)
    in_order(page, f"Train on: {NAMES[0]}, {NAMES[1]} (2 of 5 sources)", "Bar chart", "Over 3 subsets", "14.0 min",
             "scripts/export_selection.py --save_name run --task_idxes 0 1", "--task_idxes 0 1 --runs 3",
             "Are the estimates right?", "How the search went", "Every source", "Really fine-tuned", "stage_3.py <i>")  # fmt: skip
    half = 6.313752 * 0.01 / 2  # Student's t with a degree of freedom, standard deviation 0.01 / sqrt(2) of two
    interval = f"{1.105 - half:.3f} to {1.105 + half:.3f}"
    assert f"this answer (2 sources): 1.105 ({interval}); by the search and ensemble (2): 1.305" in bars(page)
    assert "random subsets (mean of 2): 1.305 (1.205 to 1.405); base model: 3.105" in bars(page)


def test_a_selection_that_is_worse_stands_in_the_chart_and_leads_to_the_page_about_it(run):
    """Also where estimates are scores, which have no bars; with no random subset measured no comparison is proposed."""
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**manifest, "ranks_only": True}))
    select(run)
    steps = pd.read_csv(run / "selection.csv").rename(columns={"estimate": "score"})
    steps.to_csv(run / "selection.csv", index=False)
    fine_tune(run, {"": 3.0, EVERYTHING: 2.0, "1 4": 2.5}, runs=1)
    page = made(run)
    in_order(
        page,
        "this answer (5 sources): 2.100; by the search and ensemble (2): 2.600",
        "docs/worse.md says how",
        "docs/worse.md has",
    )
    assert "compare_estimates" not in page


def test_the_numbers_of_a_column_line_up(run):
    """Four digits of the largest, the same decimals below it."""
    select(run)
    fine_tune(run, {"": 3.0, EVERYTHING: 0.0012345, "1 4": 12.3}, runs=1)
    table = made(run).split("Really fine-tuned")[1].split("</table>")[0]
    assert re.findall(r">([\d.]+)</td><td[^>]*>([\d.]+)</td>", table) == [
        ("0.00", "0.10"),
        ("3.00", "3.10"),
        ("12.30", "12.40"),
    ]


def test_nothing_may_help(run):
    select(run)
    fine_tune(run, {"": 1.0, EVERYTHING: 2.0, "1 4": 1.2}, runs=1)
    page = made(run)
    in_order(page, "Nothing here helps", "base model: 1.100", "train.py --save_name run --subset_file")
    assert "export_selection" not in page


def test_names_stay_text_and_figures_have_alternatives(run):
    """Outside of attributes no hostile name is markup; every picture says what it shows."""
    select(run)
    fine_tune(run, {"": 3.0, EVERYTHING: 2.0, "1 4": 1.2})
    for name in (artifacts.SELECTION_FIGURE, artifacts.TRADEOFF_FIGURE, artifacts.AFFINITY_FIGURE):
        (run / name).write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(16))
    page = made(run)
    for name in (*HOSTILE, TARGET, "<b>tiny", "<middling>", "<i>"):
        assert name not in page and html.escape(name) in page, name
    pictures = re.findall(r"<(?:img|svg) [^>]*>", page)
    assert len(pictures) == 4 and all(re.search(r'(alt|aria-label)="[^"]{20,}', picture) for picture in pictures)
    bare = [re.sub(r'(alt|aria-label)="[^"]*"', "", tag) for tag in re.findall(r"<[^>]+>", page)]
    assert not [tag for tag in bare if re.search(r"(src|href)=(?!.data:)", tag)]


PROBE = """
const found = {};
function look(frame) {
  const page = frame.contentDocument, root = page.documentElement, table = page.querySelectorAll("table.sortable")[0];
  const names = () => [...table.tBodies[0].rows].map(row => row.cells[0].textContent);
  const press = (place) => { table.tHead.rows[0].cells[place].querySelector("button").click(); return names(); };
  const wide = [...page.querySelectorAll("body *")].filter(one => !one.closest(".scroll, svg, figure")
    && one.getBoundingClientRect().right > root.clientWidth + 1).map(one => one.outerHTML.slice(0, 80));
  found[frame.width] = {overflow: root.scrollWidth - root.clientWidth, wide, before: names(), rows: press(1), fewer: press(1),
    affinity: press(4), name: press(0), text: page.body.innerText, strangers: page.querySelectorAll("img, [onload], b, i").length,
    scripts: page.scripts.length, sorted: table.querySelectorAll("[aria-sort]").length};
}
addEventListener("load", () => setTimeout(() => {
  document.querySelectorAll("iframe").forEach(look);
  found.taken = window.taken ?? null;
  const told = document.createElement("pre");
  told.id = "told";
  told.textContent = JSON.stringify(found);
  document.body.replaceChildren(told);
}, 300));
"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium")
def test_in_a_browser(run):
    """A frame is a window of its width: nothing is wider, a click on a heading sorts, names run nothing."""
    select(run)
    fine_tune(run, {"": 3.0, EVERYTHING: 2.0, "1 4": 1.2})
    page = html.escape(made(run))
    frames = "".join(f'<iframe width="{width}" height="900" srcdoc="{page}"></iframe>' for width in (400, 1200))
    probe = Path("probe.html").resolve()
    probe.write_text(f"<!doctype html><meta charset=utf-8>{frames}<script>{PROBE}</script>", encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    command = [BROWSER, *flags, f"--user-data-dir={probe.with_name('profile')}", probe.as_uri()]
    told = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False).stdout
    found = json.loads(html.unescape(re.search(r'<pre id="told">(.*?)</pre>', told, re.DOTALL)[1]))
    assert found.pop("taken") is None and len(found) == 2
    for seen in found.values():
        assert seen["overflow"] <= 0 and seen["wide"] == [] and seen["strangers"] == 0 and seen["scripts"] == 1
        assert seen["before"] == NAMES and seen["rows"] == [NAMES[place] for place in (0, 1, 3, 2, 4)]
        assert seen["fewer"] == seen["rows"][::-1] and seen["sorted"] == 1
        assert seen["affinity"] == [NAMES[place] for place in (3, 1, 2, 0, 4)] != seen["name"]
        assert seen["name"].index(NAMES[3]) < seen["name"].index("plain")
        assert all(name in seen["text"] for name in HOSTILE)
