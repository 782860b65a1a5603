"""Weights by kind: the same matrix of every layer as one line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from jax.sharding import PartitionSpec

from spmd_infer.axes import axis_tuple
from spmd_infer.mesh import MeshSpec
from spmd_infer.planning.layout import WeightLayout
from spmd_infer.tensors import Axes


@dataclass(frozen=True)
class WeightGroup:
    """Weights that differ only in numbers of their paths (the layer) and lie on the mesh alike.

    Attributes:
        pattern: their paths, ``*`` for the number.
        count: how many they are.
        shape: of each.
        dtype: of each.
        axes: logical axes; None where the model names none.
        spec: how each is split.
        parts: into how many different pieces.
        whole: why a dimension that should be split stays whole.
        nbytes: bytes of all of them.
        device_bytes: bytes of all of them on one device.
    """

    pattern: str
    count: int
    shape: tuple[int, ...]
    dtype: Any
    axes: Axes | None
    spec: PartitionSpec
    parts: int
    whole: str
    nbytes: int
    device_bytes: int

    def splits(self) -> list[tuple[str, ...]]:
        """The mesh axes over which each dimension is split."""
        entries = [*self.spec, *(None,) * (len(self.shape) - len(self.spec))]
        return [axis_tuple(entry) for entry in entries]

    def words(self) -> str:
        """The shape with the axes that split it: ``28672 mlp / model x 8192 embed``."""
        axes = self.axes or (None,) * len(self.shape)
        parts = [
            f"{size}{f' {axis}' if axis else ''}{f' / {chr(44).join(split)}' if split else ''}"
            for size, axis, split in zip(self.shape, axes, self.splits(), strict=True)
        ]
        return " x ".join(parts) or "a number"


def weight_groups(layouts: Iterable[WeightLayout]) -> list[WeightGroup]:
    """Group weights by kind, those that take most memory on a device first."""
    found: dict[tuple[Any, ...], list[WeightLayout]] = {}
    for layout in layouts:
        pattern = ".".join("*" if part.isdecimal() else part for part in layout.path.split("."))
        key = (pattern, layout.shape, str(layout.dtype), layout.spec, layout.whole)
        found.setdefault(key, []).append(layout)
    groups = [
        WeightGroup(
            pattern=pattern if len(same) > 1 else same[0].path,
            count=len(same),
            shape=same[0].shape,
            dtype=same[0].dtype,
            axes=same[0].axes,
            spec=same[0].spec,
            parts=same[0].parts,
            whole=same[0].whole,
            nbytes=sum(layout.nbytes for layout in same),
            device_bytes=sum(layout.device_bytes for layout in same),
        )
        for (pattern, *_), same in found.items()
    ]
    return sorted(groups, key=lambda group: -group.device_bytes)


def holders(group: WeightGroup, mesh: MeshSpec) -> dict[tuple[int, ...], list[int]]:
    """Which devices hold each piece: piece index by dimension, to device numbers in the mesh's order."""
    splits, shape = group.splits(), mesh.shape
    found: dict[tuple[int, ...], list[int]] = {}
    for device in range(mesh.size):
        place = coordinates(device, shape)
        key = []
        for axes in splits:
            index = 0
            for axis in axes:
                index = index * shape.get(axis, 1) + place.get(axis, 0)
            key.append(index)
        found.setdefault(tuple(key), []).append(device)
    return found


def pieces(group: WeightGroup, mesh: MeshSpec) -> list[int]:
    """Into how many pieces each dimension is cut."""
    return [prod(mesh.shape.get(axis, 1) for axis in axes) for axes in group.splits()]


def coordinates(device: int, shape: Mapping[str, int]) -> dict[str, int]:
    """A device's place along each mesh axis, from its number in the mesh's order."""
    place: dict[str, int] = {}
    for name, size in reversed(list(shape.items())):
        device, place[name] = divmod(device, size)
    return place
