"""Look at every mesh of the devices under every layout, estimate each, and choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import gcd
from typing import Any

from spmd_infer.axes import DATA, EXPERT, MODEL, STAGE, AxisRules
from spmd_infer.functional import ModelFunction
from spmd_infer.mesh import MeshSpec
from spmd_infer.models.phases import Phase
from spmd_infer.planning.choice import CLOSE, choose, score
from spmd_infer.planning.estimates import Candidate, gigabytes
from spmd_infer.planning.experts import ROWS_OVER_EXPERTS, without_experts
from spmd_infer.planning.hardware import Cluster
from spmd_infer.planning.layout import WeightLayout, weight_layouts
from spmd_infer.planning.layouts import KV_OVER_BATCH, ONE_D, TWO_D, WEIGHT_GATHERED
from spmd_infer.planning.mesh_plan import MeshPlan
from spmd_infer.planning.planner import Planner
from spmd_infer.planning.stages import stage_parts
from spmd_infer.planning.traces import Shallow
from spmd_infer.planning.workload import Workload
from spmd_infer.staging import layer_count

SEARCHED = (ONE_D, KV_OVER_BATCH, TWO_D, WEIGHT_GATHERED)
"""Layouts that a search looks at, simplest first."""


def make_plan(
    model: ModelFunction,
    cluster: Cluster,
    *,
    inputs: Any = None,
    phases: Sequence[Phase] = (),
    workload: Workload | None = None,
    rules: AxisRules | None = None,
    mesh: MeshSpec | None = None,
    units: dict[str, int] | None = None,
    shallow: Shallow | None = None,
) -> MeshPlan:
    """Choose a mesh and a layout, or judge the given ones.

    Args:
        model: the model; abstract parameters are enough.
        cluster: the devices.
        inputs: a pytree of ``InputSpec``; None where the inputs are unknown, and only weights count.
        phases: the kinds of steps of a model that takes several; default one call with ``inputs``.
        workload: the traffic; default 8 rows.
        rules: where logical axes go; default the 1-D layout for a mesh that is given and for simulated devices, whose
            collectives cost more than they save, and otherwise every known layout.
        mesh: the caller's choice; the others are still estimated for comparison.
        units: indivisible units of the model's axes.
        shallow: the same model with few layers, to trace instead of one with many.

    Raises:
        DoesNotFitError: no mesh of these devices (or not the given one) has enough memory.
        PlanError: every mesh fails for another reason, which is given.
        AxisError: the given mesh makes two axes of one tensor collide.
    """
    workload = workload or Workload()
    staged = mesh is not None and stage_parts(rules or ONE_D, mesh.shape) > 1
    if not phases and inputs is not None:
        phases = (Phase("infer", None, inputs),)
    several = SEARCHED if model.axes else (ONE_D, WEIGHT_GATHERED)  # the others move only axes that are named
    searched = several if mesh is None and not cluster.device.shared else (ONE_D,)
    if shallow is None and without_experts(model)[1].sizes:
        searched = (*searched, ROWS_OVER_EXPERTS)
    known = (rules,) if rules is not None else searched
    with_units = tuple(each.with_units(units or {}) for each in known)
    planner = Planner(model, cluster, phases, workload, with_units, shallow)
    if mesh is not None:
        for each in planner.layouts:  # a collision on the caller's own mesh is the caller's to hear about
            weight_layouts(*planner.staged(mesh, each) if staged else (model, each), mesh.shape)
    forwards = rules is None and [phase.call for phase in phases] == [None]
    layers = layer_count(model) if forwards and not planner.num_experts else 0
    candidates = [
        planner.candidate(spec, assigned)
        for spec in _meshes(cluster, mesh, workload, layers, gcd(*planner.num_experts) if rules is None else 0)
        for assigned in planner.assignments(spec)
    ]
    names = [each.name for each in planner.layouts]
    chosen = choose(candidates, mesh, workload, names, model.name, cluster)
    others = sorted(
        (_with_reason(c, chosen, workload, mesh is not None) for c in candidates if c is not chosen),
        key=lambda c: (
            not c.memory.weights,
            score(c, workload),
            c.mesh.shape.get(STAGE, 1),
            -c.mesh.shape.get(DATA, 1),
        ),
    )
    base = next(iter(chosen.rules.values()), planner.layouts[0])
    if stage_parts(base, chosen.mesh.shape) > 1:
        base = planner.staged(chosen.mesh, base)[1]
    assigned = tuple(chosen.rules.values()) or (base,)
    layouts, tensors = planner.weights(chosen.mesh, assigned, chosen.rows)
    weights = tuple(layouts)
    generates = any(phase.name == "decode" for phase in phases)
    return MeshPlan(
        model=model.name,
        cluster=cluster,
        chosen=chosen,
        candidates=(chosen, *others),
        rules=base,
        weights=weights,
        workload=workload.describe(inputs, generates=generates),
        given=mesh is not None,
        notes=(
            *([planner.untraced] if planner.untraced else []),
            *_pipeline_notes(chosen),
            *_notes(weights, chosen.mesh),
        ),
        tensors=tensors,
    )


def _meshes(cluster: Cluster, given: MeshSpec | None, workload: Workload, layers: int, experts: int) -> list[MeshSpec]:
    """Every data x model factorisation of the devices, of fewer devices too where cost counts, and the given mesh.

    Where ``layers`` can be shared out over stages, or ``experts`` over devices of their own, those meshes too.
    """
    counts = [cluster.count]
    if workload.objective == "cost" and given is None:
        counts = [count for count in range(1, cluster.count + 1) if cluster.count % count == 0]
    meshes = [
        MeshSpec.of(data=count // parts, model=parts)
        for count in counts
        for parts in range(1, count + 1)
        if count % parts == 0
    ]
    meshes += [
        MeshSpec.of(**{axis: parts, DATA: rest // model, MODEL: model})
        for count in counts
        for axis, units in ((STAGE, layers), (EXPERT, experts))
        for parts in range(2, count + 1)
        if count % parts == 0 and (parts <= units if axis == STAGE else units and units % parts == 0)
        for rest in (count // parts,)
        for model in range(1, rest + 1)
        if rest % model == 0
    ]
    return meshes if given is None or given in meshes else [*meshes, given]


def _with_reason(candidate: Candidate, chosen: Candidate, workload: Workload, given: bool) -> Candidate:
    if candidate.rejected:
        return candidate
    mine, best = score(candidate, workload), score(chosen, workload)
    if candidate.time is None or chosen.time is None:
        splits = candidate.memory.weights < chosen.memory.weights
        reason = "splits weights that already fit" if splits else "not asked for"
    elif given and 0 < mine < best:
        reason = f"estimated {best / mine:.3g}x faster, but the mesh was given"
    elif mine <= best * (1 + CLOSE) or best == 0:
        reason = "no faster, and less simple"
    else:
        reason = f"{mine / best:.3g}x the {'cost' if workload.objective == 'cost' else 'time'}"
    return replace(candidate, rejected=reason)


def _pipeline_notes(chosen: Candidate) -> list[str]:
    """What the reader should know of a mesh with stages."""
    if chosen.pipeline is None:
        return []
    return [str(chosen.pipeline), f"weights outside the layers are on all {chosen.pipeline.stages} stages"]


def _notes(layouts: tuple[WeightLayout, ...], mesh: MeshSpec) -> list[str]:
    """What stays whole although a rule wanted it split, and what was split without being annotated."""
    notes = []
    whole: dict[str, list[WeightLayout]] = {}
    for layout in layouts:
        if layout.whole:
            whole.setdefault(layout.whole, []).append(layout)
    for reason, found in whole.items():
        size = sum(layout.nbytes for layout in found)
        largest = max(found, key=lambda layout: layout.nbytes)
        named = f"such as {largest.path}, {gigabytes(largest.nbytes)}; " if len(found) > 1 else f"{largest.path}, "
        notes.append(
            f"{reason}: {len(found)} weights ({named}{gigabytes(size)}{' in all' * (len(found) > 1)}) stay whole on "
            "every device of that axis"
        )
    bare = [layout for layout in layouts if layout.axes is None]
    if bare and mesh.shape.get(MODEL, 1) > 1:
        split = [layout for layout in bare if layout.parts > 1]
        notes.append(
            f"{len(bare)} of {len(layouts)} weights name no axes. The default rule splits the largest dimension that "
            f"divides over {MODEL}, if the weight is not small; {len(split)} are split, {len(bare) - len(split)} whole"
        )
    return notes
