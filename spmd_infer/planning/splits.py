"""How the labelled dimensions of values are split over a mesh under some rules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod

from spmd_infer.axes import AxisRules, axis_tuple
from spmd_infer.planning.layout import WeightLayout
from spmd_infer.planning.work import Value, weight_label


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
            used.update(axes)
            found.append(axes)
        return found

    def axes(self, value: Value) -> set[str]:
        """Every mesh axis that splits a value."""
        return {axis for axes in self.of(value) for axis in axes}

    def parts(self, axes: Iterable[str]) -> int:
        """Pieces that these mesh axes make."""
        return prod(self._mesh[axis] for axis in axes)

    def device_bytes(self, value: Value) -> int:
        """Bytes of a value on one device."""
        return value.nbytes // self.parts(self.axes(value))
