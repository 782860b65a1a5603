"""Heads on their way from a projection into attention and back, where attention is laid out otherwise.

XLA finds the one collective that a change of layout needs if only one thing changes at a time. Asked for everything at
once it gathers whole tensors and cuts them again.
"""

from __future__ import annotations

import jax

from spmd_infer.axes import (
    ATTN_BATCH,
    ATTN_HEADS,
    ATTN_KV_HEADS,
    BATCH,
    HEAD_DIM,
    HEADS,
    KEY_SEQ,
    KV_HEADS,
    SEQ,
    constrain,
)


def queries_in(queries: jax.Array) -> jax.Array:
    """Queries ``[B, T, N, H]`` as a projection leaves them, laid out for attention."""
    return constrain(constrain(queries, BATCH, SEQ, HEADS, HEAD_DIM), ATTN_BATCH, SEQ, ATTN_HEADS, HEAD_DIM)


def keys_in(keys: jax.Array, heads: str = KV_HEADS, attn_heads: str = ATTN_KV_HEADS) -> jax.Array:
    """Keys or values ``[B, T, K, H]`` as a projection leaves them, laid out for attention; positions go last.

    Args:
        keys: the keys or values.
        heads: the axis of their heads in the projection.
        attn_heads: their axis in attention.
    """
    keys = constrain(constrain(keys, BATCH, SEQ, heads, HEAD_DIM), ATTN_BATCH, SEQ, attn_heads, HEAD_DIM)
    return constrain(keys, ATTN_BATCH, KEY_SEQ, attn_heads, HEAD_DIM)


def mixed_out(mixed: jax.Array) -> jax.Array:
    """What attention makes, ``[B, T, N, H]``, laid out for the projection that follows."""
    return constrain(constrain(mixed, ATTN_BATCH, SEQ, ATTN_HEADS, HEAD_DIM), BATCH, SEQ, HEADS, HEAD_DIM)
