"""Tables of results that people edit, or that other tools write: read, or refused with the line and the cell."""

import pytest

from src.tables import ResultsTable, read_table
from tests.commands import refused

GOOD = "subset,run,validation_loss/goal,seconds\n0 1,0,0.5,3\n,0,0.75,1\n"


def test_what_another_editor_saves_is_read(tmp_path):
    """Byte order mark, line ends, ids in another order, no columns that nobody needs."""
    path = tmp_path / "results.csv"
    path.write_bytes(b"\xef\xbb\xbfsubset,run,validation_loss/goal\r\n 1  0,0,0.5\r\n,0,nan\r\n")
    table = read_table(path, of_subsets=True)
    assert table["subset"].tolist() == ["0 1", ""] and table["validation_loss/goal"].isna().tolist() == [False, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace(",", ";"), r"no column 'subset'; .* commas between columns \(its first line is 'subset;run"),
        (GOOD.replace("run,", "seed,"), r"no column 'run'"),
        (GOOD.replace("0 1", "0-1"), r"line 2: subset is '0-1', expected task ids separated by spaces"),
        (GOOD.replace("0.75", "0.7O"), r"line 3: validation_loss/goal is '0\.7O', expected a number"),
        (GOOD.replace("0.75", ""), r"line 3: validation_loss/goal is '', expected a number"),
        (GOOD.encode("utf-16"), r"cannot be read as a table"),
    ],
)
def test_a_bad_cell_is_named(text, message, tmp_path):
    path = tmp_path / "results.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(rf"results\.csv.*{message}", read_table, path, of_subsets=True)


@pytest.mark.parametrize("facts", [None, "{half"])
def test_a_table_that_goes_on_needs_its_facts(facts, tmp_path):
    """What its rows were made from stands beside it; without, no row is added."""
    path = tmp_path / "results.csv"
    path.write_text(GOOD)
    if facts:
        path.with_suffix(".json").write_text(facts)
    refused(
        r"results\.json, which says what the rows .* cannot be read .* Choose another",
        ResultsTable,
        path,
        {"lr": 1},
        "Choose another name.",
    )
