"""Look at every mesh of the devices under every layout, estimate each, and choose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from spmd_infer.axes import DATA, LOGICAL_AXES, MODEL, AxisRules
from spmd_infer.errors import AxisError, DoesNotFitError, PlanError
from spmd_infer.functional import ModelFunction
from spmd_infer.mesh import MeshSpec
from spmd_infer.models.phases import Phase
from spmd_infer.planning.cost import MeshCost, Traffic, cost_of, is_cache, reshard_time
from spmd_infer.planning.hardware import Cluster
from spmd_infer.planning.layout import WeightLayout, weight_layouts
from spmd_infer.planning.layouts import KV_OVER_BATCH, ONE_D, TWO_D, WEIGHT_GATHERED
from spmd_infer.planning.mesh_plan import Candidate, Memory, MeshPlan, PhaseEstimate, StepTime
from spmd_infer.planning.work import Work, deeper, read_work
from spmd_infer.planning.workload import Workload

RESERVE = 0.1
"""The part of a device's memory that plans leave free, for what they cannot foresee."""

CLOSE = 0.02
"""Estimates that differ by less than this part count as equal; the simplest layout that splits least then wins."""

SEARCHED = (ONE_D, KV_OVER_BATCH, TWO_D, WEIGHT_GATHERED)
"""Layouts that a search looks at, simplest first."""

MOST_ROWS = 4096

Rules = tuple[AxisRules, ...]
"""The rules of each phase."""


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
    if not phases and inputs is not None:
        phases = (Phase("infer", None, inputs),)
    searched = SEARCHED if mesh is None and not cluster.device.shared else (ONE_D,)
    layouts = (rules,) if rules is not None else searched
    with_units = tuple(each.with_units(units or {}) for each in layouts)
    planner = _Planner(model, cluster, phases, workload, with_units, shallow)
    if mesh is not None:
        for each in planner.layouts:  # a collision on the caller's own mesh is the caller's to hear about
            weight_layouts(model, each, mesh.shape)
    candidates = [
        planner.candidate(spec, assigned)
        for spec in _meshes(cluster, mesh, workload)
        for assigned in planner.assignments(spec)
    ]
    chosen = planner.choose(candidates, mesh)
    others = sorted(
        (_with_reason(c, chosen, workload, mesh is not None) for c in candidates if c is not chosen),
        key=lambda c: (not c.memory.weights, _score(c, workload), -c.mesh.shape.get(DATA, 1)),
    )
    base = next(iter(chosen.rules.values()), planner.layouts[0])
    weights = tuple(weight_layouts(model, base, chosen.mesh.shape))
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
        notes=(*([planner.untraced] if planner.untraced else []), *_notes(weights, chosen.mesh)),
    )


def _meshes(cluster: Cluster, given: MeshSpec | None, workload: Workload) -> list[MeshSpec]:
    """Every data x model factorisation of the devices, of fewer devices too where cost counts, and the given mesh."""
    counts = [cluster.count]
    if workload.objective == "cost" and given is None:
        counts = [count for count in range(1, cluster.count + 1) if cluster.count % count == 0]
    meshes = [
        MeshSpec.of(data=count // parts, model=parts)
        for count in counts
        for parts in range(1, count + 1)
        if count % parts == 0
    ]
    return meshes if given is None or given in meshes else [*meshes, given]


@dataclass(frozen=True)
class Shallow:
    """A model of many equal layers, with two and with three of them.

    Attributes:
        num_layers: how many the whole model has.
        two: the model with two layers, and the inputs of each phase by name.
        three: likewise with three.
    """

    num_layers: int
    two: tuple[ModelFunction, Mapping[str, Any]]
    three: tuple[ModelFunction, Mapping[str, Any]]


class _Planner:
    def __init__(
        self,
        model: ModelFunction,
        cluster: Cluster,
        phases: Sequence[Phase],
        workload: Workload,
        layouts: Rules,
        shallow: Shallow | None,
    ) -> None:
        self.layouts = layouts
        self._shallow = shallow
        self._model, self._cluster, self._phases, self._workload = model, cluster, phases, workload
        self._works: dict[tuple[str, int], Work | None] = {}
        self._weights: dict[tuple[MeshSpec, int], list[WeightLayout]] = {}
        self._costs: dict[tuple[MeshSpec, int, str, int], MeshCost] = {}
        self.untraced = ""

    def assignments(self, mesh: MeshSpec) -> Iterator[Rules]:
        """Layouts for the phases: one for all, or several that keep the weights where they are.

        Layouts that come to the same on this mesh are looked at once.
        """
        different: dict[Any, AxisRules] = {}
        for rules in self.layouts:
            different.setdefault(_effect(rules, mesh), rules)
        for assigned in product(different.values(), repeat=max(1, len(self._phases))):
            if all(rules.rules == assigned[0].rules for rules in assigned):
                yield assigned

    def candidate(self, mesh: MeshSpec, assigned: Rules) -> Candidate:
        names = list(dict.fromkeys(rules.name for rules in assigned))
        try:
            found = self._estimate(mesh, assigned, self._workload.rows)
            if self._workload.objective == "throughput" and found.most_rows and found.time is not None:
                rows = min(MOST_ROWS, 1 << (found.most_rows.bit_length() - 1))
                found = self._estimate(mesh, assigned, rows)
        except AxisError as error:
            return Candidate(mesh, Memory(0, 0, 0, 0), None, "", str(error), " -> ".join(names))
        return found

    def _estimate(self, mesh: MeshSpec, assigned: Rules, rows: int) -> Candidate:
        cluster = self._part(mesh)
        parts = max(rules.row_parts(mesh.shape) for rules in assigned)
        padded = -(-rows // parts) * parts
        if not self._phases:
            cost = cost_of(mesh, assigned[0], self._layouts(mesh, assigned[0]), None, cluster)
            return self._judged(Candidate(mesh, cost.memory, None, "", "", assigned[0].name))
        costs = [self._cost(mesh, rules, phase, padded) for phase, rules in zip(self._phases, assigned, strict=True)]
        memory = Memory(
            weights=costs[0].memory.weights,
            cache=max(cost.memory.cache for cost in costs),
            activations=max(cost.memory.activations for cost in costs),
            inputs=max(cost.memory.inputs for cost in costs),
        )
        estimates = tuple(
            PhaseEstimate(phase.name, rules.name, phase.times, cost.time, _words(cost))
            for phase, rules, cost in zip(self._phases, assigned, costs, strict=True)
            if cost.time is not None
        )
        switch = sum(
            reshard_time(self._caches(phase, padded), before, after, mesh, cluster)
            for phase, before, after in zip(self._phases[1:], assigned, assigned[1:], strict=False)
        )
        grows = memory.total - memory.weights
        room = self.available - memory.weights
        return self._judged(
            Candidate(
                mesh,
                memory,
                _sum(estimates, switch) if len(estimates) == len(self._phases) else None,
                estimates[-1].collectives if estimates else "",
                "",
                " -> ".join(dict.fromkeys(rules.name for rules in assigned)),
                estimates,
                {phase.name: rules for phase, rules in zip(self._phases, assigned, strict=True)},
                switch,
                max(0, int(room / grows * padded)) if grows else 0,
                padded,
            )
        )

    def _judged(self, candidate: Candidate) -> Candidate:
        """The candidate, rejected where it exceeds memory or a limit."""
        reason = ""
        if candidate.memory.total > self.available:
            total, available = gigabytes(candidate.memory.total), gigabytes(self.available)
            reason = f"does not fit: needs {total} a device, has {available}"
        for phase in candidate.phases:
            first = phase.name == "prefill"
            limit = self._workload.ttft_limit if first else self._workload.itl_limit
            if limit is not None and phase.time.total > limit and not reason:
                what = "time to first token" if first else "time between tokens"
                reason = f"{what} {phase.time.total * 1e3:.3g} ms, over the limit of {limit * 1e3:.3g} ms"
        return replace(candidate, rejected=reason)

    def _part(self, mesh: MeshSpec) -> Cluster:
        """The devices that a mesh uses: whole hosts as far as they go."""
        if mesh.size >= self._cluster.count:
            return self._cluster
        hosts = max(1, -(-mesh.size // self._cluster.per_host))
        return replace(self._cluster, count=mesh.size, hosts=hosts if mesh.size % hosts == 0 else 1)

    def _layouts(self, mesh: MeshSpec, rules: AxisRules) -> list[WeightLayout]:
        key = (mesh, id(rules))
        if key not in self._weights:
            self._weights[key] = weight_layouts(self._model, rules, mesh.shape)
        return self._weights[key]

    def _cost(self, mesh: MeshSpec, rules: AxisRules, phase: Phase, rows: int) -> MeshCost:
        key = (mesh, id(rules), phase.name, rows)
        if key not in self._costs:
            work = self._work(phase, rows)
            self._costs[key] = cost_of(mesh, rules, self._layouts(mesh, rules), work, self._part(mesh))
        return self._costs[key]

    def _work(self, phase: Phase, rows: int) -> Work | None:
        key = (phase.name, rows)
        if key not in self._works and not self.untraced:
            try:
                self._works[key] = self._read(phase, rows)
            except Exception as error:  # the model's own code may refuse sizes that only its caller knows
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                self.untraced = (
                    f"planned from the weights alone: {self._model.name} failed on "
                    f"{self._workload.describe(phase.inputs)}: {reason}"
                )
        return self._works.get(key)

    def _read(self, phase: Phase, rows: int) -> Work:
        def work(model: ModelFunction, inputs: Any) -> Work:
            called = model if phase.call is None else replace(model, call=phase.call)
            return read_work(called, *self._workload.batch(inputs, rows))

        if self._shallow is None:
            return work(self._model, phase.inputs)
        (two, inputs_two), (three, inputs_three) = self._shallow.two, self._shallow.three
        return deeper(
            work(two, inputs_two[phase.name]), work(three, inputs_three[phase.name]), self._shallow.num_layers
        )

    def _caches(self, phase: Phase, rows: int) -> list[Any]:
        work = self._work(phase, rows)
        counted: dict[Any, int] = {}
        for value in work.inputs if work is not None else ():
            if is_cache(value):
                counted[value] = counted.get(value, 0) + 1
        return list(counted.items())

    @property
    def available(self) -> int:
        return int(self._cluster.device.memory_bytes * (1 - RESERVE))

    def choose(self, candidates: list[Candidate], mesh: MeshSpec | None) -> Candidate:
        wanted = [c for c in candidates if mesh is None or c.mesh == mesh]
        fitting = [c for c in wanted if not c.rejected]
        if fitting:
            best = min(_score(c, self._workload) for c in fitting)
            close = [c for c in fitting if _score(c, self._workload) <= best * (1 + CLOSE)]
            order = {rules.name: number for number, rules in enumerate(self.layouts)}
            return min(close, key=lambda c: (c.mesh.shape.get(MODEL, 1), order.get(c.layout, len(order))))
        smallest = min((c for c in wanted if c.memory.weights), key=lambda c: c.memory.total, default=None)
        if smallest is None or not smallest.rejected.startswith("does not fit"):
            raise PlanError("no mesh works: " + "; ".join(f"{c.mesh}, {c.layout}: {c.rejected}" for c in wanted))
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
        return -(-smallest.memory.total * smallest.mesh.size // self.available)


def _effect(rules: AxisRules, mesh: MeshSpec) -> Any:
    """What rules come to on a mesh: axes of size 1 split nothing."""

    def effective(table: AxisRules) -> tuple[tuple[str, ...], ...]:
        return tuple(
            tuple(axis for axis in table.mesh_axes(logical) if mesh.shape.get(axis, 1) > 1)
            for logical in sorted({*LOGICAL_AXES, *table.rules})
        )

    return effective(rules), effective(rules.of_activations)


def _sum(estimates: Sequence[PhaseEstimate], switch: float) -> StepTime:
    return StepTime(
        compute=sum(e.times * e.time.compute for e in estimates),
        memory=sum(e.times * e.time.memory for e in estimates),
        collectives=sum(e.times * e.time.collectives for e in estimates) + switch,
        total_seconds=sum(e.times * e.time.total for e in estimates) + switch,
    )


def _score(candidate: Candidate, workload: Workload) -> float:
    """What the objective wants small."""
    if candidate.time is None:
        return 0.0
    if workload.objective == "latency":
        return candidate.time.total
    devices = candidate.mesh.size if workload.objective == "cost" else 1
    return candidate.time.total / max(1, candidate.rows) * devices


def _words(cost: MeshCost) -> str:
    def said(item: tuple[tuple[str, tuple[str, ...]], Traffic]) -> str:
        (kind, axes), traffic = item
        return f"{traffic.count} {kind} over {','.join(axes)}"

    return ", ".join(map(said, sorted(cost.collectives.items()))) or "none"


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


def _with_reason(candidate: Candidate, chosen: Candidate, workload: Workload, given: bool) -> Candidate:
    if candidate.rejected:
        return candidate
    mine, best = _score(candidate, workload), _score(chosen, workload)
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
