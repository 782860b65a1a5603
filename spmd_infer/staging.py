"""A model's layers stacked over the stages of a mesh, and the same model without its layers.

Checkpoints and other models stay as they are: a ``PipelinedFunction`` says of each stacked weight which weights of the
model it is made of, and ``spmd_infer.pipeline`` makes it of the pieces that the devices hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import prod
from typing import Any

import jax
import numpy as np
from flax import nnx

from spmd_infer.axes import BATCH, LAYERS, AxisRules
from spmd_infer.errors import ModelError
from spmd_infer.functional import ModelFunction, Params, model_function
from spmd_infer.models.pipeline import MOST_PARTS, Keeping, Stages, bubble_share, microbatch_count
from spmd_infer.tensors import Axes


@dataclass(frozen=True, eq=False)
class PipelinedFunction(ModelFunction):
    """A model whose layers are stacked over stages; ``params`` and ``axes`` are of the stacked weights.

    Attributes:
        base: the model as it was, with its layers one by one.
        stages: how many stages there are.
        num_layers: how many layers.
        sources: for each stacked weight, the paths in ``base`` that it is made of, by stage; None where a stage has
            no such layer.
        microbatches: how many micro-batches a batch is cut into; None chooses by the rows.
        most_parts: into how many micro-batches the rows of a stage are then cut at most.
    """

    base: ModelFunction
    stages: int
    num_layers: int
    sources: Mapping[str, tuple[str | None, ...]]
    microbatches: int | None
    most_parts: int

    @property
    def depth(self) -> int:
        """Layers of the fullest stage."""
        return -(-self.num_layers // self.stages)

    def abstract(self) -> PipelinedFunction:
        """The same model holding no arrays, only their shapes and dtypes."""
        return replace(self, base=self.base.abstract())

    def count(self, rows: int, row_parts: int = 1) -> int:
        """The micro-batches that a batch of ``rows`` is cut into (see ``microbatch_count``)."""
        return self.microbatches or microbatch_count(rows, self.stages, row_parts, self.most_parts)

    def bubble(self, rows: int, row_parts: int = 1) -> float:
        """The part of the ticks in which a stage idles, for a batch of ``rows``."""
        return bubble_share(self.stages, self.count(rows, row_parts))


def pipelined(
    model: ModelFunction, stages: int, *, microbatches: int | None = None, most_parts: int = MOST_PARTS
) -> PipelinedFunction:
    """Stack a model's layers over stages, as evenly as may be; the first stages have one more where they do not divide.

    Args:
        model: an NNX model whose class names its list of layers in ``pipelined_layers`` and passes through them with
            ``spmd_infer.models.pipeline.run_layers``; abstract parameters are enough.
        stages: how many stages; at most as many as layers.
        microbatches: how many micro-batches a batch is cut into; the default follows from the rows.
        most_parts: into how many micro-batches the rows of a stage are then cut at most.

    Raises:
        ModelError: the model names no layers, they differ, or there are fewer than stages.
    """
    found = _layers(model)
    if found is None:
        raise ModelError(
            f"{model.name} cannot be spread over {stages} stages: it does not say which of its layers follow one "
            "another (an NNX class does with pipelined_layers = 'layers'); use the other mesh axes"
        )
    layers = found.layers
    if not 1 <= stages <= len(layers):
        raise ModelError(
            f"{len(layers)} layers of {model.name} cannot be shared out over {stages} stages: a stage holds one layer "
            f"at least; use 2 to {len(layers)} stages"
        )
    depth = -(-len(layers) // stages)
    sources = _sources(model, found.name, len(layers), stages)
    for layer in layers[:depth]:
        for _, variable in nnx.to_flat_state(nnx.state(layer)):
            axes = variable.get_metadata().get("axes") or (None,) * len(variable.get_value().shape)
            variable.set_metadata(axes=(LAYERS, *axes))
    found.replace(Stages(layers[:depth], stages, len(layers), most_parts=most_parts, microbatches=microbatches))
    stacked = model_function(found.module)
    params: Params = {}
    for path in stacked.params:
        own = model.params[sources[path][0] or path if path in sources else path]
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
        most_parts=most_parts,
    )


def layer_count(model: ModelFunction) -> int:
    """How many layers a pipeline could share out over stages; 0 where the model names none."""
    found = _layers(base_function(model))
    return len(found.layers) if found is not None else 0


@dataclass(eq=False)
class Travelling:
    """What travels through a model's layers; known once the model without layers has been traced.

    Attributes:
        row_bytes: bytes of one row of the activations.
    """

    row_bytes: int = 0


def without_layers(model: ModelFunction) -> tuple[ModelFunction, Travelling]:
    """What of a model every stage of a pipeline computes for rows of its own: embedding and head.

    Raises:
        ModelError: the model names no layers.
    """
    found = _layers(base_function(model))
    if found is None:
        raise ModelError(f"{model.name} does not say which of its layers follow one another")
    seen = Travelling()
    found.replace(_Nothing(seen))
    return replace(model_function(found.module), name=model.name, call=base_function(model).call), seen


class _Nothing(Stages[nnx.Module]):
    """No layers; it writes down what passes."""

    def __init__(self, seen: Travelling) -> None:
        super().__init__((), 1)
        self.seen = seen

    def keeping(
        self, through: Keeping, x: jax.Array, *rows: jax.Array, caches: Sequence[Any]
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        self.seen.row_bytes = x.size // x.shape[0] * x.dtype.itemsize
        return x, tuple(caches)


@dataclass(frozen=True, eq=False)
class _Layers:
    """A model's layers and where they hang."""

    module: nnx.Module
    name: str
    layers: Sequence[nnx.Module]

    def replace(self, stages: Stages[Any]) -> None:
        owner, _, attribute = self.name.rpartition(".")
        setattr(reduce(getattr, filter(None, owner.split(".")), self.module), attribute, stages)


def _layers(model: ModelFunction) -> _Layers | None:
    """The layers that an NNX model names in ``pipelined_layers``, in a copy of it without arrays."""
    if model.kind != "nnx":
        return None
    module = model.rebuild({path: jax.ShapeDtypeStruct(p.shape, p.dtype) for path, p in model.params.items()})
    name = getattr(module, "pipelined_layers", None)
    if not isinstance(name, str):
        return None
    return _Layers(module, name, list(reduce(getattr, name.split("."), module)))


def for_stages(
    model: ModelFunction, rules: AxisRules, mesh_shape: Mapping[str, int], most_parts: int = MOST_PARTS
) -> tuple[ModelFunction, AxisRules]:
    """The model and the rules for a mesh: stacked if the mesh has stages, else as they are.

    With stages the rows of a batch are split over them too. ``most_parts`` is as for ``pipelined``.

    Raises:
        ModelError: the mesh has stages and the model cannot be spread over them.
    """
    axes = rules.mesh_axes(LAYERS)
    stages = prod(mesh_shape.get(axis, 1) for axis in axes)
    if stages == 1:
        return model, rules
    if not isinstance(model, PipelinedFunction):
        model = pipelined(model, stages, most_parts=most_parts)
    rows = tuple(axis for axis in rules.of_activations.mesh_axes(BATCH) if axis not in axes)
    activations = {**rules.activations, BATCH: (*rows, *axes)}
    name = rules.name if rules.name.endswith("pipeline") else f"{rules.name}, pipeline"
    return model, replace(rules, activations=activations, name=name)


def base_function(model: ModelFunction) -> ModelFunction:
    """The model whose layers a pipeline stacks; other models are their own."""
    return model.base if isinstance(model, PipelinedFunction) else model


def stage_count(model: ModelFunction) -> int:
    """Over how many stages a model's layers are spread; 1 where they are not."""
    return model.stages if isinstance(model, PipelinedFunction) else 1


def base_axes(model: ModelFunction) -> Mapping[str, Axes]:
    """Logical axes by path in the checkpoint."""
    return model.base.axes if isinstance(model, PipelinedFunction) else model.axes


def _sources(model: ModelFunction, name: str, count: int, stages: int) -> dict[str, tuple[str | None, ...]]:
    """For each stacked path, the layers' paths by stage."""
    parts: list[dict[str, str]] = [{} for _ in range(count)]
    for path, value in model.params.items():
        number, dot, rest = path.removeprefix(f"{name}.").partition(".")
        if path.startswith(f"{name}.") and dot and number.isdecimal():
            parts[int(number)][rest] = f"{np.dtype(value.dtype).name}{list(value.shape)}"
    least, fuller = divmod(count, stages)
    sources: dict[str, tuple[str | None, ...]] = {}
    for place in range(-(-count // stages)):
        layers = [
            stage * least + min(stage, fuller) + place if place < least + (stage < fuller) else None
            for stage in range(stages)
        ]
        for layer in layers:
            if layer is not None:
                _check_equal(model.name, (place, parts[place]), (layer, parts[layer]))
        for path in parts[place]:
            sources[f"{name}.layers.{place}.{path}"] = tuple(
                None if layer is None else f"{name}.{layer}.{path}" for layer in layers
            )
    return sources


def _check_equal(model: str, first: tuple[int, dict[str, str]], other: tuple[int, dict[str, str]]) -> None:
    """That two layers hold weights of the same shapes under the same paths."""
    (place, firsts), (layer, ours) = first, other
    if ours == firsts:
        return
    different = sorted(path for path in ours.keys() | firsts.keys() if ours.get(path) != firsts.get(path))
    raise ModelError(
        f"layers {place} and {layer} of {model} would share a place in their stages, but {different[0]!r} is "
        f"{firsts.get(different[0], 'missing')} in one and {ours.get(different[0], 'missing')} in the other"
    )
