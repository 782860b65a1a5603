"""Keys and values that lie in pages, for decoding; Kwon et al. (2023) keep caches so, and attend otherwise.

A pool holds ``P`` pages of ``S`` positions, keys as ``[D, P, K, H, S]`` and values as ``[D, P, K, S, H]``. ``D`` is the
number of parts that rows are split into: a row and all its pages lie in one part, so nothing travels between them.
``page_attention`` has the ways to attend over them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp

from spmd_infer.axes import ATTN_BATCH, ATTN_HEADS, ATTN_KV_HEADS, HEAD_DIM, KEY_SEQ, constrain, current_scope
from spmd_infer.models.cache_formats import CacheFormat, Packed
from spmd_infer.models.page_attention import WAYS
from spmd_infer.models.page_view import PageView
from spmd_infer.tensors import Axes

PAGE_KEY_AXES: Axes = (ATTN_BATCH, KEY_SEQ, ATTN_KV_HEADS, HEAD_DIM, None)
PAGE_VALUE_AXES: Axes = (ATTN_BATCH, KEY_SEQ, ATTN_KV_HEADS, None, HEAD_DIM)
PAGE_SCALE_AXES: Axes = (ATTN_BATCH, KEY_SEQ, ATTN_KV_HEADS, None)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedCache:
    """Keys and values of one layer in pages; a ``LayerCache`` for one token more of each row, or a few.

    Attributes:
        keys: ``[D, P, K, H, S]``, scales ``[D, P, K, S]``.
        values: ``[D, P, K, S, H]``, scales ``[D, P, K, S]``.
        view: who uses which page.
        format: what they hold.
    """

    keys: Packed
    values: Packed
    view: PageView
    format: CacheFormat = field(metadata={"static": True})

    @property
    def busy(self) -> jax.Array:
        """``[D]`` bool, the parts that have a row which does not only fill up the batch."""
        return (self.view.limits > 0).any(axis=-1)

    def attend(
        self, queries: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, PagedCache]:
        """See ``LayerCache``; rows are in the order of the parts."""
        parts, rows = self.view.limits.shape
        length, heads, head_dim = queries.shape[1:]
        groups = keys.shape[2]
        by_part = (parts, rows, length)
        positions = positions.reshape(by_part)
        new = (self.format.pack(x.reshape(*by_part, groups, head_dim)) for x in (keys, values))
        addresses = jax.vmap(partial(_addresses, num_pages=self.keys.numbers.shape[1], page_size=self.page_size))(
            positions, self.view.tables, self.view.limits
        )
        pool_keys, pool_values = (
            _written(pool, packed, addresses, axes)
            for pool, packed, axes in zip((self.keys, self.values), new, (PAGE_KEY_AXES, PAGE_VALUE_AXES), strict=True)
        )
        scaled = (queries * head_dim**-0.5).reshape(*by_part, groups, heads // groups, head_dim)
        mixed = WAYS[self.view.way](scaled, pool_keys, pool_values, positions, self.view)
        mixed = mixed.reshape(parts * rows, length, heads, head_dim).astype(queries.dtype)
        kept = replace(self, keys=pool_keys, values=pool_values)
        return constrain(mixed, ATTN_BATCH, None, ATTN_HEADS, HEAD_DIM), kept

    @property
    def page_size(self) -> int:
        """Positions of a page."""
        return int(self.keys.numbers.shape[4])


def _written(pool: Packed, new: Packed, addresses: tuple[jax.Array, jax.Array], axes: Axes) -> Packed:
    """``pool`` with ``new`` at the pages and slots ``[D, b, T]`` of ``addresses``."""
    put = _put_keys if axes is PAGE_KEY_AXES else _put_lines
    numbers = _laid(jax.vmap(put)(pool.numbers, new.numbers, *addresses), axes)
    if pool.scales is None or new.scales is None:
        return Packed(numbers)
    return Packed(numbers, _laid(jax.vmap(_put_lines)(pool.scales, new.scales, *addresses), PAGE_SCALE_AXES))


def _laid(pool: jax.Array, axes: Axes) -> jax.Array:
    """``pool`` as it came in, whole where its mesh axis does not divide it: so that it is reused in place."""
    scope = current_scope()
    if scope is not None:
        rules, shape = scope[0].of_activations, dict(scope[1].shape)
        axes = tuple(
            axis if rules.split(axis, size, shape) else None for axis, size in zip(axes, pool.shape, strict=True)
        )
    return constrain(pool, *axes)


def _put_keys(pool: jax.Array, new: jax.Array, pages: jax.Array, slots: jax.Array) -> jax.Array:
    """``pool [P, K, H, S]`` with ``new [b, T, K, H]`` at ``pages`` and ``slots`` ``[b, T]``."""
    heads = jnp.arange(pool.shape[1])
    # An index for each head, and one that XLA can see to count them: so the write stays on the devices of the heads. An
    # index for a row alone would become a slice update where there is one row, which copies the pool on a CPU.
    return pool.at[pages[..., None], heads, :, slots[..., None]].set(new, mode="drop", wrap_negative_indices=False)


def _put_lines(pool: jax.Array, new: jax.Array, pages: jax.Array, slots: jax.Array) -> jax.Array:
    """``pool [P, K, S, ...]`` with ``new [b, T, K, ...]`` at ``pages`` and ``slots`` ``[b, T]``."""
    heads = jnp.arange(pool.shape[1])
    return pool.at[pages[..., None], heads, slots[..., None]].set(new, mode="drop", wrap_negative_indices=False)


def _addresses(
    positions: jax.Array, tables: jax.Array, limits: jax.Array, *, num_pages: int, page_size: int
) -> tuple[jax.Array, jax.Array]:
    """The page and the slot in it of ``positions [b, T]``; a page that does not exist where nothing may be written."""
    place = jnp.minimum(positions // page_size, tables.shape[1] - 1)
    pages = jnp.take_along_axis(tables, place, axis=1)
    return jnp.where(positions < limits[:, None], pages, num_pages), positions % page_size
