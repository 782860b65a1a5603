"""A model's traces by kind of step and number of rows, each made once."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from spmd_infer.axes import AxisRules
from spmd_infer.functional import ModelFunction
from spmd_infer.mesh import MeshSpec
from spmd_infer.models.attention import without_blocks
from spmd_infer.models.phases import Phase
from spmd_infer.planning.cost import MeshCost, is_cache
from spmd_infer.planning.experts import SeenExperts, with_experts, without_experts
from spmd_infer.planning.hardware import Cluster
from spmd_infer.planning.parallel_costs import ExpertWork
from spmd_infer.planning.tracing import read_work
from spmd_infer.planning.values import Value
from spmd_infer.planning.work import StagedWork, Work, deeper
from spmd_infer.planning.workload import Workload
from spmd_infer.staging import without_layers


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


class Traces:
    """The work of one model for one workload.

    Attributes:
        failed: why the model could not be traced; empty where it could.
    """

    def __init__(self, model: ModelFunction, workload: Workload, shallow: Shallow | None) -> None:
        self._model, self._workload, self._shallow = model, workload, shallow
        self._called, self._experts = (model, SeenExperts([])) if shallow is not None else without_experts(model)
        self._works: dict[tuple[str, int, bool], Work | None] = {}
        self._blocks: dict[tuple[str, int], list[ExpertWork]] = {}
        self._outside: dict[tuple[str, int], tuple[Work, int] | None] = {}
        self.failed = ""

    def work(self, phase: Phase, rows: int, *, split_positions: bool = False) -> Work | None:
        """What one step computes; None where the model cannot be traced.

        Args:
            phase: the kind of step.
            rows: rows of its batch.
            split_positions: whether positions lie on several devices, where models attend in another way.
        """
        key = (phase.name, rows, split_positions)
        if key not in self._works and not self.failed:
            try:
                with without_blocks() if split_positions else nullcontext():
                    self._works[key] = self._read(phase, rows)
            except Exception as error:  # the model's own code may refuse sizes that only its caller knows
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                self.failed = (
                    f"planned from the weights alone: {self._model.name} failed on "
                    f"{self._workload.describe(phase.inputs)}: {reason}"
                )
        return self._works.get(key)

    def staged(self, phase: Phase, rows: int, *, split_positions: bool = False) -> StagedWork | None:
        """The same in parts, for layers spread over stages; None where the model cannot be traced without any layer."""
        whole = self.work(phase, rows, split_positions=split_positions)
        outside = self._without_layers(phase, rows) if whole is not None else None
        return StagedWork(whole, *outside) if whole is not None and outside is not None else None

    def _without_layers(self, phase: Phase, rows: int) -> tuple[Work, int] | None:
        """What a step computes outside the layers, and the bytes of one row of what passes through them."""
        key = (phase.name, rows)
        if key not in self._outside:
            model, seen = without_layers(self._model)
            called = model if phase.call is None else replace(model, call=phase.call)
            try:
                work = read_work(called, *self._workload.batch(phase.inputs, rows))
                self._outside[key] = work, seen.row_bytes
            except Exception:  # a model's own code may need a layer at least
                self._outside[key] = None
        return self._outside[key]

    @property
    def num_experts(self) -> tuple[int, ...]:
        """How many experts each block of the model has."""
        return tuple(sizes.num_experts for sizes in self._experts.sizes)

    def with_experts(
        self, cost: MeshCost, phase: Phase, rows: int, mesh: MeshSpec, rules: AxisRules, cluster: Cluster
    ) -> MeshCost:
        """A step's cost with that of its blocks of experts."""
        blocks = self._blocks.get((phase.name, rows), [])
        return with_experts(cost, blocks, self._experts.dtype, mesh, rules, cluster)

    def caches(self, phase: Phase, rows: int) -> list[tuple[Value, int]]:
        """Each kind of cached keys or values, and how many there are."""
        work = self.work(phase, rows)
        counted: dict[Value, int] = {}
        for value in work.inputs if work is not None else ():
            if is_cache(value):
                counted[value] = counted.get(value, 0) + 1
        return list(counted.items())

    def _read(self, phase: Phase, rows: int) -> Work:
        def work(model: ModelFunction, inputs: Any) -> Work:
            called = model if phase.call is None else replace(model, call=phase.call)
            return read_work(called, *self._workload.batch(inputs, rows))

        if self._shallow is None:
            self._experts.work = []
            found = work(self._called, phase.inputs)
            self._blocks[phase.name, rows] = self._experts.work
            return found
        (two, inputs_two), (three, inputs_three) = self._shallow.two, self._shallow.three
        return deeper(
            work(two, inputs_two[phase.name]), work(three, inputs_three[phase.name]), self._shallow.num_layers
        )
