"""How much memory buffers take that are alive at different times, packed as XLA packs them."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_SMALL = 1e-3
"""Buffers below this part of the largest are not packed, only counted."""


@dataclass
class Slot:
    """A buffer.

    Attributes:
        size: its bytes.
        start: the first moment at which it is alive.
        end: the last one.
        views: whether operations read it by another name too, such as a matrix that an all-reduce takes in its shape.
    """

    size: int
    start: int
    end: int
    views: bool = False

    def meets(self, other: Slot) -> bool:
        """Whether both are alive at some moment."""
        return self.start <= other.end and other.start <= self.end


def heap_bytes(slots: Sequence[Slot]) -> int:
    """Bytes from the first to the last one in use, of all buffers together.

    XLA places the largest first, each into the smallest gap that holds it; of equal ones those that have no views, and
    then those that come first. That can take more than is ever alive at once: a third more in an EfficientNet.
    """
    least = _SMALL * max((slot.size for slot in slots), default=0)
    large, small = [s for s in slots if s.size >= least], [s for s in slots if s.size < least]
    return _packed(sorted(large, key=lambda slot: (-slot.size, slot.views, slot.start))) + alive_bytes(small)


def alive_bytes(slots: Iterable[Slot]) -> int:
    """The most bytes that are alive at once."""
    changes: Counter[int] = Counter()
    for slot in slots:
        changes[slot.start] += slot.size
        changes[slot.end + 1] -= slot.size
    alive = peak = 0
    for moment in sorted(changes):
        alive += changes[moment]
        peak = max(peak, alive)
    return peak


def _packed(slots: Sequence[Slot]) -> int:
    """Place one buffer after the other."""
    placed: list[tuple[int, Slot]] = []  # by offset
    top = 0
    for slot in slots:
        best: tuple[int, int] | None = None  # size and offset of the smallest gap
        end = 0
        for offset, other in placed:
            if other.start > slot.end or slot.start > other.end:
                continue
            gap = offset - end
            if gap >= slot.size and (best is None or gap < best[0]):
                best = gap, end
            end = max(end, offset + other.size)
        offset = end if best is None else best[1]
        insort(placed, (offset, slot), key=_offset)
        top = max(top, offset + slot.size)
    return top


def _offset(item: tuple[int, Slot]) -> int:
    return item[0]
