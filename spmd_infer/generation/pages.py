"""The pages of one data shard's key-value cache: who counts on them, what they hold, which come next.

A page is *used* (counted by one or more sequences), *cached* (counted by none, but its content has a digest and can be
found again) or *free*. Attention reads the pool from its front to its last used page, so used pages stay at the front:
a cached page that lies before every free one is moved back when its place is wanted. The copies of a step are
*simultaneous*: every source is read before any destination is written.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from spmd_infer.errors import TaskError


class PagePool:
    """Pages 0 to ``num_pages`` - 1.

    Args:
        num_pages: how many there are.
        max_copies: pages copied in one step, at most.
    """

    def __init__(self, num_pages: int, max_copies: int) -> None:
        self._counts = [0] * num_pages
        self._digests: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._cached: OrderedDict[bytes, None] = OrderedDict()  # the longest unused first
        self._free = list(range(num_pages))
        # Heaps of pages that are, or were, cached and used: stale ones are dropped when they come to the top.
        self._cached_heap = _PageHeap(num_pages)
        self._used_heap = _PageHeap(num_pages)
        self._copies: dict[int, int] = {}  # destination to source
        self._max_copies = max_copies

    @property
    def num_pages(self) -> int:
        """Pages of the pool."""
        return len(self._counts)

    @property
    def available(self) -> int:
        """Pages that ``allocate`` could give: free or cached."""
        return len(self._free) + len(self._cached)

    @property
    def cached(self) -> int:
        """Pages that nobody uses and whose content can be found again."""
        return len(self._cached)

    @property
    def used(self) -> int:
        """Pages that somebody uses."""
        return self.num_pages - self.available

    @property
    def span(self) -> int:
        """Pages from the first to the last used one: what attention has to read."""
        negative = self._used_heap.top(lambda key: self._counts[-key] > 0)
        return 0 if negative is None else 1 - negative

    def allocate(self) -> int | None:
        """The first page that is free, or cached where none is; its content is lost. None when all are used."""
        if not self._free:
            if not self._cached:
                return None
            self._evict()
        page = self._free[0]
        cached = self._first_cached()
        if cached is not None and cached < page and len(self._copies) < self._max_copies:
            self._move(cached, page)
            page = cached
        heapq.heappop(self._free)
        self._counts[page] = 1
        self._used_heap.push(-page)
        return page

    def copy(self, source: int) -> int | None:
        """A new page with what ``source`` held before this step; None where there is no page or no copy left."""
        if len(self._copies) + 2 > self._max_copies:
            return None
        page = self.allocate()
        origin = self._copies.get(source, source)
        if page is not None and page != origin:
            self._copies[page] = origin
        return page

    def find(self, digests: Iterable[bytes]) -> tuple[int, int]:
        """How many of the digests, from the first, have a page; and how many of those pages are cached."""
        found = unused = 0
        for digest in digests:
            if digest not in self._page_of:
                break
            found += 1
            unused += digest in self._cached
        return found, unused

    def share(self, digests: Sequence[bytes]) -> list[int]:
        """The pages with these digests, each counted once more. All of them must have been found."""
        for digest in digests:
            page = self._page_of[digest]
            if not self._counts[page]:
                del self._cached[digest]
            self._counts[page] += 1
        return [self._pull_forward(self._page_of[digest]) for digest in digests]

    def use(self, page: int) -> None:
        """Count a used page once more."""
        assert self._counts[page], f"page {page} is not in use"
        self._counts[page] += 1

    def register(self, page: int, digest: bytes) -> None:
        """Let a used page be found. A digest that another page has, or a page that has one, stays as it is."""
        if digest not in self._page_of and self._digests[page] is None:
            self._digests[page] = digest
            self._page_of[digest] = page

    def release(self, pages: Sequence[int]) -> None:
        """Count a sequence's pages once less. The last is the first to be evicted: it is found by those before only."""
        for page in reversed(pages):
            assert self._counts[page], f"page {page} is released more often than it was taken"
            self._counts[page] -= 1
            if not self._counts[page]:
                digest = self._digests[page]
                if digest is None:
                    self._copies.pop(page, None)
                    heapq.heappush(self._free, page)
                else:
                    self._cached[digest] = None
                    self._cached_heap.push(page)

    def take_copies(self) -> list[tuple[int, int]]:
        """The copies ``(source, destination)`` to make before the step, all at once."""
        copies = [(source, destination) for destination, source in self._copies.items()]
        self._copies.clear()
        return copies

    def resize(self, num_pages: int) -> list[tuple[int, int]]:
        """Grow or shrink. Shrinking drops the cached pages beyond the new end and moves the used ones to the front.

        Returns:
            The moves ``(source, destination)``; sources lie beyond the new end, destinations before it.

        Raises:
            TaskError: more pages are in use than would be left.
        """
        assert not self._copies, "resize between steps, when the copies have been taken"
        if num_pages < self.used:
            raise TaskError(f"a pool of {num_pages} pages is too small for the {self.used} pages in use")
        moves: list[tuple[int, int]] = []
        for page in range(num_pages, self.num_pages):
            if not self._counts[page] and (digest := self._digests[page]) is not None:
                self._forget(digest)
        self._free = sorted(page for page in self._free if page < num_pages)
        for page in range(num_pages, self.num_pages):
            if self._counts[page]:
                if not self._free:
                    self._evict()
                moves.append((page, heapq.heappop(self._free)))
        for source, destination in moves:
            self._counts[destination] = self._counts[source]
            self._name(destination, self._digests[source])
        grown = range(self.num_pages, num_pages)
        self._free += grown  # larger than all others: still a heap
        self._counts = self._counts[:num_pages] + [0] * len(grown)
        self._digests = self._digests[:num_pages] + [None] * len(grown)
        self._cached_heap = _PageHeap(num_pages, (self._page_of[digest] for digest in self._cached))
        self._used_heap = _PageHeap(num_pages, (-page for page, count in enumerate(self._counts) if count))
        return moves

    def check(self) -> None:
        """Compare all records with each other.

        Raises:
            AssertionError: they disagree: a page is lost, doubled or wrongly named.
        """
        free, cached = set(self._free), {self._page_of[digest] for digest in self._cached}
        used = {page for page, count in enumerate(self._counts) if count}
        assert min(self._counts, default=0) >= 0, "a page is counted less than never"
        assert len(free) == len(self._free), "a page is free twice"
        assert len(cached) == len(self._cached), "a page is cached twice"
        assert sorted([*free, *cached, *used]) == list(range(self.num_pages)), "a page is lost or in two states"
        named = {digest: page for page, digest in enumerate(self._digests) if digest is not None}
        assert named == self._page_of, "digests and pages disagree"
        assert all(self._digests[page] is None for page in free), "a free page can be found"
        assert not free & set(self._copies), "a free page is written"
        assert len(self._copies) <= self._max_copies, "too many copies"
        assert self.span == max(used, default=-1) + 1, "the span is wrong"
        assert self._first_cached() == min(cached, default=None), "the first cached page is wrong"

    def count(self, page: int) -> int:
        """How many sequences use a page."""
        return self._counts[page]

    def _first_cached(self) -> int | None:
        return self._cached_heap.top(lambda page: not self._counts[page] and self._digests[page] is not None)

    def _pull_forward(self, page: int) -> int:
        """Where a page just found goes: to the front if it was unused until now and there is room before it."""
        if self._counts[page] > 1:
            return page
        digest = self._digests[page]
        cached = self._first_cached()
        target = min(self._free[0] if self._free else page, page if cached is None else cached)
        if target < page and len(self._copies) + 2 <= self._max_copies:
            self._counts[page] = 0
            if target == cached:
                self._swap(page, target)
            else:
                heapq.heappop(self._free)
                self._move(page, target)
                heapq.heappush(self._free, page)
            page = target
        assert self._digests[page] == digest
        self._counts[page] = 1
        self._used_heap.push(-page)
        return page

    def _move(self, source: int, destination: int) -> None:
        """Put the content of a page that nobody counts into a free one."""
        origin = self._copies.pop(source, source)
        if origin != destination:
            self._copies[destination] = origin
        self._name(destination, self._digests[source])
        self._digests[source] = None

    def _swap(self, page: int, other: int) -> None:
        origin, other_origin = self._copies.pop(page, page), self._copies.pop(other, other)
        if origin != other:
            self._copies[other] = origin
        if other_origin != page:
            self._copies[page] = other_origin
        digest, other_digest = self._digests[page], self._digests[other]
        self._name(other, digest)
        self._name(page, other_digest)

    def _name(self, page: int, digest: bytes | None) -> None:
        self._digests[page] = digest
        if digest is not None:
            self._page_of[digest] = page
            if digest in self._cached:
                self._cached_heap.push(page)

    def _evict(self) -> None:
        heapq.heappush(self._free, self._forget(next(iter(self._cached))))

    def _forget(self, digest: bytes) -> int:
        page = self._page_of.pop(digest)
        del self._cached[digest]
        self._digests[page] = None
        self._copies.pop(page, None)
        return page


class _PageHeap:
    """A heap that lists a page at most once, however often it is pushed, so that it cannot outgrow the pool."""

    def __init__(self, num_pages: int, keys: Iterable[int] = ()) -> None:
        self._listed = bytearray(num_pages)
        self._keys: list[int] = []
        for key in keys:
            self.push(key)

    def push(self, key: int) -> None:
        if not self._listed[abs(key)]:
            self._listed[abs(key)] = True
            heapq.heappush(self._keys, key)

    def top(self, valid: Callable[[int], bool]) -> int | None:
        while self._keys:
            if valid(self._keys[0]):
                return self._keys[0]
            self._listed[abs(heapq.heappop(self._keys))] = False
        return None
