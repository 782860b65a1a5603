"""Attention over pages equals attention over the row, whoever shares the pages, wherever they lie."""

import re
from dataclasses import replace
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType

from spmd_infer.axes import AxisRules, axis_scope
from spmd_infer.errors import ModelError
from spmd_infer.models import paged_attention, pages_in_place, pages_mosaic
from spmd_infer.models.cache_formats import CacheFormat, Packed
from spmd_infer.models.chunk_attention import ChunkCache
from spmd_infer.models.page_attention import GATHERED, IN_PLACE
from spmd_infer.models.page_view import PageView
from spmd_infer.models.paged_attention import PagedCache
from spmd_infer.models.pages_in_place import attend_in_place
from spmd_infer.models.pages_mosaic import attend_mosaic

SIZE, LONGEST, MOST_SHARED = 4, 13, 3
FORMATS = {name: CacheFormat.of(name, "cpu", np.float32) for name in ("float32", "bfloat16", "int8", "fp8")}
PLAIN = FORMATS["float32"]


def reference(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """``queries [T, N, H]`` over positions 0 to ``ends [T]`` of ``keys [S, K, H]``, in float64."""
    folded = queries.shape[1] // keys.shape[1]
    keys, values = (np.repeat(x.astype(np.float64), folded, axis=1) for x in (keys, values))
    scores = np.einsum("tnh,snh->nts", queries.astype(np.float64), keys) / np.sqrt(keys.shape[-1])
    scores[:, np.arange(len(keys)) > ends[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("nts,snh->tnh", weights / weights.sum(-1, keepdims=True), values)


class Laid:
    """Rows of several parts laid into pages in random order; rows of a part may begin with the same pages."""

    def __init__(
        self,
        parts: int,
        lengths: list[list[int]],
        common: int | None,
        seed: int,
        added: int = 1,
        *,
        groups: int = 2,
        folded: int = 3,
        width: int = 8,
        fmt: CacheFormat = PLAIN,
        size: int = SIZE,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.groups, self.heads, self.width, self.format, self.size = groups, groups * folded, width, fmt, size
        rows, self.added = len(lengths[0]), added
        most = LONGEST * size // SIZE + added
        self.tables = np.zeros((parts, rows, -(-most // size) + 1), np.int32)
        num_pages = rows * self.tables.shape[2] + 3
        self.owners = np.full((parts, num_pages), rows, np.int32)
        self.places = np.zeros((parts, num_pages), np.int32)
        self.keys = rng.normal(size=(parts, rows, most, groups, width)).astype(np.float32)
        self.values = rng.normal(size=self.keys.shape).astype(np.float32)
        # What no row uses holds numbers too large to go unnoticed.
        self.pool_keys = np.full((parts, num_pages, groups, size, width), 77, np.float32)
        self.pool_values = np.full((parts, num_pages, groups, size, width), 77, np.float32)
        self.starts = np.array(lengths, np.int32)
        self.shared = np.zeros((parts, MOST_SHARED if common is not None else 0), np.int32)
        self.shared_places = np.zeros(self.shared.shape, np.int32)
        self.members = np.zeros((*self.shared.shape, rows), bool)
        common = common or 0
        for part in range(parts):
            free = iter(rng.permutation(num_pages))
            sharing = [row for row in range(rows) if common and lengths[part][row] >= common * size]
            for place in range(common if len(sharing) > 1 else 0):
                page = next(free)
                self.shared[part, place], self.shared_places[part, place] = page, place
                self.members[part, place, sharing] = True
                self.tables[part, sharing, place] = page
                for row in sharing[1:]:
                    span = slice(place * size, (place + 1) * size)
                    self.keys[part, row, span] = self.keys[part, sharing[0], span]
                    self.values[part, row, span] = self.values[part, sharing[0], span]
                self._fill(part, sharing[0], place, page)
            for row in range(rows):
                first = common if len(sharing) > 1 and row in sharing else 0
                for place in range(first, -(-(lengths[part][row] + added) // size)):
                    page = next(free)
                    self.tables[part, row, place] = page
                    self.owners[part, page], self.places[part, page] = row, place
                    self._fill(part, row, place, page)

    def _fill(self, part: int, row: int, place: int, page: int) -> None:
        for slot in range(self.size):
            position = place * self.size + slot
            if position < self.starts[part, row]:
                self.pool_keys[part, page, :, slot] = self.keys[part, row, position]
                self.pool_values[part, page, :, slot] = self.values[part, row, position]

    def cache(self, limits: np.ndarray | None = None, way: str = "in_place") -> PagedCache:
        limits = self.starts + self.added if limits is None else limits
        view = PageView(
            *map(jnp.asarray, (self.tables, limits, self.owners, self.places)),
            *map(jnp.asarray, (self.shared, self.shared_places, self.members)),
            way=way,
        )
        keys, values = (self.format.pack(jnp.asarray(pool)) for pool in (self.pool_keys, self.pool_values))
        return PagedCache(Packed(keys.numbers.swapaxes(3, 4), keys.scales), values, view, self.format)

    def step(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Queries, keys and values ``[B, T, ...]`` of the next positions, and these."""
        parts, rows, *_ = self.keys.shape
        positions = (self.starts[..., None] + np.arange(self.added)).reshape(-1, self.added)
        flat_keys, flat_values = (
            x.reshape(parts * rows, -1, self.groups, self.width) for x in (self.keys, self.values)
        )
        index = np.arange(parts * rows)[:, None]
        queries = (
            np.random.default_rng(3).normal(size=(parts * rows, self.added, self.heads, self.width)).astype(np.float32)
        )
        return queries, flat_keys[index, positions], flat_values[index, positions], positions.astype(np.int32)

    def expected(self, queries: np.ndarray, positions: np.ndarray) -> np.ndarray:
        flat_keys, flat_values = (rounded(self.format, x).reshape(-1, *x.shape[2:]) for x in (self.keys, self.values))
        return np.stack([reference(*row) for row in zip(queries, flat_keys, flat_values, positions, strict=True)])


def rounded(fmt: CacheFormat, values: np.ndarray) -> np.ndarray:
    """What a cache gives back."""
    given = jnp.asarray(values)
    return np.asarray(fmt.rounded(given, fmt.pack(given)))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("way", [IN_PLACE, GATHERED])
class TestEveryWay:
    """What holds of every way to attend over pages, in every format: the one test that a back end has to pass."""

    @pytest.mark.parametrize(
        ("parts", "rows", "added", "groups", "folded"),
        [(2, 3, 1, 2, 3), (1, 1, 3, 1, 1), (1, 2, 2, 3, 1), (1, 4, 1, 1, 4)],
    )
    def test_rows_over_pages_equal_rows_side_by_side(
        self, way: str, fmt: CacheFormat, parts: int, rows: int, added: int, groups: int, folded: int
    ) -> None:
        attend = jax.jit(PagedCache.attend)  # compiled once: only contents differ

        @settings(max_examples=8, deadline=None)
        @given(
            lengths=st.lists(
                st.lists(st.integers(0, LONGEST), min_size=rows, max_size=rows), min_size=parts, max_size=parts
            ),
            common=st.integers(0, MOST_SHARED),
            seed=st.integers(0, 99),
        )
        def check(lengths: list[list[int]], common: int, seed: int) -> None:
            laid = Laid(parts, lengths, common, seed, added, groups=groups, folded=folded, fmt=fmt)
            queries, keys, values, positions = laid.step()
            mixed, cache = attend(laid.cache(way=way), *map(jnp.asarray, (queries, keys, values, positions)))
            np.testing.assert_allclose(mixed, laid.expected(queries, positions), atol=2e-5)
            # The new positions are kept: the same step again, writing nothing, sees the same.
            limits = laid.starts if way == "in_place" else laid.starts + added
            again = replace(cache, view=replace(cache.view, limits=jnp.asarray(limits)))
            kept, _ = attend(again, *map(jnp.asarray, (queries, keys, values, positions)))
            np.testing.assert_allclose(kept, mixed, atol=1e-6)

        check()

    def test_rows_that_fill_up_the_batch_write_nothing_and_are_numbers(self, way: str, fmt: CacheFormat) -> None:
        laid = Laid(1, [[5, 0, 2]], None, 0, fmt=fmt)
        laid.owners[laid.owners == 1] = 3  # the middle row has no page of its own
        cache = laid.cache(laid.starts + np.array([[1, 0, 1]], np.int32), way)
        queries, keys, values, positions = laid.step()
        mixed, after = cache.attend(*map(jnp.asarray, (queries, keys, values, positions)))
        assert np.isfinite(mixed).all()
        np.testing.assert_allclose(mixed[::2], laid.expected(queries, positions)[::2], atol=2e-5)
        page = laid.tables[0, 1, 0]
        for before, now in zip(jax.tree.leaves(cache.keys), jax.tree.leaves(after.keys), strict=True):
            np.testing.assert_array_equal(now[0, page], before[0, page])


HALVES = CacheFormat("bfloat16", jnp.dtype(jnp.bfloat16))  # as accelerators hold it


class TestMosaic:
    """The kernel for Hopper GPUs, interpreted here, and lowered as for such a GPU."""

    @pytest.mark.parametrize(
        ("lengths", "common", "added", "groups", "folded", "width"),
        [([[150, 0, 64]], None, 1, 2, 3, 64), ([[130], [65]], None, 2, 1, 4, 128), ([[70, 70]], 1, 1, 1, 1, 64)],
        ids=["rows that differ", "two parts, two tokens", "a page in common"],
    )
    def test_interpreted_it_equals_rows_side_by_side(
        self, lengths: list[list[int]], common: int | None, added: int, groups: int, folded: int, width: int
    ) -> None:
        heads: dict[str, Any] = {"groups": groups, "folded": folded, "width": width}
        laid = Laid(len(lengths), lengths, common, 0, added, **heads, fmt=HALVES, size=64)
        queries, keys, values, positions = laid.step()
        queries = rounded(HALVES, queries)
        limits = np.where(laid.starts > 0, laid.starts + added, 0)  # a row of nothing fills up
        attended = []
        for way in (partial(attend_mosaic, interpret=interpreter()), attend_in_place):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(paged_attention, "WAYS", {"it": way})
                arrays = (jnp.asarray(x, jnp.bfloat16) for x in (queries, keys, values))
                attended.append(laid.cache(limits, "it").attend(*arrays, jnp.asarray(positions))[0])
        used = limits.reshape(-1) > 0
        found, in_place = (np.asarray(x, np.float32)[used] for x in attended)
        expected = laid.expected(queries, positions)[used]
        # Scaled queries, weights and results are bfloat16.
        assert np.abs(found - expected).max() <= 0.02 * np.abs(expected).max()
        assert np.abs(found - in_place).max() <= 0.02 * np.abs(expected).max()
        assert np.isfinite(np.asarray(attended[0], np.float32)).all()

    def test_it_lowers_for_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        hopper = SimpleNamespace(platform="gpu", compute_capability="9.0")
        monkeypatch.setattr(pages_mosaic, "current_device", lambda: hopper)
        pool = jax.ShapeDtypeStruct((1, 512, 8, 128, 64), jnp.bfloat16)
        values = jax.ShapeDtypeStruct((1, 512, 8, 64, 128), jnp.bfloat16)
        queries = jax.ShapeDtypeStruct((1, 32, 1, 8, 4, 128), jnp.bfloat16)  # Llama 3.1 8B's heads
        ints = {name: jax.ShapeDtypeStruct((1, 32, *size), jnp.int32) for name, size in SIZES_OF_ROWS.items()}
        nothing = jnp.zeros(0, jnp.int32)
        view = PageView(ints["tables"], ints["limits"], *(nothing,) * 5)  # type: ignore[arg-type]  # shapes
        traced = jax.jit(attend_mosaic).trace(queries, Packed(pool), Packed(values), ints["positions"], view)
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()

    def test_it_says_what_it_cannot_take(self) -> None:
        laid = Laid(1, [[5]], None, 0)
        queries, keys, values, positions = laid.step()
        with pytest.raises(ModelError, match="pages hold float32, the kernel takes bfloat16 and float16"):
            laid.cache(way="mosaic").attend(*map(jnp.asarray, (queries, keys, values, positions)))
        laid = Laid(1, [[70]], None, 0, width=64, fmt=HALVES, size=64)
        if jax.default_backend() != "gpu":
            with pytest.raises(ModelError, match="it is for compute capability 9, not none"):
                laid.cache(way="mosaic").attend(*(jnp.asarray(x, jnp.bfloat16) for x in laid.step()[:3]), positions)


SIZES_OF_ROWS: dict[str, tuple[int, ...]] = {"tables": (128,), "limits": (), "positions": (1,)}


def interpreter() -> Any:
    """Pallas's interpreter of kernels for Mosaic GPU, which has no public name in every version; None on such a GPU."""
    if jax.default_backend() == "gpu":
        return None
    public = getattr(plgpu, "InterpretParams", None)
    if public is None:
        public = import_module("jax._src.pallas.mosaic_gpu.interpret.params").InterpretGPUParams
    return public()


@pytest.mark.parametrize("name", ["bfloat16", "int8", "fp8"])
def test_pages_widened_some_at_a_time_equal_all_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    laid = Laid(2, [[13, 9, 1], [3, 12, 0]], 1, 4, fmt=FORMATS[name])
    queries, keys, values, positions = laid.step()
    found = []
    for size in (1 << 20, 2 * 2 * 8 * SIZE * 4):  # all pages; two of them
        monkeypatch.setattr(pages_in_place, "_WIDENED_BYTES", size)
        found.append(laid.cache().attend(*map(jnp.asarray, (queries, keys, values, positions)))[0])
    np.testing.assert_allclose(found[1], found[0], atol=1e-6)
    np.testing.assert_allclose(found[1], laid.expected(queries, positions), atol=2e-5)


@pytest.mark.parametrize("name", ["float32", "int8"])
@pytest.mark.parametrize("rules", [AxisRules(), AxisRules().replace(key_seq="seq")], ids=["whole", "pages over seq"])
def test_parts_on_devices_of_their_own_exchange_nothing(rules: AxisRules, name: str) -> None:
    sizes, names = ((2, 2), ("data", "model")) if rules.rules.get("key_seq") is None else ((2, 2), ("data", "seq"))
    mesh = jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    laid = Laid(2, [[5, 9], [3, 12]], None, 1, fmt=FORMATS[name])
    queries, keys, values, positions = laid.step()

    def run(cache: PagedCache, *args: jax.Array) -> tuple[jax.Array, PagedCache]:
        with axis_scope(rules, mesh):
            return cache.attend(*args)

    compiled = jax.jit(run).lower(laid.cache(), *map(jnp.asarray, (queries, keys, values, positions))).compile()
    mixed, _ = compiled(laid.cache(), *map(jnp.asarray, (queries, keys, values, positions)))
    np.testing.assert_allclose(mixed, laid.expected(queries, positions), atol=1e-5)
    assert not re.search(r"all-gather\(|all-to-all\(|collective-permute\(", compiled.as_text()) or "seq" in names


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("batch", [1, 4, 32])
def test_a_step_reads_the_pool_in_place(batch: int, name: str) -> None:
    fmt = FORMATS[name]

    def shape(*sizes: int, dtype: object = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, *sizes), dtype)

    def ints(*sizes: int) -> jax.ShapeDtypeStruct:
        return shape(*sizes, dtype=jnp.int32)

    pages = 16 * batch
    view = PageView(
        ints(batch, 16), ints(batch), ints(pages), ints(pages), ints(0), ints(0), shape(0, batch, dtype=bool)
    )
    pool = shape(pages, 3, 64, 64, dtype=fmt.dtype)
    pool = Packed(pool, shape(pages, 3, 64) if fmt.scaled else None)
    cache = PagedCache(pool, pool, view, fmt)
    new = [jax.ShapeDtypeStruct((batch, 1, heads, 64), jnp.float32) for heads in (9, 3, 3)]
    at = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    compiled = jax.jit(PagedCache.attend, donate_argnums=0).lower(cache, *new, at).compile()
    stored = {"float32": "f32", "bfloat16": "u16", "int8": "s8", "fp8": "u8"}[name]
    made = re.findall(rf"= {stored}\[(?:1,)?{pages},3,64,64\]\S* ([\w-]+)\(", compiled.as_text())
    assert "scatter" in made or "fusion" in made
    assert not {"copy", "transpose", "dynamic-update-slice", "gather"} & set(made)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * pages * 3 * 64 * fmt.position_bytes(64)
    # Small numbers are widened, 2 MiB of them at a time; a small pool at once.
    assert memory.temp_size_in_bytes < max(pages * 3 * 64 * 64 * 2, 6 << 20 if fmt.rounds(np.float32) else 0)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("starts", [[0, 4, 8], [8, 8, 0]])
def test_a_chunk_over_earlier_pages_equals_the_whole_row(starts: list[int], fmt: CacheFormat) -> None:
    rng = np.random.default_rng(5)
    length, groups, heads, width = 6, 2, 6, 8
    total = [start + length for start in starts]
    keys, values = (rng.normal(size=(3, max(total), groups, width)).astype(np.float32) for _ in range(2))
    queries = rng.normal(size=(3, length, heads, width)).astype(np.float32)
    positions = np.array(starts)[:, None] + np.arange(length)
    rows = np.arange(3)[:, None]
    pages, value_pages = (
        fmt.pack(jnp.asarray(x[:, :8].reshape(3, 2, SIZE, groups, width).swapaxes(2, 3))) for x in (keys, values)
    )
    earlier = Packed(pages.numbers.swapaxes(3, 4), pages.scales), value_pages
    cache = ChunkCache(jnp.asarray(starts, jnp.int32), fmt, earlier)
    new = keys[rows, positions], values[rows, positions]
    mixed, kept = cache.attend(*map(jnp.asarray, (queries, *new, positions)))
    keys, values = rounded(fmt, keys), rounded(fmt, values)
    for row in range(3):
        np.testing.assert_allclose(
            mixed[row], reference(queries[row], keys[row], values[row], positions[row]), atol=1e-5
        )
    assert kept.keys is not None
    assert kept.earlier is None
    np.testing.assert_array_equal(kept.keys.numbers, fmt.pack(jnp.asarray(new[0])).numbers)
    # A chunk that begins its row sees itself as the cache will give it back.
    first, _ = ChunkCache(jnp.zeros(3, jnp.int32), fmt).attend(
        jnp.asarray(queries), *(jnp.asarray(x[:, :length]) for x in (keys, values)), jnp.arange(length)[None]
    )
    np.testing.assert_allclose(first[0], reference(queries[0], keys[0, :6], values[0, :6], np.arange(6)), atol=1e-5)
