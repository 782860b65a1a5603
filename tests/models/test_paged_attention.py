"""Attention over pages equals attention over the row, whoever shares the pages and wherever they lie."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

from spmd_infer.axes import AxisRules, axis_scope
from spmd_infer.models.chunk_attention import ChunkCache
from spmd_infer.models.paged_attention import PagedCache, PageView

SIZE, GROUPS, FOLDED, WIDTH = 4, 2, 3, 8
HEADS = GROUPS * FOLDED


def reference(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """``queries [T, N, H]`` over positions 0 to ``ends [T]`` of ``keys [S, K, H]``, in float64."""
    keys, values = (np.repeat(x.astype(np.float64), FOLDED, axis=1) for x in (keys, values))
    scores = np.einsum("tnh,snh->nts", queries.astype(np.float64), keys) / np.sqrt(WIDTH)
    scores[:, np.arange(len(keys)) > ends[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("nts,snh->tnh", weights / weights.sum(-1, keepdims=True), values)


class Laid:
    """Rows of several parts laid into pages in random order; rows of a part may begin with the same pages."""

    def __init__(self, parts: int, lengths: list[list[int]], common: int, seed: int, added: int = 1) -> None:
        rng = np.random.default_rng(seed)
        rows, self.added = len(lengths[0]), added
        most = max(max(part) for part in lengths) + added
        self.tables = np.zeros((parts, rows, -(-most // SIZE) + 1), np.int32)
        num_pages = rows * self.tables.shape[2] + 3
        self.owners = np.full((parts, num_pages), rows, np.int32)
        self.places = np.zeros((parts, num_pages), np.int32)
        self.keys = rng.normal(size=(parts, rows, most, GROUPS, WIDTH)).astype(np.float32)
        self.values = rng.normal(size=self.keys.shape).astype(np.float32)
        # What no row uses holds numbers too large to go unnoticed.
        self.pool_keys = np.full((parts, num_pages, GROUPS, WIDTH, SIZE), 77, np.float32)
        self.pool_values = np.full((parts, num_pages, GROUPS, SIZE, WIDTH), 77, np.float32)
        self.starts = np.array(lengths, np.int32)
        self.shared = np.zeros((parts, common + 1 if common else 0), np.int32)
        self.shared_places = np.zeros(self.shared.shape, np.int32)
        self.members = np.zeros((*self.shared.shape, rows), bool)
        for part in range(parts):
            free = iter(rng.permutation(num_pages))
            sharing = [row for row in range(rows) if common and lengths[part][row] >= common * SIZE]
            for place in range(common if len(sharing) > 1 else 0):
                page = next(free)
                self.shared[part, place], self.shared_places[part, place] = page, place
                self.members[part, place, sharing] = True
                self.tables[part, sharing, place] = page
                for row in sharing[1:]:
                    span = slice(place * SIZE, (place + 1) * SIZE)
                    self.keys[part, row, span] = self.keys[part, sharing[0], span]
                    self.values[part, row, span] = self.values[part, sharing[0], span]
                self._fill(part, sharing[0], place, page)
            for row in range(rows):
                first = common if len(sharing) > 1 and row in sharing else 0
                for place in range(first, -(-(lengths[part][row] + added) // SIZE)):
                    page = next(free)
                    self.tables[part, row, place] = page
                    self.owners[part, page], self.places[part, page] = row, place
                    self._fill(part, row, place, page)

    def _fill(self, part: int, row: int, place: int, page: int) -> None:
        for slot in range(SIZE):
            position = place * SIZE + slot
            if position < self.starts[part, row]:
                self.pool_keys[part, page, :, :, slot] = self.keys[part, row, position]
                self.pool_values[part, page, :, slot] = self.values[part, row, position]

    def cache(self, limits: np.ndarray | None = None) -> PagedCache:
        limits = self.starts + self.added if limits is None else limits
        view = PageView(
            *map(jnp.asarray, (self.tables, limits, self.owners, self.places)),
            *map(jnp.asarray, (self.shared, self.shared_places, self.members)),
        )
        return PagedCache(jnp.asarray(self.pool_keys), jnp.asarray(self.pool_values), view)

    def step(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Queries, keys and values ``[B, T, ...]`` of the next positions, and these."""
        parts, rows, *_ = self.keys.shape
        positions = (self.starts[..., None] + np.arange(self.added)).reshape(-1, self.added)
        flat_keys, flat_values = (x.reshape(parts * rows, -1, GROUPS, WIDTH) for x in (self.keys, self.values))
        index = np.arange(parts * rows)[:, None]
        queries = np.random.default_rng(3).normal(size=(parts * rows, self.added, HEADS, WIDTH)).astype(np.float32)
        return queries, flat_keys[index, positions], flat_values[index, positions], positions.astype(np.int32)

    def expected(self, queries: np.ndarray, positions: np.ndarray) -> np.ndarray:
        flat_keys, flat_values = (x.reshape(-1, *x.shape[2:]) for x in (self.keys, self.values))
        return np.stack([reference(*row) for row in zip(queries, flat_keys, flat_values, positions, strict=True)])


@settings(max_examples=25, deadline=None)
@given(
    parts=st.integers(1, 2),
    data=st.data(),
    common=st.integers(0, 2),
    added=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_rows_over_pages_equal_rows_side_by_side(
    parts: int, data: st.DataObject, common: int, added: int, seed: int
) -> None:
    rows = data.draw(st.integers(1, 3))
    lengths = data.draw(
        st.lists(st.lists(st.integers(0, 13), min_size=rows, max_size=rows), min_size=parts, max_size=parts)
    )
    laid = Laid(parts, lengths, common, seed, added)
    queries, keys, values, positions = laid.step()
    mixed, cache = jax.jit(PagedCache.attend)(laid.cache(), *map(jnp.asarray, (queries, keys, values, positions)))
    np.testing.assert_allclose(mixed, laid.expected(queries, positions), atol=1e-5)
    # The new positions are kept: the same step again, without writing, sees the same.
    again = PagedCache(cache.keys, cache.values, laid.cache(np.zeros_like(laid.starts)).view)
    kept, _ = jax.jit(PagedCache.attend)(again, jnp.asarray(queries), *map(jnp.zeros_like, (keys, values)), positions)
    np.testing.assert_array_equal(kept, mixed)


def test_rows_that_fill_up_the_batch_write_nothing_and_are_numbers() -> None:
    laid = Laid(1, [[5, 0, 2]], 0, 0)
    limits = laid.starts + np.array([[1, 0, 1]], np.int32)
    queries, keys, values, positions = laid.step()
    mixed, cache = PagedCache.attend(laid.cache(limits), *map(jnp.asarray, (queries, keys, values, positions)))
    assert np.isfinite(mixed).all()
    page = laid.tables[0, 1, 0]
    np.testing.assert_array_equal(cache.keys[0, page], laid.pool_keys[0, page])


@pytest.mark.parametrize("rules", [AxisRules(), AxisRules().replace(key_seq="seq")], ids=["whole", "pages over seq"])
def test_parts_on_devices_of_their_own_exchange_nothing(rules: AxisRules) -> None:
    sizes, names = ((2, 2), ("data", "model")) if rules.rules.get("key_seq") is None else ((2, 2), ("data", "seq"))
    mesh = jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    laid = Laid(2, [[5, 9], [3, 12]], 0, 1)
    queries, keys, values, positions = laid.step()

    def run(cache: PagedCache, *args: jax.Array) -> tuple[jax.Array, PagedCache]:
        with axis_scope(rules, mesh):
            return cache.attend(*args)

    compiled = jax.jit(run).lower(laid.cache(), *map(jnp.asarray, (queries, keys, values, positions))).compile()
    mixed, _ = compiled(laid.cache(), *map(jnp.asarray, (queries, keys, values, positions)))
    np.testing.assert_allclose(mixed, laid.expected(queries, positions), atol=1e-5)
    assert not re.search(r"all-gather\(|all-to-all\(|collective-permute\(", compiled.as_text()) or "seq" in names


@pytest.mark.parametrize("batch", [1, 4])
def test_a_step_reads_the_pool_in_place(batch: int) -> None:
    def shape(*sizes: int, dtype: object = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, *sizes), dtype)

    def ints(*sizes: int) -> jax.ShapeDtypeStruct:
        return shape(*sizes, dtype=jnp.int32)

    pages = 16 * batch
    view = PageView(
        ints(batch, 16), ints(batch), ints(pages), ints(pages), ints(0), ints(0), shape(0, batch, dtype=bool)
    )
    cache = PagedCache(shape(pages, 3, 64, 64), shape(pages, 3, 64, 64), view)
    new = [jax.ShapeDtypeStruct((batch, 1, heads, 64), jnp.float32) for heads in (9, 3, 3)]
    at = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    compiled = jax.jit(PagedCache.attend, donate_argnums=0).lower(cache, *new, at).compile()
    made = re.findall(rf"= f32\[(?:1,)?{pages},3,64,64\]\S* ([\w-]+)\(", compiled.as_text())
    assert "scatter" in made or "fusion" in made
    assert not {"copy", "transpose", "dynamic-update-slice", "gather"} & set(made)
    pool_bytes = 2 * pages * 3 * 64 * 64 * 4
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes / 4


@pytest.mark.parametrize("starts", [[0, 4, 8], [8, 8, 0]])
def test_a_chunk_over_earlier_pages_equals_the_whole_row(starts: list[int]) -> None:
    rng = np.random.default_rng(5)
    length = 6
    total = [start + length for start in starts]
    keys, values = (rng.normal(size=(3, max(total), GROUPS, WIDTH)).astype(np.float32) for _ in range(2))
    queries = rng.normal(size=(3, length, HEADS, WIDTH)).astype(np.float32)
    positions = np.array(starts)[:, None] + np.arange(length)
    rows = np.arange(3)[:, None]
    pages = np.pad(keys[:, :8], ((0, 0), (0, 0), (0, 0), (0, 0))).reshape(3, 2, SIZE, GROUPS, WIDTH)
    value_pages = values[:, :8].reshape(3, 2, SIZE, GROUPS, WIDTH)
    cache = ChunkCache(
        jnp.asarray(pages.transpose(0, 1, 3, 4, 2)),
        jnp.asarray(value_pages.transpose(0, 1, 3, 2, 4)),
        jnp.asarray(starts, jnp.int32),
    )
    new = keys[rows, positions], values[rows, positions]
    mixed, kept = cache.attend(*map(jnp.asarray, (queries, *new, positions)))
    for row in range(3):
        np.testing.assert_allclose(
            mixed[row], reference(queries[row], keys[row], values[row], positions[row]), atol=1e-5
        )
    assert kept.keys is not None
    np.testing.assert_array_equal(kept.keys, new[0])
