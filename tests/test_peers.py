"""The benchmark beside peers: what is flagged as wrong, what is refused, and every peer at a tiny size where it is installed."""

import contextlib
import os
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec

import pandas as pd
import pytest
import torch

from src.console import load_script
from tests.commands import ROOT, refused

peers = load_script("scripts/benchmark_peers.py")
needs_peers = pytest.mark.skipif(find_spec("bergson") is None, reason="see requirements-peers.txt")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return peers.PeersBench("llama", 32, "cpu", 3, 2048, tmp_path_factory.mktemp("bench"))


def engine_off_by(factor: float):
    """This project's engine with every number of one matrix times a factor."""

    @contextlib.contextmanager
    def engine(bench, dim, kept):
        with peers.our_engine(bench, dim, kept) as rows_of:

            def wrong(batch):
                parts = dict(rows_of(batch))
                largest = max(parts, key=lambda name: parts[name].norm())
                return parts | {largest: factor * parts[largest]}

            yield wrong

    return engine


def test_an_engine_whose_gradients_are_off_is_flagged(bench, monkeypatch):
    """By 1 % in one of 36 matrices, or by a refusal; the project's own engine agrees with the loop of backwards."""

    @contextlib.contextmanager
    def unable(bench, dim, kept):
        raise NotImplementedError("decoders only\nmore")
        yield

    engines = {"right": engine_off_by(1.0), "wrong": engine_off_by(1.01), "unable": unable}
    monkeypatch.setattr(peers, "ENGINES", {name: ("", engine) for name, engine in engines.items()})
    found = peers.check(bench, [32], list(engines))
    assert found["right"]["remark"] == "gradients agree" and found["right"]["gradient_error"] < 1e-6
    assert found["wrong"]["remark"].startswith("gradients are off by 0.0") and found["wrong"]["numbers"] == {32: 32}
    assert found["unable"] == {"remark": "cannot: decoders only", "numbers": {}, "product_error": {}}
    assert {parameter.dtype for parameter in bench.model.parameters()} == {torch.float32}


def test_errors_are_those_of_a_loop():
    exact = {"a": torch.tensor([[3.0, 0.0], [1.0, 0.0]]), "b": torch.tensor([[4.0], [0.0]])}
    found = {"b": torch.tensor([[4.0], [0.5]]), "a": torch.tensor([[3.0, 1.0], [1.0, 0.0]])}
    assert peers.gradient_error(found, exact) == pytest.approx(0.5)  # |(0, 0, 1)| / 5 and |(0, 0.5)| / 1
    refused("no gradients of b", peers.gradient_error, {"a": exact["a"]}, exact)
    rows, whole = torch.tensor([[2.0], [1.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    errors = [(4 - 1) / 1, (2 - 0) / 2, (2 - 0) / 2, (1 - 4) / 4]
    assert peers.product_error(rows, whole) == pytest.approx((sum(error**2 for error in errors) / 4) ** 0.5)
    assert peers.judged(float("nan")) == "gradients are off by nan" and peers.judged(1e-5) == "gradients agree"
    assert [peers.side(dim, 36) for dim in (1, 36, 37, 144, 145)] == [1, 1, 2, 2, 3]


def test_other_versions_are_refused(monkeypatch):
    pins = peers.pinned_versions()
    assert {"bergson", "dattri", "dattri-llm"} < set(pins)
    monkeypatch.setattr(metadata, "version", lambda name: pins[name])
    peers.check_versions()
    monkeypatch.setattr(metadata, "version", lambda name: "0.26.1" if name == "bergson" else pins[name])
    refused(f"bergson 0.26.1 instead of {pins['bergson']}; make the peers' environment", peers.check_versions)


def test_a_run_of_some_keeps_the_rest(tmp_path):
    """Rows of other engines stay, and cells that a run leaves out."""
    file = tmp_path / "kept.csv"
    first = {
        "model": "m",
        "dim": [1, 1],
        "engine": ["a", "b"],
        "time": ["1.00", "2.00"],
        "memory": "",
        "remark": "agree",
    }
    peers.keep(file, pd.DataFrame(first))
    second = {"model": "m", "dim": [1], "engine": ["b"], "time": "", "memory": "0.50", "remark": "off"}
    peers.keep(file, pd.DataFrame(second))
    assert file.read_text().splitlines()[1:] == ["m,1,a,1.00,,agree", "m,1,b,2.00,0.50,off"]


@needs_peers
@pytest.mark.parametrize("model", ["llama", "t5"])
def test_every_peer_is_right_and_measured(model, tmp_path):
    """In a process of its own, as the memory of an engine is measured in others that import the script anew."""
    flags = ["--model", model, "--dims", "16", "--samples", "2", "--repeats", "1", "--keep", "kept.csv"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(ROOT / "scripts" / "benchmark_peers.py")]
    subprocess.run([*script, *flags], check=True, cwd=tmp_path, env=environment)
    kept = pd.read_csv(tmp_path / "kept.csv", keep_default_na=False)
    assert kept["engine"].tolist() == [peers.STEP, peers.OWN_STEP, *peers.ENGINES]
    assert set(kept["remark"][2:]) == {"gradients agree"} and (kept["time"].astype(float) > 0).all()
    assert (kept["memory"].astype(float) > 0).all() and (kept["numbers"][2:].astype(int) >= 16).all()
