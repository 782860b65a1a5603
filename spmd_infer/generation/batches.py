"""The rows of a step as arrays: which sequence is in which row, and what the devices need to know of each.

Numpy only. Every array is made anew: a device may still be reading the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from spmd_infer.generation.page_tables import PageTables

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Layout:
    """Where each entry of a step is: its part of the rows, and its row there.

    Attributes:
        parts: parts of the rows.
        rows: rows of each part, a bucket.
        places: ``(part, row)`` of each entry.
    """

    parts: int
    rows: int
    places: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, parts_of: Sequence[int], parts: int, bucket: Callable[[int], int]) -> Layout:
        """Rows for entries that live in the given parts, in their order; ``bucket`` rounds the number of rows up."""
        taken = [0] * parts
        places = []
        for part in parts_of:
            places.append((part, taken[part]))
            taken[part] += 1
        return cls(parts, bucket(max(taken)), tuple(places))

    def ints(self, values: Sequence[int], fill: int = 0) -> Ints:
        """One number of each entry as ``[D, b]``."""
        out = np.full((self.parts, self.rows), fill, np.int32)
        for (part, row), value in zip(self.places, values, strict=True):
            out[part, row] = value
        return out

    def lines(self, values: Sequence[Sequence[int]], length: int, fill: int = 0) -> Ints:
        """A list of numbers of each entry as ``[D, b, length]``."""
        out = np.full((self.parts, self.rows, length), fill, np.int32)
        for (part, row), line in zip(self.places, values, strict=True):
            out[part, row, : len(line)] = line
        return out

    def arrays(self, rows: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """One array of each entry and one more for rows that fill up, ``[entries + 1, ...]``, as ``[D, b, ...]``."""
        index = self.ints(range(len(self.places)), fill=len(self.places))
        spread: npt.NDArray[np.generic] = rows[index]
        return spread


@dataclass(frozen=True)
class PageArrays:
    """The fields of ``PageView`` as numpy arrays; see there."""

    tables: Ints
    limits: Ints
    owners: Ints
    places: Ints
    shared: Ints
    shared_places: Ints
    members: npt.NDArray[np.bool_]


def page_arrays(layout: Layout, slots: Ints, tables: Sequence[PageTables], most_shared: int) -> PageArrays:
    """What a decode step needs to know of the pages.

    Args:
        layout: the step's rows.
        slots: ``[D, b]``, the slot of each row; the last one where a row fills up.
        tables: of each part.
        most_shared: pages with several owners that there is room for.
    """
    last = tables[0].slots
    row_of = np.full((layout.parts, last + 1), layout.rows, np.int32)  # of each slot
    for part, row in layout.places:
        row_of[part, slots[part, row]] = row
    part_index = np.arange(layout.parts)[:, None]
    owners = row_of[part_index, np.stack([each.owner for each in tables])]
    shared = np.zeros((layout.parts, most_shared), np.int32)
    shared_places = np.zeros_like(shared)
    members = np.zeros((*shared.shape, layout.rows), np.bool_)
    for part, each in enumerate(tables):
        for line, (page, users) in enumerate(each.shared.items()):
            shared[part, line], shared_places[part, line] = page, each.index[page]
            rows = row_of[part, users]
            members[part, line, rows[rows < layout.rows]] = True
    return PageArrays(
        tables=np.stack([each.table for each in tables])[part_index, slots],
        limits=(slots != last).astype(np.int32),
        owners=owners,
        places=np.stack([each.index for each in tables]),
        shared=shared,
        shared_places=shared_places,
        members=members,
    )
