"""Random projections of per-sample gradients, one adapted matrix at a time.

Why this module exists: a sample's gradient has p numbers, the estimates need only inner products of
gradients, and a random projection to d << p numbers keeps those. The gradient of a linear layer's weight is
a sum of outer products, G_i = sum_t delta_t a_t^T, so every matrix is projected from its two factors and
added into the sample's row of d numbers: neither a p x d matrix nor a p-vector is ever held.

Four kinds behind one interface:

    sketch     CountSketch: every entry of G gets a random sign and one of the d bins. O(p) work a sample and
               the accuracy of the dense matrix: the one to use.
    two_sided  delta_t -> d_o and a_t -> d_i numbers by +-1 matrices before the outer product, d_o d_i ~ d.
               G is never formed: for full fine-tuning and very large layers. Less accurate, most of all when
               few rows or columns of G hold its weight.
    dense      the paper's +-1/sqrt(d) matrix of p x d (arXiv:2409.19458), unpacked from random bits block by
               block. Slow: the reference that the others are judged by.
    none       the identity, d = p: exact, for small models.

The matrix P of a parameter depends on (seed, kind, dim, name, shape) alone and is drawn with integer
arithmetic on the CPU: any rank, device, order of layers and later run uses the same one. E[P P^T] = I, so
inner products of projected gradients are unbiased, with relative variance about 1/d; `lift`, x -> P x, is
the adjoint of `add`.

Shapes: B batch, T tokens, d projection dimension, p parameters (of one matrix: out * in); out and in are the
sides of an adapted matrix, d_o and d_i their projected sizes.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

Shape = tuple[int, int]

# Entries of G that share one hash of the sketch, and entries that are permuted among themselves within it (so
# that the gather stays in a CPU's cache). They are part of what the sketch is: no device or memory may change them.
_GROUP_ENTRIES, _RUN_ENTRIES = 1 << 18, 1 << 15
# Entries of G formed at once, over a chunk of samples: 8 MB.
_CHUNK_ENTRIES = 1 << 21
# The dense projection keeps the packed signs of a matrix up to this many bytes; larger ones are redrawn.
_RESIDENT_BYTES = 1 << 26


class Projection(ABC):
    """One interface for the kinds: checks, precision, and what was drawn for each matrix.

    Attributes:
        kind: a key of `KINDS`.
        dim: d, the length of a projected gradient.
        seed: with kind, dim, name and shape all that a matrix depends on.
    """

    kind: str

    def __init__(self, dim: int, seed: int) -> None:
        self.dim, self.seed = dim, seed
        self._drawn: dict[tuple[str, Shape, torch.device], Any] = {}

    @torch.no_grad()
    def add(self, name: str, shape: Shape, output_gradients: Tensor, inputs: Tensor, rows: Tensor) -> None:
        """Add the projection of G_i = sum_t delta_t a_t^T of the matrix `name` to each sample's row, in place.

        Args:
            name: parameter name; selects the random matrix.
            shape: (out, in) of the parameter.
            output_gradients: delta (B, T, out), the gradient at the layer's output, zero at padding.
            inputs: a (B, T, in), the layer's input.
            rows: (B, d) float32, changed in place. Sums are float32 whatever the dtype of the factors.

        Raises:
            ValueError: the shapes do not fit together, or `rows` is not float32.
        """
        batch, tokens = output_gradients.shape[:2]
        expected = ((batch, tokens, shape[0]), (batch, tokens, shape[1]), (batch, self.dim))
        found = tuple(tuple(array.shape) for array in (output_gradients, inputs, rows))
        if found != expected:
            raise ValueError(
                f"{name} {shape}: output gradients, inputs and rows have shapes {found}, expected {expected}"
            )
        if rows.dtype != torch.float32:
            raise ValueError(f"rows of projected gradients must be float32, found {rows.dtype}")
        # a surrounding autocast region would take the products back to half precision
        with torch.autocast(rows.device.type, enabled=False):
            self._add(name, shape, output_gradients.float(), inputs.float(), rows)

    @torch.no_grad()
    def lift(self, solution: Tensor, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
        """Take a solution back to the parameters: P x, the adjoint of `add`.

        Args:
            solution: x (d,).
            shapes: (out, in) of every adapted matrix, by name.

        Returns:
            For each name its part of P x, (out, in), in the dtype and on the device of `solution`.

        Raises:
            ValueError: `solution` does not have d numbers.
        """
        if solution.shape != (self.dim,):
            raise ValueError(f"a solution has {self.dim} numbers, found shape {tuple(solution.shape)}")
        return {name: self._lift(name, shape, solution) for name, shape in shapes.items()}

    @abstractmethod
    def packed_signs(self, name: str, shape: Shape) -> np.ndarray:
        """The random signs of one matrix, uint8, a bit each (1 is +) in the order of `numpy.packbits`.

        sketch: the p entries of G, row by row (the bins follow from the seed); two_sided: the (out, d_o)
        matrix, then the (in, d_i) matrix; dense: (p, bytes), each line of d signs padded to whole 64-bit
        words; none: nothing.
        """

    @abstractmethod
    def _add(self, name: str, shape: Shape, output_gradients: Tensor, inputs: Tensor, rows: Tensor) -> None: ...

    @abstractmethod
    def _lift(self, name: str, shape: Shape, solution: Tensor) -> Tensor: ...

    def _draw(self, name: str, shape: Shape, device: torch.device) -> Any:
        """What is worth keeping of a matrix between calls; None when nothing is."""
        return None

    def _matrix(self, name: str, shape: Shape, device: torch.device) -> Any:
        """The result of `_draw`, drawn once for each matrix and device."""
        key = (name, shape, device)
        if key not in self._drawn:
            self._drawn[key] = self._draw(name, shape, device)
        return self._drawn[key]

    def _bits(self, name: str, shape: Shape, part: str) -> np.random.PCG64:
        """The stream of random 64-bit words that belongs to one part of one matrix."""
        key = f"{self.seed}|{self.kind}|{self.dim}|{name}|{shape[0]}x{shape[1]}|{part}"
        return np.random.PCG64(int.from_bytes(hashlib.sha256(key.encode()).digest(), "little"))


class _Fold:
    """A random signed hash of `length` numbers into d bins: E[P P^T] = I, and exact when length <= d.

    The numbers are permuted, cut into lines of d and the lines added up, so that all bins are equally full.
    A gather gives the same sums on every run and device; a scatter would not.
    """

    def __init__(self, bits: np.random.PCG64, length: int, dim: int, device: torch.device) -> None:
        self.length, self.dim = length, dim
        num_slots = math.ceil(length / dim) * dim
        signs = np.zeros(num_slots, np.int8)  # 0 fills up the last line
        signs[:length] = _unpacked_signs(_random_bytes(bits, length), length)
        # sorted random words are the same permutation in every version of numpy
        keys = bits.random_raw(num_slots)
        run = math.ceil(_RUN_ENTRIES / dim) * dim
        order = np.concatenate(
            [first + np.argsort(keys[first : first + run], kind="stable") for first in range(0, num_slots, run)]
        )
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


class _Sketch(Projection):
    """CountSketch of G: each group of rows has a hash of its own."""

    kind = "sketch"

    def _draw(self, name: str, shape: Shape, device: torch.device) -> list[tuple[slice, _Fold]]:
        hashes = []
        for group in _blocks(shape[0], _GROUP_ENTRIES // shape[1]):
            bits = self._bits(name, shape, f"rows {group.start}")
            hashes.append((group, _Fold(bits, (group.stop - group.start) * shape[1], self.dim, device)))
        return hashes

    def _add(self, name: str, shape: Shape, output_gradients: Tensor, inputs: Tensor, rows: Tensor) -> None:
        for group, hashed in self._matrix(name, shape, rows.device):
            for samples in _blocks(len(rows), _CHUNK_ENTRIES // hashed.length):
                gradients = _sample_gradients(output_gradients[samples, :, group], inputs[samples])
                rows[samples] += hashed.fold(gradients)

    def _lift(self, name: str, shape: Shape, solution: Tensor) -> Tensor:
        hashes = self._matrix(name, shape, solution.device)
        return torch.cat([hashed.unfold(solution) for _, hashed in hashes]).view(shape)

    def packed_signs(self, name: str, shape: Shape) -> np.ndarray:
        return np.packbits(self._lift(name, shape, torch.ones(self.dim)).numpy() > 0)


class _TwoSided(Projection):
    """R_o^T G R_i of +-1 matrices, computed from the projected factors.

    Its d_o d_i numbers are hashed into the d bins, so that any d is allowed, a prime too: a few more than d
    numbers fold over, the p < d numbers of a small matrix leave bins empty, and either way inner products
    stay unbiased.
    """

    kind = "two_sided"

    def _draw(self, name: str, shape: Shape, device: torch.device) -> tuple[Tensor | None, Tensor | None, _Fold]:
        sides = projected_sides(shape, self.dim)
        out_signs, in_signs = (
            # a side that keeps its size is left as it is
            None if size == side else (signs.float() / math.sqrt(side)).to(device)
            for size, side, signs in zip(shape, sides, self._side_signs(name, shape), strict=True)
        )
        return out_signs, in_signs, _Fold(self._bits(name, shape, "bins"), math.prod(sides), self.dim, device)

    def _side_signs(self, name: str, shape: Shape) -> list[Tensor]:
        """The +-1 matrices (out, d_o) and (in, d_i), int8."""
        matrices = []
        for part, size in zip(("out", "in"), zip(shape, projected_sides(shape, self.dim), strict=True), strict=True):
            packed = _random_bytes(self._bits(name, shape, part), math.prod(size))
            matrices.append(torch.from_numpy(_unpacked_signs(packed, math.prod(size)).reshape(size)))
        return matrices

    def _add(self, name: str, shape: Shape, output_gradients: Tensor, inputs: Tensor, rows: Tensor) -> None:
        out_signs, in_signs, hashed = self._matrix(name, shape, rows.device)
        if out_signs is not None:
            output_gradients = output_gradients @ out_signs  # (B, T, d_o)
        if in_signs is not None:
            inputs = inputs @ in_signs  # (B, T, d_i)
        rows += hashed.fold(_sample_gradients(output_gradients, inputs))

    def _lift(self, name: str, shape: Shape, solution: Tensor) -> Tensor:
        out_signs, in_signs, hashed = self._matrix(name, shape, solution.device)
        lifted = hashed.unfold(solution).view(projected_sides(shape, self.dim))
        if out_signs is not None:
            lifted = out_signs.to(solution.dtype) @ lifted
        if in_signs is not None:
            lifted = lifted @ in_signs.to(solution.dtype).T
        return lifted

    def packed_signs(self, name: str, shape: Shape) -> np.ndarray:
        return np.packbits(torch.cat([signs.flatten() for signs in self._side_signs(name, shape)]).numpy() > 0)


class _Dense(Projection):
    """The paper's matrix: line j of a stream of random bits holds the d signs of parameter j."""

    kind = "dense"

    def __init__(self, dim: int, seed: int, *, block_entries: int = 1 << 24) -> None:
        """`block_entries`: signs unpacked at once. It bounds the memory (4 bytes each) and changes no sign."""
        super().__init__(dim, seed)
        self.block_entries = block_entries
        self._words = math.ceil(dim / 64)  # of a line

    def _draw(self, name: str, shape: Shape, device: torch.device) -> Tensor | None:
        if math.prod(shape) * self._words * 8 > _RESIDENT_BYTES:
            return None
        return self._packed(name, shape, 0, math.prod(shape)).to(device)

    def _packed(self, name: str, shape: Shape, start: int, stop: int) -> Tensor:
        """The lines of parameters start to stop: (stop - start, bytes) uint8."""
        bits = self._bits(name, shape, "signs").advance(start * self._words)
        return torch.from_numpy(_random_bytes(bits, (stop - start) * self._words * 64).reshape(stop - start, -1))

    def _sign_blocks(self, name: str, shape: Shape, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Rows of G, and the +-1 of their parameters: (rows * in, d) in the dtype and on the device of `like`."""
        resident = self._matrix(name, shape, like.device)
        bit = torch.arange(7, -1, -1, dtype=torch.uint8, device=like.device)  # numpy.packbits fills from the top
        for block in _blocks(shape[0], self.block_entries // (shape[1] * self.dim)):
            start, stop = block.start * shape[1], block.stop * shape[1]
            packed = self._packed(name, shape, start, stop) if resident is None else resident[start:stop]
            ones = (packed.to(like.device).unsqueeze(2) >> bit) & 1
            yield block, ones.flatten(1)[:, : self.dim].to(like.dtype).mul_(2).sub_(1)

    def _add(self, name: str, shape: Shape, output_gradients: Tensor, inputs: Tensor, rows: Tensor) -> None:
        for block, signs in self._sign_blocks(name, shape, rows):
            gradients = _sample_gradients(output_gradients[:, :, block], inputs)
            rows.addmm_(gradients, signs, alpha=1 / math.sqrt(self.dim))

    def _lift(self, name: str, shape: Shape, solution: Tensor) -> Tensor:
        lifted = [signs @ solution for _, signs in self._sign_blocks(name, shape, solution)]
        return torch.cat(lifted).view(shape) / math.sqrt(self.dim)

    def packed_signs(self, name: str, shape: Shape) -> np.ndarray:
        return self._packed(name, shape, 0, math.prod(shape)).numpy()


class _Identity(Projection):
    """No projection: the flattened matrices side by side, in the order of `shapes`."""

    kind = "none"

    def __init__(self, shapes: Mapping[str, Shape], seed: int) -> None:
        ends = np.cumsum([math.prod(shape) for shape in shapes.values()]).tolist()
        super().__init__(ends[-1], seed)
        self._columns = {
            (name, tuple(shape)): slice(end - math.prod(shape), end)
            for (name, shape), end in zip(shapes.items(), ends, strict=True)
        }

    def _place(self, name: str, shape: Shape) -> slice:
        if (name, tuple(shape)) not in self._columns:
            known = ", ".join(f"{known} {size}" for known, size in self._columns)
            raise ValueError(f"{name} {tuple(shape)} is not one of the matrices of this projection: {known}")
        return self._columns[name, tuple(shape)]

    def _add(self, name: str, shape: Shape, output_gradients: Tensor, inputs: Tensor, rows: Tensor) -> None:
        rows[:, self._place(name, shape)] += _sample_gradients(output_gradients, inputs)

    def _lift(self, name: str, shape: Shape, solution: Tensor) -> Tensor:
        return solution[self._place(name, shape)].reshape(shape).clone()

    def packed_signs(self, name: str, shape: Shape) -> np.ndarray:
        return np.empty(0, np.uint8)


RANDOM: dict[str, Callable[..., Projection]] = {kind.kind: kind for kind in (_Sketch, _TwoSided, _Dense)}
KINDS = (*RANDOM, _Identity.kind)


def make_projection(kind: str, dim: int | None, seed: int, shapes: Mapping[str, Shape] | None = None) -> Projection:
    """A projection of one of the `KINDS`.

    Args:
        kind: "sketch", "two_sided", "dense" or "none".
        dim: d; for "none" the number of parameters or None.
        seed: any integer; another seed is another draw of every matrix.
        shapes: (out, in) of every adapted matrix by name, in the order that "none" lays them out; the
            others need none.

    Raises:
        ValueError: an unknown kind, d below 1, or "none" without shapes or with another d.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown projection {kind!r}; choose one of {', '.join(KINDS)}")
    if kind == _Identity.kind:
        if not shapes:
            raise ValueError("the projection 'none' needs the shapes of all adapted matrices")
        identity = _Identity(shapes, seed)
        if dim not in (None, identity.dim):
            raise ValueError(
                f"the projection 'none' keeps all {identity.dim} parameters, found projection dimension {dim}; leave "
                "the dimension out or choose another projection"
            )
        return identity
    if dim is None or dim < 1:
        raise ValueError(f"the projection {kind!r} needs a dimension of at least 1, found {dim}")
    return RANDOM[kind](int(dim), int(seed))


def projected_sides(shape: Shape, dim: int) -> Shape:
    """The sizes (d_o, d_i) to which "two_sided" reduces an (out, in) matrix.

    Of the pairs with just d numbers or a few more, the one of the least relative variance that a gradient of rank one
    can have, about 2/d_o + 2/d_i, nothing from a side that keeps its size. Numbers above d count as their square
    root, so that divisors of d win where little is lost. In effect the most balanced divisors for a large matrix,
    and all of the short side for a LoRA matrix.
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


def _unpacked_signs(packed: np.ndarray, count: int) -> np.ndarray:
    """The first `count` bits as +-1, (count,) int8."""
    return np.unpackbits(packed, count=count).astype(np.int8) * 2 - 1
