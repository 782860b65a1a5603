"""From what a caller says of the mesh to a plan and the mesh itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
from jax.sharding import Mesh

from spmd_infer.axes import AxisRules
from spmd_infer.errors import DoesNotFitError, ModelError
from spmd_infer.functional import ModelFunction
from spmd_infer.mesh import MeshSpec, auto_mesh, spec_of
from spmd_infer.models.phases import Phase
from spmd_infer.planning.estimates import RESERVE
from spmd_infer.planning.hardware import Cluster, found_cluster
from spmd_infer.planning.mesh_plan import MeshPlan
from spmd_infer.planning.search import make_plan
from spmd_infer.planning.traces import Shallow
from spmd_infer.planning.workload import Workload
from spmd_infer.staging import for_stages

MeshLike = str | MeshSpec | MeshPlan | Mesh
"""``"auto"``, ``"data=2,model=4"``, the same parsed, a plan, or a mesh. With ``LOCAL`` before a text it is a mesh of
this process's own devices, and each process of a job has an engine to itself."""

LOCAL = "local:"


@dataclass(frozen=True)
class PlanRequest:
    """What a plan is asked for, whatever the mesh.

    Attributes:
        model: the model; abstract parameters are enough.
        inputs: a pytree of ``InputSpec``; None where they are unknown.
        workload: the traffic to plan for.
        rules: where logical axes go; default those of a given plan, else what ``make_plan`` chooses among.
        phases: the kinds of steps of a model that takes several.
        units: indivisible units of the model's axes.
        shallow: the same model with few layers, to trace instead of one with many.
    """

    model: ModelFunction
    inputs: Any = None
    workload: Workload | None = None
    rules: AxisRules | None = None
    phases: Sequence[Phase] = ()
    units: Mapping[str, int] = field(default_factory=dict)
    shallow: Shallow | None = None

    def plan(self, cluster: Cluster, mesh: MeshSpec | None = None) -> MeshPlan:
        """``make_plan`` for these devices."""
        return make_plan(
            self.model,
            cluster,
            inputs=self.inputs,
            phases=self.phases,
            workload=self.workload,
            rules=self.rules,
            mesh=mesh,
            units=dict(self.units),
            shallow=self.shallow,
        )


def resolve_mesh(mesh: MeshLike, request: PlanRequest) -> tuple[MeshPlan, Mesh]:
    """Plan for the devices that the caller means.

    Args:
        mesh: what the caller said.
        request: what to plan.

    Returns:
        The plan, and the mesh that it names.

    Raises:
        MeshError: the mesh cannot be parsed, or there are too few devices.
        PlanError: no mesh works; ``DoesNotFitError`` where memory is what is missing.
    """
    if isinstance(mesh, MeshPlan):
        if request.rules is None and _is_of(mesh, request.model):
            built = mesh.build()
            return _on_these(mesh, found_cluster(list(built.devices.flat))), built
        request = replace(request, rules=request.rules or mesh.rules)
        mesh = mesh.mesh
    devices = jax.devices()
    if isinstance(mesh, str) and mesh.startswith(LOCAL):
        mesh, devices = mesh.removeprefix(LOCAL), jax.local_devices()
    if isinstance(mesh, str) and mesh == "auto":
        plan = request.plan(found_cluster(devices))
        return plan, plan.build(devices)
    if isinstance(mesh, Mesh):
        built = auto_mesh(mesh)
    else:
        built = (MeshSpec.parse(mesh) if isinstance(mesh, str) else mesh).build(devices)
    return request.plan(found_cluster(list(built.devices.flat)), spec_of(built)), built


def _on_these(plan: MeshPlan, found: Cluster) -> MeshPlan:
    """A plan that was made for other devices, once it is sure that it fits on these.

    Raises:
        DoesNotFitError: it needs more memory than they have.
    """
    device, needed = found.device, plan.chosen.memory.total
    if plan.cluster.device == device:
        return plan
    available = int(device.memory_bytes * (1 - RESERVE))
    if needed > available:
        raise DoesNotFitError(
            f"the plan was made for {plan.cluster} with {plan.cluster.device.memory_bytes:,} bytes each, and these are "
            f"{found}: mesh {plan.mesh} needs {needed:,} bytes a device, {available:,} are available ({RESERVE:.0%} of "
            f"{device.memory_bytes:,} is kept free); plan for these devices",
            needed_bytes=needed,
            available_bytes=available,
        )
    note = f"made for {plan.cluster}, running on {found}: its times are those of the former"
    return plan if note in plan.notes else replace(plan, notes=(*plan.notes, note))


def _is_of(plan: MeshPlan, model: ModelFunction) -> bool:
    """Whether a plan lays out just the weights of this model, its layers stacked where the plan has stages."""
    try:
        model, _ = for_stages(model, plan.rules, plan.mesh.shape)
    except ModelError:
        return False
    shapes = {path: tuple(value.shape) for path, value in model.params.items()}
    return shapes == {layout.path: layout.shape for layout in plan.weights}


def platform_of(mesh: MeshLike) -> str:
    """The platform of the devices that a mesh will use."""
    device = mesh.devices.flat[0] if isinstance(mesh, Mesh) else jax.devices()[0]
    return str(device.platform)
