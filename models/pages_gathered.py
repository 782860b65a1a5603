"""Attention over each row's pages, gathered: for a few rows in a pool that holds many more pages than they use."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from spmd_infer.models.cache_formats import Packed, widened
from spmd_infer.models.page_view import PageView
from spmd_infer.models.pages_in_place import product_dtype


def attend_gathered(
    queries: jax.Array, keys: Packed, values: Packed, positions: jax.Array, view: PageView
) -> jax.Array:
    """See ``page_attention``; what it reads is as wide as ``view.tables``."""
    return jax.vmap(_attend)(queries, keys, values, positions, view)


def _attend(q: jax.Array, keys: Packed, values: Packed, positions: jax.Array, view: PageView) -> jax.Array:
    """Attention of ``q [b, T, K, G, H]`` at ``positions [b, T]`` over the pages of one part, in float32."""
    q = q.astype(product_dtype(keys.numbers, q))
    keys, values = jax.tree.map(lambda x: x[view.tables], (keys, values))  # [b, M, K, ...]
    count, size = values.numbers.shape[1], values.numbers.shape[3]
    scores = jnp.einsum("btkgh,bmkhs->bkgtms", q, widened(keys.numbers, q.dtype), preferred_element_type=jnp.float32)
    if keys.scales is not None:
        scores *= keys.scales.transpose(0, 2, 1, 3)[:, :, None, None]  # [b, K, 1, 1, M, S]
    place = jnp.arange(count * size).reshape(count, size)
    ends = jnp.minimum(positions, view.limits[:, None] - 1)  # rows that fill up the batch see nothing
    scores = jnp.where(place <= ends[:, None, None, :, None, None], scores, -1e30)
    largest = scores.max(axis=(-2, -1), keepdims=True)
    weights = jnp.exp(scores - largest) * (scores > -1e30)
    total = weights.sum(axis=(-2, -1))  # [b, K, G, T]
    if values.scales is not None:
        weights *= values.scales.transpose(0, 2, 1, 3)[:, :, None, None]
    wide = widened(values.numbers, q.dtype)
    mixed = jnp.einsum("bkgtms,bmksh->btkgh", weights.astype(q.dtype), wide, preferred_element_type=jnp.float32)
    return mixed / jnp.maximum(total, 1e-30).transpose(0, 3, 1, 2)[..., None]
