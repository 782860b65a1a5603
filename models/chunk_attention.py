"""Attention of a chunk of a prompt over itself and over what came before it in its row.

A long prompt is run in chunks, and a prompt that begins like an earlier one starts after the pages that it shares. The
earlier positions lie in pages, which are gathered for the chunk: its arithmetic outweighs the copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from spmd_infer.axes import ATTN_BATCH, ATTN_HEADS, HEAD_DIM, SEQ, constrain
from spmd_infer.models.attention import causal_attention

_QUERIES_AT_ONCE = 256


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ChunkCache:
    """One layer's part in a chunk; a ``LayerCache`` that keeps the chunk's own keys and values for the pages.

    Attributes:
        earlier_keys: ``[B, M, K, H, S]``, pages before the chunk; M may be 0.
        earlier_values: ``[B, M, K, S, H]``.
        starts: ``[B]`` int32, how many positions of them count: where the chunk begins in its row.
        keys: ``[B, T, K, H]`` of the chunk once it has been attended; None before.
        values: likewise.
    """

    earlier_keys: jax.Array
    earlier_values: jax.Array
    starts: jax.Array
    keys: jax.Array | None = None
    values: jax.Array | None = None

    def attend(
        self, queries: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, ChunkCache]:
        """See ``LayerCache``; ``positions`` are ``starts`` and those that follow."""
        kept = ChunkCache(self.earlier_keys, self.earlier_values, self.starts, keys, values)
        if not self.earlier_keys.shape[1]:
            return causal_attention(queries, keys, values), kept
        length = queries.shape[1]
        blocks = []
        for start in range(0, length, _QUERIES_AT_ONCE):
            stop = min(start + _QUERIES_AT_ONCE, length)
            blocks.append(self._block(queries[:, start:stop], keys[:, :stop], values[:, :stop], start))
        mixed = blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)
        return constrain(mixed.astype(queries.dtype), ATTN_BATCH, SEQ, ATTN_HEADS, HEAD_DIM), kept

    def _block(self, queries: jax.Array, keys: jax.Array, values: jax.Array, start: int) -> jax.Array:
        """Queries ``[B, T, N, H]`` from ``start`` in the chunk on, over the pages and the chunk up to their end."""
        batch, length, heads, head_dim = queries.shape
        groups = keys.shape[2]
        rows = (queries * head_dim**-0.5).reshape(batch, length, groups, heads // groups, head_dim)
        pages, size = self.earlier_keys.shape[1], self.earlier_keys.shape[4]
        dtype = self.earlier_keys.dtype
        before = jnp.einsum(
            "btkgh,bmkhs->bkgtms", rows.astype(dtype), self.earlier_keys, preferred_element_type=jnp.float32
        ).reshape(batch, groups, heads // groups, length, pages * size)
        known = jnp.arange(pages * size) < self.starts[:, None]  # [B, M S]
        before = jnp.where(known[:, None, None, None], before, -jnp.inf)
        within = jnp.einsum("btkgh,bskh->bkgts", rows, keys, preferred_element_type=jnp.float32)
        seen = start + jnp.arange(length)[:, None] >= jnp.arange(keys.shape[1])  # [T, S]
        within = jnp.where(seen, within, -jnp.inf)
        weights = jax.nn.softmax(jnp.concatenate((before, within), axis=-1), axis=-1)
        old = weights[..., : pages * size].reshape(batch, groups, heads // groups, length, pages, size)
        mixed = jnp.einsum(
            "bkgtms,bmksh->btkgh", old.astype(dtype), self.earlier_values, preferred_element_type=jnp.float32
        )
        mixed += jnp.einsum(
            "bkgts,bskh->btkgh",
            weights[..., pages * size :].astype(values.dtype),
            values,
            preferred_element_type=jnp.float32,
        )
        return mixed.reshape(batch, length, heads, head_dim)
