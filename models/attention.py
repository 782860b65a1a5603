"""Attention: of decoders over a prompt and over a cache of earlier keys and values, and of encoders within segments.

Keys are cached as ``[B, K, H, S]`` and values as ``[B, K, S, H]``: the two layouts that a decode step reads at memory
speed on a CPU, several times faster than any other. Query heads that share a key head are folded into the rows of one
product, so keys and values are never repeated. Softmax is in float32.

A model talks to its cache through one method, ``attend``. A cache that keeps its positions elsewhere (in pages) offers
the same one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Protocol, Self

import jax
import jax.numpy as jnp

from spmd_infer.axes import ATTN_BATCH, ATTN_KV_HEADS, HEAD_DIM, KEY_SEQ, constrain, current_scope
from spmd_infer.models.cache_formats import CacheFormat, Packed, widened
from spmd_infer.models.ring_attention import find_split, split_attention
from spmd_infer.tensors import Axes

KEY_AXES: Axes = (ATTN_BATCH, ATTN_KV_HEADS, HEAD_DIM, KEY_SEQ)
VALUE_AXES: Axes = (ATTN_BATCH, ATTN_KV_HEADS, KEY_SEQ, HEAD_DIM)
SCALE_AXES: Axes = (ATTN_BATCH, ATTN_KV_HEADS, KEY_SEQ)

# Queries go in blocks that read the keys up to their own end: four blocks save three eighths of the arithmetic, eight
# would save a sixteenth more. Of long prompts the scores of a block must not outgrow the weights.
_SMALLEST_BLOCK = 128
_BLOCKS = 4
_LARGEST_BLOCK = 512
_MOST_BLOCKS = 8
_MASKED = -1e30

_in_blocks: ContextVar[bool] = ContextVar("in_blocks", default=True)


@contextmanager
def without_blocks() -> Iterator[None]:
    """Causal attention of all queries at once, as it is where positions are split over devices.

    For traces of a model that know no mesh, and count what it computes on one that splits them.
    """
    token = _in_blocks.set(False)
    try:
        yield
    finally:
        _in_blocks.reset(token)


class LayerCache(Protocol):
    """What a decoder layer asks of its cache; the update returns a new cache, and XLA reuses the donated buffers."""

    def attend(
        self, queries: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, Self]:
        """Keep new keys and values, and attend over them and all earlier positions of each row.

        Args:
            queries: ``[B, T, N, H]``.
            keys: ``[B, T, K, H]``.
            values: ``[B, T, K, H]``.
            positions: ``[B, T]``, of each token in its row.

        Returns:
            ``[B, T, N, H]`` in the dtype of ``queries``, and the cache with the new positions.
        """
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ContiguousCache:
    """Keys and values of one layer, each row's positions side by side.

    Attributes:
        keys: ``[B, K, H, S]``.
        values: ``[B, K, S, H]``.
        key_scales: ``[B, K, S]`` where the format has scales.
        value_scales: likewise.
        format: what is held, if not floats of the dtype of ``keys``.
    """

    keys: jax.Array
    values: jax.Array
    key_scales: jax.Array | None = None
    value_scales: jax.Array | None = None
    format: CacheFormat | None = field(default=None, metadata={"static": True})

    def attend(
        self, queries: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, ContiguousCache]:
        """See ``LayerCache``; one token of each row goes to its position, several are the whole row from 0 on."""
        if queries.shape[1] > 1:
            return causal_attention(queries, keys, values), self._replaced(keys, values)
        cache = self._appended(keys[:, 0], values[:, 0], positions[:, 0])
        return cache._attended(queries[:, 0], positions[:, 0])[:, None], cache

    def _replaced(self, keys: jax.Array, values: jax.Array) -> ContiguousCache:
        """With the keys and values ``[B, T, K, H]`` of whole rows."""
        packed_keys, packed_values = self._packed(keys), self._packed(values)
        return replace(
            self,
            keys=_with_first(self.keys, packed_keys.numbers.transpose(0, 2, 3, 1), KEY_AXES),  # [B, K, H, T]
            values=_with_first(self.values, packed_values.numbers.transpose(0, 2, 1, 3), VALUE_AXES),  # [B, K, T, H]
            key_scales=_with_first_scales(self.key_scales, packed_keys.scales),
            value_scales=_with_first_scales(self.value_scales, packed_values.scales),
        )

    def _packed(self, values: jax.Array) -> Packed:
        return Packed(values.astype(self.keys.dtype)) if self.format is None else self.format.pack(values)

    def _appended(self, keys: jax.Array, values: jax.Array, positions: jax.Array) -> ContiguousCache:
        """With one key and value ``[B, K, H]`` more in each row, at ``positions [B]``."""
        # One scatter with a position for each written number of the keys and each written row of the values. With a
        # position for each row of the batch alone, a batch of one becomes a slice update, which XLA on CPU fuses into
        # both of its readers at the cost of four copies of the whole cache.
        packed_keys, packed_values = self._packed(keys), self._packed(values)
        by_number = jnp.broadcast_to(positions[:, None, None], keys.shape)
        by_row = jnp.broadcast_to(positions[:, None], values.shape[:2])
        put_lines = jax.vmap(jax.vmap(_put))

        def put_scales(cache: jax.Array | None, new: jax.Array | None) -> jax.Array | None:
            return None if cache is None or new is None else put_lines(cache, new, by_row)

        return replace(
            self,
            keys=jax.vmap(jax.vmap(jax.vmap(_put)))(self.keys, packed_keys.numbers, by_number),
            values=put_lines(self.values, packed_values.numbers, by_row),
            key_scales=put_scales(self.key_scales, packed_keys.scales),
            value_scales=put_scales(self.value_scales, packed_values.scales),
        )

    def _attended(self, queries: jax.Array, positions: jax.Array) -> jax.Array:
        """Attention of ``queries [B, N, H]`` over positions 0 to ``positions [B]``, as ``[B, N, H]``."""
        batch, heads, head_dim = queries.shape
        groups = self.keys.shape[1]
        dtype = self.keys.dtype if self.format is None else queries.dtype
        rows = (queries * head_dim**-0.5).astype(dtype).reshape(batch, groups, heads // groups, head_dim)
        scores = jnp.einsum("bkgh,bkhs->bkgs", rows, widened(self.keys, dtype), preferred_element_type=jnp.float32)
        if self.key_scales is not None:
            scores *= self.key_scales[:, :, None]
        seen = jnp.arange(self.keys.shape[3]) <= positions[:, None]  # [B, S]
        weights = jax.nn.softmax(jnp.where(seen[:, None, None, :], scores, -jnp.inf), axis=-1)
        if self.value_scales is not None:
            weights *= self.value_scales[:, :, None]
        mixed = jnp.einsum(
            "bkgs,bksh->bkgh", weights.astype(dtype), widened(self.values, dtype), preferred_element_type=jnp.float32
        )
        return mixed.reshape(batch, heads, head_dim).astype(queries.dtype)


def _with_first_scales(cache: jax.Array | None, new: jax.Array | None) -> jax.Array | None:
    """``cache [B, K, S]`` with ``new [B, T, K]`` at its first positions."""
    return None if cache is None or new is None else _with_first(cache, new.transpose(0, 2, 1), SCALE_AXES)


def _with_first(cache: jax.Array, new: jax.Array, axes: Axes) -> jax.Array:
    """``cache`` with ``new`` at its first positions."""
    position = axes.index(KEY_SEQ)
    size, scope = cache.shape[position], current_scope()
    shape = {} if scope is None else {str(name): int(parts) for name, parts in scope[1].shape.items()}
    if scope is None or not scope[0].of_activations.split(KEY_SEQ, size, shape):
        return jax.lax.dynamic_update_slice(cache, new, (0,) * cache.ndim)
    # Where positions are split, parts of the new ones are no parts of the cache. An update in place would bring
    # together both; so only the new ones are, and every device takes what falls into its part.
    whole = constrain(new, *(None if axis == KEY_SEQ else axis for axis in axes))
    width = [(0, size - new.shape[d] if d == position else 0) for d in range(new.ndim)]
    seen = jax.lax.broadcasted_iota(jnp.int32, cache.shape, position) < new.shape[position]
    return jnp.where(seen, constrain(jnp.pad(whole, width), *axes), cache)


def _put(line: jax.Array, value: jax.Array, position: jax.Array) -> jax.Array:
    """``line [S, ...]`` with ``value`` at ``position``, which the caller knows to be inside."""
    return line.at[position].set(value, mode="promise_in_bounds", indices_are_sorted=True, unique_indices=True)


def causal_attention(queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
    """Attention of each position over itself and those before it in its row.

    Rows padded on the right need no mask: nothing after a position changes it.

    Args:
        queries: ``[B, T, N, H]``.
        keys: ``[B, T, K, H]`` where K divides N; query head ``n`` reads key head ``n // (N / K)``.
        values: ``[B, T, K, H]``.

    Returns:
        ``[B, T, N, H]`` in the dtype of ``queries``.
    """
    batch, length, heads, head_dim = queries.shape
    groups = keys.shape[2]
    scaled = queries * head_dim**-0.5
    split = find_split(queries, keys)
    if split is not None:
        return split_attention(split, scaled, keys, values, causal=True).astype(queries.dtype)
    rows = scaled.reshape(batch, length, groups, heads // groups, head_dim)
    rows = rows.transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    keys = keys.transpose(0, 2, 3, 1)  # [B, K, H, S]
    values = values.transpose(0, 2, 1, 3)  # [B, K, S, H]
    block = min(max(_SMALLEST_BLOCK, -(-length // _BLOCKS)), max(_LARGEST_BLOCK, -(-length // _MOST_BLOCKS)))
    block = block if _in_blocks.get() else length
    blocks = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        blocks.append(_attend_block(rows[:, :, :, start:stop], keys[..., :stop], values[:, :, :stop], start))
    mixed = blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=3)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim).astype(queries.dtype)


def segment_attention(queries: jax.Array, keys: jax.Array, values: jax.Array, segments: jax.Array) -> jax.Array:
    """Attention of each position over all of its own segment.

    Args:
        queries: ``[B, T, N, H]``.
        keys: ``[B, T, N, H]``.
        values: ``[B, T, N, H]``.
        segments: ``[B, T]`` integers. Padding is a segment like any other, so that no position sees nothing.

    Returns:
        ``[B, T, N, H]`` in the dtype of ``queries``.
    """
    scale = queries.shape[-1] ** -0.5
    split = find_split(queries, keys)
    if split is not None:
        attended = split_attention(split, queries * scale, keys, values, causal=False, segments=segments)
        return attended.astype(queries.dtype)
    seen = segments[:, :, None] == segments[:, None, :]  # [B, T, S]
    scores = jnp.einsum("btnh,bsnh->bnts", queries, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(seen[:, None], scores * scale, _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    mixed = jnp.einsum("bnts,bsnh->btnh", weights, values, preferred_element_type=jnp.float32)
    return mixed.astype(queries.dtype)


def _attend_block(rows: jax.Array, keys: jax.Array, values: jax.Array, start: int) -> jax.Array:
    """Queries ``[B, K, G, T, H]`` at positions from ``start`` over keys ``[B, K, H, S]`` from position 0."""
    scores = jnp.einsum("bkgth,bkhs->bkgts", rows, keys, preferred_element_type=jnp.float32)
    seen = start + jnp.arange(rows.shape[3])[:, None] >= jnp.arange(keys.shape[3])  # [T, S]
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bkgts,bksh->bkgth", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)


__all__ = [
    "KEY_AXES",
    "SCALE_AXES",
    "VALUE_AXES",
    "ContiguousCache",
    "LayerCache",
    "causal_attention",
    "segment_attention",
    "without_blocks",
]
