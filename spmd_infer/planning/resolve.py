"""From what a caller says of the mesh to a plan and the mesh itself."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh

from spmd_infer.axes import AxisRules
from spmd_infer.functional import ModelFunction
from spmd_infer.mesh import MeshSpec, auto_mesh, spec_of
from spmd_infer.planning.hardware import found_cluster
from spmd_infer.planning.mesh_plan import MeshPlan
from spmd_infer.planning.search import Workload, make_plan

MeshLike = str | MeshSpec | MeshPlan | Mesh
"""``"auto"``, ``"data=2,model=4"``, the same parsed, a plan, or a mesh."""


def resolve_mesh(
    mesh: MeshLike, model: ModelFunction, inputs: Any, workload: Workload | None, rules: AxisRules | None
) -> tuple[MeshPlan, Mesh]:
    """Plan for the devices that the caller means.

    Args:
        mesh: what the caller said.
        model: the model; abstract parameters are enough.
        inputs: a pytree of ``InputSpec``; None where they are unknown.
        workload: the traffic to plan for.
        rules: where logical axes go; default those of a given plan, else the default rules.

    Returns:
        The plan, and the mesh that it names.

    Raises:
        MeshError: the mesh cannot be parsed, or there are too few devices.
        PlanError: no mesh works; ``DoesNotFitError`` where memory is what is missing.
    """
    if isinstance(mesh, MeshPlan):
        rules = rules or mesh.rules
        mesh = mesh.mesh
    if isinstance(mesh, str) and mesh == "auto":
        plan = make_plan(model, found_cluster(jax.devices()), inputs=inputs, workload=workload, rules=rules)
        return plan, plan.build()
    if isinstance(mesh, Mesh):
        built = auto_mesh(mesh)
    else:
        built = (MeshSpec.parse(mesh) if isinstance(mesh, str) else mesh).build()
    cluster = found_cluster(list(built.devices.flat))
    plan = make_plan(model, cluster, inputs=inputs, workload=workload, rules=rules, mesh=spec_of(built))
    return plan, built


def platform_of(mesh: MeshLike) -> str:
    """The platform of the devices that a mesh will use."""
    device = mesh.devices.flat[0] if isinstance(mesh, Mesh) else jax.devices()[0]
    return str(device.platform)
