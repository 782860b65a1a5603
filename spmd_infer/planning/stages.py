"""What a model spread over stages costs, from the traces of the same model with its layers and without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from jax.sharding import PartitionSpec

from spmd_infer.axes import ATTN_BATCH, LAYERS, AxisRules
from spmd_infer.mesh import MeshSpec
from spmd_infer.models.pipeline import microbatch_count
from spmd_infer.planning.cost import Traffic, cost_of
from spmd_infer.planning.estimates import Memory, Pipeline, StepTime
from spmd_infer.planning.hardware import Cluster
from spmd_infer.planning.layout import WeightLayout
from spmd_infer.planning.parallel_costs import pipeline_cost
from spmd_infer.planning.work import Work
from spmd_infer.staging import PipelinedFunction


@dataclass(frozen=True)
class StagedWork:
    """A step's work in parts.

    Attributes:
        whole: of the model with its layers one by one.
        outside: without any layer.
        row_bytes: bytes of one row of each array that travels through the layers.
    """

    whole: Work
    outside: Work
    row_bytes: tuple[int, ...]


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
    count = model.microbatches or microbatch_count(rows, stages, parts // stages)
    shape = Pipeline(stages, model.num_layers // stages, count)
    held = sum(layout.device_bytes for layout in weights)
    if work is None:
        return StagedCost(Memory(held, 0, 0, 0), None, {}, shape)
    rules = _with_attention(rules)
    one_by_one = [layout for stacked in weights for layout in _unstacked(stacked, model.sources)]
    whole = cost_of(mesh, rules, one_by_one, work.whole, cluster)
    outside = cost_of(mesh, rules, one_by_one, work.outside, cluster)
    layers = {path for paths in model.sources.values() for path in paths}
    layer_bytes = sum(layout.device_bytes for layout in one_by_one if layout.path in layers)
    cost = pipeline_cost(whole, outside, layer_bytes, work.row_bytes, rows, count, mesh, rules, cluster)
    ticks = count + stages - 1
    traffic = dict(outside.collectives)
    for key, found in whole.collectives.items():
        before = outside.collectives.get(key, Traffic())
        # A stage's own layers, on one micro-batch, once a tick.
        inside = (found.count - before.count) // stages * ticks
        if inside > 0:
            size = (found.nbytes - before.nbytes) * ticks // count
            traffic[key] = Traffic(before.count + inside, before.nbytes + size)
    for message in cost.permutes:
        known = traffic.get((message.kind, message.axes), Traffic())
        traffic[message.kind, message.axes] = Traffic(
            known.count + message.times, known.nbytes + message.times * message.nbytes
        )
    own = sum(work.row_bytes) * rows // parts  # of each array that travels, a device's share of the rows
    passing = 3 * own * stages // count  # a micro-batch as it comes, as it is worked on, and as it goes
    # Before and after the ticks the rows are there twice. During them the layers work on one micro-batch, for which
    # the place of the results is still free.
    layers_at_work = own + passing + whole.memory.activations * stages // count - whole.memory.inputs
    activations = max(outside.memory.activations, 2 * own + passing, layers_at_work)
    memory = Memory(held, 0, activations, whole.memory.inputs)
    return StagedCost(memory, cost.time, traffic, shape)


def _with_attention(rules: AxisRules) -> AxisRules:
    """Layers one by one have rows over the stages in attention too; in the pipeline it sees one stage's rows."""
    axes = rules.mesh_axes(LAYERS)
    rows = tuple(axis for axis in rules.of_activations.mesh_axes(ATTN_BATCH) if axis not in axes)
    return replace(rules, activations={**rules.activations, ATTN_BATCH: (*axes, *rows)})


def _unstacked(layout: WeightLayout, sources: Mapping[str, Sequence[str]]) -> list[WeightLayout]:
    """A stacked weight as the layers' own, as though each device held them for all stages."""
    paths = sources.get(layout.path)
    if paths is None:
        return [layout]
    axes = layout.axes[1:] if layout.axes is not None else None
    spec, parts = PartitionSpec(*layout.spec[1:]), layout.parts // len(paths)
    return [WeightLayout(path, layout.shape[1:], layout.dtype, axes, spec, layout.whole, parts) for path in paths]
