"""Subsets: drawn without repetition, kept in files that can be edited, and clusters as tasks."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from src import subsets as module
from src.subsets import draw_subsets, membership_matrix, read_subsets, read_task_weights, write_subsets
from tests.commands import refused


def test_membership_matrix():
    """A row per subset, a column per task."""
    assert membership_matrix([(0, 2), (), (1,)], 3).tolist() == [[True, False, True], [False] * 3, [False, True, False]]
    refused(r"subset \(1, 3\) holds task 3; tasks are 0 to 2", membership_matrix, [(1, 3)], 3)


def test_subset_size_is_a_share_or_a_count():
    """Below 1 a share, rounded half up and at least one task; from 1 on a count."""
    sizes = {(0.5, 9): 5, (0.5, 10): 5, (0.01, 10): 1, (1, 10): 1, (4, 10): 4, (3.0, 10): 3, (0.5, 400): 200}
    for (size, num_tasks), expected in sizes.items():
        assert {len(subset) for subset in draw_subsets(5, num_tasks, size, seed=0)} == {expected}


@given(num_tasks=st.integers(1, 7), size=st.integers(1, 7), seed=st.integers(0, 3), data=st.data())
def test_drawn_subsets_differ(num_tasks, size, seed, data):
    """Sorted, within range, of the size, all different: up to every subset there is, and the same for the same seed."""
    size = min(size, num_tasks)
    num_subsets = data.draw(st.integers(1, math.comb(num_tasks, size)))
    drawn = draw_subsets(num_subsets, num_tasks, size, seed)
    assert len(set(drawn)) == len(drawn) == num_subsets
    assert all(subset == tuple(sorted(set(subset))) and len(subset) == size for subset in drawn)
    assert all(0 <= task < num_tasks for subset in drawn for task in subset)
    assert drawn == draw_subsets(num_subsets, num_tasks, size, seed)


def test_every_task_is_drawn_as_often():
    """A draw of half of the tasks takes each with probability one half."""
    membership = membership_matrix(draw_subsets(2000, 20, 0.5, seed=1), 20)
    np.testing.assert_allclose(membership.mean(axis=0), 0.5, atol=0.05)
    assert draw_subsets(3, 20, 0.5, seed=1) != draw_subsets(3, 20, 0.5, seed=2)


def test_impossible_draws_are_refused():
    for size in (0, -0.5, 2.5, 11):
        message = f"subset size {size}: expected a share between 0 and 1, or .* 1 to 10"
        refused(message, draw_subsets, 1, 10, size, seed=0)
    refused("11 subsets of 2 out of 5 tasks are asked for, but only 10 exist", draw_subsets, 11, 5, 2, seed=0)


def test_written_subsets_are_read_back(tmp_path):
    """Sorted, under a comment, with nothing else left in the folder, also where one cannot be written."""
    path = tmp_path / "folder" / "subsets.txt"
    write_subsets(path, [(3, 1), (0,), (2, 1)], comment="drawn\nby hand")
    refused("empty subset cannot be written", write_subsets, path, [(0,), ()])
    assert path.read_text() == "# drawn\n# by hand\n1 3\n0\n1 2\n"
    assert read_subsets(path, 4) == [(1, 3), (0,), (1, 2)]
    assert list(path.parent.iterdir()) == [path]


def test_an_edited_file_is_read(tmp_path):
    """Comments, blank lines, tabs, any order, names of tasks, another editor's line ends and byte order mark."""
    path, names = tmp_path / "subsets.txt", ["2", "2019", "case law", "poetry"]
    text = b"\xef\xbb\xbf3 1  # the good ones\r\n\r\n   \t\r\n# 9 9 9\r\n2\t0\r\npoetry,  case  law # mine\n2\n2019"
    path.write_bytes(text)
    assert read_subsets(path, 4, names) == [(1, 3), (0, 2), (2, 3), (2,), (1,)]


def test_a_file_names_its_tasks(tmp_path):
    """Ids of other data are refused, of data that only has more tasks at its end they are read."""
    path, names = tmp_path / "subsets.txt", ["law", "medicine", "po\n etry"]
    write_subsets(path, [(1,), (0, 2)], comment="forward selection", tasks=names)
    assert read_subsets(path, 3, names) == read_subsets(path, 4, [*names, "tort"]) == [(1,), (0, 2)]
    path.write_bytes(path.read_bytes().replace(b"# 0 = law\n", b"  #  0  =  law  \r\n"))
    message = "line 2: task 0 is 'law' there, and 'biology' in the data; draw or select"
    refused(message, read_subsets, path, 4, ["biology", *names])
    message = "line 4: task 2 is 'po etry' there, and not among the 2 tasks in the data"
    refused(message, read_subsets, path, 2, names[:-1])


def test_bad_files_are_refused(tmp_path):
    """The file, the line, the word and what was expected."""
    for text, message in {
        "0 1\n# fine\n2 4\n": "subsets.txt, line 3: '4' is no task id; expected numbers from 0 to 3, or names",
        "0 -1\n": "line 1: '-1' is no task id",
        "0, 1\n": "line 1: '0,' is no task id",
        "a, prose\n": "line 1: 'prose' is no task id",
        "0 1\n2 0 2\n": "line 2: task 2 is named twice",
        "# nothing\n\n": "subsets.txt holds no subset",
        "\udcff0 1": "subsets.txt is not UTF-8 text",
    }.items():
        (tmp_path / "subsets.txt").write_bytes(text.encode("utf-8", "surrogateescape"))
        refused(message, read_subsets, tmp_path / "subsets.txt", 4, ["a", "b", "c", "d"])


def test_the_file_decides(tmp_path):
    """Drawn and written once; from then on the file is read, with whatever a user made of it. Reading never draws."""
    path = tmp_path / "subsets.txt"
    refused(r"subsets\.txt does not exist", read_subsets, path, 10, error=FileNotFoundError)
    drawn = module.load_or_draw_subsets(path, 6, 10, 0.5, seed=3)
    assert drawn == draw_subsets(6, 10, 0.5, seed=3) == read_subsets(path, 10)
    write_subsets(path, [(1, 2)])
    assert module.load_or_draw_subsets(path, 6, 10, 0.5, seed=3) == [(1, 2)]


def test_task_weights(tmp_path):
    path = tmp_path / "weights.csv"
    module.write_task_weights(path, ["law", "a, b"], np.array([0.25, 0.75]))
    assert read_task_weights(path, ["a, b", "law", "other"]).tolist() == [0.75, 0.25, 0]
    path.write_text("name,share\nlaw,1\nlaw,1\n")
    refused(r"weights\.csv: task 'law' stands there twice", read_task_weights, path, ["law"])


@pytest.mark.parametrize("limit", [20_000, 10])
def test_clusters_are_directions(limit, monkeypatch):
    """Length does not matter, ids follow the first appearance, rows of zeros join the largest; the same by k-means."""
    monkeypatch.setattr(module, "MAX_LINKAGE_SAMPLES", limit)
    rng = np.random.default_rng(0)
    truth = np.concatenate([np.arange(3), rng.integers(0, 3, 197)])
    rows = 5 * np.eye(3, 12)[truth] + 0.3 * rng.standard_normal((200, 12))
    rows *= 10 ** rng.uniform(-3, 3, (200, 1))
    zeros = np.isin(np.arange(200), [50, 60])
    rows[zeros], truth[zeros] = 0, np.bincount(truth[~zeros]).argmax()
    clusters = module.cluster_samples(rows.astype(np.float32), 3, seed=0)
    assert clusters.dtype == np.int32
    np.testing.assert_array_equal(clusters, truth)
    assert module.cluster_samples(rows, 1, seed=0).tolist() == [0] * 200


def test_impossible_clusters_are_refused():
    """More clusters than samples with a gradient, or rows that are not finite."""
    rows = np.random.default_rng(0).standard_normal((4, 6))
    rows[1] = 0
    message = "4 clusters of 3 samples with a gradient: expected 1 to 3 clusters"
    refused(message, module.cluster_samples, rows, 4, seed=0)
    rows[2, 3] = np.nan
    refused("row 2 is not finite", module.cluster_samples, rows, 2, seed=0)
