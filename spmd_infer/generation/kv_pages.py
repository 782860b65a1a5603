"""The key-value cache of a decoder in pages: every layer's pool, and what is done to pools as wholes.

A program of the model runs a chunk of prompts without the pools and returns its keys and values; ``insert`` lays them
into pages. So programs of prompts do not depend on the pools' size, and those of a decode step only on it and the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from spmd_infer.generation.cache import CacheSizes
from spmd_infer.models.paged_attention import PAGE_KEY_AXES, PAGE_VALUE_AXES

PAGE_SIZE = 64
"""Positions of a page. Smaller ones are slower to attend over (10 ms in place of 2.7 for 16 on a CPU)."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVPages:
    """The pools of all layers; passed to a step, returned changed, its buffers donated.

    Attributes:
        keys: ``[D, P, K, H, S]``, one a layer: parts of the rows, pages, key heads, head dim, positions of a page.
        values: ``[D, P, K, S, H]``.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]

    @classmethod
    def zeros(cls, sizes: CacheSizes, parts: int, num_pages: int, dtype: DTypeLike) -> KVPages:
        """Empty pools; called while tracing."""
        heads, width = sizes.num_kv_heads, sizes.head_dim
        keys = tuple(jnp.zeros((parts, num_pages, heads, width, PAGE_SIZE), dtype) for _ in range(sizes.num_layers))
        values = tuple(jnp.zeros((parts, num_pages, heads, PAGE_SIZE, width), dtype) for _ in range(sizes.num_layers))
        return cls(keys, values)

    @property
    def num_pages(self) -> int:
        """Pages of each part."""
        return int(self.keys[0].shape[1])

    def inserted(self, keys: Sequence[jax.Array], values: Sequence[jax.Array], targets: jax.Array) -> KVPages:
        """With the keys and values of a chunk of prompts.

        Args:
            keys: ``[B, T, K, H]`` of each layer; T a multiple of the page's positions.
            values: likewise.
            targets: ``[D, b, T / S]`` int32, the page for each span of S positions; P or more for none.
        """
        parts, rows, spans = targets.shape

        def put(pool: jax.Array, new: jax.Array, order: tuple[int, ...]) -> jax.Array:
            spanned = new.reshape(parts, rows * spans, PAGE_SIZE, *new.shape[2:]).transpose(order)
            into = targets.reshape(parts, rows * spans)
            return jax.vmap(partial(_set_pages, pool.dtype))(pool, into, spanned)

        return KVPages(
            tuple(put(pool, new, (0, 1, 3, 4, 2)) for pool, new in zip(self.keys, keys, strict=True)),
            tuple(put(pool, new, (0, 1, 3, 2, 4)) for pool, new in zip(self.values, values, strict=True)),
        )

    def gathered(self, tables: jax.Array) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        """The pages of rows, ``tables [D, b, M]``: keys ``[D b, M, K, H, S]`` and values ``[D b, M, K, S, H]``."""
        parts, rows, count = tables.shape

        def take(pool: jax.Array) -> jax.Array:
            found: jax.Array = jax.vmap(lambda pages, wanted: pages[wanted])(pool, tables)
            return found.reshape(parts * rows, count, *pool.shape[2:])

        return tuple(map(take, self.keys)), tuple(map(take, self.values))

    def copied(self, sources: jax.Array, targets: jax.Array) -> KVPages:
        """With pages ``sources [D, n]`` copied over ``targets [D, n]``; a target of P or more is none.

        All are read before any is written.
        """

        def put(pool: jax.Array) -> jax.Array:
            found = jax.vmap(lambda pages, wanted: pages[wanted])(pool, sources)
            return jax.vmap(partial(_set_pages, pool.dtype))(pool, targets, found)

        return KVPages(tuple(map(put, self.keys)), tuple(map(put, self.values)))

    def resized(self, num_pages: int) -> KVPages:
        """The first ``num_pages`` pages, new ones empty."""

        def fit(pool: jax.Array) -> jax.Array:
            kept = pool[:, :num_pages]
            return jnp.pad(kept, ((0, 0), (0, num_pages - kept.shape[1]), (0, 0), (0, 0), (0, 0)))

        return KVPages(tuple(map(fit, self.keys)), tuple(map(fit, self.values)))


def _set_pages(dtype: DTypeLike, pool: jax.Array, targets: jax.Array, new: jax.Array) -> jax.Array:
    written: jax.Array = pool.at[targets].set(new.astype(dtype), mode="drop")
    return written


def pages_axes(sizes: CacheSizes) -> KVPages:
    """The logical axes of each array of the pools, in their own structure."""
    axes = (PAGE_KEY_AXES,) * sizes.num_layers, (PAGE_VALUE_AXES,) * sizes.num_layers
    return KVPages(*axes)  # type: ignore[arg-type]  # a tree of axes, not of arrays


def page_bytes(sizes: CacheSizes, dtype: DTypeLike) -> int:
    """Bytes of one page in all layers, on all devices together."""
    return 2 * sizes.num_layers * sizes.num_kv_heads * sizes.head_dim * PAGE_SIZE * np.dtype(dtype).itemsize
