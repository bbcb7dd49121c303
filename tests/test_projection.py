"""Projection: unbiased, adjoint, reproducible, and as accurate as the dense matrix on structured gradients."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from src import projection as module
from src.projection import KINDS, RANDOM, Projection, Shape, make_projection, projected_sides

# LoRA A, LoRA B and one matrix smaller than d; (out, in)
SHAPES: dict[str, Shape] = {"layer0.A": (4, 24), "layer0.B": (20, 4), "head": (3, 5)}
NUM_PARAMETERS = sum(math.prod(shape) for shape in SHAPES.values())
DIM = 30

Factors = dict[str, tuple[Tensor, Tensor]]


def random_factors(batch: int = 5, tokens: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32) -> Factors:
    """(B, T, out) and (B, T, in) of every matrix of SHAPES."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tuple(torch.randn(batch, tokens, size, generator=generator).to(dtype) for size in shape)
        for name, shape in SHAPES.items()
    }


def projected(projection: Projection, factors: Factors) -> Tensor:
    """Rows (B, d) of the sum over all matrices."""
    rows = torch.zeros(len(next(iter(factors.values()))[0]), projection.dim)
    for name, (output_gradients, inputs) in factors.items():
        projection.add(name, (output_gradients.shape[2], inputs.shape[2]), output_gradients, inputs, rows)
    return rows


def full_gradients(factors: Factors) -> Tensor:
    """The per-sample p-vectors that projections avoid, (B, p) float64."""
    matrices = [torch.einsum("bto,bti->boi", *(factor.double() for factor in pair)) for pair in factors.values()]
    return torch.cat([matrix.flatten(1) for matrix in matrices], dim=1)


def make(kind: str, seed: int = 0) -> Projection:
    return make_projection(kind, None if kind == "none" else DIM, seed, shapes=SHAPES)


def whole_matrix(projection: Projection) -> Tensor:
    """P (p, d) float64, column by column from `lift`."""
    columns = [projection.lift(unit, SHAPES) for unit in torch.eye(projection.dim, dtype=torch.float64)]
    return torch.stack([torch.cat([matrix.flatten() for matrix in column.values()]) for column in columns], dim=1)


def inner_product_errors(kind: str, dim: int, factors: Factors, num_seeds: int) -> np.ndarray:
    """(<P^T g, P^T h> - <g, h>) / (|g| |h|) of every pair of samples g != h: (seeds, pairs)."""
    gradients = full_gradients(factors)
    exact = gradients @ gradients.T
    norms = exact.diag().sqrt()
    errors = []
    for seed in range(num_seeds):
        rows = projected(make_projection(kind, dim, seed), factors).double()
        relative = (rows @ rows.T - exact) / torch.outer(norms, norms)
        errors.append(relative[tuple(torch.triu_indices(len(rows), len(rows), 1))].numpy())
    return np.array(errors)


@pytest.mark.parametrize("kind", KINDS)
def test_add_and_lift_are_adjoint(kind: str) -> None:
    """`add` multiplies by P^T and `lift` by P, the same P: P itself, taken from `lift`, reproduces the rows."""
    projection, factors = make(kind), random_factors()
    expected = full_gradients(factors) @ whole_matrix(projection)
    torch.testing.assert_close(projected(projection, factors).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["sketch", "two_sided", "dense"])
def test_inner_products_are_unbiased(kind: str) -> None:
    """E<P^T g, P^T h> = <g, h>, also for gradients that all layers share."""
    factors = {name: tuple(1 + factor for factor in pair) for name, pair in random_factors().items()}
    num_seeds = 200
    errors = inner_product_errors(kind, DIM, factors, num_seeds)
    standard_error = errors.std(axis=0) / math.sqrt(num_seeds)
    assert (np.abs(errors.mean(axis=0)) <= 4.5 * standard_error).all()


@pytest.mark.parametrize("kind", ["sketch", "dense"])
@pytest.mark.parametrize("dim", [100, 400])
def test_inner_product_variance_is_one_over_d(kind: str, dim: int) -> None:
    """The relative error of inner products of random low-rank gradients is 1/sqrt(d)."""
    generator = torch.Generator().manual_seed(1)
    factors = {
        name: (torch.randn(8, 2, out, generator=generator), torch.randn(8, 2, size, generator=generator))
        for name, (out, size) in {"A": (8, 200), "B": (200, 8)}.items()
    }
    error = np.sqrt((inner_product_errors(kind, dim, factors, num_seeds=20) ** 2).mean())
    assert error == pytest.approx(1 / math.sqrt(dim), rel=0.12), "a factor of sqrt(2) means the signs repeat"


def structured_factors(structure: str, batch: int = 8, out: int = 16, size: int = 200) -> Factors:
    """Gradients whose weight sits on one rank, a row, a column or two columns d = 100 apart, in four layers."""
    generator = torch.Generator().manual_seed(2)
    factors = {}
    for layer in range(4):
        tokens = 1 if structure == "rank one" else 3
        output_gradients = torch.randn(batch, tokens, out, generator=generator)
        inputs = torch.randn(batch, tokens, size, generator=generator)
        if structure == "hot row":
            output_gradients[:, :, 1:] *= 0.02
        elif structure == "hot column":
            inputs[:, :, 1:] *= 0.02
        elif structure == "columns d apart":
            inputs[:, :, [column for column in range(size) if column not in (7, 107)]] *= 0.02
        factors[f"layer{layer}"] = (output_gradients, inputs)
    return factors


@pytest.mark.parametrize("structure", ["rank one", "hot row", "hot column", "columns d apart"])
def test_sketch_keeps_its_accuracy_on_structured_gradients(structure: str) -> None:
    """No structure of rows and columns makes entries collide together: the error stays that of the dense matrix."""
    errors = inner_product_errors("sketch", 100, structured_factors(structure), num_seeds=40)
    assert np.sqrt((errors**2).mean()) <= 0.115, "0.1 is the dense matrix; more means that whole columns collide"


@pytest.mark.parametrize("dim", [97, 100, 1024])
def test_two_sided_error_stays_near_the_dense_one(dim: int) -> None:
    """One side of a LoRA matrix stays whole, so that even a gradient of rank one loses little; d may be a prime."""
    errors = inner_product_errors("two_sided", dim, structured_factors("rank one"), num_seeds=40)
    assert np.sqrt((errors**2).mean()) <= 1.5 / math.sqrt(dim)


def test_sketch_is_exact_for_a_matrix_that_fits() -> None:
    """At most d entries never share a bin."""
    factors = {"head": random_factors()["head"]}
    gradients = full_gradients(factors)
    rows = projected(make("sketch"), factors).double()
    torch.testing.assert_close(rows @ rows.T, gradients @ gradients.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_added_up_linearly(kind: str) -> None:
    """Two tokens in one call, or one in each of two calls, give the same row; what was in the row stays."""
    projection, factors = make(kind), random_factors(tokens=2)
    rows = torch.ones(5, projection.dim)
    for token in (0, 1):
        for name, (output_gradients, inputs) in factors.items():
            one = (slice(None), slice(token, token + 1))
            projection.add(name, SHAPES[name], 3 * output_gradients[one], inputs[one], rows)
    torch.testing.assert_close(rows, 1 + 3 * projected(projection, factors), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["sketch", "two_sided", "dense"])
def test_draw_depends_on_seed_name_and_shape_only(kind: str) -> None:
    """The order of matrices, other matrices and the batch do not matter; seed and name do."""
    factors = random_factors()
    backwards = dict(reversed(factors.items()))
    torch.testing.assert_close(projected(make(kind), backwards), projected(make(kind), factors))
    alone = {name: (delta[2:3], inputs[2:3]) for name, (delta, inputs) in factors.items()}
    torch.testing.assert_close(projected(make(kind), alone), projected(make(kind), factors)[2:3])
    head = factors["head"]
    first = projected(make(kind), {"head": head})
    assert not torch.equal(projected(make(kind, seed=1), {"head": head}), first)
    assert not torch.equal(projected(make(kind), {"tail": head}), first)


@pytest.mark.parametrize(
    ("kind", "digest"),
    [("sketch", "bf010463a8bfa0fe"), ("two_sided", "bd7e3fe17998e2af"), ("dense", "2ec7877539fe8910")],
)
def test_draw_never_changes(kind: str, digest: str) -> None:
    """Stored rows stay usable: a seed names the same matrix in every process, version and machine."""
    lifted = make_projection(kind, 16, 3).lift(torch.arange(1.0, 17.0), {"w": (6, 8)})["w"]
    rounded = [round(value) for value in (4 * lifted).flatten().tolist()]
    assert hashlib.sha256(str(rounded).encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_factors_are_summed_in_float32(kind: str) -> None:
    """bfloat16 factors give what their values give in float32, inside an autocast region too."""
    factors = random_factors(dtype=torch.bfloat16)
    exact = projected(make(kind), {name: (delta.float(), inputs.float()) for name, (delta, inputs) in factors.items()})
    assert torch.equal(projected(make(kind), factors), exact)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(projected(make(kind), factors), exact)


@pytest.mark.parametrize("block_entries", [1, 1000])
def test_dense_block_size_is_irrelevant(block_entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks bound memory only, and so does redrawing the signs rather than keeping them."""
    factors, expected = random_factors(), projected(make("dense"), random_factors())
    blocked = RANDOM["dense"](DIM, 0, block_entries=block_entries)
    torch.testing.assert_close(projected(blocked, factors), expected)
    monkeypatch.setattr(module, "_RESIDENT_BYTES", 0)
    redrawn = RANDOM["dense"](DIM, 0, block_entries=block_entries)
    torch.testing.assert_close(projected(redrawn, factors), expected)
    assert torch.equal(whole_matrix(redrawn), whole_matrix(make("dense")))


def test_large_matrices_are_taken_in_groups_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several groups of rows, several chunks of samples: still the adjoint of `lift`, whatever the chunk."""
    shape, generator = (5, 1 << 17), torch.Generator().manual_seed(3)
    factors = {"w": tuple(torch.randn(3, 2, size, generator=generator) for size in shape)}
    solution = torch.randn(DIM, generator=generator)
    projection = make_projection("sketch", DIM, 0)
    lifted = projection.lift(solution, {"w": shape})["w"].flatten().double()
    rows = projected(projection, factors)
    gradients = full_gradients(factors)
    torch.testing.assert_close(rows.double() @ solution.double(), gradients @ lifted, rtol=1e-3, atol=1e-2)
    monkeypatch.setattr(module, "_CHUNK_ENTRIES", 1)
    torch.testing.assert_close(projected(projection, factors), rows)


def test_dense_packed_signs_are_the_matrix() -> None:
    """+-1/sqrt(d) of the saved bits is P."""
    bits = np.unpackbits(make("dense").packed_signs("head", (3, 5)), axis=1)[:, :DIM]
    matrix = (bits.astype(float) * 2 - 1) / math.sqrt(DIM)
    rows = full_gradients({"head": random_factors()["head"]}).numpy() @ matrix
    np.testing.assert_allclose(projected(make("dense"), {"head": random_factors()["head"]}), rows, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "num_signs"), [("sketch", 96), ("two_sided", None), ("dense", 96 * 64), ("none", 0)])
def test_packed_signs_are_as_many_as_documented(kind: str, num_signs: int | None) -> None:
    """And half of them are positive."""
    packed = make(kind).packed_signs("layer0.A", (4, 24))
    if num_signs is None:
        num_signs = sum(size * side for size, side in zip((4, 24), projected_sides((4, 24), DIM), strict=True))
    assert packed.dtype == np.uint8
    assert packed.size == math.ceil(num_signs / 8)
    if num_signs:
        assert np.unpackbits(packed).mean() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(num_signs))


def test_none_lays_the_matrices_side_by_side() -> None:
    """The rows are the gradients themselves."""
    factors = random_factors()
    rows = projected(make("none"), dict(reversed(factors.items())))
    torch.testing.assert_close(rows.double(), full_gradients(factors), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "dim", "sides"),
    [
        ((2048, 2048), 400, (20, 20)),  # the most balanced divisors
        ((2048, 2048), 1024, (32, 32)),
        ((16, 2048), 400, (16, 25)),  # the rank whole
        ((2048, 16), 400, (25, 16)),
        ((3, 5), 400, (3, 5)),  # nothing to reduce
    ],
)
def test_projected_sides(shape: Shape, dim: int, sides: Shape) -> None:
    """Balanced, never above the shape, at least d numbers where the shape has them."""
    assert projected_sides(shape, dim) == sides


@pytest.mark.parametrize("dim", [1, 2, 7, 97, 101, 500])
def test_projected_sides_hold_at_least_d_numbers(dim: int) -> None:
    """A prime d costs a few numbers more, which the hash folds over."""
    out, size = projected_sides((64, 64), dim)
    assert dim <= out * size <= dim + min(out, size)


def test_bad_requests_are_refused() -> None:
    """One clear error each."""
    with pytest.raises(ValueError, match="unknown projection 'gauss'; choose one of sketch"):
        make_projection("gauss", 10, 0)
    with pytest.raises(ValueError, match="at least 1, found 0"):
        make_projection("sketch", 0, 0)
    with pytest.raises(ValueError, match="needs the shapes"):
        make_projection("none", None, 0)
    with pytest.raises(ValueError, match=f"keeps all {NUM_PARAMETERS} parameters, found projection dimension 10"):
        make_projection("none", 10, 0, shapes=SHAPES)
    factors, rows = torch.zeros(2, 3, 4), torch.zeros(2, DIM)
    with pytest.raises(ValueError, match=r"expected \(\(2, 3, 4\), \(2, 3, 24\), \(2, 30\)\)"):
        make("sketch").add("layer0.A", (4, 24), factors, factors, rows)
    with pytest.raises(ValueError, match="must be float32, found"):
        make("sketch").add("w", (4, 4), factors, factors, rows.double())
    with pytest.raises(ValueError, match=r"w \(4, 4\) is not one of the matrices"):
        make("none").add("w", (4, 4), factors, factors, torch.zeros(2, NUM_PARAMETERS))
    with pytest.raises(ValueError, match=r"30 numbers, found shape \(29,\)"):
        make("dense").lift(torch.zeros(29), SHAPES)
