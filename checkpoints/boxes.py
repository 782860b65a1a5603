"""Boxes: contiguous pieces of a tensor, given by start and stop in each dimension."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy.typing as npt

Box = tuple[tuple[int, int], ...]


def whole(shape: Sequence[int]) -> Box:
    """The box that is all of a tensor."""
    return tuple((0, size) for size in shape)


def box_shape(box: Box) -> tuple[int, ...]:
    """Size of a box in each dimension."""
    return tuple(stop - start for start, stop in box)


def elements(box: Box) -> int:
    """How many elements a box holds."""
    count = 1
    for start, stop in box:
        count *= max(0, stop - start)
    return count


def as_slices(box: Box) -> tuple[slice, ...]:
    """A box as an index."""
    return tuple(slice(start, stop) for start, stop in box)


def part(array: npt.NDArray[Any], box: Box) -> npt.NDArray[Any]:
    """A view of a box of an array; also of one without dimensions, which plain indexing would make a number."""
    index: tuple[Any, ...] = (*as_slices(box), ...)
    view: npt.NDArray[Any] = array[index]
    return view


def intersection(a: Box, b: Box) -> Box | None:
    """What two boxes of one tensor share; None where that is nothing."""
    shared = tuple((max(start, other), min(stop, end)) for (start, stop), (other, end) in zip(a, b, strict=True))
    return shared if all(start < stop for start, stop in shared) else None


def relative(box: Box, origin: Box) -> Box:
    """A box counted from the start of another one."""
    return tuple((start - first, stop - first) for (start, stop), (first, _) in zip(box, origin, strict=True))


def run_of(shape: Sequence[int], box: Box) -> int | None:
    """The number of the first element of a box in a C-ordered tensor; None where the box does not lie in one run."""
    first, whole_behind, stride = 0, True, 1
    for size, (start, stop) in reversed(list(zip(shape, box, strict=True))):
        if not whole_behind and stop - start != 1:
            return None
        whole_behind = whole_behind and stop - start == size
        first, stride = first + start * stride, stride * size
    return first


def pieces(box: Box, itemsize: int, most_bytes: int) -> Iterator[Box]:
    """Cut a box into pieces of at most ``most_bytes``, each contiguous where the box lies in C order.

    A dimension is cut into a power of two of equal parts where that goes, so that the pieces of a tensor are also those
    of its halves and quarters. Pieces come in C order. A piece of one element may exceed the limit; an empty box has no
    pieces.
    """
    if elements(box) == 0:
        return
    if elements(box) * itemsize <= most_bytes:
        yield box
        return
    first = next((d for d, (start, stop) in enumerate(box) if stop - start > 1), None)
    if first is None:
        yield box
        return
    start, stop = box[first]
    row = elements(box) * itemsize // (stop - start)
    rows = max(1, most_bytes // row)
    parts = 1 << (-(-(stop - start) // rows) - 1).bit_length()
    if (stop - start) % parts == 0:
        rows = (stop - start) // parts
    for begin in range(start, stop, rows):
        part = (*box[:first], (begin, min(stop, begin + rows)), *box[first + 1 :])
        if row > most_bytes:
            yield from pieces(part, itemsize, most_bytes)
        else:
            yield part


def tiling_problem(shape: Sequence[int], boxes: Sequence[Box]) -> str | None:
    """Why boxes do not cover a tensor, each element once; None where they do."""
    covered = 0
    for box in boxes:
        if len(box) != len(shape) or any(not 0 <= a < b <= size for (a, b), size in zip(box, shape, strict=True)):
            return f"has a piece {list(box)} that does not lie in shape {list(shape)}"
        covered += elements(box)
    wanted = elements(whole(shape))
    if covered != wanted:
        return f"has {covered} of its {wanted} elements"
    if not shape:
        return None
    # Sweep along the first dimension: only boxes that are open at the same time can overlap.
    open_boxes: list[Box] = []
    for box in sorted(boxes):
        open_boxes = [other for other in open_boxes if other[0][1] > box[0][0]]
        if any(intersection(box, other) for other in open_boxes):
            return f"has two pieces that overlap at {list(box)}"
        open_boxes.append(box)
    return None
