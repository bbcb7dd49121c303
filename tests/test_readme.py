"""Every command, link, file and flag on every page is there, and what the project prints or ships parses with its script's parser."""

from __future__ import annotations

import ast
import re
import shlex
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from src import config
from tests.commands import ROOT, STAGES, load_script

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
EVERYTHING = "\n".join(TEXTS.values())


def commands(text: str) -> list[list[str]]:
    """The `python <script>.py …` commands of a text, continuation lines joined."""
    joined = re.sub(r"\\\\?\n", " ", text)
    found = re.findall(r"^\s*(?:\$ )?(?:\.venv/bin/)?python ([\w/]+\.py)\b([^\n]*)", joined, re.MULTILINE)
    return [[script, *shlex.split(rest.split(" #")[0])] for script, rest in found]


def started_by_torchrun(text: str) -> list[list[str]]:
    """The scripts that `torchrun …` starts, with their flags."""
    found = re.findall(r"^torchrun .*?([\w/]+\.py)\b([^\n]*)", re.sub(r"\\\n", " ", text), re.MULTILINE)
    return [[script, *shlex.split(rest)] for script, rest in found]


SOURCES = [*PAGES, *sorted(ROOT.glob("scripts/**/*.sh")), *sorted(ROOT.glob("*.py")),
           *sorted(ROOT.glob("data/*.py")), *sorted(ROOT.glob("notebook/*.py")), *sorted(ROOT.glob("scripts/*.py"))]  # fmt: skip


def placeholders_filled(words: list[str]) -> list[str]:
    """`<name>` and `…` of a documented command become words."""
    return [re.sub(r"<[^>]*>", "name", word) for word in words if word != "…"]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_commands_parse(source: Path) -> None:
    text = source.read_text(encoding="utf-8")
    inline = "\n".join(re.findall(r"`(python [\w/]+\.py[^`]*)`", text)) if source in PAGES else ""
    for script, *arguments in [*commands(text), *commands(inline), *started_by_torchrun(text)]:
        try:
            load_script(script).parse_args(placeholders_filled(arguments))
        except SystemExit as error:
            pytest.fail(f"{source.name}: python {script} {' '.join(arguments)} does not parse ({error})")


def test_the_readme_is_short_and_names_every_page() -> None:
    text = TEXTS["README.md"]
    assert len(text.splitlines()) <= 230
    missing = {path for path in TEXTS if path != "README.md"} - set(re.findall(r"\]\((docs/[\w.]+\.md)", text))
    assert not missing


def test_the_pages_name_every_stage() -> None:
    assert set(STAGES) <= {script for script, *_ in commands(EVERYTHING)}
    in_readme = {script for script, *_ in commands(TEXTS["README.md"])}
    assert {stage for stage in STAGES if "/" not in stage} <= in_readme


def anchor(heading: str) -> str:
    """What GitHub calls a heading in links."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"```.*?```", "", TEXTS[page], flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("https://"):
            continue
        name, _, heading = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.is_file(), f"{page}: {target}"
        headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE) if heading else []
        assert not heading or heading in map(anchor, headings), f"{page}: {target}"


@pytest.mark.parametrize("page", TEXTS)
def test_files_that_are_named_exist(page: str) -> None:
    text = TEXTS[page]
    named = re.findall(r"`((?:src|tests|scripts|notebook|data|docs)/[\w/]+\.(?:py|sh|md))`", text)
    scripts = re.findall(r"(?:bash|python) ((?:scripts/|notebook/|data/)?[\w/]+\.(?:sh|py))", text)
    tops = [name for name in re.findall(r"`(\w+\.py)`", text) if name != "fast_estimate_linear_model.py"]  # elsewhere
    assert not [name for name in (*named, *scripts) if not (ROOT / name).is_file()]
    assert not [name for name in tops if not any(ROOT.glob(f"{name}")) and not any(ROOT.glob(f"*/{name}"))]


def test_every_module_stands_in_the_tree() -> None:
    tree = TEXTS["README.md"].split("## Files")[1].split("```")[1]
    patterns = [*re.findall(r"\b([a-z_]+\*?)\.py", tree), *re.findall(r"(\w+_)\*\.py", tree)]
    stems = {path.stem for path in (ROOT / "src").glob("*.py")} - {"__init__"}
    assert not [stem for stem in stems if stem not in patterns and not stem.startswith("stage_")]
    assert "stage_*.py" in tree


def test_figures_of_the_readme_stand_on_the_pages_that_it_links_to() -> None:
    """The results table has no number of its own."""
    table = TEXTS["README.md"].split("## How well it works")[1].split("## How it works")[0]
    others = "\n".join(text for page, text in TEXTS.items() if page != "README.md")
    numbers, known = (set(re.findall(r"\u2212?\d+\.\d+", text)) for text in (table, others))
    assert len(numbers) > 20 and numbers <= known


# docs/decisions.md names what was rejected
OFFERED = "\n".join(text for page, text in TEXTS.items() if page != "docs/decisions.md")


@pytest.mark.parametrize("flag", sorted(set(re.findall(r"`(--[a-z_]+)", OFFERED))))
def test_flags_named_on_the_pages_exist(flag: str) -> None:
    groups = [value for value in vars(config).values() if isinstance(value, type) and is_dataclass(value)]
    declared = {f"--{f.name}" for group in groups for f in fields(group)} | {"--device", "--project_dimension"}
    scripts = [
        path
        for pattern in ("scripts/*.py", "data/*.py", "notebook/*.py", "scripts/tables/*.sh")
        for path in ROOT.glob(pattern)
    ]
    assert flag in declared or any(f"{flag}" in path.read_text(encoding="utf-8") for path in scripts), flag


def test_python_on_the_pages_parses() -> None:
    blocks = re.findall(r"```py\n(.*?)```", EVERYTHING, re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        ast.parse(block)
