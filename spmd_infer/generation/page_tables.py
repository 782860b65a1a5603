"""What the devices need to know of one data shard's pages, kept up to date change by change.

Attention over pages asks from both sides: a prompt's chunk writes by the row's *table* (which page is this row's
i-th?), a decode step reads by the page's *owner* (whose is it, and which of its pages?). Pages of a common prefix have
several owners and are listed apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Changes:
    """What differs since the last look, each in the order of its first change.

    Attributes:
        slots: rows of ``table``.
        pages: entries of ``owner`` and ``index``.
    """

    slots: list[int]
    pages: list[int]


class PageTables:
    """Tables of one pool's pages and of the slots whose sequences use them.

    The arrays change in place. Whoever hands them to a device that may read them later hands over a copy.

    Attributes:
        table: ``[slots + 1, max_pages]`` int32: the page of each slot's i-th page, 0 beyond its last. The last row is
            no sequence's: for rows of padding.
        owner: ``[num_pages]`` int32: the slot that alone uses the page; ``slots`` where none or several do.
        index: ``[num_pages]`` int32: which of its sequence's pages it is; 0 where nobody uses it.
        shared: the pages with several slots: page to slots, in the order in which they came.
    """

    def __init__(self, slots: int, num_pages: int, max_pages: int) -> None:
        self.slots = slots
        self.table: Ints = np.zeros((slots + 1, max_pages), np.int32)
        self.owner: Ints = np.full(num_pages, slots, np.int32)
        self.index: Ints = np.zeros(num_pages, np.int32)
        self.shared: dict[int, list[int]] = {}
        self._changed_slots: dict[int, None] = {}
        self._changed_pages: dict[int, None] = {}

    def add(self, slot: int, start: int, pages: Sequence[int]) -> None:
        """Give a slot its pages number ``start`` and following."""
        self._changed_slots[slot] = None
        self.table[slot, start : start + len(pages)] = pages
        for index, page in enumerate(pages, start):
            self._changed_pages[page] = None
            if (slots := self.shared.get(page)) is not None:
                slots.append(slot)
            elif (owner := int(self.owner[page])) == self.slots:
                self.owner[page] = slot
                self.index[page] = index
            else:
                self.shared[page] = [owner, slot]
                self.owner[page] = self.slots

    def clear(self, slot: int, pages: Sequence[int]) -> None:
        """Take all its pages from a slot."""
        self._changed_slots[slot] = None
        self.table[slot, : len(pages)] = 0
        for page in pages:
            self._changed_pages[page] = None
            if (slots := self.shared.get(page)) is None:
                self.owner[page] = self.slots
                self.index[page] = 0
            else:
                slots.remove(slot)
                if len(slots) == 1:
                    self.owner[page] = slots[0]
                    del self.shared[page]

    def shared_pages(self) -> tuple[Ints, Ints]:
        """The pages with several owners, in falling number of owners, then by page.

        Returns:
            ``[n]`` pages and ``[n, most]`` their slots, each row filled up with ``slots``.
        """
        rows = sorted(self.shared.items(), key=lambda item: (-len(item[1]), item[0]))
        owners: Ints = np.full((len(rows), max((len(slots) for _, slots in rows), default=0)), self.slots, np.int32)
        for line, (_, slots) in zip(owners, rows, strict=True):
            line[: len(slots)] = slots
        return np.array([page for page, _ in rows], np.int32), owners

    def take_changes(self) -> Changes:
        """What changed since the last call."""
        changes = Changes(list(self._changed_slots), list(self._changed_pages))
        self._changed_slots.clear()
        self._changed_pages.clear()
        return changes

    def resize(self, num_pages: int, moves: Sequence[tuple[int, int]]) -> None:
        """Follow a pool that grew or shrank.

        Args:
            num_pages: pages from now on.
            moves: what ``PagePool.resize`` returned.
        """
        for source, destination in moves:
            index = int(self.index[source])
            slots = self.shared.pop(source, None)
            self.owner[destination], self.index[destination] = self.owner[source], index
            for slot in slots or [int(self.owner[source])]:
                self.table[slot, index] = destination
                self._changed_slots[slot] = None
            if slots is not None:
                self.shared[destination] = slots
        kept = min(num_pages, len(self.owner))
        more = num_pages - kept
        self.owner = np.concatenate([self.owner[:kept], np.full(more, self.slots, np.int32)])
        self.index = np.concatenate([self.index[:kept], np.zeros(more, np.int32)])
        self._changed_pages = dict.fromkeys(range(num_pages))
