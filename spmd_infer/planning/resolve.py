"""From what a caller says of the mesh to a plan and the mesh itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from spmd_infer.axes import AxisRules
from spmd_infer.functional import ModelFunction
from spmd_infer.mesh import MeshSpec, auto_mesh, spec_of
from spmd_infer.models.phases import Phase
from spmd_infer.planning.hardware import found_cluster
from spmd_infer.planning.mesh_plan import MeshPlan
from spmd_infer.planning.planner import Shallow
from spmd_infer.planning.search import make_plan
from spmd_infer.planning.workload import Workload

MeshLike = str | MeshSpec | MeshPlan | Mesh
"""``"auto"``, ``"data=2,model=4"``, the same parsed, a plan, or a mesh."""


def resolve_mesh(
    mesh: MeshLike,
    model: ModelFunction,
    inputs: Any,
    workload: Workload | None,
    rules: AxisRules | None,
    *,
    phases: Sequence[Phase] = (),
    units: Mapping[str, int] | None = None,
    shallow: Shallow | None = None,
) -> tuple[MeshPlan, Mesh]:
    """Plan for the devices that the caller means.

    Args:
        mesh: what the caller said.
        model: the model; abstract parameters are enough.
        inputs: a pytree of ``InputSpec``; None where they are unknown.
        workload: the traffic to plan for.
        rules: where logical axes go; default those of a given plan, else what ``make_plan`` chooses among.
        phases: the kinds of steps of a model that takes several.
        units: indivisible units of the model's axes.
        shallow: the same model with few layers, to trace instead of one with many.

    Returns:
        The plan, and the mesh that it names.

    Raises:
        MeshError: the mesh cannot be parsed, or there are too few devices.
        PlanError: no mesh works; ``DoesNotFitError`` where memory is what is missing.
    """
    if isinstance(mesh, MeshPlan):
        if rules is None and _is_of(mesh, model):
            return mesh, mesh.build()
        rules = rules or mesh.rules
        mesh = mesh.mesh
    options: dict[str, Any] = {"inputs": inputs, "workload": workload, "rules": rules}
    options |= {"phases": phases, "units": dict(units or {}), "shallow": shallow}
    if isinstance(mesh, str) and mesh == "auto":
        plan = make_plan(model, found_cluster(jax.devices()), **options)
        return plan, plan.build()
    if isinstance(mesh, Mesh):
        built = auto_mesh(mesh)
    else:
        built = (MeshSpec.parse(mesh) if isinstance(mesh, str) else mesh).build()
    cluster = found_cluster(list(built.devices.flat))
    return make_plan(model, cluster, mesh=spec_of(built), **options), built


def _is_of(plan: MeshPlan, model: ModelFunction) -> bool:
    """Whether a plan lays out just the weights of this model."""
    shapes = {path: tuple(value.shape) for path, value in model.params.items()}
    return shapes == {layout.path: layout.shape for layout in plan.weights}


def platform_of(mesh: MeshLike) -> str:
    """The platform of the devices that a mesh will use."""
    device = mesh.devices.flat[0] if isinstance(mesh, Mesh) else jax.devices()[0]
    return str(device.platform)
