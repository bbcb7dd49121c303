"""Every command that the project prints, documents or ships parses with its script's own parser."""

import ast
import re
import shlex
from dataclasses import fields, is_dataclass

import pytest

from src import config
from tests.commands import ROOT, load_script


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


def test_the_readme_names_every_stage():
    from tests.commands import STAGES

    documented = {script for script, *_ in commands((ROOT / "README.md").read_text(encoding="utf-8"))}
    assert set(STAGES) <= documented


def test_shell_scripts_named_in_the_readme_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    scripts = re.findall(r"bash (\S+\.sh)", text)
    assert {"scripts/quickstart.sh", "scripts/test.sh"} <= set(scripts)
    for script in scripts:
        assert (ROOT / script).is_file(), script


def test_what_the_readme_points_to_is_there():
    """Pictures and files of the repository that it names."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert len(pictures) == 2
    named = re.findall(r"`((?:src|tests|scripts|notebook|data)/[\w/]+\.(?:py|sh))`", text)
    assert len(named) > 8
    for path in (*pictures, *named):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize(
    "flag", sorted(set(re.findall(r"`(--[a-z_]+)", (ROOT / "README.md").read_text(encoding="utf-8"))))
)
def test_flags_named_in_the_readme_exist(flag):
    groups = [value for value in vars(config).values() if isinstance(value, type) and is_dataclass(value)]
    declared = {f"--{f.name}" for group in groups for f in fields(group)} | {"--device", "--project_dimension"}
    scripts = [
        *ROOT.glob("scripts/*.py"),
        *ROOT.glob("data/*.py"),
        *ROOT.glob("notebook/*.py"),
        *ROOT.glob("scripts/tables/*.sh"),
    ]
    assert flag in declared or any(f"{flag}" in path.read_text(encoding="utf-8") for path in scripts), flag


def test_python_in_the_readme_parses():
    blocks = re.findall(r"```py\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        ast.parse(block)
