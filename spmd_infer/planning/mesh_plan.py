"""The outcome of planning: a mesh, how everything lies on it, what that costs, and what was rejected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from spmd_infer.axes import AxisRules
from spmd_infer.mesh import MeshSpec
from spmd_infer.planning.estimates import Candidate
from spmd_infer.planning.hardware import Cluster
from spmd_infer.planning.layout import WeightLayout


@dataclass(frozen=True)
class MeshPlan:
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

    @property
    def phase_rules(self) -> Mapping[str, AxisRules]:
        """The rules of each phase that has its own; other programs follow ``rules``."""
        return {name: rules for name, rules in self.chosen.rules.items() if rules is not self.rules}

    @property
    def mesh(self) -> MeshSpec:
        """The chosen mesh."""
        return self.chosen.mesh

    def build(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """The chosen mesh over ``devices`` (default: all there are)."""
        return self.mesh.build(devices)

    def explain(self) -> str:
        """The plan as a table with the rejected meshes and the reasons, and a picture of one weight on the mesh."""
        from spmd_infer.planning.explain import explain

        return explain(self)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, for ``--json``."""
        from spmd_infer.planning.explain import to_dict

        return to_dict(self)
