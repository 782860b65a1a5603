"""From a model with a list of layers to the same model with those layers stacked over the stages of a mesh.

Checkpoints stay as they are: each layer's weights are put on the devices of their stage by their own paths, and a
stacked weight is then made of the pieces that the devices already hold, without the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spmd_infer.functional import ModelFunction, Params
from spmd_infer.models.pipeline import MOST_PARTS
from spmd_infer.planning.layout import WeightLayout
from spmd_infer.planning.mesh_plan import MeshPlan
from spmd_infer.planning.resolve import MeshLike, PlanRequest, resolve_mesh
from spmd_infer.staging import PipelinedFunction, for_stages


def resolve_stages(mesh: MeshLike, request: PlanRequest) -> tuple[ModelFunction, MeshPlan, Mesh]:
    """``resolve_mesh``, and the model with its layers stacked where the mesh has stages.

    Raises:
        ModelError: the caller's mesh has stages and the model cannot be spread over them.
    """
    plan, built = resolve_mesh(mesh, request)
    pipeline, most_parts = plan.chosen.pipeline, MOST_PARTS
    if pipeline is not None and "infer" in plan.chosen.rules:  # otherwise planned for steps that keep a cache
        most_parts = pipeline.microbatches // pipeline.stages
    model, _ = for_stages(request.model, plan.rules, plan.mesh.shape, most_parts)
    return model, plan, built


def own_layouts(model: ModelFunction, weights: Sequence[WeightLayout], mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Where each weight goes by its path in the checkpoint; those of a layer go to the devices of its stage only.

    Args:
        model: the model, stacked or not.
        weights: the layout of its parameters.
        mesh: the devices.

    Returns:
        By path: shape, dtype and sharding. In a job of several processes, weights of which this one holds nothing are
        left out.
    """
    found: dict[str, jax.ShapeDtypeStruct] = {}
    for layout in weights:
        sources = model.sources.get(layout.path) if isinstance(model, PipelinedFunction) else None
        if sources is None:
            sharding = NamedSharding(mesh, layout.spec)
            found[layout.path] = jax.ShapeDtypeStruct(layout.shape, layout.dtype, sharding=sharding)
            continue
        for path, part in zip(sources, _stage_meshes(mesh, layout.spec), strict=True):
            sharding = NamedSharding(part, PartitionSpec(*layout.spec[1:]))
            if path is not None and sharding.addressable_devices:
                found[path] = jax.ShapeDtypeStruct(layout.shape[1:], layout.dtype, sharding=sharding)
    return found


def stacked(model: ModelFunction, weights: Sequence[WeightLayout], mesh: Mesh, own: Params) -> Params:
    """The model's parameters from arrays that lie as ``own_layouts`` says.

    Each device makes its row of a stacked weight from what it holds; ``own`` is emptied on the way, so that no more
    than one weight is held twice.
    """
    params: Params = {}
    for layout in weights:
        sources = model.sources.get(layout.path) if isinstance(model, PipelinedFunction) else None
        if sources is None:
            params[layout.path] = own.pop(layout.path)
            continue
        rows = [_lead(own.pop(path)) for path in sources if path is not None and path in own]
        pieces = [shard.data for row in rows for shard in row.addressable_shards]
        whole = NamedSharding(mesh, layout.spec)
        pieces += _empty_rows(layout, whole, [stage for stage, path in enumerate(sources) if path is None])
        params[layout.path] = jax.make_array_from_single_device_arrays(layout.shape, whole, pieces)
    return params


def unstacked(model: ModelFunction, params: Params) -> Params:
    """The weights by their paths in the checkpoint, each layer's on the devices of its stage; for saving and moving.

    Only for processes that hold a part of every stage.
    """
    if not isinstance(model, PipelinedFunction):
        return dict(params)
    own: Params = {}
    for path, array in params.items():
        sources = model.sources.get(path)
        if sources is None:
            own[path] = array
            continue
        mesh, spec = array.sharding.mesh, array.sharding.spec
        by_row: dict[int, list[jax.Array]] = {}
        for shard in array.addressable_shards:
            by_row.setdefault(shard.index[0].start or 0, []).append(shard.data)
        for row, part in enumerate(_stage_meshes(mesh, spec)):
            name = sources[row]
            if name is None:
                continue
            lead = NamedSharding(part, PartitionSpec(None, *spec[1:]))
            whole = jax.make_array_from_single_device_arrays((1, *array.shape[1:]), lead, by_row[row])
            own[name] = _unlead(whole)
    return own


def _empty_rows(layout: WeightLayout, whole: NamedSharding, stages: Sequence[int]) -> list[jax.Array]:
    """Zeros on the devices of stages that have no layer at this place."""
    shape = whole.shard_shape(layout.shape)
    return [
        jnp.zeros(shape, layout.dtype, device=device)
        for device, index in whole.addressable_devices_indices_map(layout.shape).items()
        if index is not None and index[0].start in stages
    ]


def _stage_meshes(mesh: Mesh, spec: PartitionSpec) -> list[Mesh]:
    """The devices of each stage, as meshes with the same axes."""
    position = mesh.axis_names.index(spec[0])
    return [
        Mesh(np.take(mesh.devices, [stage], axis=position), mesh.axis_names, axis_types=mesh.axis_types)
        for stage in range(mesh.devices.shape[position])
    ]


_lead: Callable[[jax.Array], jax.Array] = jax.jit(lambda array: array[None])
_unlead: Callable[[jax.Array], jax.Array] = jax.jit(lambda array: jnp.squeeze(array, 0))
