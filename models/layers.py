"""The blocks that models are wired from: projections, embeddings and norms, each weight with its logical axes.

Weights keep the layout in which Hugging Face stores them, ``[out, in]``: loading needs no transpose, and XLA on CPU
multiplies few rows by such weights up to several times faster than by ``[in, out]`` ones. Every product accumulates in
float32 (or exactly, in integers) whatever the weights' dtype, and is returned in the input's dtype.

``Linear`` and ``Embedding`` may hold small numbers with scales instead of floats: ``spmd_infer.models.quantised`` makes
them so, ``spmd_infer.models.dense`` multiplies by them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from spmd_infer.models.dense import dense, dequantise, rotate
from spmd_infer.tensors import Axes

_initial = nnx.initializers.normal(0.02)


class Linear(nnx.Module):
    """``x @ weight.T + bias``.

    Args:
        in_features: size of the contracted dimension.
        out_features: size of the produced dimension.
        axes: logical axes of the weight, ``(out, in)``.
        use_bias: whether there is a bias; it carries the ``out`` axis.
        rngs: source of the initial weights.

    Attributes:
        adapters: what ``spmd_infer.models.adapters`` adds for each row; None where no row has an adapter.
    """

    def __init__(
        self, in_features: int, out_features: int, *, axes: Axes, use_bias: bool = False, rngs: nnx.Rngs
    ) -> None:
        self.weight = nnx.Param(_initial(rngs.params(), (out_features, in_features)), axes=axes)
        self.weight_scale: nnx.Param[jax.Array] | None = nnx.data(None)
        self.rotation = 0
        self.bias = nnx.Param(jnp.zeros((out_features,)), axes=axes[:1]) if use_bias else None
        self.in_features, self.out_features = in_features, out_features
        self.adapters: Callable[[jax.Array], jax.Array] | None = nnx.data(None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Project ``x [..., in]`` to ``[..., out]``."""
        y = _project(x, self)
        if self.adapters is not None:
            y = y + self.adapters(x)
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


class Embedding(nnx.Module):
    """A table ``[rows, width]`` looked up by integer ids; ``attend`` uses the same table as an output projection.

    Args:
        rows: how many ids there are.
        width: size of each row.
        axes: logical axes of the table.
        rngs: source of the initial weights.
        attends: whether the model calls ``attend``: such a table is a projection, and quantised like one.
    """

    def __init__(self, rows: int, width: int, *, axes: Axes, rngs: nnx.Rngs, attends: bool = False) -> None:
        self.weight = nnx.Param(_initial(rngs.params(), (rows, width)), axes=axes)
        self.weight_scale: nnx.Param[jax.Array] | None = nnx.data(None)
        self.rotation = 0
        self.attends = attends
        self.dtype: Any = None  # of looked-up rows, where the table does not say

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Rows of the table for ``ids [...]``, as ``[..., width]``."""
        rows = jnp.take(self.weight[...], ids, axis=0)
        if self.weight_scale is None:
            return rows
        values = dequantise(rows, jnp.take(self.weight_scale[...], ids, axis=0))
        return rotate(values, self.rotation).astype(self.dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        """Scores of ``x [..., width]`` against every row, in float32, as ``[..., rows]``."""
        return _project(x, self)


def _project(x: jax.Array, part: Linear | Embedding) -> jax.Array:
    """``x [..., in]`` times the weight of a part, in float32, whatever the weight's numbers are."""
    if part.weight_scale is None:
        return dense(x, part.weight[...])
    return dense(rotate(x, part.rotation), part.weight[...], part.weight_scale[...])


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last dimension, computed in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, *, axes: Axes, epsilon: float) -> None:
        self.weight = nnx.Param(jnp.ones((width,)), axes=axes)
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise ``x [..., width]``."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        return (y * self.weight[...].astype(jnp.float32)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm with scale and bias over the last dimension, computed in float32 (Ba et al. 2016)."""

    def __init__(self, width: int, *, axes: Axes, epsilon: float) -> None:
        self.weight = nnx.Param(jnp.ones((width,)), axes=axes)
        self.bias = nnx.Param(jnp.zeros((width,)), axes=axes)
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise ``x [..., width]``."""
        y = x.astype(jnp.float32)
        mean = jnp.mean(y, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(y - mean), axis=-1, keepdims=True)
        y = (y - mean) * jax.lax.rsqrt(variance + self.epsilon)
        return (y * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)
