"""Low-rank adapters (Hu et al. 2021) beside the weights of projections: each row of a batch has its own, or none.

A projection with adapters gives ``x W.T + (x A.T) B.T``, A ``[r, in]`` and B ``[out, r]`` of the row's adapter. All
adapters of a projection are held as one array of a fixed size, ranks filled up with zeros, so programs do not depend
on which are loaded. Two ways, by sizes that are known while tracing:

* few rows: each takes its own A and B out of the arrays, which reads (and on long chunks multiplies by) nothing else;
* many rows: all rows meet all adapters' A in one product, ``[rows, adapters * r]``, what is not the row's own becomes
  zero, and one product with all B follows. The arrays are read once, whatever the rows use.

A is split like the projection's inputs and B like its outputs. Where inputs are split, each device sums over its own
part, and one all-reduce of ``r`` numbers for each row (and adapter) joins them; outputs need none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from spmd_infer.axes import BATCH, SEQ, constrain
from spmd_infer.models.layers import Linear
from spmd_infer.tensors import Axes


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AdapterTable:
    """All adapters of one projection.

    Attributes:
        down: ``[A, r, in]`` floats: every adapter's A.
        up: ``[A, r, out]`` floats: every adapter's B, turned and scaled.
    """

    down: jax.Array
    up: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowAdapters:
    """The adapters of a model's projections, and which of them each row uses.

    Attributes:
        tables: by the projection's path.
        rows: ``[D, b]`` int32, the adapter of each row of each part; -1 for none.
    """

    tables: Mapping[str, AdapterTable]
    rows: jax.Array

    def onto(self, model: Any) -> None:
        """Give a model's projections these adapters, while a program of it is traced."""
        few = self.rows.shape[-1] <= next(iter(self.tables.values())).down.shape[0]
        rows = constrain(self.rows.reshape(-1), BATCH)
        for path, part in nnx.iter_modules(model):
            table = self.tables.get(".".join(map(str, path)))
            if table is not None and isinstance(part, Linear):
                part.adapters = nnx.data(LinearAdapters(table, rows, few))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LinearAdapters:
    """What one projection adds for each row.

    Attributes:
        table: its adapters.
        rows: ``[B]`` int32, which of them each row uses; -1 for none.
        few: whether each row takes out its own.
    """

    table: AdapterTable
    rows: jax.Array
    few: bool = field(metadata={"static": True})

    def __call__(self, x: jax.Array) -> jax.Array:
        """The change ``[B, T, out]``, in float32, for ``x [B, T, in]``."""
        down, up, rows = self.table.down, self.table.up, self.rows
        x = x.astype(down.dtype)
        if self.few:
            own = jnp.maximum(rows, 0)
            z = _sums("btd,brd->btr", x, down[own])
            z = jnp.where((rows >= 0)[:, None, None], constrain(z, BATCH, SEQ, None), 0.0)
            return _sums("btr,bro->bto", z.astype(up.dtype), up[own])
        z = _sums("btd,ard->btar", x, down)
        own_only = rows[:, None] == jnp.arange(len(down))  # [B, A]
        z = jnp.where(own_only[:, None, :, None], constrain(z, BATCH, SEQ, None, None), 0.0)
        return _sums("btar,aro->bto", z.astype(up.dtype), up)


def _sums(subscripts: str, *operands: jax.Array) -> jax.Array:
    product: jax.Array = jnp.einsum(subscripts, *operands, preferred_element_type=jnp.float32)
    return product


@dataclass(frozen=True)
class Projection:
    """The sizes of a projection that adapters may change.

    Attributes:
        in_features: its inputs.
        out_features: its outputs.
        axes: logical axes of its weight, ``(out, in)``.
    """

    in_features: int
    out_features: int
    axes: Axes

    @property
    def table_axes(self) -> AdapterTable:
        """The logical axes of an ``AdapterTable``'s arrays."""
        out, into = self.axes
        return AdapterTable((None, None, into), (None, None, out))  # type: ignore[arg-type]  # axes, not arrays


def projections(model: nnx.Module) -> dict[str, Projection]:
    """Those of a model, with weights or with their shapes alone, by path."""
    return {
        ".".join(map(str, path)): Projection(part.in_features, part.out_features, part.weight.get_metadata()["axes"])
        for path, part in nnx.iter_modules(model)
        if isinstance(part, Linear)
    }
