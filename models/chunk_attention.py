"""Attention of a chunk of a prompt over itself and over what came before it in its row.

A long prompt is run in chunks, and a prompt that begins like an earlier one starts after the pages that it shares. The
earlier positions lie in pages, which are gathered for the chunk: its arithmetic outweighs the copy.

Where a cache rounds keys and values, a chunk attends over its own as they are rounded too, so that it makes no
difference how a prompt was cut into chunks or what of it was found in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp

from spmd_infer.axes import ATTN_BATCH, ATTN_HEADS, HEAD_DIM, SEQ, constrain
from spmd_infer.models.cache_formats import CacheFormat, Packed, widened
from spmd_infer.models.pages_in_place import product_dtype
from spmd_infer.models.prompt_attention import PROMPT_WAYS, XLA

_QUERIES_AT_ONCE = 256


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ChunkCache:
    """One layer's part in a chunk; a ``LayerCache`` that keeps the chunk's own keys and values for the pages.

    Attributes:
        starts: ``[B]`` int32, where the chunk begins in its row: how many positions of the earlier pages count.
        format: what the pages hold.
        way: how a chunk that begins its row is attended over, one of ``prompt_attention.PROMPT_WAYS``.
        earlier: keys ``[B, M, K, H, S]`` and values ``[B, M, K, S, H]`` of the pages before the chunk; None where every
            row starts at 0.
        keys: ``[B, T, K, H]`` of the chunk once it has been attended; None before.
        values: likewise.
        used: ``[B]`` bool, rows that do not only fill up the batch; None for all.
    """

    starts: jax.Array
    format: CacheFormat = field(metadata={"static": True})
    earlier: tuple[Packed, Packed] | None = None
    way: str = field(default=XLA, metadata={"static": True})
    keys: Packed | None = None
    values: Packed | None = None
    used: jax.Array | None = None

    @property
    def busy(self) -> jax.Array | None:
        """See ``used``."""
        return self.used

    def attend(
        self, queries: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, ChunkCache]:
        """See ``LayerCache``; ``positions`` are ``starts`` and those that follow."""
        packed_keys, packed_values = self.format.pack(keys), self.format.pack(values)
        kept = replace(self, earlier=None, keys=packed_keys, values=packed_values)
        keys, values = self.format.rounded(keys, packed_keys), self.format.rounded(values, packed_values)
        if self.earlier is None:
            return PROMPT_WAYS[self.way](queries, keys, values), kept
        length = queries.shape[1]
        blocks = []
        for start in range(0, length, _QUERIES_AT_ONCE):
            stop = min(start + _QUERIES_AT_ONCE, length)
            blocks.append(self._block(self.earlier, queries[:, start:stop], keys[:, :stop], values[:, :stop], start))
        mixed = blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)
        return constrain(mixed.astype(queries.dtype), ATTN_BATCH, SEQ, ATTN_HEADS, HEAD_DIM), kept

    def _block(
        self, earlier: tuple[Packed, Packed], queries: jax.Array, keys: jax.Array, values: jax.Array, start: int
    ) -> jax.Array:
        """Queries ``[B, T, N, H]`` from ``start`` in the chunk on, over the pages and the chunk up to their end."""
        batch, length, heads, head_dim = queries.shape
        groups = keys.shape[2]
        rows = (queries * head_dim**-0.5).reshape(batch, length, groups, heads // groups, head_dim)
        old_keys, old_values = earlier
        pages, size = old_values.numbers.shape[1], old_values.numbers.shape[3]
        dtype = product_dtype(old_keys.numbers, queries)
        before = jnp.einsum(
            "btkgh,bmkhs->bkgtms",
            rows.astype(dtype),
            widened(old_keys.numbers, dtype),
            preferred_element_type=jnp.float32,
        )
        if old_keys.scales is not None:
            before *= old_keys.scales.transpose(0, 2, 1, 3)[:, :, None, None]  # [B, K, 1, 1, M, S]
        before = before.reshape(batch, groups, heads // groups, length, pages * size)
        known = jnp.arange(pages * size) < self.starts[:, None]  # [B, M S]
        before = jnp.where(known[:, None, None, None], before, -jnp.inf)
        within = jnp.einsum("btkgh,bskh->bkgts", rows, keys, preferred_element_type=jnp.float32)
        seen = start + jnp.arange(length)[:, None] >= jnp.arange(keys.shape[1])  # [T, S]
        within = jnp.where(seen, within, -jnp.inf)
        weights = jax.nn.softmax(jnp.concatenate((before, within), axis=-1), axis=-1)
        old = weights[..., : pages * size].reshape(batch, groups, heads // groups, length, pages, size)
        if old_values.scales is not None:
            old *= old_values.scales.transpose(0, 2, 1, 3)[:, :, None, None]
        mixed = jnp.einsum(
            "bkgtms,bmksh->btkgh",
            old.astype(dtype),
            widened(old_values.numbers, dtype),
            preferred_element_type=jnp.float32,
        )
        mixed += jnp.einsum(
            "bkgts,bskh->btkgh",
            weights[..., pages * size :].astype(values.dtype),
            values,
            preferred_element_type=jnp.float32,
        )
        return mixed.reshape(batch, length, heads, head_dim)
