"""Which boxes of a tensor a mesh of devices asks for, and which host holds each; needs none of the devices."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from spmd_infer.axes import MODEL, STAGE, AxisRules, axis_tuple
from spmd_infer.checkpoints.boxes import Box, whole
from spmd_infer.errors import MeshError
from spmd_infer.mesh import MeshSpec
from spmd_infer.tensors import Axes

_SMALL_BYTES = 64 * 1024  # as in planning.layout: below it, a tensor without axes stays whole
_LAYER = re.compile(r"(?:^|\.)(?:layers?|blocks?|blk|h)\.(\d+)\.")


@dataclass(frozen=True)
class MeshLayout:
    """A mesh spread evenly over hosts, hosts outermost, and where logical axes go on it.

    Attributes:
        mesh: its axes and sizes.
        hosts: over how many hosts it is spread.
        rules: which mesh axis splits each logical axis.
        layers: layers of the model, for meshes with stages.
    """

    mesh: MeshSpec
    hosts: int
    rules: AxisRules
    layers: int = 0

    def __post_init__(self) -> None:
        if self.hosts < 1 or self.mesh.size % self.hosts:
            raise MeshError(
                f"{self.mesh.size} devices of mesh {self.mesh} cannot be spread evenly over {self.hosts} hosts"
            )

    def boxes(self, name: str, shape: Sequence[int], itemsize: int, axes: Axes | None) -> list[tuple[Box, int]]:
        """The distinct boxes of one tensor, each with the first host that holds it.

        Args:
            name: the tensor's name; on a mesh with stages its layer's number says which stage holds it.
            shape: its shape.
            itemsize: bytes of one element.
            axes: its logical axes. A tensor without any is split over the model axis along its largest dimension that
                divides, unless it is small.
        """
        return [(box, hosts[0]) for box, hosts in self.holders(name, shape, itemsize, axes).items()]

    def holders(self, name: str, shape: Sequence[int], itemsize: int, axes: Axes | None) -> dict[Box, list[int]]:
        """The distinct boxes of one tensor, each with all hosts that hold it."""
        sizes = self.mesh.shape
        entries = self._spec(shape, itemsize, axes)
        per_host = self.mesh.size // self.hosts
        stage = self._stage(name)
        result: dict[Box, list[int]] = {}
        names = [axis for axis, _ in self.mesh.sizes]
        for number, place in enumerate(itertools.product(*(range(size) for _, size in self.mesh.sizes))):
            at = dict(zip(names, place, strict=True))
            if stage is not None and at[STAGE] != stage:
                continue
            box = []
            for size, entry in zip(shape, entries, strict=True):
                parts = prod(sizes[axis] for axis in entry)
                position = 0
                for axis in entry:
                    position = position * sizes[axis] + at[axis]
                box.append((size // parts * position, size // parts * (position + 1)))
            hosts = result.setdefault(tuple(box), [])
            if number // per_host not in hosts:
                hosts.append(number // per_host)
        return result

    def _stage(self, name: str) -> int | None:
        """The stage that holds a tensor of a layer; None for tensors outside the layers, which all of them hold."""
        stages = self.mesh.shape.get(STAGE, 1)
        found = _LAYER.search(name)
        if stages == 1 or found is None or self.layers == 0:
            return None
        return min(stages - 1, int(found.group(1)) * stages // self.layers)

    def _spec(self, shape: Sequence[int], itemsize: int, axes: Axes | None) -> list[tuple[str, ...]]:
        sizes = self.mesh.shape
        if axes is not None:
            found, _ = self.rules.entries(axes, shape, sizes)
            return [tuple(axis for axis in axis_tuple(entry) if axis in sizes) for entry in found]
        parts = sizes.get(MODEL, 1)
        entries: list[tuple[str, ...]] = [()] * len(shape)
        divisible = [d for d, size in enumerate(shape) if size and size % parts == 0]
        if parts > 1 and prod(shape) * itemsize >= _SMALL_BYTES and divisible:
            entries[max(divisible, key=lambda d: shape[d])] = (MODEL,)
        return entries


def unsplit(shape: Sequence[int]) -> list[tuple[Box, int]]:
    """The whole tensor, on the first host: the layout of a checkpoint that was cut for no mesh."""
    return [(whole(shape), 0)]


def layers_of(names: Mapping[str, object]) -> int:
    """How many numbered layers tensors of these names have."""
    found = [int(match.group(1)) for name in names if (match := _LAYER.search(name))]
    return max(found, default=-1) + 1
