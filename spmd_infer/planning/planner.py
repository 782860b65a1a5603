"""Estimating every mesh and layout for a model, and choosing among them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from spmd_infer.axes import LOGICAL_AXES, MODEL, AxisRules
from spmd_infer.errors import AxisError, DoesNotFitError, PlanError
from spmd_infer.functional import ModelFunction
from spmd_infer.mesh import MeshSpec
from spmd_infer.models.phases import Phase
from spmd_infer.planning.cost import MeshCost, Traffic, cost_of, is_cache, reshard_time
from spmd_infer.planning.estimates import RESERVE, Candidate, Memory, PhaseEstimate, StepTime, gigabytes
from spmd_infer.planning.hardware import Cluster
from spmd_infer.planning.layout import WeightLayout, weight_layouts
from spmd_infer.planning.tensor_search import TensorSearch, bare, search_tensors
from spmd_infer.planning.tracing import read_work
from spmd_infer.planning.work import Work, deeper
from spmd_infer.planning.workload import Workload

CLOSE = 0.02
"""Estimates that differ by less than this part count as equal; the simplest layout that splits least then wins."""

MOST_ROWS = 4096

Rules = tuple[AxisRules, ...]
"""The rules of each phase."""

_Laid = tuple[MeshSpec, tuple[int, ...], int]


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


class Planner:
    """Estimates meshes for one model, devices and traffic; traces of the model are kept between them."""

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
        self._weights: dict[_Laid, tuple[list[WeightLayout], TensorSearch | None]] = {}
        self._costs: dict[tuple[_Laid, int, str, int], MeshCost] = {}
        self._annotated = model.params.keys() <= model.axes.keys()
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
        """What a mesh comes to with these rules, one for each phase; rejected where it cannot be."""
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
            cost = cost_of(mesh, assigned[0], self.weights(mesh, assigned, padded)[0], None, cluster)
            return self._judged(Candidate(mesh, cost.memory, None, "", "", assigned[0].name))
        costs = [
            self._cost(mesh, assigned, rules, phase, padded)
            for phase, rules in zip(self._phases, assigned, strict=True)
        ]
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

    def weights(self, mesh: MeshSpec, assigned: Rules, rows: int) -> tuple[list[WeightLayout], TensorSearch | None]:
        """Where each weight goes, and what a search over those that name no axes came to."""
        key = self._laid(mesh, assigned, rows)
        if key not in self._weights:
            layouts = weight_layouts(self._model, assigned[0], mesh.shape)
            works = [self._work(phase, rows) for phase in self._phases] if bare(layouts) and mesh.size > 1 else []
            known = [(work, phase.times) for work, phase in zip(works, self._phases, strict=False) if work is not None]
            if known and len(known) == len(self._phases):
                cluster = self._part(mesh)

                def estimate(tried: Sequence[WeightLayout], works: Sequence[Work]) -> list[MeshCost]:
                    pairs = zip(assigned, works, strict=True)
                    return [cost_of(mesh, rules, tried, work, cluster) for rules, work in pairs]

                self._weights[key] = search_tensors(layouts, known, estimate, mesh.shape, self.available)
            else:
                self._weights[key] = layouts, None
        return self._weights[key]

    def _laid(self, mesh: MeshSpec, assigned: Rules, rows: int) -> _Laid:
        """What the layout of the weights depends on: for models that name their axes, not the traffic."""
        if self._annotated:
            return mesh, (id(assigned[0]),), 0
        return mesh, tuple(map(id, assigned)), rows

    def _cost(self, mesh: MeshSpec, assigned: Rules, rules: AxisRules, phase: Phase, rows: int) -> MeshCost:
        key = (self._laid(mesh, assigned, rows), id(rules), phase.name, rows)
        if key not in self._costs:
            work, (layouts, _) = self._work(phase, rows), self.weights(mesh, assigned, rows)
            self._costs[key] = cost_of(mesh, rules, layouts, work, self._part(mesh))
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
        """Bytes of a device that plans may use."""
        return int(self._cluster.device.memory_bytes * (1 - RESERVE))

    def choose(self, candidates: list[Candidate], mesh: MeshSpec | None) -> Candidate:
        """The best candidate (of the given mesh, if one is given); the simplest of those that are as good.

        Raises:
            DoesNotFitError: none has enough memory.
            PlanError: none works for another reason.
        """
        wanted = [c for c in candidates if mesh is None or c.mesh == mesh]
        fitting = [c for c in wanted if not c.rejected]
        if fitting:
            best = min(score(c, self._workload) for c in fitting)
            close = [c for c in fitting if score(c, self._workload) <= best * (1 + CLOSE)]
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


def score(candidate: Candidate, workload: Workload) -> float:
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


def _parts(memory: Memory) -> str:
    return (
        f"weights {gigabytes(memory.weights)}, cache {gigabytes(memory.cache)}, "
        f"activations {gigabytes(memory.activations)}, inputs and results {gigabytes(memory.inputs)}"
    )
