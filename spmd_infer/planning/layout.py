"""How each weight of a model lies on a mesh."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from spmd_infer.axes import MODEL, AxisRules
from spmd_infer.functional import ModelFunction
from spmd_infer.tensors import Axes

SMALL_BYTES = 64 * 1024
"""An un-annotated weight below this size is kept whole on every device: splitting it saves nothing."""


@dataclass(frozen=True)
class WeightLayout:
    """One weight on the mesh.

    Attributes:
        path: the parameter's path.
        shape: its global shape.
        dtype: its dtype.
        axes: its logical axes; None where the model names none.
        spec: how it is split.
        whole: why a dimension that a rule wanted split stays whole; empty where none does.
        parts: into how many different pieces it is split; every device holds one of them.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    axes: Axes | None
    spec: PartitionSpec
    whole: str
    parts: int

    @property
    def nbytes(self) -> int:
        """Bytes of the whole weight."""
        return nbytes(self.shape, self.dtype)

    @property
    def device_bytes(self) -> int:
        """Bytes that each device holds."""
        return self.nbytes // self.parts


@cache
def nbytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Bytes of an array; a PRNG key counts as its raw words."""
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return prod(shape) * 8
    return prod(shape) * int(np.dtype(dtype).itemsize)


def weight_layouts(model: ModelFunction, rules: AxisRules, mesh_shape: Mapping[str, int]) -> list[WeightLayout]:
    """Lay every weight of a model on a mesh of the given shape.

    Weights with logical axes follow ``rules``. A weight without any is split over the model axis along its largest
    dimension that divides, unless it is small.

    Raises:
        AxisError: a weight's axes do not match its rank, or collide on one mesh axis.
    """
    layouts = []
    known: dict[Any, tuple[PartitionSpec, str, int]] = {}  # the layers of a model repeat each other
    for path, value in model.params.items():
        shape, axes = tuple(value.shape), model.axes.get(path)
        key = shape, axes, value.dtype
        if key not in known:
            spec, whole = (
                _default_spec(shape, nbytes(shape, value.dtype), mesh_shape.get(MODEL, 1))
                if axes is None
                else _spec_by_rules(axes, shape, rules, mesh_shape)
            )
            known[key] = spec, whole, spec_parts(spec, mesh_shape)
        layouts.append(WeightLayout(path, shape, value.dtype, axes, *known[key]))
    return layouts


def _spec_by_rules(
    axes: Axes, shape: tuple[int, ...], rules: AxisRules, mesh_shape: Mapping[str, int]
) -> tuple[PartitionSpec, str]:
    """The spec of a weight with logical axes, and what stays whole that a rule wanted split."""
    resolved = rules.resolve(axes, shape, mesh_shape)
    whole = "; ".join(
        f"{units} {logical} do not divide over {axis}={parts}" for logical, units, axis, parts in resolved.replicated
    )
    return resolved.spec, whole


def spec_parts(spec: PartitionSpec, mesh_shape: Mapping[str, int]) -> int:
    """Into how many different pieces a spec splits an array."""
    names = [name for entry in spec if entry is not None for name in (entry if isinstance(entry, tuple) else (entry,))]
    return prod(mesh_shape.get(name, 1) for name in names)


def _default_spec(shape: tuple[int, ...], size: int, parts: int) -> tuple[PartitionSpec, str]:
    """The rule for weights without logical axes."""
    if parts == 1 or size < SMALL_BYTES:
        return PartitionSpec(), ""
    divisible = [dimension for dimension, length in enumerate(shape) if length % parts == 0]
    if not divisible:
        return PartitionSpec(), f"no dimension of {shape} divides over {MODEL}={parts}"
    best = max(divisible, key=lambda dimension: shape[dimension])
    return PartitionSpec(*(None,) * best, MODEL), ""
