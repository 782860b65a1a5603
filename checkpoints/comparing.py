"""Which tensors of two checkpoints differ, and by how much; read in pieces, so that both may be larger than memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from spmd_infer.checkpoints.boxes import Box, as_slices, box_shape, elements, part, pieces, relative, whole
from spmd_infer.checkpoints.digests import flat_bytes
from spmd_infer.checkpoints.file_bytes import Scratch
from spmd_infer.checkpoints.manifest import CHUNK_BYTES
from spmd_infer.checkpoints.pipeline import Pipeline
from spmd_infer.checkpoints.reader import Reader, TensorInfo, read_into, takes_whole

BUDGET_BYTES = 256 << 20
"""How many bytes of both checkpoints may be under way."""

_WORDS = 1 << 17
"""Of pieces that may be the same, how many words of eight bytes are compared at once: they stay in a core's cache."""

_BLOCK_BYTES = 8 << 20
"""Of differing pieces, how many bytes are computed with at once, in float64."""


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that differs.

    Attributes:
        name: which.
        what: ``only in A``, ``only in B``, ``shape``, ``dtype`` (the values are the same) or ``values``.
        a: how it looks in the first checkpoint; empty where it is not there.
        b: the same of the second.
        differing: elements that differ, where the shapes are the same.
        size: elements that there are.
        largest: the largest absolute difference.
        relative: the root mean square of the differences over that of the first checkpoint's values.
        first: index of the first element that differs.
    """

    name: str
    what: str
    a: str = ""
    b: str = ""
    differing: int = 0
    size: int = 0
    largest: float = 0.0
    relative: float = 0.0
    first: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)


def compare(a: Reader, b: Reader, *, advance: Callable[[int], None] = lambda count: None) -> list[TensorDifference]:
    """Compare two checkpoints tensor by tensor, by their names.

    Equal means equal bits, except that a not-a-number equals another at the same place where the dtypes differ.

    Args:
        a: the first.
        b: the second.
        advance: called with the bytes of each tensor of ``a`` when it has been compared.
    """
    found: list[TensorDifference] = []
    memory = Scratch(), Scratch()
    with Pipeline(BUDGET_BYTES, "checkpoint-compare") as line:
        for name, info in a.tensors.items():
            other = b.tensors.get(name)
            if other is None:
                line.then(partial(found.append, TensorDifference(name, "only in A", _looks(info))))
            elif info.shape != other.shape:
                line.then(partial(found.append, TensorDifference(name, "shape", _looks(info), _looks(other))))
            else:
                pair = _Pair(a, b, info, other, memory)
                for box in pair.boxes:
                    nbytes = elements(box) * (info.dtype.itemsize + other.dtype.itemsize)
                    line.run(nbytes, partial(pair.look, box))
                line.then(partial(pair.end, found))
            line.then(partial(advance, info.nbytes))
    found.extend(
        TensorDifference(name, "only in B", "", _looks(info))
        for name, info in b.tensors.items()
        if name not in a.tensors
    )
    return found


@dataclass(frozen=True)
class _Piece:
    """What differs in a piece of a tensor: how many elements, the largest gap, the sum of its squares, where first."""

    differing: int
    largest: float
    squares: float
    first: tuple[int, ...]


class _Pair:
    """One tensor of both checkpoints, of which several threads look at a piece each.

    Attributes:
        boxes: the pieces.
    """

    def __init__(
        self, a: Reader, b: Reader, info: TensorInfo, other: TensorInfo, memory: tuple[Scratch, Scratch]
    ) -> None:
        self._a, self._b, self._info, self._other, self._memory = a, b, info, other, memory
        self._found: dict[Box, list[_Piece]] = {}
        self._whole = takes_whole(a, info.name) or takes_whole(b, info.name)
        wide = max(info.dtype.itemsize, other.dtype.itemsize)
        self.boxes = [whole(info.shape)] if self._whole else list(pieces(whole(info.shape), wide, CHUNK_BYTES))

    def look(self, box: Box) -> None:
        """Compare one piece."""
        if self._whole:  # memory that is used again would stay as large as the largest of them
            left, right = (np.ascontiguousarray(reader.read(self._info.name)) for reader in (self._a, self._b))
        else:
            shape = box_shape(box)
            left, right = self._memory[0].take(shape, self._info.dtype), self._memory[1].take(shape, self._other.dtype)
            read_into(self._a, self._info.name, box, left)
            read_into(self._b, self._info.name, box, right)
        if left.dtype == right.dtype and _same_bits(left, right):
            return
        parts = pieces(box, 8, _BLOCK_BYTES)
        each = (_difference(part(left, relative(p, box)), part(right, relative(p, box)), p) for p in parts)
        self._found[box] = [piece for piece in each if piece is not None]

    def end(self, found: list[TensorDifference]) -> None:
        """Note what all pieces amount to."""
        info, looks = self._info, (_looks(self._info), _looks(self._other))
        parts = [piece for box in self.boxes for piece in self._found.get(box, ())]
        if parts:
            base = 0.0
            for box in self.boxes:
                values = self._a.read(info.name, as_slices(box))
                for piece in pieces(box, 8, _BLOCK_BYTES):
                    x = _wide(part(values, relative(piece, box)))
                    base += float(np.square(np.abs(x[np.isfinite(x)])).sum())
            differing, squares = sum(each.differing for each in parts), sum(each.squares for each in parts)
            relative_size = float(np.sqrt(squares / base)) if base else float("inf")
            largest = max(each.largest for each in parts)
            found.append(
                TensorDifference(
                    info.name, "values", *looks, differing, info.size, largest, relative_size, parts[0].first
                )
            )
        elif info.dtype != self._other.dtype:
            found.append(TensorDifference(info.name, "dtype", *looks, size=info.size))


def _same_bits(left: npt.NDArray[Any], right: npt.NDArray[Any]) -> bool:
    """Whether two C-ordered arrays are the same byte for byte, eight at a time as far as that goes."""
    a, b = flat_bytes(left), flat_bytes(right)
    eights = a.size // 8 * 8
    words = (each[:eights].view(np.uint64) for each in (a, b))
    blocks = zip(*(np.array_split(each, range(_WORDS, each.size, _WORDS)) for each in words), strict=True)
    return np.array_equal(a[eights:], b[eights:]) and all(np.array_equal(x, y) for x, y in blocks)


def _difference(left: npt.NDArray[Any], right: npt.NDArray[Any], box: Box) -> _Piece | None:
    unequal = _unequal(left, right)
    count = int(unequal.sum())
    if not count:
        return None
    place = np.unravel_index(int(np.argmax(unequal)), unequal.shape)
    with np.errstate(invalid="ignore"):
        gap = np.abs(_wide(left) - _wide(right))
    gap = np.where(np.isnan(gap) & unequal, np.inf, np.nan_to_num(gap, nan=0.0, posinf=np.inf))
    first = tuple(int(p) + start for p, (start, _) in zip(place, box, strict=True))
    return _Piece(count, float(gap.max()), float(np.square(gap).sum()), first)


def _unequal(left: npt.NDArray[Any], right: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Where bits differ, or, for two dtypes, values."""
    if left.dtype == right.dtype:
        shape = (*left.shape, left.dtype.itemsize)
        a, b = (np.ascontiguousarray(each).reshape(-1).view(np.uint8).reshape(shape) for each in (left, right))
        return np.asarray((a != b).any(axis=-1))
    x, y = _wide(left), _wide(right)
    return np.asarray((x != y) & ~(np.isnan(x) & np.isnan(y)))


def _wide(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return values if values.dtype.kind == "c" else values.astype(np.float64)


def _looks(info: TensorInfo) -> str:
    return f"{info.dtype.name}[{', '.join(map(str, info.shape))}]"
