"""The ways in which a weight without axes could be split over a mesh."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from jax.sharding import PartitionSpec

from spmd_infer.axes import DATA, MEMBER, MESH_AXES, STAGE, axis_tuple
from spmd_infer.planning.layout import WeightLayout


def split_options(layout: WeightLayout, mesh: Mapping[str, int], *, wide: bool) -> list[PartitionSpec]:
    """Ways to split a weight: over ``model`` along each dimension that divides, or not at all.

    Axes that are there for something else (``expert``, ``seq``) hold copies of un-annotated weights, which could as
    well be pieces. Those of the rows are looked at only where memory is short: the pieces must come together in each
    step.
    """
    axes = spare_axes(mesh, wide=wide)
    found: dict[PartitionSpec, None] = {PartitionSpec(): None}
    rank = len(layout.shape)
    for first in axes:
        for dimension in range(rank):
            found[_spec({dimension: (first,)})] = None
        for second in axes:
            if first == second:
                continue
            for one in range(rank):
                for other in range(rank):
                    joint = {one: (first,), other: (second,)} if one != other else {one: _in_order(first, second)}
                    found[_spec(joint)] = None
    return [spec for spec in found if _divides(layout.shape, spec, mesh)]


def spare_axes(mesh: Mapping[str, int], *, wide: bool) -> list[str]:
    """The mesh axes that weights may be split over."""
    never = (STAGE, MEMBER) if wide else (STAGE, MEMBER, DATA)
    return [axis for axis in MESH_AXES if mesh.get(axis, 1) > 1 and axis not in never]


def _in_order(*axes: str) -> tuple[str, ...]:
    return tuple(sorted(axes, key=MESH_AXES.index))


def _spec(split: Mapping[int, tuple[str, ...]]) -> PartitionSpec:
    entries: list[str | tuple[str, ...] | None] = [None] * (max(split) + 1)
    for dimension, axes in split.items():
        entries[dimension] = axes[0] if len(axes) == 1 else axes
    return PartitionSpec(*entries)


def _divides(shape: tuple[int, ...], spec: PartitionSpec, mesh: Mapping[str, int]) -> bool:
    return all(
        size % prod(mesh[axis] for axis in axis_tuple(entry)) == 0 for size, entry in zip(shape, spec, strict=False)
    )
