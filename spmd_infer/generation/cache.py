"""The key-value cache of a decoder: every layer's keys and values, and how many positions each row holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from spmd_infer.axes import BATCH
from spmd_infer.models.attention import KEY_AXES, VALUE_AXES, ContiguousCache
from spmd_infer.tensors import Axes


class CacheSizes(Protocol):
    """The part of a decoder's configuration that sizes its cache."""

    @property
    def num_layers(self) -> int:
        """Layers that keep keys and values."""

    @property
    def num_kv_heads(self) -> int:
        """Key heads, as many as value heads."""

    @property
    def head_dim(self) -> int:
        """Width of a head."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Passed to a step, returned changed, its buffers donated.

    Attributes:
        layers: keys and values, one entry a layer.
        lengths: ``[B]`` int32, positions that each row holds.
    """

    layers: tuple[ContiguousCache, ...]
    lengths: jax.Array

    @classmethod
    def zeros(cls, sizes: CacheSizes, batch: int, length: int, dtype: DTypeLike) -> KVCache:
        """An empty cache with room for ``length`` positions in each of ``batch`` rows; called while tracing."""
        key_shape = (batch, sizes.num_kv_heads, sizes.head_dim, length)
        value_shape = (batch, sizes.num_kv_heads, length, sizes.head_dim)
        layers = tuple(
            ContiguousCache(jnp.zeros(key_shape, dtype), jnp.zeros(value_shape, dtype)) for _ in range(sizes.num_layers)
        )
        return cls(layers, jnp.zeros((batch,), jnp.int32))

    @property
    def capacity(self) -> int:
        """Positions that a row has room for."""
        return int(self.layers[0].keys.shape[3])


def cache_axes(sizes: CacheSizes) -> KVCache:
    """The logical axes of each array of a cache, in the cache's own structure."""
    layer = _layer_axes(KEY_AXES, VALUE_AXES)
    axes: Axes = (BATCH,)
    return KVCache((layer,) * sizes.num_layers, axes)  # type: ignore[arg-type]  # a tree of axes, not of arrays


def _layer_axes(keys: Axes, values: Axes) -> ContiguousCache:
    return ContiguousCache(keys, values)  # type: ignore[arg-type]  # a tree of axes, not of arrays
