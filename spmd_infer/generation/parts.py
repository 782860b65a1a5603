"""One data shard of the decode batch: its slots, its pages, and the sequences that hold them."""

from __future__ import annotations

import heapq
from bisect import insort

from spmd_infer.generation.limits import Limits
from spmd_infer.generation.page_tables import PageTables
from spmd_infer.generation.pages import PagePool
from spmd_infer.generation.prefixes import extend_digests
from spmd_infer.generation.sequences import Sequence


class Part:
    """A page pool and its slots.

    Attributes:
        running: the sequences that hold a slot, the one of the lowest rank first.
    """

    def __init__(self, index: int, limits: Limits) -> None:
        self.index = index
        self.pool = PagePool(limits.num_pages, limits.max_copies)
        self.tables = PageTables(limits.slots, limits.num_pages, limits.max_pages)
        self.running: list[Sequence] = []
        self._limits = limits
        self._free_slots = list(range(limits.slots))

    def restart(self) -> None:
        """Nothing runs, and no page holds anything."""
        num_pages = self.pool.num_pages
        self.pool = PagePool(num_pages, self._limits.max_copies)
        self.tables = PageTables(self._limits.slots, num_pages, self._limits.max_pages)
        self.running = []
        self._free_slots = list(range(self._limits.slots))

    @property
    def has_slot(self) -> bool:
        """Whether a slot is free."""
        return bool(self._free_slots)

    def spare(self) -> int:
        """Pages that could be allocated if half of the running sequences that will need another page had taken it."""
        # All of them would leave 8 % of a short pool's rows idle; none would preempt every other sequence
        # (benchmarks/scheduler.py, 160 pages: 36 and 4,602 of 10,000 preempted, with half of them 364).
        growing = 0
        for sequence in self.running:
            growing += sequence.reach > sequence.room
        return self.pool.available - (growing + 1) // 2

    def place(self, sequence: Sequence, pages: list[int]) -> None:
        """Give a sequence a slot and its first pages."""
        sequence.part = self.index
        sequence.slot = heapq.heappop(self._free_slots)
        sequence.pages = pages
        sequence.room = len(pages) * self._limits.page_size
        self.tables.add(sequence.slot, 0, pages)
        insort(self.running, sequence, key=_rank)

    def grow(self, sequence: Sequence) -> bool:
        """Give a sequence its next page; False where there is none."""
        page = self.pool.allocate()
        if page is None:
            return False
        assert sequence.slot is not None
        self.tables.add(sequence.slot, len(sequence.pages), [page])
        sequence.pages.append(page)
        sequence.room += self._limits.page_size
        return True

    def remove(self, sequence: Sequence) -> None:
        """Take slot and pages from a sequence."""
        assert sequence.slot is not None
        self.running.remove(sequence)
        self.tables.clear(sequence.slot, sequence.pages)
        self.pool.release(sequence.pages)
        heapq.heappush(self._free_slots, sequence.slot)
        sequence.slot = None
        sequence.pages = []
        sequence.room = 0

    def resize(self, num_pages: int) -> list[tuple[int, int]]:
        """Grow or shrink the pool; returns the page moves ``(source, destination)``."""
        moves = self.pool.resize(num_pages)
        self.tables.resize(num_pages, moves)
        where = dict(moves)
        for sequence in self.running:
            sequence.pages = [where.get(page, page) for page in sequence.pages]
        return moves

    def digests(self, sequence: Sequence, count: int) -> list[bytes]:
        """The digests of a sequence's first ``count`` pages, each made once."""
        extend_digests(
            sequence.digests,
            sequence.tokens,
            count,
            page_size=self._limits.page_size,
            salt=self._limits.salt,
            namespace=sequence.namespace,
        )
        return sequence.digests[:count]

    def register(self, sequence: Sequence, computed: int) -> None:
        """Let the pages of a sequence's first ``computed`` positions be found by sequences that begin alike."""
        full = computed // self._limits.page_size
        if not self._limits.prefix_cache or full <= sequence.registered:
            return
        digests = self.digests(sequence, full)
        for index in range(sequence.registered, full):
            self.pool.register(sequence.pages[index], digests[index])
        sequence.registered = full


def _rank(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.rank
