"""What a step costs on a mesh: memory of the fullest device, and a roofline time with collectives.

The time is ``max(arithmetic / peak rate, bytes / bandwidth) + collectives``; a ring all-reduce of B bytes over p
devices moves ``2 (p - 1) / p * B`` per device, an all-gather half of that, and each starts with a latency.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spmd_infer.axes import BATCH, KV_HEADS, AxisRules
from spmd_infer.mesh import MeshSpec
from spmd_infer.planning.hardware import Cluster
from spmd_infer.planning.layout import WeightLayout
from spmd_infer.planning.mesh_plan import Memory, StepTime
from spmd_infer.planning.work import Product, Value, Work, weight_label


@dataclass(frozen=True)
class MeshCost:
    """What one mesh costs.

    Attributes:
        memory: bytes on the fullest device.
        time: estimated seconds of one step; None where no work is known.
        collectives: number of collectives of each kind in a step.
    """

    memory: Memory
    time: StepTime | None
    collectives: Mapping[str, int]


class _Splits:
    """Over which mesh axis, and into how many parts, each labelled dimension is split."""

    def __init__(self, rules: AxisRules, mesh: Mapping[str, int], layouts: Sequence[WeightLayout]) -> None:
        self._rules, self._mesh = rules, mesh
        self._own: dict[str, str] = {}
        for layout in layouts:
            if layout.axes is None:
                for dimension, entry in enumerate(layout.spec):
                    if isinstance(entry, str):
                        self._own[weight_label(layout.path, dimension)] = entry

    def axis(self, label: str | None, size: int) -> str | None:
        """The mesh axis that splits a dimension of this size; None where it stays whole."""
        axis = self._own.get(label or "") or self._rules.mesh_axis(label)
        parts = self._mesh.get(axis, 1) if axis is not None else 1
        units = self._rules.units.get(label, size) if label is not None else size
        return axis if parts > 1 and size % parts == 0 and units % parts == 0 else None

    def axes(self, value: Value) -> set[str]:
        """Every mesh axis that splits a value."""
        found = (self.axis(label, size) for label, size in zip(value.labels, value.shape, strict=True))
        return {axis for axis in found if axis is not None}

    def parts(self, axes: set[str]) -> int:
        """Pieces that these mesh axes make."""
        product = 1
        for axis in axes:
            product *= self._mesh[axis]
        return product

    def device_bytes(self, value: Value) -> int:
        """Bytes of a value on one device."""
        return value.nbytes // self.parts(self.axes(value))


def cost_of(
    mesh: MeshSpec,
    rules: AxisRules,
    layouts: Sequence[WeightLayout],
    work: Work | None,
    cache_bytes: int,
    cache_heads: int,
    rows: int,
    cluster: Cluster,
) -> MeshCost:
    """Estimate memory and time of one step.

    Args:
        mesh: the mesh.
        rules: where each logical axis goes.
        layouts: where each weight goes.
        work: what a step computes; None where the inputs are unknown.
        cache_bytes: keys and values of all rows, bytes, for models that keep them.
        cache_heads: the number of heads that the cache splits into.
        rows: rows of the batch.
        cluster: the devices.
    """
    splits = _Splits(rules, mesh.shape, layouts)
    weights = sum(layout.device_bytes for layout in layouts)
    cache = cache_bytes // splits.parts(splits.axes(Value((rows, cache_heads), "float32", (BATCH, KV_HEADS))))
    if work is None:
        return MeshCost(Memory(weights, cache, 0, 0), None, {})
    inputs = sum(splits.device_bytes(value) for value in (*work.inputs, *work.outputs))
    memory = Memory(weights, cache, _peak(work, splits), inputs)
    share = cluster.count if cluster.device.shared else 1
    compute, moved, talk = 0.0, float(weights + cache), 0.0
    kinds: Counter[str] = Counter()
    for product in work.products:
        summed = {axis for left, right, size in product.summed if (axis := splits.axis(right or left, size))}
        split = splits.axes(product.out) | summed
        rate = cluster.device.peak(product.right.dtype) / share
        compute += product.times * product.flops / splits.parts(split) / rate
        moved += product.times * (splits.device_bytes(product.out) + splits.device_bytes(product.left))
        for kind, axis, size in _collectives(product, splits, summed):
            kinds[kind] += product.times
            talk += product.times * collective_time(kind, size, mesh, axis, cluster)
    return MeshCost(memory, StepTime(compute, moved / (cluster.device.bandwidth / share), talk), kinds)


def _collectives(product: Product, splits: _Splits, summed: set[str]) -> list[tuple[str, str, int]]:
    """``(kind, mesh axis, bytes)`` of the communication that a product needs."""
    found = []
    out = splits.device_bytes(product.out)
    for left, right, size in product.summed:
        ours, theirs = splits.axis(left, size), splits.axis(right, size)
        if theirs is not None or (ours is not None and ours not in splits.axes(product.right)):
            found.append(("all-reduce", theirs or str(ours), out))
        elif ours is not None:
            found.append(("all-gather", ours, product.left.nbytes // splits.parts(splits.axes(product.left) - {ours})))
    return found


def collective_time(kind: str, size: int, mesh: MeshSpec, axis: str, cluster: Cluster) -> float:
    """Seconds of one ring collective of ``size`` bytes along a mesh axis."""
    parts = mesh.shape[axis]
    inner = 1  # devices that neighbours along this axis are apart
    for name, length in reversed(mesh.sizes):
        if name == axis:
            break
        inner *= length
    crosses = parts * inner > cluster.per_host
    bandwidth = cluster.device.network if crosses else cluster.device.link
    moved = (2 if kind == "all-reduce" else 1) * (parts - 1) / parts * size
    return cluster.device.latency + parts * cluster.device.hop + moved / bandwidth


def _peak(work: Work, splits: _Splits) -> int:
    """The most bytes of intermediate results that are alive at once."""
    changes: Counter[int] = Counter()
    for value, first, last in work.lives:
        size = splits.device_bytes(value)
        changes[first] += size
        changes[last + 1] -= size
    alive = peak = 0
    for moment in sorted(changes):
        alive += changes[moment]
        peak = max(peak, alive)
    return peak
