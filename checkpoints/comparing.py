"""Which tensors of two checkpoints differ, and by how much; read in pieces, so that both may be larger than memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from spmd_infer.checkpoints.boxes import as_slices, pieces, whole
from spmd_infer.checkpoints.reader import Reader, TensorInfo

_BLOCK_BYTES = 8 << 20


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
    for name, info in a.tensors.items():
        other = b.tensors.get(name)
        if other is None:
            found.append(TensorDifference(name, "only in A", _looks(info)))
        elif info.shape != other.shape:
            found.append(TensorDifference(name, "shape", _looks(info), _looks(other)))
        else:
            difference = _values(a, b, info, other)
            if difference is not None:
                found.append(difference)
        advance(info.nbytes)
    found.extend(
        TensorDifference(name, "only in B", "", _looks(info))
        for name, info in b.tensors.items()
        if name not in a.tensors
    )
    return found


def _values(a: Reader, b: Reader, info: TensorInfo, other: TensorInfo) -> TensorDifference | None:
    differing, largest, squares, base = 0, 0.0, 0.0, 0.0
    first: tuple[int, ...] | None = None
    boxes = list(pieces(whole(info.shape), max(8, info.dtype.itemsize), _BLOCK_BYTES))
    for box in boxes:
        left, right = a.read(info.name, as_slices(box)), b.read(info.name, as_slices(box))
        if info.dtype == other.dtype and left.tobytes() == right.tobytes():
            continue
        unequal = _unequal(left, right)
        count = int(unequal.sum())
        x, y = _wide(left), _wide(right)
        if not count:
            continue
        if first is None:
            place = np.unravel_index(int(np.argmax(unequal)), unequal.shape)
            first = tuple(int(p) + start for p, (start, _) in zip(place, box, strict=True))
        with np.errstate(invalid="ignore"):
            gap = np.abs(x - y)
        gap = np.where(np.isnan(gap) & unequal, np.inf, np.nan_to_num(gap, nan=0.0, posinf=np.inf))
        differing, largest = differing + count, max(largest, float(gap.max()))
        squares += float(np.square(gap).sum())
    if differing:
        for box in boxes:
            x = _wide(a.read(info.name, as_slices(box)))
            base += float(np.square(np.abs(x[np.isfinite(x)])).sum())
        relative = float(np.sqrt(squares / base)) if base else float("inf")
        return TensorDifference(
            info.name, "values", _looks(info), _looks(other), differing, info.size, largest, relative, first or ()
        )
    if info.dtype != other.dtype:
        return TensorDifference(info.name, "dtype", _looks(info), _looks(other), size=info.size)
    return None


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
