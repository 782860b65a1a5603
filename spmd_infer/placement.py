"""Where a model is: its weights on a mesh, under a plan. The one thing of an engine that ``reshard`` changes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from math import lcm
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from spmd_infer.axes import AxisRules
from spmd_infer.functional import ModelFunction, Params
from spmd_infer.pipeline import own_layouts, stacked, unstacked
from spmd_infer.planning.mesh_plan import MeshPlan
from spmd_infer.tensors import Axes
from spmd_infer.transfer import put


@dataclass
class Placement:
    """A model on a mesh.

    Attributes:
        model: the model, its layers stacked where the mesh has stages.
        plan: how it lies on the mesh.
        mesh: the mesh.
        params: its weights by path.
    """

    model: ModelFunction
    plan: MeshPlan
    mesh: Mesh
    params: Params

    def rules(self, phase: str | None = None) -> AxisRules:
        """Where logical axes go: the plan's rules, or those of a phase that has its own."""
        return self.plan.phase_rules.get(phase, self.plan.rules) if phase is not None else self.plan.rules

    @property
    def row_parts(self) -> int:
        """The number that batch sizes must be a multiple of, in every phase."""
        every = (self.plan.rules, *self.plan.phase_rules.values())
        return lcm(*(rules.row_parts(dict(self.mesh.shape)) for rules in every))

    def key(self, phase: str | None = None) -> Hashable:
        """Tells apart programs that are compiled for different placements, and finds those of an equal one again."""
        rules = self.rules(phase)
        tables = tuple(tuple(sorted(table.items(), key=str)) for table in (rules.rules, rules.activations, rules.units))
        return type(self.model).__name__, self.mesh, tables, self.plan.own_splits

    def sharding(self, axes: Axes, shape: tuple[int, ...], phase: str | None = None) -> NamedSharding:
        """Where an activation, input or cache of these logical axes lies."""
        resolved = self.rules(phase).of_activations.resolve(axes, shape, dict(self.mesh.shape))
        return NamedSharding(self.mesh, resolved.spec)

    def move(self, model: ModelFunction, plan: MeshPlan, mesh: Mesh) -> None:
        """Lay the weights out by another plan, device to device, one after the other.

        Each weight's old pieces are let go of as soon as its new ones exist, so the devices hold only a few weights
        twice (of a pipeline, a stack of layers). They are not donated: the caller may hold them too. ``params`` stays
        the same dict. Where a weight cannot be moved, for want of memory say, those moved before go back.
        """
        own = unstacked(self.model, self.params)
        self.params.clear()
        before = {path: value.sharding for path, value in own.items()}
        targets = own_layouts(model, plan.weights, mesh)
        moved: dict[str, Any] = {}
        try:
            for path in list(own):
                moved[path] = jax.device_put(own[path], targets[path].sharding)
                jax.block_until_ready(moved[path])
                del own[path]
            params = stacked(model, plan.weights, mesh, moved)
        except BaseException:
            own |= {path: jax.device_put(moved[path], before[path]) for path in list(moved) if path not in own}
            self.params.update(stacked(self.model, self.plan.weights, self.mesh, own))
            raise
        self.params.update(params)
        self.model, self.plan, self.mesh = model, plan, mesh


def placed(model: ModelFunction, plan: MeshPlan, mesh: Mesh, values: Mapping[str, Any]) -> Placement:
    """Put a model's own parameters (by their paths in the unstacked model) on a mesh."""
    targets = own_layouts(model, plan.weights, mesh)
    own = {path: put(values[path], target.sharding) for path, target in targets.items()}
    return Placement(model.abstract(), plan, mesh, dict(stacked(model, plan.weights, mesh, own)))
