"""How the labelled dimensions of values are split over a mesh under some rules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod

from spmd_infer.axes import ATTN_HEADS, ATTN_KV_HEADS, AxisRules, axis_tuple
from spmd_infer.planning.layout import WeightLayout
from spmd_infer.planning.values import Value, weight_label


class Splits:
    """Over which mesh axes each labelled dimension is split."""

    def __init__(self, rules: AxisRules, mesh: Mapping[str, int], layouts: Sequence[WeightLayout]) -> None:
        self._rules, self._mesh = rules, mesh
        self._found: dict[Value, list[tuple[str, ...]]] = {}
        self._own: dict[str, tuple[str, ...]] = {}
        for layout in layouts:
            if layout.axes is None:
                for dimension, entry in enumerate(layout.spec):
                    if entry is not None:
                        self._own[weight_label(layout.path, dimension)] = axis_tuple(entry)

    def of(self, value: Value) -> list[tuple[str, ...]]:
        """The mesh axes of each dimension; an axis serves only the first dimension that wants it."""
        found = self._found.get(value)
        if found is None:
            found = self._found[value] = self._split(value)
        return found

    def _split(self, value: Value) -> list[tuple[str, ...]]:
        rules = self._rules if value.weight else self._rules.of_activations
        used: set[str] = set()
        found = []
        for label, size in zip(value.labels, value.shape, strict=True):
            axes = self._own.get(label or "") or rules.split(label, size, self._mesh)
            axes = tuple(axis for axis in axes if axis not in used and size % self.parts(axes) == 0)
            if not axes and label == ATTN_HEADS:
                axes = tuple(axis for axis in self._split_groups(value, size, rules) if axis not in used)
            used.update(axes)
            found.append(axes)
        return found

    def _split_groups(self, value: Value, size: int, rules: AxisRules) -> tuple[str, ...]:
        """The mesh axes that split query heads which lie in groups, one for each key head, of which there are fewer.

        A device then has a part of a group, although neither the groups nor what is in one divide.
        """
        heads = rules.units.get(ATTN_HEADS, size)
        group = heads // size
        beside = any(label is None and n == group for label, n in zip(value.labels, value.shape, strict=True))
        return rules.split(ATTN_HEADS, heads, self._mesh) if size * group == heads and group > 1 and beside else ()

    def axes(self, value: Value) -> set[str]:
        """Every mesh axis that splits a value."""
        return {axis for axes in self.of(value) for axis in axes}

    def parts(self, axes: Iterable[str]) -> int:
        """Pieces that these mesh axes make."""
        return prod(self._mesh[axis] for axis in axes)

    def order(self, axis: str) -> int:
        """Where a mesh axis comes in the mesh, the outermost first."""
        return list(self._mesh).index(axis)

    def device_bytes(self, value: Value) -> int:
        """Bytes of a value on one device."""
        return value.nbytes // self.parts(self.axes(value))

    def shared_heads(self, value: Value) -> tuple[str, ...]:
        """The mesh axis over which query heads are split and key heads are not, although some of them could be.

        There are fewer key heads than devices then, and several devices read the same ones.
        """
        rules = self._rules.of_activations
        for label, size in zip(value.labels, value.shape, strict=True):
            axes = tuple(axis for axis in rules.mesh_axes(label) if self._mesh.get(axis, 1) > 1)
            parts, heads = self.parts(axes), rules.units.get(ATTN_HEADS, 1)
            if label == ATTN_KV_HEADS and axes and size % parts and parts % size == 0 and size > 1:
                return axes if heads % parts == 0 else ()
        return ()
