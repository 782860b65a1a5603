"""The outcome of planning as data: a mesh, how everything lies on it, what that costs, and what was rejected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from spmd_infer.axes import AxisRules
from spmd_infer.mesh import MeshSpec
from spmd_infer.planning.estimates import RESERVE, Candidate
from spmd_infer.planning.hardware import Cluster
from spmd_infer.planning.layout import WeightLayout
from spmd_infer.planning.tensor_search import TensorSearch


@dataclass(frozen=True)
class PlanOutcome:
    """How a model is laid over devices, and why.

    Attributes:
        model: the model's name.
        cluster: the devices that were planned for.
        chosen: the mesh and its estimates.
        candidates: every mesh that was looked at, best first.
        rules: where each logical axis goes.
        weights: where each weight goes.
        workload: the batch that was planned for, in words.
        given: whether the caller chose the mesh.
        notes: what the reader should know: whole weights, assumptions.
        tensors: what the search over weights without axes came to; None where there are none, or no batch is known.
    """

    model: str
    cluster: Cluster
    chosen: Candidate
    candidates: tuple[Candidate, ...]
    rules: AxisRules
    weights: tuple[WeightLayout, ...]
    workload: str
    given: bool
    notes: tuple[str, ...] = ()
    tensors: TensorSearch | None = None

    @property
    def phase_rules(self) -> Mapping[str, AxisRules]:
        """The rules of each phase that has its own; other programs follow ``rules``."""
        return {name: rules for name, rules in self.chosen.rules.items() if rules is not self.rules}

    @property
    def mesh(self) -> MeshSpec:
        """The chosen mesh."""
        return self.chosen.mesh

    @property
    def available(self) -> int:
        """Bytes of a device that plans may use."""
        return int(self.cluster.device.memory_bytes * (1 - RESERVE))

    @cached_property
    def own_splits(self) -> str:
        """How weights without axes are split, as text: plans of one mesh with the same rules may differ in it."""
        return "; ".join(f"{layout.path} {layout.spec}" for layout in self.weights if layout.axes is None)
