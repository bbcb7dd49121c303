"""Every command that the project prints, documents or ships parses with its script's own parser."""

import ast
import re
import shlex
from dataclasses import fields, is_dataclass

import pytest

from src import config
from tests.commands import ROOT, STAGES, load_script

README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(text: str) -> list[list[str]]:
    """The `python <script>.py …` commands of a text, continuation lines joined."""
    joined = re.sub(r"\\\\?\n", " ", text)
    found = re.findall(r"^\s*(?:\$ )?(?:\.venv/bin/)?python ([\w/]+\.py)\b([^\n]*)", joined, re.MULTILINE)
    return [[script, *shlex.split(rest.split(" #")[0])] for script, rest in found]


SOURCES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("scripts/**/*.sh")), *sorted(ROOT.glob("*.py")),
           *sorted(ROOT.glob("data/*.py")), *sorted(ROOT.glob("notebook/*.py")), *sorted(ROOT.glob("scripts/*.py"))]  # fmt: skip


def placeholders_filled(words: list[str]) -> list[str]:
    """`<name>` and `…` of a documented command become words."""
    return [re.sub(r"<[^>]*>", "name", word) for word in words if word != "…"]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_commands_parse(source):
    text = source.read_text(encoding="utf-8")
    for script, *arguments in commands(text):
        try:
            load_script(script).parse_args(placeholders_filled(arguments))
        except SystemExit as error:
            pytest.fail(f"{source.name}: python {script} {' '.join(arguments)} does not parse ({error})")


def test_the_readme_names_every_stage_and_what_it_points_to_is_there():
    """Shell scripts, pictures and files of the repository."""
    assert set(STAGES) <= {script for script, *_ in commands(README)}
    scripts, pictures = re.findall(r"bash (\S+\.sh)", README), re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    named = re.findall(r"`((?:src|tests|scripts|notebook|data)/[\w/]+\.(?:py|sh))`", README)
    assert {"scripts/quickstart.sh", "scripts/test.sh"} <= set(scripts) and len(pictures) == 2 and len(named) > 8
    assert not [path for path in (*scripts, *pictures, *named) if not (ROOT / path).is_file()]


def test_flags_named_in_the_readme_exist():
    groups = [value for value in vars(config).values() if isinstance(value, type) and is_dataclass(value)]
    declared = {f"--{f.name}" for group in groups for f in fields(group)} | {"--device", "--project_dimension"}
    scripts = [path for folder in ("scripts", "data", "notebook") for path in ROOT.glob(f"{folder}/**/*.[ps][yh]")]
    texts = [path.read_text(encoding="utf-8") for path in scripts]
    flags = set(re.findall(r"`(--[a-z_]+)", README)) - declared
    assert not [flag for flag in flags if not any(flag in text for text in texts)]


def test_python_in_the_readme_parses():
    blocks = re.findall(r"```py\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        ast.parse(block)
