"""Estimating every mesh and layout for a model, and choosing among them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from spmd_infer.axes import LOGICAL_AXES, AxisRules
from spmd_infer.errors import AxisError, ModelError
from spmd_infer.functional import ModelFunction
from spmd_infer.mesh import MeshSpec
from spmd_infer.models.phases import Phase
from spmd_infer.planning.cost import MeshCost, Traffic, cost_of, reshard_time
from spmd_infer.planning.estimates import RESERVE, Candidate, Memory, PhaseEstimate, StepTime, gigabytes
from spmd_infer.planning.hardware import Cluster
from spmd_infer.planning.layout import WeightLayout, weight_layouts
from spmd_infer.planning.stages import fastest_cut, stage_parts
from spmd_infer.planning.tensor_search import TensorSearch, bare, search_tensors
from spmd_infer.planning.traces import Shallow, Traces
from spmd_infer.planning.work import Work
from spmd_infer.planning.workload import Workload
from spmd_infer.staging import PipelinedFunction, base_function, for_stages

MOST_ROWS = 4096

Rules = tuple[AxisRules, ...]
"""The rules of each phase."""

_Laid = tuple[MeshSpec, tuple[int, ...], int]


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
        self._model, self._cluster, self._phases, self._workload = model, cluster, phases, workload
        self._traces = Traces(base_function(model), workload, shallow)
        self._staged: dict[int, PipelinedFunction] = {}
        self._weights: dict[_Laid, tuple[list[WeightLayout], TensorSearch | None]] = {}
        self._costs: dict[tuple[_Laid, int, str, int], MeshCost] = {}
        self._annotated = model.params.keys() <= model.axes.keys()

    def assignments(self, mesh: MeshSpec) -> Iterator[Rules]:
        """Layouts for the phases: one for all, or several that keep the weights where they are.

        Layouts that come to the same on this mesh are looked at once.
        """
        different: dict[Any, AxisRules] = {}
        # The cost of a pipeline does not know of weights that must be brought together in every tick.
        layouts = self.layouts[:1] if stage_parts(self.layouts[0], mesh.shape) > 1 else self.layouts
        for rules in layouts:
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
        except (AxisError, ModelError) as error:
            return Candidate(mesh, Memory(0, 0, 0, 0), None, "", str(error), " -> ".join(names))
        return found

    def _estimate(self, mesh: MeshSpec, assigned: Rules, rows: int) -> Candidate:
        if stage_parts(assigned[0], mesh.shape) > 1:
            return self._estimate_stages(mesh, assigned[0], rows)
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
            PhaseEstimate(phase.name, rules.name, phase.times, cost.time, _words(cost.collectives))
            for phase, rules, cost in zip(self._phases, assigned, costs, strict=True)
            if cost.time is not None
        )
        switch = sum(
            reshard_time(self._traces.caches(phase, padded), before, after, mesh, cluster)
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

    def _estimate_stages(self, mesh: MeshSpec, asked: AxisRules, rows: int) -> Candidate:
        model, rules = self.staged(mesh, asked)
        parts = rules.row_parts(mesh.shape)
        padded = -(-rows // parts) * parts
        weights, cluster = weight_layouts(model, rules, mesh.shape), self._part(mesh)
        split = rules.splits_positions(mesh.shape)
        works = [self._traces.staged(phase, padded, split_positions=split) for phase in self._phases] or [None]
        costs = [fastest_cut(mesh, rules, model, weights, work, padded, cluster) for work in works]
        memory = Memory(
            weights=costs[0].memory.weights,
            cache=max(cost.memory.cache for cost in costs),
            activations=max(cost.memory.activations for cost in costs),
            inputs=max(cost.memory.inputs for cost in costs),
        )
        estimates = tuple(
            PhaseEstimate(phase.name, rules.name, phase.times, cost.time, _words(cost.collectives))
            for phase, cost in zip(self._phases, costs, strict=False)
            if cost.time is not None
        )
        grows = memory.total - memory.weights
        room = self.available - memory.weights
        return self._judged(
            Candidate(
                mesh,
                memory,
                _sum(estimates, 0.0) if estimates and len(estimates) == len(self._phases) else None,
                estimates[-1].collectives if estimates else "",
                "",
                rules.name,
                estimates,
                {phase.name: rules for phase in self._phases},
                most_rows=max(0, int(room / grows * padded)) if grows else 0,
                rows=padded,
                pipeline=costs[-1].pipeline,
            )
        )

    def staged(self, mesh: MeshSpec, asked: AxisRules) -> tuple[PipelinedFunction, AxisRules]:
        """The model and the rules for a mesh with stages.

        Raises:
            ModelError: the model cannot be spread over so many stages.
        """
        stages = stage_parts(asked, mesh.shape)
        if stages not in self._staged:
            model, _ = for_stages(self._model, asked, mesh.shape)
            assert isinstance(model, PipelinedFunction)  # the mesh has stages
            self._staged[stages] = model
        return self._staged[stages], for_stages(self._staged[stages], asked, mesh.shape)[1]

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
        if stage_parts(assigned[0], mesh.shape) > 1:
            model, rules = self.staged(mesh, assigned[0])
            return weight_layouts(model, rules, mesh.shape), None
        key = self._laid(mesh, assigned, rows)
        if key not in self._weights:
            layouts = weight_layouts(self._model, assigned[0], mesh.shape)
            phases = self._phases if bare(layouts) and mesh.size > 1 else ()
            works = [self._traces.work(phase, rows) for phase in phases]
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
            work = self._traces.work(phase, rows, split_positions=rules.splits_positions(mesh.shape))
            layouts, _ = self.weights(mesh, assigned, rows)
            cost, cluster = cost_of(mesh, rules, layouts, work, self._part(mesh)), self._part(mesh)
            self._costs[key] = self._traces.with_experts(cost, phase, rows, mesh, rules, cluster)
        return self._costs[key]

    @property
    def num_experts(self) -> tuple[int, ...]:
        """How many experts each block of the model has."""
        return self._traces.num_experts

    @property
    def untraced(self) -> str:
        """Why the model could not be traced; empty where it could."""
        return self._traces.failed

    @property
    def available(self) -> int:
        """Bytes of a device that plans may use."""
        return int(self._cluster.device.memory_bytes * (1 - RESERVE))


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
        overlaps=all(e.time.overlaps for e in estimates),
    )


def _words(collectives: Mapping[tuple[str, tuple[str, ...]], Traffic]) -> str:
    def said(item: tuple[tuple[str, tuple[str, ...]], Traffic]) -> str:
        (kind, axes), traffic = item
        return f"{traffic.count} {kind} over {','.join(axes)}"

    return ", ".join(map(said, sorted(collectives.items()))) or "none"
