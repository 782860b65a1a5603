"""The plan that a caller gets: the outcome of planning, with ways to read it and to build its mesh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from spmd_infer.planning.as_data import to_dict
from spmd_infer.planning.explain import explain
from spmd_infer.planning.outcome import PlanOutcome


@dataclass(frozen=True)
class MeshPlan(PlanOutcome):
    """How a model is laid over devices, and why; attributes as of ``PlanOutcome``."""

    def build(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """The chosen mesh over ``devices`` (default: all there are)."""
        return self.mesh.build(devices)

    def explain(self) -> str:
        """The plan as a table with the rejected meshes and the reasons, and a picture of one weight on the mesh."""
        return explain(self)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, for ``--json``."""
        return to_dict(self)
