"""The program behind ``infer`` for one bucket: its inputs, where they lie, and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import keystr

from spmd_infer.aggregate import Aggregate
from spmd_infer.axes import BATCH
from spmd_infer.errors import BatchError
from spmd_infer.functional import ModelFunction
from spmd_infer.programs import Program, Programs
from spmd_infer.signature import CheckedBatch
from spmd_infer.tensors import InputSpec
from spmd_infer.transfer import put


@dataclass(frozen=True)
class InferProgram:
    """``infer`` compiled for one bucket.

    Attributes:
        program: the executable, called with the parameters, the row weights if it aggregates, and the batch's leaves.
        shardings: where each leaf goes.
        rows: where row weights go.
        aggregates: whether it takes row weights and returns partial aggregates.
    """

    program: Program
    shardings: tuple[NamedSharding, ...]
    rows: NamedSharding
    aggregates: bool

    def __call__(self, params: Any, leaves: Sequence[Any], weights: Any = None) -> Any:
        """Dispatch: returns arrays on the device at once, without waiting for them.

        Numpy arrays are split over the devices by the executable itself, which is faster than ``jax.device_put``, where
        all devices are this process's.
        """
        if not self.rows.is_fully_addressable:
            leaves = [put(leaf, sharding) for leaf, sharding in zip(leaves, self.shardings, strict=True)]
            weights = None if weights is None else put(weights, self.rows)
        placed = [
            leaf if isinstance(leaf, np.ndarray) or leaf.sharding == sharding else jax.device_put(leaf, sharding)
            for leaf, sharding in zip(leaves, self.shardings, strict=True)
        ]
        if not self.aggregates:
            return self.program(params, *placed)
        return self.program(params, weights, *placed)


def bucket_shape(leaf: Any, spec: InputSpec, bucket: int) -> tuple[int, ...]:
    """A leaf's shape with its batch dimension set to the bucket."""
    return tuple(bucket if want == BATCH else have for have, want in zip(leaf.shape, spec.shape, strict=True))


def infer_program(
    programs: Programs,
    batch: CheckedBatch,
    bucket: int,
    aggregate: Aggregate | None,
    donate: bool,
) -> InferProgram:
    """Compile (or find) the program for one bucket.

    Args:
        programs: the model, where it is, and its programs.
        batch: a checked batch; only shapes, dtypes and structure count.
        bucket: rows that the program takes.
        aggregate: the reduction over rows; None keeps them.
        donate: whether inputs that have the shape of an output may give it their memory.

    Raises:
        BatchError: the model fails on such a batch, or returns something without a batch dimension.
    """
    placement = programs.placement
    model, params, mesh = placement.model, placement.params, placement.mesh
    avals = tuple(
        jax.ShapeDtypeStruct(bucket_shape(leaf, spec, bucket), spec.dtype)
        for leaf, spec in zip(batch.leaves, batch.specs, strict=True)
    )
    shardings = tuple(placement.sharding(spec.axes, aval.shape) for spec, aval in zip(batch.specs, avals, strict=True))
    rows = placement.sharding((BATCH,), (bucket,))
    outputs = batched_outputs(model, params, batch, avals, bucket)
    reuse = _reusable(avals, outputs) if donate and aggregate is None else ()

    def infer(values: Any, *args: Any) -> Any:
        leaves = args if aggregate is None else args[1:]
        result = model(values, jax.tree_util.tree_unflatten(batch.treedef, leaves))
        result = jax.tree.map(lambda x: _keep_rows(x, mesh, rows.spec), result)
        if aggregate is None:
            return result
        return jax.tree.map(lambda x: aggregate.reduce(x, args[0]), result)

    first = () if aggregate is None else (jax.ShapeDtypeStruct((bucket,), jnp.float32),)
    program = programs.get(
        ("infer", batch.treedef, tuple((a.shape, np.dtype(a.dtype).str) for a in avals), _kind(aggregate), reuse),
        infer,
        (params, *first, *avals),
        name="infer",
        in_shardings=(_shardings_of(params), *(rows for _ in first), *shardings),
        donate=tuple(1 + position for position in reuse),
    )
    return InferProgram(program, shardings, rows, aggregate is not None)


def batched_outputs(
    model: ModelFunction, params: Any, batch: CheckedBatch, avals: Sequence[jax.ShapeDtypeStruct], bucket: int
) -> Any:
    """The outputs' shapes, after making sure that each has the batch as its leading dimension.

    An output whose shape does not follow the batch mixes its rows, padding included, so the engine cannot cut it back.
    """

    def shapes(rows: int) -> Any:
        leaves = [
            jax.ShapeDtypeStruct(bucket_shape(aval, spec, rows), aval.dtype)
            for aval, spec in zip(avals, batch.specs, strict=True)
        ]
        abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
        try:
            return jax.eval_shape(model, abstract, jax.tree_util.tree_unflatten(batch.treedef, leaves))
        except BatchError:
            raise
        except Exception as error:
            taken = ", ".join(f"{leaf.dtype.name}{list(leaf.shape)}" for leaf in leaves)
            raise BatchError(f"{model.name} does not accept inputs {taken}: {error}") from error

    now, doubled = shapes(bucket), shapes(2 * bucket)
    for (path, one), two in zip(
        jax.tree_util.tree_flatten_with_path(now)[0], jax.tree_util.tree_leaves(doubled), strict=True
    ):
        if not one.shape or one.shape[0] != bucket or two.shape[0] != 2 * bucket:
            raise BatchError(
                f"output {keystr(path) or 'of ' + model.name} has shape {list(one.shape)} for {bucket} rows and "
                f"{list(two.shape)} for {2 * bucket}: expected the rows as its first dimension. Return one result a "
                "row, and combine rows with infer(..., aggregate=...)"
            )
    return now


def _keep_rows(x: jax.Array, mesh: Mesh, rows: PartitionSpec) -> jax.Array:
    """Rows stay on the devices that computed them; the other dimensions are XLA's choice."""
    free = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    spec = PartitionSpec(*(rows if len(rows) else (None,)), *free)
    kept: jax.Array = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
    return kept


def _reusable(avals: Sequence[jax.ShapeDtypeStruct], outputs: Any) -> tuple[int, ...]:
    """Positions of the inputs that have an output of the same shape and dtype, each output used once."""
    free = [(leaf.shape, np.dtype(leaf.dtype)) for leaf in jax.tree_util.tree_leaves(outputs)]
    positions = []
    for position, aval in enumerate(avals):
        if (aval.shape, np.dtype(aval.dtype)) in free:
            free.remove((aval.shape, np.dtype(aval.dtype)))
            positions.append(position)
    return tuple(positions)


def _shardings_of(params: Any) -> Any:
    return jax.tree.map(lambda p: p.sharding, params)


def _kind(aggregate: Aggregate | None) -> str:
    """Aggregates of one type share a program: their weights are an argument."""
    return "" if aggregate is None else type(aggregate).__qualname__
