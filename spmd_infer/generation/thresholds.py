"""Top-k, top-p and min-p: the smallest logit that each row keeps, found where the vocabulary lies.

A sort of the whole vocabulary is slow, and gathering one that is split over devices moves megabytes to choose a few
bytes. So each device offers its largest logits, these few are gathered and sorted, and where a row's threshold is among
them (with 128 from every device it is, unless hundreds of tokens are about equally likely) it is exact. Otherwise the
threshold is found bit by bit, in passes over the logits that exchange one number a row each.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from spmd_infer.generation.vocab_shards import VocabShard, over_vocabulary

CANDIDATES = 128
"""Logits of each row that each device offers. On a CPU, 8 rows of 49,152: 128 take 1.5 ms, the passes 6 to 15."""


def filter_thresholds(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """The smallest logit that each row keeps; tokens as likely as the last one that is kept are kept too.

    Args:
        logits: ``[B, V]`` float32.
        top_k: ``[B]`` int32; keep the k likeliest, all where 0.
        top_p: ``[B]`` float32; of those keep the likeliest that together reach this part of their probability.

    Returns:
        ``[B]`` float32.
    """
    found: jax.Array = over_vocabulary(_thresholds, [logits], top_k, top_p)
    return found


def min_p_threshold(logits: jax.Array, min_p: jax.Array) -> jax.Array:
    """The smallest logit that each row keeps where less likely tokens than ``min_p`` times the likeliest are dropped.

    Args:
        logits: ``[B, V]`` float32.
        min_p: ``[B]`` float32; 0 keeps all.

    Returns:
        ``[B]`` float32.
    """
    return jnp.max(logits, axis=-1) + jnp.log(min_p)


def _thresholds(shard: VocabShard, logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """As ``filter_thresholds``, for logits ``[B, V / parts]`` of one shard."""
    batch, here = logits.shape
    count = min(CANDIDATES, here)
    offered = shard.gather(jax.lax.top_k(logits, count)[0])  # [B, parts * C]
    # Every logit above the floor is among the candidates, wherever it lies.
    floor = offered.reshape(batch, shard.parts, count)[:, :, -1].max(axis=1) if count < here else jnp.float32(-jnp.inf)
    offered = jnp.flip(jnp.sort(offered, axis=1), axis=1)
    largest = offered[:, 0]
    last = jnp.clip(top_k, 1, offered.shape[1]) - 1
    kth = jnp.take_along_axis(offered, last[:, None], axis=1)[:, 0]
    k_known = (top_k == 0) | ((top_k == last + 1) & (kth >= floor)) | ((top_k > last) & (count == here))
    kth = jnp.where(top_k == 0, -jnp.inf, kth)

    weights = jnp.where(logits >= kth[:, None], jnp.exp(logits - largest[:, None]), 0.0)
    wanted = top_p * shard.sum(weights.sum(-1))
    reached = jnp.cumsum(jnp.exp(offered - largest[:, None]), axis=1) >= wanted[:, None]
    place = jnp.argmax(reached, axis=1)
    nucleus = jnp.take_along_axis(offered, place[:, None], axis=1)[:, 0]
    p_known = (top_p >= 1) | (reached.any(axis=1) & (nucleus >= floor))
    found = jnp.where(top_p >= 1, kth, jnp.maximum(kth, nucleus))
    known = k_known & p_known
    # Only rows that need the passes take their result: rounding in it must not depend on the rest of the batch.
    result: jax.Array = jax.lax.cond(
        jnp.all(known),
        lambda: found,
        lambda: jnp.where(known, found, _by_passes(shard, logits, largest, top_k, top_p)),
    )
    return result


def _by_passes(
    shard: VocabShard, logits: jax.Array, largest: jax.Array, top_k: jax.Array, top_p: jax.Array
) -> jax.Array:
    """The thresholds whatever the logits, in twice 32 passes."""
    order = _ordered_bits(logits)
    vocab = logits.shape[1] * shard.parts
    wanted = jnp.where(top_k > 0, jnp.minimum(top_k, vocab), vocab).astype(jnp.float32)
    kth = _bit_by_bit(order, jnp.ones_like(logits), wanted, shard)
    weights = jnp.where(order >= kth[:, None], jnp.exp(logits - largest[:, None]), 0.0)
    nucleus = _bit_by_bit(order, weights, top_p * shard.sum(weights.sum(-1)), shard)
    return _from_ordered_bits(jnp.where(top_p >= 1, kth, jnp.maximum(kth, nucleus)))


def _ordered_bits(x: jax.Array) -> jax.Array:
    """Unsigned integers in the order of the float32 numbers ``x``."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    negative = bits >> 31 == 1
    return jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))


def _from_ordered_bits(order: jax.Array) -> jax.Array:
    """The float32 numbers that ``_ordered_bits`` made these integers of."""
    negative = order >> 31 == 0
    return jax.lax.bitcast_convert_type(jnp.where(negative, ~order, order & jnp.uint32((1 << 31) - 1)), jnp.float32)


def _bit_by_bit(order: jax.Array, weights: jax.Array, wanted: jax.Array, shard: VocabShard) -> jax.Array:
    """For each row the largest t with ``sum(weights where order >= t) >= wanted``, as ``[B]`` uint32."""

    def refine(index: jax.Array, found: jax.Array) -> jax.Array:
        candidate = found | (jnp.uint32(1) << (31 - index).astype(jnp.uint32))
        mass = shard.sum(jnp.where(order >= candidate[:, None], weights, 0.0).sum(-1))
        return jnp.where(mass >= wanted, candidate, found)

    start = jnp.zeros(order.shape[:1], jnp.uint32)
    result: jax.Array = jax.lax.fori_loop(0, 32, refine, start)
    return result


__all__ = ["CANDIDATES", "filter_thresholds", "min_p_threshold"]
