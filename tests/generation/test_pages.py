"""The page pool: counts, sharing, eviction, copies, sizes; against a simulated cache that holds what each page says."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from spmd_infer.errors import TaskError
from spmd_infer.generation.pages import PagePool
from spmd_infer.generation.prefixes import extend_digests

COPIES = 8


def pool_of(num_pages: int, max_copies: int = COPIES) -> PagePool:
    return PagePool(num_pages, max_copies)


def take(pool: PagePool, count: int) -> list[int]:
    pages = [pool.allocate() for _ in range(count)]
    assert None not in pages
    return [page for page in pages if page is not None]


def digests_of(tokens: list[int], *, salt: bytes = b"salt", namespace: str = "") -> list[bytes]:
    digests: list[bytes] = []
    extend_digests(digests, tokens, len(tokens) // 4, page_size=4, salt=salt, namespace=namespace)
    return digests


def test_the_lowest_free_page_comes_first() -> None:
    pool = pool_of(6)
    assert take(pool, 4) == [0, 1, 2, 3]
    assert pool.span == 4
    pool.release([1, 3])
    assert pool.span == 3
    assert take(pool, 3) == [1, 3, 4]
    assert pool.available == 1
    pool.check()


def test_an_exhausted_pool_gives_none() -> None:
    pool = pool_of(2)
    take(pool, 2)
    assert pool.allocate() is None
    assert pool.copy(0) is None


def test_a_freed_page_with_a_digest_is_found_until_it_is_evicted() -> None:
    pool = pool_of(3)
    (page,) = take(pool, 1)
    pool.register(page, b"a")
    pool.release([page])
    assert (pool.cached, pool.find([b"a", b"b"])) == (1, (1, 1))
    assert pool.share([b"a"]) == [0]
    assert pool.find([b"a"]) == (1, 0)
    pool.release([0])
    take(pool, 3)
    assert pool.find([b"a"]) == (0, 0)
    pool.check()


def test_the_longest_unused_page_is_evicted_first_and_a_prefix_after_what_follows_it() -> None:
    pool = pool_of(4)
    pages = take(pool, 4)
    for page, digest in zip(pages, [b"a", b"b", b"c", b"d"], strict=True):
        pool.register(page, digest)
    pool.release([2, 3])
    pool.release([0, 1])
    kept = []
    for _ in range(4):
        pool.allocate()
        kept.append([digest for digest in (b"a", b"b", b"c", b"d") if pool.find([digest])[0]])
    assert kept == [[b"a", b"b", b"c"], [b"a", b"b"], [b"a"], []]


def test_used_pages_stay_at_the_front_and_the_cache_moves_back() -> None:
    pool = pool_of(8)
    pages = take(pool, 3)
    for page, digest in zip(pages, [b"a", b"b", b"c"], strict=True):
        pool.register(page, digest)
    pool.release(pages)
    assert take(pool, 2) == [0, 1]
    assert sorted(pool.take_copies()) == [(0, 3), (1, 4)]
    assert pool.find([b"a", b"b", b"c"]) == (3, 3)
    assert pool.share([b"a", b"b", b"c"]) == [3, 4, 2]
    assert pool.span == 5
    pool.check()


def test_a_found_page_comes_to_the_front_in_exchange() -> None:
    pool = pool_of(4)
    pages = take(pool, 4)
    for page, digest in zip(pages, [b"a", b"b", b"c", b"d"], strict=True):
        pool.register(page, digest)
    pool.release(pages)
    assert pool.share([b"d"]) == [0]
    assert sorted(pool.take_copies()) == [(0, 3), (3, 0)]
    assert pool.find([b"a"]) == (1, 1)
    pool.check()


def test_no_more_copies_than_allowed() -> None:
    pool = pool_of(8, max_copies=1)
    pages = take(pool, 4)
    for page in pages:
        pool.register(page, bytes([page]))
    pool.release(pages)
    assert take(pool, 3) == [0, 5, 6]
    assert pool.copy(0) is None
    assert pool.take_copies() == [(0, 4)]


def test_shrinking_moves_used_pages_and_drops_cached_ones() -> None:
    pool = pool_of(6)
    pages = take(pool, 6)
    for page in pages:
        pool.register(page, bytes([page]))
    pool.release([0, 1, 4])
    assert pool.resize(4) == [(5, 1)]
    assert pool.find([bytes([5])]) == (1, 0)
    assert [pool.find([bytes([page])])[0] for page in (0, 1, 4)] == [1, 0, 0]
    pool.check()
    with pytest.raises(TaskError, match="2 pages is too small for the 3 pages in use"):
        pool.resize(2)
    assert pool.resize(9) == []
    assert pool.available == 6
    pool.check()


def test_digests_depend_on_everything_before_and_on_salt_and_namespace() -> None:
    tokens = list(range(16))
    digests = digests_of(tokens)
    assert len(set(digests)) == 4
    assert digests_of(tokens[:8]) == digests[:2]
    changed = digests_of([99, *tokens[1:]])
    assert not set(changed) & set(digests)
    assert not set(digests_of(tokens, salt=b"other")) & set(digests)
    assert not set(digests_of(tokens, namespace="adapter")) & set(digests)
    grown = digests[:1]
    extend_digests(grown, tokens, 4, page_size=4, salt=b"salt", namespace="")
    assert grown == digests


class Pool(RuleBasedStateMachine):
    """Random use of a pool whose pages hold an integer each; what is found must hold what its digest says."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = pool_of(7, 4)
        self.content: list[int] = [-1] * 7  # of each page, as of the last step
        self.written: dict[int, int] = {}  # what this step's computation writes, after its copies
        self.holders: list[dict[int, int]] = []  # page to content that it must have after the step
        self.named: dict[int, int] = {}  # pages to name when the step is over
        self.next = 0

    @rule(count=st.integers(1, 3), named=st.booleans())
    def compute(self, count: int, named: bool) -> None:
        if self.pool.available < count:
            assert count > 1 or self.pool.allocate() is None
            return
        holder = {}
        for page in take(self.pool, count):
            assert all(page not in other for other in self.holders)
            holder[page] = self.written[page] = self.next
            if named:
                self.named[page] = self.next
            self.next += 1
        self.holders.append(holder)

    @rule(data=st.data())
    def find(self, data: st.DataObject) -> None:
        values = data.draw(st.lists(st.integers(0, self.next), max_size=3, unique=True))
        digests = [value.to_bytes(4) for value in values]
        found, unused = self.pool.find(digests)
        assert unused <= found <= len(digests)
        if found:
            pages = self.pool.share(digests[:found])
            self.holders.append(dict(zip(pages, values[:found], strict=True)))

    @precondition(lambda self: any(set(holder) - set(self.written) for holder in self.holders))
    @rule(data=st.data())
    def copy(self, data: st.DataObject) -> None:
        candidates = [
            (page, value) for holder in self.holders for page, value in holder.items() if page not in self.written
        ]
        source, value = data.draw(st.sampled_from(candidates))
        page = self.pool.copy(source)
        if page is not None:
            assert all(page not in holder for holder in self.holders)
            self.holders.append({page: value})

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        holder = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        self.pool.release(list(holder))
        for page in holder:
            if not self.pool.count(page):
                self.named.pop(page, None)
                self.written.pop(page, None)

    @rule()
    def step(self) -> None:
        copies = self.pool.take_copies()
        assert len(copies) <= 4
        assert len({destination for _, destination in copies}) == len(copies)
        before = list(self.content)
        for source, destination in copies:
            self.content[destination] = before[source]
        for page, value in self.written.items():
            self.content[page] = value
        for page, value in self.named.items():
            self.pool.register(page, value.to_bytes(4))
        self.written.clear()
        self.named.clear()
        for holder in self.holders:
            assert {page: self.content[page] for page in holder} == holder
        for value in range(self.next):
            digest = value.to_bytes(4)
            if self.pool.find([digest])[0]:
                page = self.pool._page_of[digest]
                assert self.content[page] == value

    @rule(num_pages=st.integers(4, 10))
    def resize(self, num_pages: int) -> None:
        self.step()
        if num_pages < self.pool.used:
            with pytest.raises(TaskError):
                self.pool.resize(num_pages)
            return
        content = self.content + [-1] * (num_pages - len(self.content))
        moves = self.pool.resize(num_pages)
        for source, destination in moves:
            assert destination < num_pages <= source
            content[destination] = self.content[source]
        self.content = content[:num_pages]
        where = dict(moves)
        self.holders = [{where.get(page, page): value for page, value in holder.items()} for holder in self.holders]
        self.step()

    @invariant()
    def consistent(self) -> None:
        self.pool.check()
        for holder in self.holders:
            for page in holder:
                assert self.pool.count(page) == sum(page in other for other in self.holders)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
