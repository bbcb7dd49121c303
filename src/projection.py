"""Random projections of per-sample gradients, p numbers to d << p, that keep inner products.

The gradient of a linear layer's weight is a sum of outer products, G_i = sum_t delta_t a_t^T. Every adapted matrix is
projected from its two factors and added to the sample's row: neither a p x d matrix nor a p-vector is ever held.
Letters: B samples, T tokens, p parameters, d numbers of a row; (out, in) a matrix, (d_o, d_i) its projected sides.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

Shape = tuple[int, int]
Stream = Callable[[str], np.random.PCG64]

# Entries of G that share one hash of the sketch, and entries that are permuted among themselves within it (so that
# the gather stays in a CPU's cache). They are part of what the sketch is: no device or memory may change them.
_GROUP_ENTRIES, _RUN_ENTRIES = 1 << 18, 1 << 15
# Entries of G formed at once, over a chunk of samples: 8 MB, and 512 MB on a GPU, where many small kernels take long.
_CHUNK_ENTRIES, _CUDA_CHUNK_ENTRIES = 1 << 21, 1 << 27
# Signs of the dense matrix unpacked at once, 4 bytes each.
_KEPT_BYTES = 1 << 26  # of the dense projection's bits of one matrix
_DENSE_ENTRIES = 1 << 24


class Projection:
    """A random matrix P (p, d) with E[P P^T] = I: inner products of rows P^T g are unbiased, relative variance ~ 1/d.

    The part of a parameter depends on (seed, kind, dim, name, shape) alone and is drawn with integer arithmetic on
    the CPU: any rank, device, order of layers and later run uses the same one. `columns` says where kind "none" puts each.
    """

    def __init__(self, kind: str, dim: int, seed: int, columns: Mapping[tuple[str, Shape], slice]) -> None:
        self.kind, self.dim, self.seed, self._columns = kind, dim, seed, columns
        self._matrix = cache(self._draw)

    @torch.no_grad()
    def add(self, name: str, shape: Shape, output_gradients: Tensor, inputs: Tensor, rows: Tensor) -> None:
        """Add the projections of G_i = sum_t delta_t a_t^T of the parameter `name`, (out, in), to each sample's row.

        `output_gradients` is delta (B, T, out), zero at padding, `inputs` a (B, T, in); `rows` (B, d) float32 is changed
        in place. Sums are float32 whatever the dtype of the factors. ValueError: other shapes, or rows of another dtype.
        """
        batch, tokens = output_gradients.shape[:2]
        expected = ((batch, tokens, shape[0]), (batch, tokens, shape[1]), (batch, self.dim))
        found = tuple(tuple(array.shape) for array in (output_gradients, inputs, rows))
        if found != expected:
            raise ValueError(f"{name} {shape}: factors and rows have shapes {found}, expected {expected}")
        if rows.dtype != torch.float32:
            raise ValueError(f"rows of projected gradients must be float32, found {rows.dtype}")
        # a surrounding autocast region would take the products back to half precision
        with torch.autocast(rows.device.type, enabled=False):
            self._matrix(name, shape, rows.device).add(output_gradients.float(), inputs.float(), rows)

    @torch.no_grad()
    def lift(self, solution: Tensor, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
        """The adjoint of `add`: P x, by name the parts (out, in) in the dtype and on the device of x (d,)."""
        if solution.shape != (self.dim,):
            raise ValueError(f"a solution has {self.dim} numbers, found shape {tuple(solution.shape)}")
        return {name: self._matrix(name, shape, solution.device).lift(solution) for name, shape in shapes.items()}

    def packed_signs(self, name: str, shape: Shape) -> np.ndarray:
        """The random signs of one matrix, uint8, a bit each (1 is +) in the order of `numpy.packbits`.

        sketch: the p entries of G, row by row (the bins follow from the seed); two_sided: the (out, d_o) matrix,
        then the (in, d_i) matrix; dense: (p, bytes), each line of d signs padded to whole 64-bit words; none: nothing.
        """
        return self._draw(name, shape, torch.device("cpu")).packed_signs()

    def _draw(self, name: str, shape: Shape, device: torch.device) -> _Matrix:
        if self.kind in RANDOM:
            return RANDOM[self.kind](partial(self._stream, name, shape), shape, self.dim, device)
        if (name, shape) not in self._columns:
            known = ", ".join(f"{known} {size}" for known, size in self._columns)
            raise ValueError(f"{name} {shape} is not one of the matrices of this projection: {known}")
        return _Identity(self._columns[name, shape], shape)

    def _stream(self, name: str, shape: Shape, part: str) -> np.random.PCG64:
        """The random 64-bit words that belong to one part of one matrix."""
        key = f"{self.seed}|{self.kind}|{self.dim}|{name}|{shape[0]}x{shape[1]}|{part}"
        return np.random.PCG64(int.from_bytes(hashlib.sha256(key.encode()).digest(), "little"))


def make_projection(kind: str, dim: int | None, seed: int, shapes: Mapping[str, Shape] | None = None) -> Projection:
    """A projection of one of the `KINDS` to d = `dim` numbers.

    "none" needs `shapes`, (out, in) of every adapted matrix by name in the order of its columns; its dim may be None.
    ValueError: an unknown kind, d below 1, or "none" without shapes or with a d that is not p.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown projection {kind!r}; choose one of {', '.join(KINDS)}")
    if kind in RANDOM:
        if dim is None or dim < 1:
            raise ValueError(f"the projection {kind!r} needs a dimension of at least 1, found {dim}")
        return Projection(kind, int(dim), int(seed), {})
    if not shapes:
        raise ValueError("the projection 'none' needs the shapes of all adapted matrices")
    columns, end = dict[tuple[str, Shape], slice](), 0
    for name, shape in shapes.items():
        columns[name, shape] = slice(end, end := end + math.prod(shape))
    if dim not in (None, end):
        raise ValueError(f"the projection 'none' keeps all {end} parameters, found projection dimension {dim}; omit it")
    return Projection(kind, end, int(seed), columns)


class _Fold:
    """A random signed hash of `length` numbers into d bins, exact when length <= d: the permuted numbers in lines of d,
    added up, so that all bins are equally full. A gather gives the same sums on every run; a scatter would not."""

    def __init__(self, bits: np.random.PCG64, length: int, dim: int, device: torch.device) -> None:
        self.length, self.dim = length, dim
        num_slots = math.ceil(length / dim) * dim
        signs = np.zeros(num_slots, np.int8)  # 0 fills up the last line
        signs[:length] = _signs(bits, length)
        # sorted random words are the same permutation in every version of numpy
        keys = bits.random_raw(num_slots)
        runs = _blocks(num_slots, math.ceil(_RUN_ENTRIES / dim) * dim)
        order = np.concatenate([run.start + np.argsort(keys[run], kind="stable") for run in runs])
        self._signs = torch.from_numpy(signs[order]).to(device)  # (slots,)
        self._source = torch.from_numpy(np.minimum(order, length - 1).astype(np.int32)).to(device)  # (slots,)

    def fold(self, values: Tensor) -> Tensor:
        """(B, length) -> (B, d)."""
        lines = values.index_select(1, self._source).mul_(self._signs)
        return lines.view(len(values), -1, self.dim).sum(1)

    def unfold(self, solution: Tensor) -> Tensor:
        """The adjoint: (d,) -> (length,)."""
        slots = solution.repeat(len(self._source) // self.dim) * self._signs
        return solution.new_zeros(self.length).index_add_(0, self._source, slots)


class _Sketch:
    """CountSketch: every entry of G gets a random sign and a bin, each group of rows by a hash of its own. O(p) work a
    sample with the accuracy of the dense matrix: the kind to use."""

    def __init__(self, stream: Stream, shape: Shape, dim: int, device: torch.device) -> None:
        self.shape, self.dim, self.hashes = shape, dim, []
        for group in _blocks(shape[0], _GROUP_ENTRIES // shape[1]):
            length = (group.stop - group.start) * shape[1]
            self.hashes.append((group, _Fold(stream(f"rows {group.start}"), length, dim, device)))

    def add(self, output_gradients: Tensor, inputs: Tensor, rows: Tensor) -> None:
        chunk = _CUDA_CHUNK_ENTRIES if rows.is_cuda else _CHUNK_ENTRIES
        for group, hashed in self.hashes:
            for samples in _blocks(len(rows), chunk // hashed.length):
                rows[samples] += hashed.fold(_sample_gradients(output_gradients[samples, :, group], inputs[samples]))

    def lift(self, solution: Tensor) -> Tensor:
        return torch.cat([hashed.unfold(solution) for _, hashed in self.hashes]).view(self.shape)

    def packed_signs(self) -> np.ndarray:
        return np.packbits(self.lift(torch.ones(self.dim)).numpy() > 0)


class _TwoSided:
    """R_o^T G R_i of +-1 matrices, d_o d_i ~ d, from the projected factors: G is never formed. For full fine-tuning and
    very large layers; less accurate, most of all when few rows or columns of G hold its weight."""

    def __init__(self, stream: Stream, shape: Shape, dim: int, device: torch.device) -> None:
        self.sides, self.signs, self.factors = projected_sides(shape, dim), [], []
        for part, size, side in zip(("out", "in"), shape, self.sides, strict=True):
            self.signs.append(signs := _signs(stream(part), size * side))
            factor = torch.from_numpy(signs).view(size, side).float() / math.sqrt(side)
            self.factors.append(None if size == side else factor.to(device))  # None: it keeps its size
        self.hashed = _Fold(stream("bins"), math.prod(self.sides), dim, device)  # any d is allowed, a prime too

    def add(self, output_gradients: Tensor, inputs: Tensor, rows: Tensor) -> None:
        factors = zip((output_gradients, inputs), self.factors, strict=True)
        projected = (values if factor is None else values @ factor for values, factor in factors)
        rows += self.hashed.fold(_sample_gradients(*projected))

    def lift(self, solution: Tensor) -> Tensor:
        lifted, (out_factor, in_factor) = self.hashed.unfold(solution).view(self.sides), self.factors
        if out_factor is not None:
            lifted = out_factor.to(solution.dtype) @ lifted
        return lifted if in_factor is None else lifted @ in_factor.to(solution.dtype).T

    def packed_signs(self) -> np.ndarray:
        return np.packbits(np.concatenate(self.signs) > 0)


class _Dense:
    """The paper's +-1/sqrt(d) matrix (arXiv:2409.19458), unpacked block by block from bits, which are kept (p d / 8 bytes) or,
    of a large matrix, drawn again each time. Slow: the reference that the others are judged by."""

    def __init__(self, stream: Stream, shape: Shape, dim: int, device: torch.device) -> None:
        self.shape, self.dim, self.stream, self.device = shape, dim, stream, device
        self.words, parameters = math.ceil(dim / 64), math.prod(shape)
        self.kept = self.lines(0, parameters) if parameters * self.words * 8 <= _KEPT_BYTES else None

    def lines(self, start: int, stop: int) -> Tensor:
        """The bits of parameters start to stop, (stop - start, bytes)."""
        bits = self.stream("signs").advance(start * self.words)
        packed = _random_bytes(bits, (stop - start) * self.words * 64).reshape(stop - start, -1)
        return torch.from_numpy(packed).to(self.device)

    def blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Rows of G, and the +-1 of their parameters: (rows * in, d)."""
        bit = torch.arange(7, -1, -1, dtype=torch.uint8, device=self.device)  # numpy.packbits fills from the top
        for block in _blocks(self.shape[0], _DENSE_ENTRIES // (self.shape[1] * self.dim)):
            start, stop = block.start * self.shape[1], block.stop * self.shape[1]
            packed = self.lines(start, stop) if self.kept is None else self.kept[start:stop]
            ones = (packed.unsqueeze(2) >> bit) & 1
            yield block, ones.flatten(1)[:, : self.dim].to(dtype).mul_(2).sub_(1)

    def add(self, output_gradients: Tensor, inputs: Tensor, rows: Tensor) -> None:
        for block, signs in self.blocks(rows.dtype):
            gradients = _sample_gradients(output_gradients[:, :, block], inputs)
            rows.addmm_(gradients, signs, alpha=1 / math.sqrt(self.dim))

    def lift(self, solution: Tensor) -> Tensor:
        lifted = torch.cat([signs @ solution for _, signs in self.blocks(solution.dtype)])
        return lifted.view(self.shape) / math.sqrt(self.dim)

    def packed_signs(self) -> np.ndarray:
        return self.lines(0, math.prod(self.shape)).cpu().numpy()


class _Identity:
    """No projection, d = p, for small models: each matrix flattened in its own columns of the row."""

    def __init__(self, columns: slice, shape: Shape) -> None:
        self.columns, self.shape = columns, shape

    def add(self, output_gradients: Tensor, inputs: Tensor, rows: Tensor) -> None:
        rows[:, self.columns] += _sample_gradients(output_gradients, inputs)

    def lift(self, solution: Tensor) -> Tensor:
        return solution[self.columns].reshape(self.shape).clone()

    def packed_signs(self) -> np.ndarray:
        return np.empty(0, np.uint8)


class Directions(Projection):
    """Given directions in the place of random ones: rows are the exact products g.delta, and `lift` is sum_k x_k delta_k.

    Args:
        directions: d displacements, name -> (out, in) of every adapted matrix.
    """

    def __init__(self, directions: Sequence[Mapping[str, Tensor]]) -> None:
        super().__init__("directions", len(directions), 0, {})
        self.directions = directions

    def _draw(self, name: str, shape: Shape, device: torch.device) -> _Matrix:
        return _Given(torch.stack([direction[name] for direction in self.directions]).float().to(device))


class _Given:
    """The parts (d, out, in) of given directions in one matrix: g.delta = sum_t delta_t^T D a_t, of which no G is formed."""

    def __init__(self, parts: Tensor) -> None:
        self.parts = parts

    def add(self, output_gradients: Tensor, inputs: Tensor, rows: Tensor) -> None:
        for column, part in enumerate(self.parts):
            rows[:, column] += (output_gradients * (inputs @ part.T)).sum(dim=(1, 2))

    def lift(self, solution: Tensor) -> Tensor:
        return torch.einsum("d,doi->oi", solution, self.parts.to(solution))

    def packed_signs(self) -> np.ndarray:
        return np.empty(0, np.uint8)


RANDOM: dict[str, type[_Sketch] | type[_TwoSided] | type[_Dense]]
RANDOM = {"sketch": _Sketch, "two_sided": _TwoSided, "dense": _Dense}
KINDS = (*RANDOM, "none")
_Matrix = _Sketch | _TwoSided | _Dense | _Identity | _Given


def projected_sides(shape: Shape, dim: int) -> Shape:
    """The sizes (d_o, d_i) to which "two_sided" reduces an (out, in) matrix.

    Of the pairs with at least d numbers the one of the least relative variance, for a gradient of rank one about
    2/d_o + 2/d_i without the sides that keep their size; numbers above d cost their square root. In effect the most
    balanced divisors of d for a large matrix, and all of the short side for a LoRA matrix.
    """
    out, size = shape
    pairs = [(side, min(size, math.ceil(dim / side))) for side in range(1, min(out, dim) + 1)]
    pairs += [(min(out, math.ceil(dim / side)), side) for side in range(1, min(size, dim) + 1)]

    def cost(sides: Shape) -> float:
        by_side = (0 if side == whole else 2 / side for side, whole in zip(sides, shape, strict=True))
        return math.prod(1 + variance for variance in by_side) * math.sqrt(math.prod(sides))

    return min((sides for sides in pairs if math.prod(sides) >= min(dim, out * size)), key=cost)


def _sample_gradients(output_gradients: Tensor, inputs: Tensor) -> Tensor:
    """G_i = sum_t delta_t a_t^T, flattened: (B, T, out), (B, T, in) -> (B, out * in)."""
    return torch.bmm(output_gradients.transpose(1, 2), inputs).flatten(1)


def _blocks(length: int, size: int) -> Iterator[slice]:
    """0..length in consecutive slices of `size`, but at least 1."""
    size = max(size, 1)
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _random_bytes(bits: np.random.PCG64, num_bits: int) -> np.ndarray:
    """The next 64-bit words of the stream, enough for `num_bits`, as bytes on any machine alike."""
    return bits.random_raw(math.ceil(num_bits / 64)).astype("<u8").view(np.uint8)


def _signs(bits: np.random.PCG64, count: int) -> np.ndarray:
    """The next `count` bits of the stream as +-1, (count,) int8."""
    return np.unpackbits(_random_bytes(bits, count), count=count).astype(np.int8) * 2 - 1
