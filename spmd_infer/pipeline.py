"""From a model with a list of layers to the same model with those layers stacked over the stages of a mesh.

Checkpoints stay as they are: each layer's weights are put on the devices of their stage by their own paths, and a
stacked weight is then made of the pieces that the devices already hold, without the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spmd_infer.axes import BATCH, LAYERS, AxisRules
from spmd_infer.errors import ModelError
from spmd_infer.functional import ModelFunction, Params, model_function
from spmd_infer.mesh import MeshSpec, spec_of
from spmd_infer.models.phases import Phase
from spmd_infer.models.pipeline import Stages, bubble_share, microbatch_count
from spmd_infer.planning.layout import WeightLayout
from spmd_infer.planning.mesh_plan import MeshPlan
from spmd_infer.planning.planner import Shallow
from spmd_infer.planning.resolve import MeshLike, resolve_mesh
from spmd_infer.planning.workload import Workload
from spmd_infer.tensors import Axes


@dataclass(frozen=True, eq=False)
class PipelinedFunction(ModelFunction):
    """A model whose layers are stacked over stages; ``params`` and ``axes`` are of the stacked weights.

    Attributes:
        base: the model as it was, with its layers one by one.
        stages: how many stages there are.
        num_layers: how many layers.
        sources: for each stacked weight, the paths in ``base`` that it is made of, by stage.
        microbatches: how many micro-batches a batch is cut into; None chooses by the rows.
    """

    base: ModelFunction
    stages: int
    num_layers: int
    sources: Mapping[str, tuple[str, ...]]
    microbatches: int | None

    def abstract(self) -> PipelinedFunction:
        """The same model holding no arrays, only their shapes and dtypes."""
        return replace(self, base=self.base.abstract())

    def bubble(self, rows: int, row_parts: int = 1) -> float:
        """The part of the ticks in which a stage idles, for a batch of ``rows`` (see ``microbatch_count``)."""
        return bubble_share(self.stages, self.microbatches or microbatch_count(rows, self.stages, row_parts))


def pipelined(model: ModelFunction, stages: int, *, microbatches: int | None = None) -> PipelinedFunction:
    """Stack a model's layers over stages.

    Args:
        model: an NNX model whose class names its list of layers in ``pipelined_layers`` and passes through them with
            ``spmd_infer.models.pipeline.run_layers``; abstract parameters are enough.
        stages: how many stages; they must divide the layers.
        microbatches: how many micro-batches a batch is cut into; the default follows from the rows.

    Raises:
        ModelError: the model names no layers, they differ, or the stages do not divide them.
    """
    abstract = {path: jax.ShapeDtypeStruct(p.shape, p.dtype) for path, p in model.params.items()}
    module = model.rebuild(abstract)
    name = getattr(module, "pipelined_layers", None)
    if not isinstance(module, nnx.Module) or not isinstance(name, str):
        raise ModelError(
            f"{model.name} cannot be spread over {stages} stages: it does not say which of its layers follow one "
            "another (an NNX class does with pipelined_layers = 'layers'); use the other mesh axes"
        )
    *parents, attribute = name.split(".")
    owner: Any = module
    for parent in parents:
        owner = getattr(owner, parent)
    layers: Sequence[nnx.Module] = list(getattr(owner, attribute))
    if stages < 1 or len(layers) % stages:
        fitting = [n for n in range(2, len(layers) + 1) if len(layers) % n == 0]
        raise ModelError(
            f"{len(layers)} layers of {model.name} cannot be shared out evenly over {stages} stages; "
            f"stages that divide them: {', '.join(map(str, fitting))}"
        )
    depth = len(layers) // stages
    sources = _sources(model, name, len(layers), depth)
    for layer in layers[:depth]:
        for _, variable in nnx.to_flat_state(nnx.state(layer)):
            axes = variable.get_metadata().get("axes") or (None,) * len(variable.get_value().shape)
            variable.set_metadata(axes=(LAYERS, *axes))
    setattr(owner, attribute, Stages(layers[:depth], stages, microbatches))
    stacked = model_function(module)
    params: Params = {}
    for path in stacked.params:
        own = abstract[sources[path][0]] if path in sources else model.params[path]
        params[path] = jax.ShapeDtypeStruct((stages, *own.shape), own.dtype) if path in sources else own
    return PipelinedFunction(
        stacked.kind,
        model.name,
        params,
        stacked.axes,
        stacked.rebuild,
        model.call,
        base=model,
        stages=stages,
        num_layers=len(layers),
        sources=sources,
        microbatches=microbatches,
    )


def for_stages(
    model: ModelFunction, rules: AxisRules, mesh_shape: Mapping[str, int]
) -> tuple[ModelFunction, AxisRules]:
    """The model and the rules for a mesh: stacked if the mesh has stages, else as they are.

    With stages the rows of a batch are split over them too.

    Raises:
        ModelError: the mesh has stages and the model cannot be spread over them.
    """
    axes = rules.mesh_axes(LAYERS)
    stages = prod(mesh_shape.get(axis, 1) for axis in axes)
    if stages == 1:
        return model, rules
    if not isinstance(model, PipelinedFunction):
        model = pipelined(model, stages)
    rows = tuple(axis for axis in rules.of_activations.mesh_axes(BATCH) if axis not in axes)
    activations = {**rules.activations, BATCH: (*axes, *rows)}
    name = rules.name if rules.name.endswith("pipeline") else f"{rules.name}, pipeline"
    return model, replace(rules, activations=activations, name=name)


def pipeline_notes(model: ModelFunction, rules: AxisRules, mesh_shape: Mapping[str, int], rows: int) -> tuple[str, ...]:
    """What a plan says of a pipeline; nothing for other models."""
    if not isinstance(model, PipelinedFunction):
        return ()
    parts = rules.row_parts(mesh_shape)
    padded = -(-rows // parts) * parts
    count = model.microbatches or microbatch_count(padded, model.stages, parts // model.stages)
    idle = (
        f"pipeline of {model.stages} stages, {model.num_layers // model.stages} layers each: {padded} rows pass in "
        f"{count} micro-batches, and a stage idles {bubble_share(model.stages, count):.0%} of the time "
        f"({model.stages - 1} of {count + model.stages - 1} ticks)"
    )
    return idle, f"weights outside the layers are on all {model.stages} stages"


def resolve_stages(
    mesh: MeshLike,
    model: ModelFunction,
    inputs: Any,
    workload: Workload | None,
    rules: AxisRules | None,
    *,
    phases: Sequence[Phase] = (),
    units: Mapping[str, int] | None = None,
    shallow: Shallow | None = None,
) -> tuple[ModelFunction, MeshPlan, Mesh]:
    """``resolve_mesh``, with the model's layers stacked where the caller's mesh has stages.

    A pipeline is planned for whole forward passes: its steps of generation are not.

    Raises:
        ModelError: the mesh has stages and the model cannot be spread over them.
    """
    shape = _shape(mesh)
    given = rules or (mesh.rules if isinstance(mesh, MeshPlan) else None)
    model, staged = for_stages(model, (given or AxisRules()).with_units(units or {}), shape)
    if isinstance(model, PipelinedFunction):
        plan, built = resolve_mesh(mesh, model, inputs, workload, staged)
        notes = pipeline_notes(model, staged, shape, (workload or Workload()).rows)
        return model, replace(plan, notes=(*plan.notes, *notes)), built
    return model, *resolve_mesh(mesh, model, inputs, workload, rules, phases=phases, units=units, shallow=shallow)


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
            if sharding.addressable_devices:
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
        rows = [_lead(own.pop(path)) for path in sources if path in own]
        pieces = [shard.data for row in rows for shard in row.addressable_shards]
        params[layout.path] = jax.make_array_from_single_device_arrays(
            layout.shape, NamedSharding(mesh, layout.spec), pieces
        )
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
            lead = NamedSharding(part, PartitionSpec(None, *spec[1:]))
            whole = jax.make_array_from_single_device_arrays((1, *array.shape[1:]), lead, by_row[row])
            own[sources[row]] = _unlead(whole)
    return own


def base_function(model: ModelFunction) -> ModelFunction:
    """The model whose layers a pipeline stacks; other models are their own."""
    return model.base if isinstance(model, PipelinedFunction) else model


def base_axes(model: ModelFunction) -> Mapping[str, Axes]:
    """Logical axes by path in the checkpoint."""
    return model.base.axes if isinstance(model, PipelinedFunction) else model.axes


def _shape(mesh: MeshLike) -> Mapping[str, int]:
    """The sizes of a mesh that a caller named; none where the planner is to choose, which it does without stages."""
    if isinstance(mesh, str):
        return {} if mesh == "auto" else MeshSpec.parse(mesh).shape
    if isinstance(mesh, MeshPlan):
        return mesh.mesh.shape
    return (mesh if isinstance(mesh, MeshSpec) else spec_of(mesh)).shape


def _sources(model: ModelFunction, name: str, count: int, depth: int) -> dict[str, tuple[str, ...]]:
    """For each stacked path, the layers' paths by stage."""
    parts: list[dict[str, str]] = [{} for _ in range(count)]
    for path, value in model.params.items():
        number, dot, rest = path.removeprefix(f"{name}.").partition(".")
        if path.startswith(f"{name}.") and dot and number.isdecimal():
            parts[int(number)][rest] = f"{np.dtype(value.dtype).name}{list(value.shape)}"
    for layer, ours in enumerate(parts):
        firsts = parts[layer % depth]
        if ours != firsts:
            different = sorted(path for path in ours.keys() | firsts.keys() if ours.get(path) != firsts.get(path))
            raise ModelError(
                f"layers {layer % depth} and {layer} of {model.name} would share a place in their stages, but "
                f"{different[0]!r} is {firsts.get(different[0], 'missing')} in one and "
                f"{ours.get(different[0], 'missing')} in the other"
            )
    return {
        f"{name}.layers.{place}.{path}": tuple(f"{name}.{layer}.{path}" for layer in range(place, count, depth))
        for place in range(depth)
        for path in parts[place]
    }


def _stage_meshes(mesh: Mesh, spec: PartitionSpec) -> list[Mesh]:
    """The devices of each stage, as meshes with the same axes."""
    position = mesh.axis_names.index(spec[0])
    return [
        Mesh(np.take(mesh.devices, [stage], axis=position), mesh.axis_names, axis_types=mesh.axis_types)
        for stage in range(mesh.devices.shape[position])
    ]


_lead: Callable[[jax.Array], jax.Array] = jax.jit(lambda array: array[None])
_unlead: Callable[[jax.Array], jax.Array] = jax.jit(lambda array: jnp.squeeze(array, 0))
