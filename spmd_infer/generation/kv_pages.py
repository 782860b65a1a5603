"""The key-value cache of a decoder in pages: every layer's pool, and what is done to pools as wholes.

A program of the model runs a chunk of prompts without the pools and returns its keys and values; ``insert`` lays them
into pages. So programs of prompts do not depend on the pools' size, and those of a decode step only on it and the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp

from spmd_infer.generation.cache import CacheSizes
from spmd_infer.models.cache_formats import CacheFormat, Packed
from spmd_infer.models.page_view import PageView
from spmd_infer.models.paged_attention import PAGE_KEY_AXES, PAGE_SCALE_AXES, PAGE_VALUE_AXES, PagedCache

PAGE_SIZE = 64
"""Positions of a page. Smaller ones are slower to attend over (10 ms in place of 2.7 for 16 on a CPU)."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVPages:
    """The pools of all layers; passed to a step, returned changed, its buffers donated.

    Attributes:
        keys: ``[D, P, K, H, S]``, one a layer: parts of the rows, pages, key heads, head dim, positions of a page;
            scales, if the format has them, ``[D, P, K, S]``.
        values: ``[D, P, K, S, H]``, scales likewise.
        format: what they hold.
    """

    keys: tuple[Packed, ...]
    values: tuple[Packed, ...]
    format: CacheFormat = field(metadata={"static": True})

    @classmethod
    def zeros(cls, sizes: CacheSizes, parts: int, num_pages: int, fmt: CacheFormat) -> KVPages:
        """Empty pools of a format; called while tracing."""
        pool, width = (parts, num_pages, sizes.num_kv_heads), sizes.head_dim

        def empty(*page: int) -> Packed:
            scales = jnp.zeros((*pool, PAGE_SIZE), jnp.float32) if fmt.scaled else None
            return Packed(jnp.zeros((*pool, *page), fmt.dtype), scales)

        keys = tuple(empty(width, PAGE_SIZE) for _ in range(sizes.num_layers))
        return cls(keys, tuple(empty(PAGE_SIZE, width) for _ in range(sizes.num_layers)), fmt)

    @property
    def num_pages(self) -> int:
        """Pages of each part."""
        return int(self.keys[0].numbers.shape[-4])

    def inserted(self, keys: Sequence[Packed], values: Sequence[Packed], targets: jax.Array) -> KVPages:
        """With the keys and values of a chunk of prompts.

        Args:
            keys: ``[B, T, K, H]`` of each layer; T a multiple of the page's positions.
            values: likewise.
            targets: ``[D, b, T / S]`` int32, the page for each span of S positions; P or more for none.
        """
        parts, rows, spans = targets.shape
        into = targets.reshape(parts, rows * spans)

        def put(pool: jax.Array, new: jax.Array, *, turned: bool = False) -> jax.Array:
            spanned = new.reshape(parts, rows * spans, PAGE_SIZE, *new.shape[2:]).swapaxes(2, 3)  # [D, n, K, S, ...]
            return jax.vmap(_set_pages)(pool, into, spanned.swapaxes(3, 4) if turned else spanned)

        def laid(pool: Packed, new: Packed, *, turned: bool = False) -> Packed:
            numbers = put(pool.numbers, new.numbers, turned=turned)
            if pool.scales is None or new.scales is None:
                return Packed(numbers)
            return Packed(numbers, put(pool.scales, new.scales))

        return replace(
            self,
            keys=tuple(laid(pool, new, turned=True) for pool, new in zip(self.keys, keys, strict=True)),
            values=tuple(laid(pool, new) for pool, new in zip(self.values, values, strict=True)),
        )

    def layers(self, view: PageView) -> list[PagedCache]:
        """The cache of each layer, for a step of the rows in ``view``."""
        return [PagedCache(*pair, view, self.format) for pair in zip(self.keys, self.values, strict=True)]

    def updated(self, layers: Sequence[PagedCache]) -> KVPages:
        """With what a step has made of ``layers``."""
        return replace(self, keys=tuple(layer.keys for layer in layers), values=tuple(layer.values for layer in layers))

    def gathered(self, tables: jax.Array) -> tuple[tuple[Packed, ...], tuple[Packed, ...]]:
        """The pages of rows, ``tables [D, b, M]``: keys ``[D b, M, K, H, S]`` and values ``[D b, M, K, S, H]``."""
        parts, rows, count = tables.shape

        def take(pool: jax.Array) -> jax.Array:
            found: jax.Array = jax.vmap(lambda pages, wanted: pages[wanted])(pool, tables)
            return found.reshape(parts * rows, count, *pool.shape[2:])

        taken: KVPages = jax.tree.map(take, self)
        return taken.keys, taken.values

    def copied(self, sources: jax.Array, targets: jax.Array) -> KVPages:
        """With pages ``sources [D, n]`` copied over ``targets [D, n]``; a target of P or more is none.

        All are read before any is written.
        """

        def put(pool: jax.Array) -> jax.Array:
            found = jax.vmap(lambda pages, wanted: pages[wanted])(pool, sources)
            return jax.vmap(_set_pages)(pool, targets, found)

        pages: KVPages = jax.tree.map(put, self)
        return pages

    def resized(self, num_pages: int) -> KVPages:
        """The first ``num_pages`` pages, new ones empty."""

        def fit(pool: jax.Array) -> jax.Array:
            kept = pool[:, :num_pages]
            return jnp.pad(kept, ((0, 0), (0, num_pages - kept.shape[1]), *((0, 0),) * (kept.ndim - 2)))

        pages: KVPages = jax.tree.map(fit, self)
        return pages


def _set_pages(pool: jax.Array, targets: jax.Array, new: jax.Array) -> jax.Array:
    written: jax.Array = pool.at[targets].set(new, mode="drop")
    return written


def pages_axes(sizes: CacheSizes, fmt: CacheFormat) -> KVPages:
    """The logical axes of each array of the pools, in their own structure."""
    scales = PAGE_SCALE_AXES if fmt.scaled else None
    keys = Packed(PAGE_KEY_AXES, scales)  # type: ignore[arg-type]  # trees of axes, not of arrays
    values = Packed(PAGE_VALUE_AXES, scales)  # type: ignore[arg-type]
    return KVPages((keys,) * sizes.num_layers, (values,) * sizes.num_layers, fmt)


def page_bytes(sizes: CacheSizes, fmt: CacheFormat) -> int:
    """Bytes of one page in all layers, on all devices together."""
    return 2 * sizes.num_layers * sizes.num_kv_heads * PAGE_SIZE * fmt.position_bytes(sizes.head_dim)
