"""Projection: unbiased, adjoint, reproducible, and as accurate as the dense matrix on structured gradients."""

import hashlib
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from src import projection as module
from src.projection import KINDS, RANDOM, Projection, Shape, make_projection, projected_sides
from tests.commands import refused

# LoRA A, LoRA B and one matrix smaller than d; (out, in)
SHAPES: dict[str, Shape] = {"layer0.A": (4, 24), "layer0.B": (20, 4), "head": (3, 5)}
NUM_PARAMETERS = sum(math.prod(shape) for shape in SHAPES.values())
DIM = 30

Factors = dict[str, tuple[Tensor, Tensor]]


def random_factors(shapes: dict = SHAPES, batch=5, tokens=3, seed=0, dtype: torch.dtype = torch.float32) -> Factors:
    """(B, T, out) and (B, T, in) of every matrix."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda size: torch.randn(batch, tokens, size, generator=generator).to(dtype)  # noqa: E731
    return {name: tuple(map(draw, shape)) for name, shape in shapes.items()}


def projected(projection: Projection, factors: Factors, rows: Tensor | None = None) -> Tensor:
    """Rows (B, d) of the sum over all matrices."""
    rows = torch.zeros(len(next(iter(factors.values()))[0]), projection.dim) if rows is None else rows
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
def test_add_and_lift_are_adjoint(kind):
    """`add` adds P^T g to what is in the row, `lift` multiplies by P: P itself, taken from `lift`, reproduces the rows;
    those of "none" are the gradients."""
    projection, factors = make(kind), random_factors()
    matrix = torch.eye(NUM_PARAMETERS, dtype=torch.float64) if kind == "none" else whole_matrix(projection)
    rows = projected(projection, factors, torch.ones(5, projection.dim)).double()
    torch.testing.assert_close(rows, 1 + full_gradients(factors) @ matrix, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", RANDOM)
def test_inner_products_are_unbiased(kind):
    """E<P^T g, P^T h> = <g, h>, also for gradients that all layers share."""
    factors = {name: tuple(1 + factor for factor in pair) for name, pair in random_factors().items()}
    errors = inner_product_errors(kind, DIM, factors, num_seeds=200)
    assert (np.abs(errors.mean(axis=0)) <= 4.5 * errors.std(axis=0) / math.sqrt(200)).all()


ERRORS = [
    ("sketch", 16 * 200, "one layer", 1e-5),  # at most d entries never share a bin
    # 1/sqrt(d) is the dense matrix; a factor of sqrt(2) means that signs repeat or whole columns collide
    *[(kind, dim, "none", 1.12 / math.sqrt(dim)) for kind in ("sketch", "dense") for dim in (100, 400)],
    *[("sketch", 100, kind, 0.115) for kind in ("rank one", "hot row", "hot column", "columns d apart")],
    # one side of a LoRA matrix stays whole, so that even a gradient of rank one loses little; d may be a prime
    *[("two_sided", dim, "rank one", 1.5 / math.sqrt(dim)) for dim in (97, 100, 1024)],
]


@pytest.mark.parametrize(("kind", "dim", "structure", "largest"), ERRORS)
def test_error_of_inner_products(kind, dim, structure, largest):
    """Of gradients whose weight sits on one rank, a row, a column or two columns d = 100 apart, in four layers."""
    shapes = {f"layer{layer}": (16, 200) for layer in range(1 if structure == "one layer" else 4)}
    factors = random_factors(shapes, batch=8, tokens=1 if structure == "rank one" else 3, seed=2)
    kept = {"hot column": [0], "columns d apart": [7, 107]}.get(structure, range(200))
    for output_gradients, inputs in factors.values():
        inputs[:, :, [column for column in range(200) if column not in kept]] *= 0.02
        if structure == "hot row":
            output_gradients[:, :, 1:] *= 0.02
    error = np.sqrt((inner_product_errors(kind, dim, factors, num_seeds=40) ** 2).mean())
    assert error <= largest


@pytest.mark.parametrize("kind", RANDOM)
def test_draw_depends_on_seed_name_and_shape_only(kind):
    """The order of matrices, other matrices and the batch do not matter; seed and name do."""
    factors = random_factors()
    alone = {name: (delta[2:3], inputs[2:3]) for name, (delta, inputs) in reversed(factors.items())}
    torch.testing.assert_close(projected(make(kind), alone), projected(make(kind), factors)[2:3])
    first = projected(make(kind), {"head": factors["head"]})
    assert not torch.equal(projected(make(kind, seed=1), {"head": factors["head"]}), first)
    assert not torch.equal(projected(make(kind), {"tail": factors["head"]}), first)


def test_draw_never_changes():
    """Stored rows stay usable: a seed names the same matrix in every process, version and machine."""
    digests = {"sketch": "bf010463a8bfa0fe", "two_sided": "bd7e3fe17998e2af", "dense": "2ec7877539fe8910"}
    for kind, digest in digests.items():
        lifted = make_projection(kind, 16, 3).lift(torch.arange(1.0, 17.0), {"w": (6, 8)})["w"]
        rounded = [round(value) for value in (4 * lifted).flatten().tolist()]
        assert hashlib.sha256(str(rounded).encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_factors_are_summed_in_float32(kind):
    """bfloat16 factors give what their values give in float32, inside an autocast region too."""
    factors = random_factors(dtype=torch.bfloat16)
    exact = projected(make(kind), {name: (delta.float(), inputs.float()) for name, (delta, inputs) in factors.items()})
    assert torch.equal(projected(make(kind), factors), exact)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(projected(make(kind), factors), exact)


LIMITS = [
    ("sketch", "_CHUNK_ENTRIES", (5, 1 << 17)),
    ("dense", "_DENSE_ENTRIES", (5, 7)),
    ("dense", "_KEPT_BYTES", (5, 7)),
]


@pytest.mark.parametrize(("kind", "limit", "shape"), LIMITS)
def test_large_matrices_are_taken_in_chunks(kind, limit, shape, monkeypatch):
    """Several groups of rows, chunks of samples or signs, signs drawn again: the adjoint of `lift`, whatever the limit."""
    factors, projection = random_factors({"w": shape}, batch=3, tokens=2), make_projection(kind, DIM, 0)
    solution, rows = torch.randn(DIM, generator=torch.Generator().manual_seed(3)), projected(projection, factors)
    lifted = projection.lift(solution, {"w": shape})["w"]
    expected = full_gradients(factors) @ lifted.flatten().double()
    torch.testing.assert_close(rows.double() @ solution.double(), expected, rtol=1e-3, atol=1e-2)
    monkeypatch.setattr(module, limit, 1)
    projection = make_projection(kind, DIM, 0)
    torch.testing.assert_close(projected(projection, factors), rows)
    torch.testing.assert_close(projection.lift(solution, {"w": shape})["w"], lifted)


def test_packed_signs_are_as_many_as_documented():
    """And half of them are positive; +-1/sqrt(d) of the dense ones is P."""
    for kind, num_signs in {"sketch": 96, "two_sided": 16 + 24 * 8, "dense": 96 * 64, "none": 0}.items():
        assert projected_sides((4, 24), DIM) == (4, 8)
        packed = make(kind).packed_signs("layer0.A", (4, 24))
        assert packed.dtype == np.uint8 and packed.size == math.ceil(num_signs / 8)
        if num_signs:
            assert np.unpackbits(packed).mean() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(num_signs))
        if kind == "dense":
            signs = np.unpackbits(packed, axis=1)[:, :DIM].astype(float) * 2 - 1
            np.testing.assert_allclose(whole_matrix(make("dense"))[:96], signs / math.sqrt(DIM))


def test_projected_sides():
    """Balanced divisors, or the rank whole, or nothing to reduce; of a prime d a few numbers more, which the hash folds."""
    shapes = {(2048, 2048): (20, 20), (16, 2048): (16, 25), (2048, 16): (25, 16), (3, 5): (3, 5)}
    assert {shape: projected_sides(shape, 400) for shape in shapes} == shapes
    for dim in (2, 7, 97, 101):
        out, size = projected_sides((64, 64), dim)
        assert dim <= out * size <= dim + min(out, size)


def test_bad_requests_are_refused():
    none, sketch, zeros, rows = make("none"), make("sketch"), torch.zeros(2, 3, 4), torch.zeros(2, DIM)
    refused("unknown projection 'gauss'; choose one of sketch", make_projection, "gauss", 10, 0)
    refused("at least 1, found 0", make_projection, "sketch", 0, 0)
    refused("needs the shapes", make_projection, "none", None, 0)
    refused(f"keeps all {none.dim} parameters, found .* 10", make_projection, "none", 10, 0, shapes=SHAPES)
    refused(r"expected \(\(2, 3, 4\), \(2, 3, 24\), \(2, 30\)\)", sketch.add, "w", (4, 24), zeros, zeros, rows)
    refused("must be float32, found", sketch.add, "w", (4, 4), zeros, zeros, rows.double())
    refused("not one of the matrices", none.add, "w", (4, 4), zeros, zeros, torch.zeros(2, none.dim))
    refused(r"30 numbers, found shape \(29,\)", sketch.lift, torch.zeros(29), SHAPES)
