"""The sizes that programs of generation are compiled for: few, and near enough to what is needed to waste little.

Without a warm-up they are found as they are needed. A warm-up fixes them: whatever stays within its bounds then runs in
a program that exists.
"""

from __future__ import annotations

from dataclasses import dataclass

from spmd_infer.generation.kv_pages import PAGE_SIZE

FEWEST_PAGES = 8
"""Of a pool."""

_FEWEST_SHARED = 32
_TOKENS_AT_ONCE = 1024  # of prompts in one program, about


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a warm-up compiles for. All counts are those of one part.

    Attributes:
        rows: requests that run at a time.
        positions: of the longest request, prompt and output.
        pages: of the largest pool.
        max_chunk: tokens of a prompt run at once; those of the longest request where prompts are not cut.
        copies: pages copied at once.
    """

    rows: int
    positions: int
    pages: int
    max_chunk: int
    copies: int


@dataclass(frozen=True)
class SizesAhead:
    """Every combination that is compiled ahead.

    Attributes:
        decodes: rows, pages of the pool, shared pages.
        chunks: rows, length, pages before.
        pools: pages, rising.
        copies: pages copied at once, rising.
    """

    decodes: tuple[tuple[int, int, int], ...]
    chunks: tuple[tuple[int, int, int], ...]
    pools: tuple[int, ...]
    copies: tuple[int, ...]

    @classmethod
    def within(cls, bounds: Bounds) -> SizesAhead:
        """The combinations that cover these bounds."""
        pools = _pools(bounds)
        decodes = [
            (rows, pool, shared)
            for pool in pools
            for shared in ((0,) if bounds.rows == 1 else sorted({0, min(_FEWEST_SHARED, pool), pool}))
            for rows in _decode_rows(pool, shared, bounds)
        ]
        longest = max(PAGE_SIZE, power_of_two(min(bounds.max_chunk, bounds.positions)))
        before = -(-bounds.positions // PAGE_SIZE) - 1
        kinds = [(length, 0) for length in _ladder(PAGE_SIZE, longest, 2)]
        if before:
            lengths = sorted({PAGE_SIZE, longest})
            kinds += [(length, earlier) for length in lengths for earlier in _ladder(4, power_of_two(before), 8)]
        chunks = [(rows, *kind) for kind in kinds for rows in sorted({1, _most_chunk_rows(kind[0], bounds)})]
        return cls(tuple(decodes), tuple(chunks), pools, (4, max(4, power_of_two(bounds.copies))))


class StepSizes:
    """Rounds what a step needs up to what is compiled, or will be.

    Attributes:
        ahead: what a warm-up has compiled; None without one.
    """

    def __init__(self) -> None:
        self.ahead: SizesAhead | None = None
        self._known: dict[tuple[int, int], list[int]] = {}

    def decode(self, rows: int, pool: int, shared: int) -> tuple[int, int]:
        """Rows and shared pages of the program for a decode step over a pool."""
        if self.ahead is not None:
            fitting = [(s, r) for r, p, s in self.ahead.decodes if p == pool and r >= rows and s >= shared]
            if fitting:
                least_shared, least_rows = min(fitting)
                return least_rows, least_shared
        return self._rows((0, 0), rows), _least_shared(shared)

    def chunk(self, tokens: int, before: int) -> tuple[int, int]:
        """Length, and pages before it, of the program for a chunk of so many tokens after so many pages."""
        if self.ahead is not None:
            fitting = [
                (length, earlier)
                for _, length, earlier in self.ahead.chunks
                if length >= tokens and earlier >= before and (before or not earlier)
            ]
            if fitting:
                return min(fitting)
        return max(PAGE_SIZE, power_of_two(tokens)), power_of_two(before) if before else 0

    def most_chunk_rows(self, length: int, earlier: int) -> int | None:
        """Rows that a program for chunks takes at most; more of them are run one batch after the other."""
        if self.ahead is None:
            return None
        return max((rows for rows, *kind in self.ahead.chunks if kind == [length, earlier]), default=None)

    def chunk_rows(self, rows: int, length: int, earlier: int) -> int:
        """Rows of the program for so many chunks."""
        if self.ahead is not None:
            fitting = [size for size, *kind in self.ahead.chunks if size >= rows and kind == [length, earlier]]
            if fitting:
                return min(fitting)
        return self._rows((length, earlier), rows)

    def pool(self, pages: int, most: int) -> int:
        """Pages of a pool for which so many would do, ``most`` at most."""
        if self.ahead is not None:
            fitting = [pool for pool in self.ahead.pools if pages <= pool <= most]
            if fitting:
                return min(fitting)
        return min(most, max(FEWEST_PAGES, power_of_two(pages)))

    def pools_between(self, now: int, wanted: int) -> tuple[int, ...]:
        """The sizes that a pool goes through on its way, the last included: only neighbours have programs."""
        if self.ahead is None:
            return (wanted,)
        low, high = sorted((now, wanted))
        between = [pool for pool in self.ahead.pools if low < pool < high]
        return (*(between if now < wanted else reversed(between)), wanted)

    def copies(self, count: int) -> int:
        """Pages of the program that copies so many."""
        if self.ahead is not None:
            return next((size for size in self.ahead.copies if size >= count), power_of_two(count))
        return power_of_two(count)

    def _rows(self, kind: tuple[int, int], rows: int) -> int:
        """The fewest that fit of those used before by programs of this kind, unless most would be wasted."""
        known = self._known.setdefault(kind, [])
        fitting = [size for size in known if rows <= size <= 4 * rows]
        if fitting:
            return min(fitting)
        known.append(power_of_two(rows))
        return known[-1]


def power_of_two(count: int) -> int:
    """The smallest that is not smaller."""
    return 1 << max(0, count - 1).bit_length()


def _least_shared(count: int) -> int:
    """Shared pages that a decode program is compiled for: none, or a few sizes far apart."""
    bucket = _FEWEST_SHARED if count else 0
    while bucket < count:
        bucket *= 8
    return bucket


def _pools(bounds: Bounds) -> tuple[int, ...]:
    most = power_of_two(bounds.pages)
    return tuple(sorted({min(size, bounds.pages) for size in _ladder(FEWEST_PAGES, most, 4)}))


def _decode_rows(pool: int, shared: int, bounds: Bounds) -> tuple[int, ...]:
    """In a pool so large that many requests filled it, the few that are left run in a program for some more."""
    most = power_of_two(min(bounds.rows, pool))
    needed = min(most, pool * PAGE_SIZE // bounds.positions)  # requests of the longest kind that fill it
    if shared > _FEWEST_SHARED:
        return (most,)
    if shared:
        return tuple(sorted({min(8, most), most}))
    # Twice as many rows cost twice as much where there are many, and hardly more where there are few.
    ladder = sorted({*_ladder(1, min(16, most), 4), *_ladder(min(16, most), most, 2)})
    return tuple(rows for rows in ladder if 8 * rows >= needed)


def _most_chunk_rows(length: int, bounds: Bounds) -> int:
    return max(1, min(power_of_two(bounds.rows), _TOKENS_AT_ONCE // length))


def _ladder(first: int, last: int, factor: int) -> tuple[int, ...]:
    """``first``, ``factor`` times as much, and so on, ending with ``last``."""
    steps = []
    while first < last:
        steps.append(first)
        first *= factor
    return (*steps, last)
