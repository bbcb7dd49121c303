"""Stage 3 and the file of subsets: it is taken when it is there, and what contradicts it is said."""

from pathlib import Path

import pytest

from tests.commands import run_script


@pytest.mark.parametrize(
    ("flags", "notices"),
    [
        ([], []),
        (["--number_of_subsets", "3", "--subset_size", "0.5"], []),
        (["--subset_size", "0.25"], ["holds subsets of 2 tasks, and --subset_size 0.25 asks for 1"]),
        (["--number_of_subsets", "2", "--subset_size", "3"],
         ["holds 3 subsets, and --number_of_subsets asks for 2", "holds subsets of 2 tasks, and --subset_size 3 asks for 3"]),
    ],
)  # fmt: skip
def test_flags_that_contradict_a_file_are_named(here, flags, notices, capsys):
    path = Path("pairs.txt")
    path.write_text("0 1\n1 2\n0 3\n")
    named = ["--project_dim", "32", "--sampled_tasks", str(path), "--save_name", "toy"]
    run_script("fast_estimate_linear_regression_alpaca.py", *named, *flags)
    said = [line for line in capsys.readouterr().out.splitlines() if str(path) in line and "is taken" in line]
    assert [line.partition("pairs.txt ")[2].partition(";")[0] for line in said] == notices
    assert path.read_text() == "0 1\n1 2\n0 3\n"
