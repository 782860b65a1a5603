"""What a model spread over stages costs, from the traces of the same model with its layers and without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from jax.sharding import PartitionSpec

from spmd_infer.axes import ATTN_BATCH, LAYERS, AxisRules
from spmd_infer.mesh import MeshSpec
from spmd_infer.planning.cost import Traffic, cost_of
from spmd_infer.planning.estimates import Memory, Pipeline, StepTime
from spmd_infer.planning.hardware import Cluster
from spmd_infer.planning.layout import WeightLayout
from spmd_infer.planning.parallel_costs import pipeline_cost
from spmd_infer.planning.work import StagedWork
from spmd_infer.staging import PipelinedFunction

CUTS = (1, 2, 4, 8)
"""Into how many micro-batches a plan may cut the rows of a stage."""


@dataclass(frozen=True)
class StagedCost:
    """What one step costs over stages.

    Attributes:
        memory: bytes on the fullest device.
        time: seconds; None where no work is known.
        collectives: what is communicated in a step, by kind and mesh axes.
        pipeline: stages, micro-batches and the bubble.
    """

    memory: Memory
    time: StepTime | None
    collectives: Mapping[tuple[str, tuple[str, ...]], Traffic]
    pipeline: Pipeline


def stage_parts(rules: AxisRules, mesh: Mapping[str, int]) -> int:
    """Over how many stages a mesh spreads the layers; 1 for none."""
    return prod(mesh.get(axis, 1) for axis in rules.mesh_axes(LAYERS))


def fastest_cut(
    mesh: MeshSpec,
    rules: AxisRules,
    model: PipelinedFunction,
    weights: Sequence[WeightLayout],
    work: StagedWork | None,
    rows: int,
    cluster: Cluster,
) -> StagedCost:
    """``staged_cost`` for as many micro-batches as are estimated to take least time.

    More of them shorten the bubble; but each reads its stage's weights, and messages become more and smaller.
    """
    if model.microbatches is not None or work is None:
        return staged_cost(mesh, rules, model, weights, work, rows, cluster)
    cuts = [replace(model, most_parts=parts) for parts in CUTS]
    different = {cut.count(rows, rules.row_parts(mesh.shape) // model.stages): cut for cut in reversed(cuts)}
    costs = [staged_cost(mesh, rules, cut, weights, work, rows, cluster) for cut in different.values()]
    return min(reversed(costs), key=lambda cost: cost.time.total if cost.time is not None else 0.0)


def staged_cost(
    mesh: MeshSpec,
    rules: AxisRules,
    model: PipelinedFunction,
    weights: Sequence[WeightLayout],
    work: StagedWork | None,
    rows: int,
    cluster: Cluster,
) -> StagedCost:
    """Estimate memory and time of one step over stages.

    Args:
        mesh: the mesh, with its stages.
        rules: where logical axes go, the rows over the stages too (as ``for_stages`` makes them).
        model: the model with its layers stacked.
        weights: where each of its weights goes.
        work: what a step computes; None where the inputs are unknown.
        rows: rows of the batch, padded.
        cluster: the devices.
    """
    stages, parts = model.stages, rules.row_parts(mesh.shape)
    held = sum(layout.device_bytes for layout in weights)
    if work is None:
        shape = Pipeline(stages, model.num_layers, model.count(rows, parts // stages))
        return StagedCost(Memory(held, 0, 0, 0), None, {}, shape)
    rules = _with_attention(rules)
    one_by_one = [layout for stacked in weights for layout in _unstacked(stacked, model.sources)]
    whole = cost_of(mesh, rules, one_by_one, work.whole, cluster)
    outside = cost_of(mesh, rules, one_by_one, work.outside, cluster)
    # Layers that keep something of the rows take one micro-batch a stage.
    count = stages if whole.memory.cache else model.count(rows, parts // stages)
    shape = Pipeline(stages, model.num_layers, count)
    layers = {path for paths in model.sources.values() for path in paths}
    layer_bytes = sum(layout.device_bytes for layout in one_by_one if layout.path in layers)
    cost = pipeline_cost(whole, outside, layer_bytes, work.row_bytes, rows, shape, mesh, rules, cluster)
    traffic = dict(outside.collectives)
    for key, found in whole.collectives.items():
        before = outside.collectives.get(key, Traffic())
        # A stage's own layers, on one micro-batch after the other.
        inside = (found.count - before.count) * shape.depth // shape.layers * count
        if inside > 0:
            size = int((found.nbytes - before.nbytes) * shape.fullest)
            traffic[key] = Traffic(before.count + inside, before.nbytes + size)
    message = cost.permutes
    known = traffic.get((message.kind, message.axes), Traffic())
    traffic[message.kind, message.axes] = Traffic(
        known.count + message.times, known.nbytes + message.times * message.nbytes
    )
    own = work.row_bytes * rows // parts  # a device's share of the rows
    passing = 3 * own * stages // count  # a micro-batch as it comes, as it is worked on, and as it goes
    # Before and after the ticks the rows are there twice. During them the layers work on one micro-batch, for which
    # the place of the results is still free.
    layers_at_work = own + passing + whole.memory.activations * stages // count - whole.memory.inputs
    cache = int(whole.memory.cache * shape.fullest)
    # A layer's cache of that micro-batch is taken out and put back: there twice.
    taken = own + passing + 2 * cache // shape.depth // count
    activations = max(outside.memory.activations, 2 * own + passing, layers_at_work, taken)
    memory = Memory(held, cache, activations, whole.memory.inputs)
    return StagedCost(memory, cost.time, traffic, shape)


def _with_attention(rules: AxisRules) -> AxisRules:
    """Layers one by one have rows over the stages in attention too; in the pipeline it sees one stage's rows."""
    axes = rules.mesh_axes(LAYERS)
    rows = tuple(axis for axis in rules.of_activations.mesh_axes(ATTN_BATCH) if axis not in axes)
    return replace(rules, activations={**rules.activations, ATTN_BATCH: (*axes, *rows)})


def _unstacked(layout: WeightLayout, sources: Mapping[str, Sequence[str | None]]) -> list[WeightLayout]:
    """A stacked weight as the layers' own, as though each device held them for all stages."""
    paths = sources.get(layout.path)
    if paths is None:
        return [layout]
    axes = layout.axes[1:] if layout.axes is not None else None
    spec, parts = PartitionSpec(*layout.spec[1:]), layout.parts // len(paths)
    return [
        WeightLayout(path, layout.shape[1:], layout.dtype, axes, spec, layout.whole, parts)
        for path in paths
        if path is not None
    ]
