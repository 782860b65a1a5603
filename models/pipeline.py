"""A stack of layers spread over stages: each group of devices holds some layers, and activations travel between them.

Layers lie over stages in blocks of neighbours: of 6 layers over 2 stages the first holds layers 0 to 2. The weights of
layers at the same place in their stage are stacked, with one leading row for each stage, so that a stage's devices hold
that stage's layers and no others. The rows of a batch are split over the stages too: outside the layers every stage
works on rows of its own, so embedding and head are not computed several times. Inside, the batch becomes M
micro-batches, which pass through the stages one after the other (GPipe, Huang et al. 2019). In each of M + S - 1 ticks
a stage hands the micro-batch that it has finished to the next one. Meanwhile those that wait for the first stage move
towards it, and results move into the places that they leave, so that after the last tick each stage holds the results
of its own rows: apart from this passing on to neighbours no communication over stages is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any, Generic, TypeVar, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from spmd_infer.axes import BATCH, LAYERS, AxisRules, axis_scope, axis_tuple, current_scope
from spmd_infer.errors import BatchError, ModelError

Layer = TypeVar("Layer", bound=nnx.Module)
Through = Callable[..., jax.Array]
"""``through(layers, x, *rows)``: the activations ``x`` after some neighbouring layers."""

MOST_PARTS = 4
"""Into how many micro-batches a stage's rows are cut at most: with M >= 4 S the bubble is under a fifth (GPipe)."""


def microbatch_count(rows: int, stages: int, row_parts: int = 1) -> int:
    """Micro-batches that a batch is cut into: as many as leave whole rows for every device, at most 4 a stage.

    Args:
        rows: rows of the batch, a multiple of ``stages``.
        stages: how many stages there are.
        row_parts: devices of one stage over which the rows of a micro-batch are split.
    """
    own = rows // stages
    own = own // row_parts if own % row_parts == 0 else own
    return stages * max(parts for parts in range(1, MOST_PARTS + 1) if own % parts == 0)


def bubble_share(stages: int, microbatches: int) -> float:
    """The part of the ticks in which a stage has nothing to do, (S - 1) / (M + S - 1)."""
    return (stages - 1) / (microbatches + stages - 1)


class Stages(nnx.Module, Generic[Layer]):
    """Layers stacked over stages, in the place of a model's list of layers.

    Args:
        layers: the layers of one stage; each weight has a leading dimension with one row for each stage.
        stages: how many stages there are.
        microbatches: micro-batches that a batch is cut into, a multiple of ``stages``; None chooses by the rows.
    """

    def __init__(self, layers: Sequence[Layer], stages: int, microbatches: int | None = None) -> None:
        self.layers = nnx.List(layers)
        self.stages = stages
        self.microbatches = microbatches

    def stage(self, index: int) -> list[Layer]:
        """The layers of one stage, as they were in the model."""
        return [_row(layer, index) for layer in self.layers]

    def __call__(self, through: Through, x: jax.Array, *rows: jax.Array) -> jax.Array:
        """Pass ``x`` through all layers.

        Args:
            through: ``through(layers, x, *rows)`` for some neighbouring layers.
            x: activations ``[B, ...]``.
            rows: what the layers need to know of each row, ``[B, ...]``. They travel with the activations.

        Returns:
            ``[B, ...]``. Outside of an engine, or on a mesh without stages, the layers run one after the other.

        Raises:
            ModelError: the mesh has another number of stages.
            BatchError: the rows do not divide into micro-batches.
        """
        scope = current_scope()
        axes = scope[0].mesh_axes(LAYERS) if scope is not None else ()
        parts = prod(scope[1].shape.get(axis, 1) for axis in axes) if scope is not None else 1
        if scope is None or parts == 1:
            for index in range(self.stages):
                x = through(self.stage(index), x, *rows)
            return x
        if parts != self.stages or len(axes) != 1:
            raise ModelError(f"layers stacked for {self.stages} stages on a mesh that splits them {parts} ways")
        return self._spread(*scope, axes[0], through, (x, *rows))

    def _spread(
        self, rules: AxisRules, mesh: Mesh, axis: str, through: Through, arrays: tuple[jax.Array, ...]
    ) -> jax.Array:
        count = arrays[0].shape[0]
        inner = _without(rules, axis)
        row_parts = prod(mesh.shape.get(name, 1) for name in inner.of_activations.mesh_axes(BATCH))
        wanted = self.microbatches or microbatch_count(count, self.stages, row_parts)
        if count % wanted or wanted % self.stages:
            raise BatchError(
                f"{count} rows in {wanted} micro-batches over {self.stages} stages: expected rows that are a multiple "
                f"of the micro-batches, and those a multiple of the stages"
            )
        graph, values = nnx.split(self.layers)

        def run(values: Any, *arrays: jax.Array) -> jax.Array:
            layers = nnx.merge(graph, jax.tree.map(lambda value: value[0], values))
            # Here the stage axis is ours; XLA still lays everything out over the others.
            with axis_scope(inner, cast("Mesh", jax.sharding.get_abstract_mesh())):
                return _ticks(partial(through, list(layers)), arrays, axis, self.stages, wanted // self.stages)

        split = PartitionSpec(axis)
        spread = jax.shard_map(run, mesh=mesh, in_specs=split, out_specs=split, axis_names={axis}, check_vma=False)
        passed: jax.Array = spread(values, *arrays)
        return passed


def run_layers(layers: Stages[Layer] | Iterable[Layer], through: Through, x: jax.Array, *rows: jax.Array) -> jax.Array:
    """Pass ``x [B, ...]`` through a model's layers, be they a list or spread over stages; see ``Stages``."""
    return layers(through, x, *rows) if isinstance(layers, Stages) else through(layers, x, *rows)


def _ticks(
    work: Callable[..., jax.Array], arrays: tuple[jax.Array, ...], axis: str, stages: int, parts: int
) -> jax.Array:
    """One stage's side of the pipeline; ``arrays`` are its own rows, in ``parts`` micro-batches."""
    stage = jax.lax.axis_index(axis)
    onward = [(here, (here + 1) % stages) for here in range(stages)]
    back = [(here, (here - 1) % stages) for here in range(stages)]
    # Every parts-th row makes a micro-batch, so that each device's rows are in every one of them.
    waiting = tuple(a.reshape(a.shape[0] // parts, parts, *a.shape[1:]) for a in arrays)

    def tick(state: Any, moment: jax.Array) -> tuple[Any, None]:
        received, waiting = state
        place = moment % parts
        first = tuple(jax.lax.dynamic_index_in_dim(a, place, 1, keepdims=False) for a in waiting)
        x, *rows = (jnp.where(stage == 0, ours, theirs) for ours, theirs in zip(first, received, strict=True))
        x = work(x, *rows)
        received = tuple(jax.lax.ppermute(a, axis, onward) for a in (x, *rows))
        moved = [jax.lax.ppermute(a, axis, back) for a in first]
        moved[0] = jnp.where(stage == stages - 1, x, moved[0])
        waiting = tuple(
            jax.lax.dynamic_update_index_in_dim(a, new, place, 1) for a, new in zip(waiting, moved, strict=True)
        )
        return (received, waiting), None

    start = tuple(jnp.zeros_like(a[:, 0]) for a in waiting)
    (_, (results, *_)), _ = jax.lax.scan(tick, (start, waiting), jnp.arange(stages * (parts + 1) - 1))
    # The result of micro-batch m entered in tick m + S - 1.
    results = jnp.roll(results, -(stages - 1), axis=1)
    return results.reshape(arrays[0].shape)


def _row(layer: Layer, index: int) -> Layer:
    graph, values = nnx.split(layer)
    merged: Layer = nnx.merge(graph, jax.tree.map(lambda value: value[index], values))
    return merged


def _without(rules: AxisRules, axis: str) -> AxisRules:
    """The rules for code in which ``axis`` is not XLA's to split over."""

    def rest(table: Any) -> dict[str, Any]:
        return {name: tuple(a for a in axis_tuple(axes) if a != axis) for name, axes in table.items()}

    return replace(rules, rules=rest(rules.rules), activations=rest(rules.activations))
