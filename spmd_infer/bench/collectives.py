"""How long all-reduces and all-gathers take, by size and number of devices, and what links that amounts to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from scipy.optimize import nnls

from spmd_infer.bench.timing import median_seconds
from spmd_infer.scratch import keep_scratch

KINDS = ("all-reduce", "all-gather")
_SHORT, _LONG = 2, 10  # collectives in a row; the difference leaves out what a call costs
SIZES = (4 << 10, 64 << 10, 1 << 20, 8 << 20)
LARGE_SIZES = (*SIZES, 64 << 20, 512 << 20)


@dataclass(frozen=True)
class Reading:
    """One measurement.

    Attributes:
        kind: ``all-reduce`` or ``all-gather``.
        group: devices that talk with each other; all groups do so at once.
        size: bytes of the result on one device.
        seconds: time of one collective.
    """

    kind: str
    group: int
    size: int
    seconds: float

    @property
    def moved(self) -> float:
        """Bytes that each device of a ring sends."""
        return (2 if self.kind == "all-reduce" else 1) * (self.group - 1) / self.group * self.size

    def as_dict(self) -> dict[str, Any]:
        """Plain data, with the bandwidth in bytes/s and direction."""
        return {**asdict(self), "bandwidth": self.moved / self.seconds}


@dataclass(frozen=True)
class Links:
    """Constants of the cost model: ``latency + group * hop + moved / link * (1 + sqrt(half_size / size))``.

    Attributes:
        link: bytes/s and direction in large collectives.
        latency: s.
        hop: s a device.
        half_size: bytes at which half of ``link`` is reached.
        error: the median relative difference between the readings and this model.
    """

    link: float
    latency: float
    hop: float
    half_size: float
    error: float

    def seconds(self, reading: Reading) -> float:
        """What the model says of a reading."""
        slow = 1 + sqrt(self.half_size / reading.size)
        return self.latency + reading.group * self.hop + reading.moved / self.link * slow


def measure_collectives(seconds: float = 0.3, sizes: Sequence[int] | None = None) -> list[Reading]:
    """Measure collectives among all devices that JAX has, in groups of each size that divides their number.

    Args:
        seconds: time for each reading, without compiling.
        sizes: bytes of the results; default 4 kB to 8 MB on CPU, to 512 MB elsewhere.
    """
    devices = jax.devices()
    if devices[0].platform == "cpu":
        keep_scratch()  # as programs of an engine have it
    if sizes is None:
        sizes = SIZES if devices[0].platform == "cpu" else LARGE_SIZES
    groups = [group for group in range(2, len(devices) + 1) if len(devices) % group == 0]
    return [
        Reading(kind, group, size, _one(devices, kind, group, size, seconds))
        for kind in KINDS
        for group in groups
        for size in sizes
    ]


def fit(readings: Sequence[Reading]) -> Links:
    """The constants that come closest to the readings, by least squares of relative errors with none negative.

    Raises:
        ValueError: there are no readings.
    """
    if not readings:
        raise ValueError("collectives need at least two devices to be measured")
    rows = np.array([[1.0, r.group, r.moved, r.moved / r.size**0.5] for r in readings])
    times = np.array([r.seconds for r in readings])
    scale = rows.max(0)  # columns differ by ten orders of magnitude
    found, _ = nnls(rows / times[:, None] / scale, np.ones(len(times)))
    latency, hop, per_byte, per_root = (float(x) for x in found / scale)
    per_byte = max(per_byte, 1e-15)
    links = Links(1 / per_byte, latency, hop, (per_root / per_byte) ** 2, 0.0)
    errors = [abs(links.seconds(r) / r.seconds - 1) for r in readings]
    return Links(links.link, links.latency, links.hop, links.half_size, float(np.median(errors)))


def _one(devices: Sequence[jax.Device], kind: str, group: int, size: int, budget: float) -> float:
    grid = np.array(devices, dtype=object).reshape(-1, group)
    mesh = Mesh(grid, ("groups", "group"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    count = max(group, size // 4 // group * group)
    both = PartitionSpec(("groups", "group"))
    placed = NamedSharding(mesh, both)
    x = jax.jit(lambda: jnp.ones((mesh.size * count,), jnp.float32), out_shardings=placed)()

    def reduce(part: jax.Array) -> jax.Array:
        summed: jax.Array = jax.lax.psum(part, "group")
        return summed * (1 / group)

    def gather(part: jax.Array) -> jax.Array:
        # Only a share of the part is sent, so that the result is as large as the part.
        whole: jax.Array = jax.lax.all_gather(part[: count // group], "group", tiled=True)
        return whole + part

    step = reduce if kind == "all-reduce" else gather

    def chain(times: int) -> Callable[[], jax.Array]:
        def run(part: jax.Array) -> jax.Array:
            for _ in range(times):
                part = step(part)
            return part

        compiled = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=both, out_specs=both, check_vma=False))
        return lambda: compiled(x)

    long, short = (median_seconds(chain(times), budget / 2) for times in (_LONG, _SHORT))
    return max(long - short, 0.02 * long) / (_LONG - _SHORT)
