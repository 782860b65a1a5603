"""What of a plan is compiled to verify it, and what the plan foresees of just that; with stages too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import jax

from spmd_infer.axes import LAYERS, AxisRules
from spmd_infer.functional import ModelFunction
from spmd_infer.mesh import MeshSpec
from spmd_infer.models.attention import without_blocks
from spmd_infer.models.phases import Phase
from spmd_infer.planning.cost import MeshCost, cost_of
from spmd_infer.planning.estimates import Pipeline
from spmd_infer.planning.hardware import Cluster
from spmd_infer.planning.layout import WeightLayout, weight_layouts
from spmd_infer.planning.stages import staged_cost
from spmd_infer.planning.traces import Traces
from spmd_infer.planning.tracing import read_work
from spmd_infer.planning.values import Value
from spmd_infer.planning.workload import Workload
from spmd_infer.staging import PipelinedFunction
from spmd_infer.tensors import InputSpec


@dataclass(frozen=True)
class Foreseen:
    """One program, and what is planned of it.

    Attributes:
        model: the model, called as in the phase.
        batch: abstract inputs.
        inputs: their shapes and logical axes, in order.
        layouts: where the weights go.
        cost: what the plan foresees.
        pipeline: how the batch passes through stages; None without any.
    """

    model: ModelFunction
    batch: Any
    inputs: Sequence[Value]
    layouts: Sequence[WeightLayout]
    cost: MeshCost
    pipeline: Pipeline | None = None


def foreseen(
    model: ModelFunction, phase: Phase, spec: MeshSpec, rules: AxisRules, workload: Workload, cluster: Cluster
) -> Foreseen:
    """The program of a phase, for rows that the rules divide, and its cost.

    Args:
        model: the model, its layers stacked where the mesh has stages.
        phase: the phase, its inputs as of the model with its layers one by one.
        spec: the mesh.
        rules: where logical axes go.
        workload: the traffic.
        cluster: what was planned for.
    """
    called = model if phase.call is None else replace(model, call=phase.call)
    parts = rules.row_parts(spec.shape)
    rows = -(-workload.rows // parts) * parts
    layouts = weight_layouts(called, rules, spec.shape)
    if isinstance(model, PipelinedFunction):
        batch, axes = workload.batch(_stacked(phase.inputs, model), rows)
        split = rules.splits_positions(spec.shape)
        work = Traces(model.base, workload, None).staged(phase, rows, split_positions=split)
        cost = staged_cost(spec, rules, model, layouts, work, rows, cluster)
        inputs = [
            Value(leaf.shape, leaf.dtype, labels) for leaf, labels in zip(jax.tree.leaves(batch), axes, strict=True)
        ]
        return Foreseen(
            called, batch, inputs, layouts, MeshCost(cost.memory, cost.time, cost.collectives), cost.pipeline
        )
    batch, axes = workload.batch(phase.inputs, rows)
    with without_blocks() if rules.splits_positions(spec.shape) else nullcontext():
        work_read = read_work(called, batch, axes)
    return Foreseen(called, batch, work_read.inputs, layouts, cost_of(spec, rules, layouts, work_read, cluster))


def _stacked(inputs: Any, model: PipelinedFunction) -> Any:
    """Inputs whose caches, one a layer, lie with their stages: one for each place in a stage."""
    if not isinstance(inputs, Mapping) or "caches" not in inputs:
        return inputs

    def stack(spec: InputSpec) -> InputSpec:
        return InputSpec((model.stages, *spec.shape), spec.dtype, (LAYERS, *spec.axes), spec.required)

    return {**inputs, "caches": jax.tree.map(stack, inputs["caches"][: model.depth])}
