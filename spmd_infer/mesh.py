"""From "data=2,model=4" and a list of devices to a ``jax.sharding.Mesh``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from spmd_infer.axes import MESH_AXES
from spmd_infer.errors import MeshError
from spmd_infer.multihost.job import current_job

if TYPE_CHECKING:  # checkpoints are cut for meshes on machines without JAX's devices, and quickly
    import jax
    from jax.sharding import Mesh


@dataclass(frozen=True)
class MeshSpec:
    """How many devices lie along each mesh axis.

    Attributes:
        sizes: ``(axis, size)`` pairs, outermost first, as in ``MESH_AXES``.
    """

    sizes: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        names = [name for name, _ in self.sizes]
        for name, size in self.sizes:
            if name not in MESH_AXES:
                raise MeshError(f"unknown mesh axis {name!r}; mesh axes are {', '.join(MESH_AXES)}")
            if names.count(name) > 1:
                raise MeshError(f"mesh axis {name!r} is given {names.count(name)} times")
            if size < 1:
                raise MeshError(f"mesh axis {name!r} has size {size}; sizes are 1 or more")
        object.__setattr__(self, "sizes", tuple(sorted(self.sizes, key=lambda pair: MESH_AXES.index(pair[0]))))

    @classmethod
    def parse(cls, text: str) -> MeshSpec:
        """Read ``"data=2,model=4"``.

        Raises:
            MeshError: the text is not a list of ``axis=size``, or an axis is unknown, repeated or not positive.
        """
        pairs = []
        for part in text.split(","):
            name, equals, size = part.partition("=")
            if not equals or not size.strip().isdecimal():
                raise MeshError(
                    f"cannot read {part.strip()!r} in mesh {text!r}: expected axis=size pairs such as 'data=2,model=4'"
                )
            pairs.append((name.strip(), int(size)))
        return cls(tuple(pairs))

    @classmethod
    def of(cls, **sizes: int) -> MeshSpec:
        """``MeshSpec.of(data=2, model=4)``."""
        return cls(tuple(sizes.items()))

    @property
    def shape(self) -> dict[str, int]:
        """Size by axis name."""
        return dict(self.sizes)

    @property
    def size(self) -> int:
        """Number of devices."""
        return prod(size for _, size in self.sizes)

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in self.sizes)

    def build(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """The mesh over ``devices`` (default: all), hosts outermost so that the last axes stay inside one host.

        Raises:
            MeshError: there are fewer devices than the mesh has places, or so many more that a process would have none
                of them in it.
        """
        import jax
        from jax.sharding import AxisType, Mesh

        found = list(devices if devices is not None else jax.devices())
        if len(found) < self.size:
            raise MeshError(
                f"mesh {self} has {self.size} places but there are {len(found)} {found[0].platform} devices; "
                f"choose sizes whose product is at most {len(found)}, or simulate devices with --devices {self.size}"
            )
        everywhere = sorted(found, key=lambda d: (host_of(d), d.process_index, d.id))
        ordered = everywhere[: self.size]
        idle = {d.process_index for d in everywhere} - {d.process_index for d in ordered}
        if idle:
            raise MeshError(
                f"mesh {self} has {self.size} places for {len(found)} devices: process {min(idle)} would have no part "
                "in it; give every process one, or start fewer processes"
            )
        grid = np.array(ordered, dtype=object).reshape([size for _, size in self.sizes])
        names = tuple(name for name, _ in self.sizes)
        return Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))


def host_of(device: jax.Device) -> int:
    """The host that a device is in, numbered in the order of ranks; a process is one where nobody says otherwise."""
    job = current_job()
    if job is None or job.size == 1:
        return int(device.process_index)
    return job.hosts.index(job.hosts[device.process_index])


def spec_of(mesh: Mesh) -> MeshSpec:
    """The spec that a mesh was, or could have been, built from."""
    return MeshSpec(tuple((str(name), int(size)) for name, size in mesh.shape.items()))


def auto_mesh(mesh: Mesh) -> Mesh:
    """A caller's mesh with the same devices and names, its axes of type Auto so that XLA chooses the collectives.

    Raises:
        MeshError: an axis has a name that the rules do not know.
    """
    from jax.sharding import AxisType, Mesh

    spec_of(mesh)
    if all(kind == AxisType.Auto for kind in mesh.axis_types):
        return mesh
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
