"""Look at every data×model mesh of the devices, estimate each, and choose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from spmd_infer.axes import BATCH, DATA, MODEL, SEQ, AxisRules
from spmd_infer.errors import AxisError, DoesNotFitError, PlanError
from spmd_infer.functional import ModelFunction
from spmd_infer.mesh import MeshSpec
from spmd_infer.planning.cost import MeshCost, cost_of
from spmd_infer.planning.hardware import Cluster
from spmd_infer.planning.layout import WeightLayout, weight_layouts
from spmd_infer.planning.mesh_plan import Candidate, Memory, MeshPlan, StepTime
from spmd_infer.planning.work import Work, read_work
from spmd_infer.tensors import InputSpec

RESERVE = 0.1
"""The part of a device's memory that plans leave free, for what they cannot foresee."""

CLOSE = 0.02
"""Estimates that differ by less than this part count as equal; the mesh that splits the model least then wins."""


DEFAULT_SIZE = 128
"""The size planned for where a varying dimension has none."""


@dataclass(frozen=True)
class Workload:
    """The traffic to plan for.

    Attributes:
        rows: batch size.
        sizes: size of each other varying input dimension, such as ``{"seq": 128}``.
        cache_bytes_per_row: keys and values of one row, in bytes, for models that keep them.
        cache_heads: the number of heads that this cache splits into.
    """

    rows: int = 8
    sizes: Mapping[str, int] = field(default_factory=lambda: {SEQ: DEFAULT_SIZE})
    cache_bytes_per_row: int = 0
    cache_heads: int = 1

    def describe(self, inputs: Any) -> str:
        """The traffic in words, with only those sizes that the inputs have."""
        if inputs is None:
            return "unknown (give inputs= or example= to let the batch count)"
        names = {d for spec in jax.tree_util.tree_leaves(inputs) for d in spec.shape if isinstance(d, str)} - {BATCH}
        parts = [f"{self.rows} rows"] + [f"{name}={self._size(name)}" for name in sorted(names)]
        if self.cache_bytes_per_row:
            parts.append(f"{self.rows * self.cache_bytes_per_row / 1e6:.0f} MB of keys and values")
        return ", ".join(parts)

    def batch(self, inputs: Any, rows: int) -> tuple[Any, list[tuple[str | None, ...]]]:
        """Abstract inputs of this size, and the axes of each."""
        kept = inputs
        if isinstance(inputs, Mapping):
            kept = {k: v for k, v in inputs.items() if not isinstance(v, InputSpec) or v.required}
        leaves, treedef = jax.tree_util.tree_flatten(kept)
        shapes = [
            jax.ShapeDtypeStruct(
                tuple(rows if d == BATCH else self._size(d) if isinstance(d, str) else d for d in spec.shape),
                np.dtype(spec.dtype),
            )
            for spec in leaves
        ]
        return jax.tree_util.tree_unflatten(treedef, shapes), [tuple(spec.axes) for spec in leaves]

    def _size(self, name: str) -> int:
        return self.sizes.get(name, DEFAULT_SIZE)


def make_plan(
    model: ModelFunction,
    cluster: Cluster,
    *,
    inputs: Any = None,
    workload: Workload | None = None,
    rules: AxisRules | None = None,
    mesh: MeshSpec | None = None,
) -> MeshPlan:
    """Choose a mesh, or judge the given one.

    Args:
        model: the model; abstract parameters are enough.
        cluster: the devices.
        inputs: a pytree of ``InputSpec``; None where the inputs are unknown, and only weights count.
        workload: the traffic; default 8 rows.
        rules: where logical axes go.
        mesh: the caller's choice; the others are still estimated for comparison.

    Raises:
        DoesNotFitError: no mesh of these devices (or not the given one) has enough memory.
        PlanError: every mesh fails for another reason, which is given.
        AxisError: the given mesh makes two axes of one tensor collide.
    """
    workload, rules = workload or Workload(), rules or AxisRules()
    planner = _Planner(model, cluster, inputs, workload, rules)
    if mesh is not None:
        planner.estimate(mesh)  # a collision on the caller's own mesh is the caller's to hear about
    meshes = [
        MeshSpec.of(data=cluster.count // m, model=m) for m in range(1, cluster.count + 1) if not cluster.count % m
    ]
    if mesh is not None and mesh not in meshes:
        meshes.append(mesh)
    candidates = [planner.candidate(spec) for spec in meshes]
    chosen = planner.choose(candidates, mesh)
    others = sorted(
        (_with_reason(c, chosen, mesh is not None) for c in candidates if c.mesh != chosen.mesh),
        key=lambda c: (not c.memory.weights, c.time.total if c.time else 0, -c.mesh.shape.get(DATA, 1)),
    )
    layouts = tuple(weight_layouts(model, rules, chosen.mesh.shape))
    return MeshPlan(
        model=model.name,
        cluster=cluster,
        chosen=chosen,
        candidates=(chosen, *others),
        rules=rules,
        weights=layouts,
        workload=workload.describe(inputs),
        given=mesh is not None,
        notes=(*([planner.untraced] if planner.untraced else []), *_notes(layouts, chosen.mesh)),
    )


class _Planner:
    def __init__(
        self, model: ModelFunction, cluster: Cluster, inputs: Any, workload: Workload, rules: AxisRules
    ) -> None:
        self._model, self._cluster, self._inputs = model, cluster, inputs
        self._workload, self._rules = workload, rules
        self._works: dict[int, Work] = {}
        self.untraced = ""

    def estimate(self, mesh: MeshSpec) -> MeshCost:
        data = mesh.shape.get(DATA, 1)
        rows = -(-self._workload.rows // data) * data
        if self._inputs is not None and rows not in self._works and not self.untraced:
            try:
                self._works[rows] = read_work(self._model, *self._workload.batch(self._inputs, rows))
            except Exception as error:  # the model's own code may refuse sizes that only its caller knows
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                self.untraced = (
                    f"planned from the weights alone: {self._model.name} failed on "
                    f"{self._workload.describe(self._inputs)}: {reason}"
                )
        return cost_of(
            mesh,
            self._rules,
            weight_layouts(self._model, self._rules, mesh.shape),
            self._works.get(rows),
            rows * self._workload.cache_bytes_per_row,
            self._workload.cache_heads,
            rows,
            self._cluster,
        )

    def candidate(self, mesh: MeshSpec) -> Candidate:
        try:
            cost = self.estimate(mesh)
        except AxisError as error:
            return Candidate(mesh, Memory(0, 0, 0, 0), None, "", str(error))
        words = ", ".join(
            f"{traffic.count} {kind} over {','.join(axes)}"
            for (kind, axes), traffic in sorted(cost.collectives.items())
        )
        reason = ""
        if cost.memory.total > self.available:
            reason = f"does not fit: needs {gigabytes(cost.memory.total)} a device, has {gigabytes(self.available)}"
        return Candidate(mesh, cost.memory, cost.time, words or "none", reason)

    @property
    def available(self) -> int:
        return int(self._cluster.device.memory_bytes * (1 - RESERVE))

    def choose(self, candidates: list[Candidate], mesh: MeshSpec | None) -> Candidate:
        wanted = [c for c in candidates if mesh is None or c.mesh == mesh]
        fitting = [c for c in wanted if not c.rejected]
        if fitting:
            best = min((c.time.total for c in fitting if c.time), default=0.0)
            close = [c for c in fitting if c.time is None or c.time.total <= best * (1 + CLOSE)]
            return min(close, key=lambda c: c.mesh.shape.get(MODEL, 1))
        smallest = min((c for c in wanted if c.memory.weights), key=lambda c: c.memory.total, default=None)
        if smallest is None:
            raise PlanError("no mesh works: " + "; ".join(f"{c.mesh}: {c.rejected}" for c in wanted))
        needed = smallest.memory.total
        elsewhere = min((c for c in candidates if not c.rejected), key=lambda c: c.memory.total, default=None)
        advice = (
            f"mesh {elsewhere.mesh} would fit"
            if elsewhere is not None
            else f"use at least {self._devices_needed(smallest)} devices, a smaller dtype, or fewer rows"
        )
        raise DoesNotFitError(
            f"{self._model.name} does not fit on {self._cluster}: mesh {smallest.mesh} needs {needed:,} bytes a device "
            f"({_parts(smallest.memory)}), {self.available:,} are available ({RESERVE:.0%} of "
            f"{self._cluster.device.memory_bytes:,} is kept free); {advice}",
            needed_bytes=needed,
            available_bytes=self.available,
        )

    def _devices_needed(self, smallest: Candidate) -> int:
        """Devices over which the whole of the smallest candidate would spread, each with this memory."""
        return -(-smallest.memory.total * self._cluster.count // self.available)


def gigabytes(size: float) -> str:
    """Bytes in the unit that reads best."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} B"


def _parts(memory: Memory) -> str:
    return (
        f"weights {gigabytes(memory.weights)}, cache {gigabytes(memory.cache)}, "
        f"activations {gigabytes(memory.activations)}, inputs and results {gigabytes(memory.inputs)}"
    )


def _with_reason(candidate: Candidate, chosen: Candidate, given: bool) -> Candidate:
    if candidate.rejected:
        return candidate
    mine: StepTime | None = candidate.time
    if mine is None or chosen.time is None:
        reason = (
            "splits weights that already fit" if candidate.memory.weights < chosen.memory.weights else "not asked for"
        )
    elif given and mine.total < chosen.time.total:
        reason = f"estimated {chosen.time.total / mine.total:.1f}x faster, but the mesh was given"
    elif mine.total <= chosen.time.total * (1 + CLOSE):
        reason = "as fast, but splits the model further"
    else:
        reason = f"slower: {mine.total / chosen.time.total:.3g}x the time"
    return Candidate(candidate.mesh, candidate.memory, mine, candidate.collectives, reason)


def _notes(layouts: tuple[WeightLayout, ...], mesh: MeshSpec) -> list[str]:
    """What stays whole although a rule wanted it split, and what was split without being annotated."""
    notes = []
    whole: dict[str, list[WeightLayout]] = {}
    for layout in layouts:
        if layout.whole:
            whole.setdefault(layout.whole, []).append(layout)
    for reason, found in whole.items():
        size = sum(layout.nbytes for layout in found)
        notes.append(f"{reason}: {len(found)} weights ({gigabytes(size)}) stay whole on every device of that axis")
    bare = [layout for layout in layouts if layout.axes is None]
    if bare and mesh.shape.get(MODEL, 1) > 1:
        split = [layout for layout in bare if layout.parts > 1]
        notes.append(
            f"{len(bare)} of {len(layouts)} weights name no axes. Split over {MODEL} along the largest dimension that "
            f"divides: {len(split)}; whole because small or indivisible: {len(bare) - len(split)}"
        )
    return notes
