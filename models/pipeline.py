"""A stack of layers spread over stages: each group of devices holds some layers, and activations travel between them.

Layers lie over stages in blocks of neighbours: of 7 layers over 2 stages the first holds layers 0 to 3, the second 4 to
6. The weights of layers at the same place in their stage are stacked, with one leading row for each stage, so that a
stage's devices hold that stage's layers and no others; where a stage has one layer less than the first, its row of the
last place is empty. The rows of a batch are split over the stages too: outside the layers every stage works on rows of
its own, so embedding and head are not computed several times. Inside, the batch becomes M micro-batches, which pass
through the stages one after the other (GPipe, Huang et al. 2019). In each of M + S - 1 ticks a stage hands the
micro-batch that it has finished to the next one. Meanwhile those that wait for the first stage move towards it, and
results move into the places that they leave, so that after the last tick each stage holds the results of its own rows:
apart from this passing on to neighbours no communication over stages is needed. A stage that has nothing to do in a
tick does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from math import prod
from typing import Any, Generic, TypeVar, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from spmd_infer.axes import BATCH, LAYERS, AxisRules, axis_scope, axis_tuple, current_scope
from spmd_infer.errors import BatchError, ModelError
from spmd_infer.models.microbatches import MicroBatches, Segment

Layer = TypeVar("Layer", bound=nnx.Module)
Tree = TypeVar("Tree")
Through = Callable[..., jax.Array]
"""``through(layers, x, *rows)``: the activations ``x`` after some neighbouring layers."""

Keeping = Callable[..., tuple[jax.Array, Sequence[Any]]]
"""``through(layers, x, *rows, caches)``: likewise, and the layers' caches."""

MOST_PARTS = 4
"""Into how many micro-batches a stage's rows are cut at most: with M >= 4 S the bubble is under a fifth (GPipe)."""


def microbatch_count(rows: int, stages: int, row_parts: int = 1, most_parts: int = MOST_PARTS) -> int:
    """Micro-batches that a batch is cut into: as many as leave whole rows for every device, at most some a stage.

    Args:
        rows: rows of the batch, a multiple of ``stages``.
        stages: how many stages there are.
        row_parts: devices of one stage over which the rows of a micro-batch are split.
        most_parts: into how many micro-batches the rows of a stage are cut at most.
    """
    own = rows // stages
    own = own // row_parts if own % row_parts == 0 else own
    return stages * max(parts for parts in range(1, most_parts + 1) if own % parts == 0)


def bubble_share(stages: int, microbatches: int) -> float:
    """The part of the ticks in which a stage has nothing to do, (S - 1) / (M + S - 1)."""
    return (stages - 1) / (microbatches + stages - 1)


class Stages(nnx.Module, Generic[Layer]):
    """Layers stacked over stages, in the place of a model's list of layers.

    Args:
        layers: the layers of one stage; each weight has a leading dimension with one row for each stage.
        stages: how many stages there are.
        num_layers: how many layers; stages after the first ``num_layers % stages`` have one less than those. None for
            as many in each.
        most_parts: into how many micro-batches the rows of a stage are cut at most.
        microbatches: micro-batches that a batch is cut into, a multiple of ``stages``; None chooses by the rows.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        stages: int,
        num_layers: int | None = None,
        *,
        most_parts: int = MOST_PARTS,
        microbatches: int | None = None,
    ) -> None:
        self.layers = nnx.List(layers)
        self.stages = stages
        self.fuller = 0 if num_layers is None else num_layers % stages  # stages that use the last place; 0 for all
        self.most_parts = most_parts
        self.microbatches = microbatches

    def stage(self, index: int) -> list[Layer]:
        """The layers of one stage, as they were in the model."""
        depth = len(self.layers) - (0 < self.fuller <= index)
        return [_row(layer, index) for layer in list(self.layers)[:depth]]

    def __call__(self, through: Through, x: jax.Array, *rows: jax.Array) -> jax.Array:
        """Pass ``x`` through all layers.

        Args:
            through: ``through(layers, x, *rows)`` for some neighbouring layers.
            x: activations ``[B, ...]``.
            rows: what the layers need to know of each row, ``[B, ...]``; every stage gets that of all rows.

        Returns:
            ``[B, ...]``. Outside of an engine, or on a mesh without stages, the layers run one after the other.

        Raises:
            ModelError: the mesh has another number of stages.
            BatchError: the rows do not divide into micro-batches.
        """
        return self.keeping(lambda layers, x, *rows: (through(layers, x, *rows[:-1]), ()), x, *rows, caches=())[0]

    def keeping(
        self, through: Keeping, x: jax.Array, *rows: jax.Array, caches: Sequence[Any]
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        """Pass ``x`` through layers that keep something of the rows, such as keys and values.

        Args:
            through: ``through(layers, x, *rows, caches)`` for some neighbouring layers.
            x: activations ``[B, ...]``; with caches every stage's rows make one micro-batch.
            rows: as when called.
            caches: one for each place in a stage: a pytree of ``[stages, n, ...]`` where ``n`` counts rows, or groups
                of as many rows each, in the order of ``x``.

        Returns:
            ``[B, ...]``, and the caches as the layers left them.

        Raises:
            ModelError: as when called.
            BatchError: as when called.
        """
        scope = current_scope()
        axes = scope[0].mesh_axes(LAYERS) if scope is not None else ()
        parts = prod(scope[1].shape.get(axis, 1) for axis in axes) if scope is not None else 1
        if scope is None or parts == 1:
            return self._in_order(through, x, rows, caches)
        if parts != self.stages or len(axes) != 1:
            raise ModelError(f"layers stacked for {self.stages} stages on a mesh that splits them {parts} ways")
        return self._spread(*scope, axes[0], through, x, rows, caches)

    def _in_order(
        self, through: Keeping, x: jax.Array, rows: Sequence[jax.Array], caches: Sequence[Any]
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        found = []
        for index in range(self.stages):
            own = jax.tree.map(lambda a, index=index: a[index], tuple(caches))
            layers = self.stage(index)
            x, done = through(layers, x, *rows, own[: len(layers)])
            found.append((*done, *(jax.tree.map(jnp.zeros_like, done[0]) for _ in own[len(layers) :])))
        return x, tuple(jax.tree.map(lambda *each: jnp.stack(each), *place) for place in zip(*found, strict=True))

    def _spread(
        self,
        rules: AxisRules,
        mesh: Mesh,
        axis: str,
        through: Keeping,
        x: jax.Array,
        rows: Sequence[jax.Array],
        caches: Sequence[Any],
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        count = x.shape[0]
        inner = _without(rules, axis)
        row_parts = prod(mesh.shape.get(name, 1) for name in inner.of_activations.mesh_axes(BATCH))
        row_parts = row_parts if count % (self.stages * row_parts) == 0 else 1
        most = 1 if caches else self.most_parts
        wanted = self.microbatches or microbatch_count(count, self.stages, row_parts, most)
        if count % (wanted * row_parts) or wanted % self.stages:
            raise BatchError(
                f"{count} rows in {wanted} micro-batches over {self.stages} stages"
                f"{f' of {row_parts} parts' if row_parts > 1 else ''}: expected rows that are a multiple of the "
                "micro-batches, and those a multiple of the stages"
            )
        graph, values = nnx.split(self.layers)
        batches = MicroBatches(axis, self.stages, wanted // self.stages, row_parts)
        caches = tuple(caches)
        leaves, treedef = jax.tree_util.tree_flatten(caches)
        different = {id(leaf): leaf for leaf in leaves}  # what all layers share is sliced once
        numbers = [list(different).index(id(leaf)) for leaf in leaves]
        last = len(self.layers) - 1
        spans = [slice(None)] if not self.fuller else [slice(last), slice(last, None)]
        traced: list[Segment] = []

        def run(values: Any, x: jax.Array, rows: Any, held: Any) -> Any:
            stacked: Any = nnx.merge(graph, jax.tree.map(lambda value: value[0], values))
            own = jax.tree_util.tree_unflatten(treedef, [held[number][0] for number in numbers])

            def segment(span: slice, stages: int) -> Segment:
                layers = list(stacked)[span]
                return Segment(batches, lambda x, rows, caches: through(layers, x, *rows, caches), own[span], stages)

            # Here the stage axis is ours; XLA still lays everything out over the others.
            with axis_scope(inner, cast("Mesh", jax.sharding.get_abstract_mesh())):
                traced[:] = [segment(*each) for each in zip(spans, (self.stages, self.fuller), strict=False)]
                x, changed = batches.passed(traced, x, rows)
            return x, jax.tree.map(lambda a: a[None], changed)

        ours, whole = PartitionSpec(None, axis), PartitionSpec()
        split = PartitionSpec(axis)
        spread = jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(split, ours, whole, split),
            out_specs=(ours, split),
            axis_names={axis},
            check_vma=False,
        )
        by_part = x.reshape(row_parts, count // row_parts, *x.shape[1:])
        passed, changed = spread(values, by_part, tuple(rows), list(different.values()))
        done = [part.rebuilt(caches[span], new) for part, span, new in zip(traced, spans, changed, strict=True)]
        return passed.reshape(x.shape), tuple(cache for part in done for cache in part)


def run_layers(layers: Stages[Layer] | Iterable[Layer], through: Through, x: jax.Array, *rows: jax.Array) -> jax.Array:
    """Pass ``x [B, ...]`` through a model's layers, be they a list or spread over stages; see ``Stages``."""
    return layers(through, x, *rows) if isinstance(layers, Stages) else through(layers, x, *rows)


def kept_layers(layers: Stages[Layer] | Sequence[Layer]) -> int:
    """How many caches a model's layers take: one each, or one for each place in a stage."""
    return len(layers.layers if isinstance(layers, Stages) else layers)


def shared_by_stages(layers: Stages[Layer] | Sequence[Layer], tree: Tree) -> Tree:
    """What the caches of all layers share, as ``Stages.keeping`` takes it."""
    if not isinstance(layers, Stages):
        return tree
    shared: Tree = jax.tree.map(lambda a: jnp.broadcast_to(a, (layers.stages, *a.shape)), tree)
    return shared


def _row(layer: Layer, index: int) -> Layer:
    graph, values = nnx.split(layer)
    merged: Layer = nnx.merge(graph, jax.tree.map(lambda value: value[index], values))
    return merged


def _without(rules: AxisRules, axis: str) -> AxisRules:
    """The rules for code in which ``axis`` is not XLA's to split over."""

    def rest(table: Any) -> dict[str, Any]:
        return {name: tuple(a for a in axis_tuple(axes) if a != axis) for name, axes in table.items()}

    return replace(rules, rules=rest(rules.rules), activations=rest(rules.activations))
