"""What a step costs on a mesh: memory of the fullest device, and a roofline time with collectives.

The time is ``max(arithmetic / peak rate, bytes / bandwidth) + collectives``; a ring all-reduce of B bytes over p
devices moves ``2 (p - 1) / p * B`` per device, an all-gather half of that, and each starts with a latency.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from spmd_infer.axes import ATTN_KV_HEADS, AxisRules, axis_tuple
from spmd_infer.mesh import MeshSpec
from spmd_infer.planning.estimates import Memory, StepTime
from spmd_infer.planning.hardware import Cluster
from spmd_infer.planning.layout import WeightLayout
from spmd_infer.planning.work import Product, Reduction, Relabel, Value, Work, weight_label


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind along the same mesh axes.

    Attributes:
        count: how many there are in a step. XLA may combine several of them into one.
        nbytes: bytes of all their results on one device.
    """

    count: int = 0
    nbytes: int = 0


@dataclass(frozen=True)
class MeshCost:
    """What one mesh costs.

    Attributes:
        memory: bytes on the fullest device.
        time: estimated seconds of one step; None where no work is known.
        collectives: what is communicated in a step, by kind and mesh axes.
    """

    memory: Memory
    time: StepTime | None
    collectives: Mapping[tuple[str, tuple[str, ...]], Traffic]


class _Splits:
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


def cost_of(
    mesh: MeshSpec, rules: AxisRules, layouts: Sequence[WeightLayout], work: Work | None, cluster: Cluster
) -> MeshCost:
    """Estimate memory and time of one step.

    Args:
        mesh: the mesh.
        rules: where each logical axis goes.
        layouts: where each weight goes.
        work: what a step computes; None where the inputs are unknown.
        cluster: the devices.
    """
    splits = _Splits(rules, mesh.shape, layouts)
    weights = sum(layout.device_bytes for layout in layouts)
    if work is None:
        return MeshCost(Memory(weights, 0, 0, 0), None, {})
    device = cluster.device.running(cluster.count)
    share = cluster.count if device.shared else 1
    compute = moved = 0.0
    gathered = 0
    messages: list[_Message] = []
    for product in work.products:
        found = list(_of_product(product, splits))
        # Simulated devices gather all layers' weights early; accelerators one layer ahead of the one at work.
        alive = product.times if device.shared else min(2, product.times)
        gathered += sum(message.nbytes * alive for message in found if message.weight)
        messages += found
        rate = device.peak(product.left.dtype if product.right.weight else product.right.dtype)
        rate *= device.matmul_efficiency / share
        compute += product.times * product.flops / splits.parts(_working_axes(product, splits)) / rate
        read = (product.left,) if product.lookup else (product.left, product.right)
        moved += product.times * sum(splits.device_bytes(value) for value in (*read, product.out))
    for reduction in work.reductions:
        messages += _of_reduction(reduction, splits)
    for relabel in work.relabels:
        messages += _of_relabel(relabel, splits)
    talk = 0.0
    traffic: dict[tuple[str, tuple[str, ...]], Traffic] = {}
    for message in messages:
        talk += message.times * collective_time(message.kind, message.nbytes, mesh, message.axes, cluster)
        known = traffic.get((message.kind, message.axes), Traffic())
        traffic[message.kind, message.axes] = Traffic(
            known.count + message.times, known.nbytes + message.times * message.nbytes
        )
    caches = [value for value in work.inputs if is_cache(value)]
    arrays = [value for value in (*work.inputs, *work.outputs) if not is_cache(value)]
    memory = Memory(
        weights=weights,
        cache=sum(splits.device_bytes(value) for value in caches),
        activations=_peak(work, splits) + gathered,
        inputs=sum(splits.device_bytes(value) for value in arrays),
    )
    return MeshCost(
        memory, StepTime(compute, moved / (device.bandwidth * device.bandwidth_efficiency / share), talk), traffic
    )


def is_cache(value: Value) -> bool:
    """Whether an input or result is keys or values that stay on the devices between steps."""
    return ATTN_KV_HEADS in value.labels and len(value.shape) > 2


def reshard_time(
    values: Sequence[tuple[Value, int]], before: AxisRules, after: AxisRules, mesh: MeshSpec, cluster: Cluster
) -> float:
    """Seconds to move values from one layout to another on the same mesh: ``(value, how many such)`` each.

    What a device must receive is its new piece less what of it the device holds already, at link speed.
    """
    old, new = _Splits(before, mesh.shape, ()), _Splits(after, mesh.shape, ())
    received = 0.0
    for value, count in values:
        common = 1
        for ours, theirs in zip(old.of(value), new.of(value), strict=True):
            common *= old.parts(set(ours) | set(theirs))
        if old.of(value) != new.of(value):
            received += count * (new.device_bytes(value) - value.nbytes // common)
    crosses = cluster.count > cluster.domain
    speed = cluster.device.collective_bandwidth(received, leaves_domain=crosses) if received else 1.0
    return received / speed


@dataclass(frozen=True)
class _Message:
    """One collective: its kind, mesh axes and the bytes of its result on a device; how often; whether of a weight."""

    kind: str
    axes: tuple[str, ...]
    nbytes: int
    times: int
    weight: bool = False


def _working_axes(product: Product, splits: _Splits) -> set[str]:
    """The mesh axes over which a product's arithmetic is shared out."""
    axes = splits.axes(product.out)
    left, right = splits.of(product.left), splits.of(product.right)
    for a, b in product.summed_dimensions:
        axes |= set(left[a]) if a is not None else set()
        axes |= set(right[b])
    return axes


def _of_product(product: Product, splits: _Splits) -> Iterator[_Message]:
    """The communication that a product needs.

    A summed dimension that is split leaves partial sums: an all-reduce of the result. A mesh axis that already splits
    the result's rows cannot split the weight too: the weight is gathered first, one mesh axis after the other; keys and
    values that are split like the queries go around a ring instead. An operand that is split where the other one is
    whole is gathered. A convolution over a split dimension fetches the rows that its window needs from its neighbours.
    """
    left, right, out = splits.of(product.left), splits.of(product.right), splits.axes(product.out)
    reduced: list[str] = []
    gathered: list[str] = []
    fetched: list[str] = []
    rows = {axis for position, axes in enumerate(left) for axis in axes if position not in product.summed_left}
    for a, b in product.summed_dimensions:
        ours = left[a] if a is not None else ()
        gathered += [axis for axis in right[b] if axis in rows]
        reduced += [axis for axis in right[b] if axis not in rows]
        fetched += [axis for axis in ours if axis not in right[b] and not product.lookup]
    paired = {b for _, b in product.summed_dimensions} | set(product.batch_right)
    shared = rows & {axis for position, axes in enumerate(right) if position not in paired for axis in axes}
    size = splits.device_bytes(product.right)
    if product.lookup and not product.right.weight:
        shared = set()  # each row looks up its own
    for axis in dict.fromkeys([*gathered, *sorted(shared)]):
        if product.right.weight or product.lookup:
            size *= splits.parts([axis])
            yield _Message("all-gather", (axis,), size, product.times, weight=product.right.weight)
        else:
            yield _Message("collective-permute", (axis,), size, product.times * (splits.parts([axis]) - 1))
    for dimension, before, after in product.halos:
        for axis in left[dimension]:
            row = splits.device_bytes(product.left) * splits.parts(left[dimension]) // product.left.shape[dimension]
            for reach in (before, after):
                if reach:
                    yield _Message("collective-permute", (axis,), row * reach, product.times)
    size = splits.device_bytes(product.left)
    for axis in dict.fromkeys(fetched):
        size *= splits.parts([axis])
        yield _Message("all-gather", (axis,), size, product.times)
    summed = tuple(axis for axis in dict.fromkeys(reduced) if axis not in out)
    if summed:
        yield _Message("all-reduce", summed, splits.device_bytes(product.out), product.times)


def _of_reduction(reduction: Reduction, splits: _Splits) -> Iterator[_Message]:
    """A reduction over a split dimension: each device reduces its part, then an all-reduce of the result."""
    split = splits.of(reduction.value)
    axes = tuple(axis for dimension in reduction.dimensions for axis in split[dimension])
    if axes:
        yield _Message("all-reduce", axes, splits.device_bytes(reduction.out), reduction.times)


def _of_relabel(relabel: Relabel, splits: _Splits) -> Iterator[_Message]:
    """A constraint that moves a mesh axis from one dimension to another (all-to-all) or drops it (all-gather)."""
    before, after = splits.of(relabel.before), splits.of(relabel.after)
    wanted = splits.axes(relabel.after)
    size = splits.device_bytes(relabel.before)
    for ours, theirs in zip(before, after, strict=True):
        for axis in ours:
            if axis in theirs:
                continue
            if axis in wanted:
                yield _Message("all-to-all", (axis,), size, relabel.times)
            else:
                size *= splits.parts([axis])
                yield _Message("all-gather", (axis,), size, relabel.times)


def collective_time(kind: str, size: int, mesh: MeshSpec, axes: Sequence[str], cluster: Cluster) -> float:
    """Seconds of one ring collective along mesh axes.

    Args:
        kind: ``all-reduce``, ``all-gather``, ``reduce-scatter``, ``all-to-all`` or ``collective-permute``.
        size: bytes of the whole result on one device.
        mesh: the mesh.
        axes: the mesh axes along which devices talk.
        cluster: the devices.
    """
    device = cluster.device.running(cluster.count)
    parts = prod(mesh.shape[axis] for axis in axes)
    reach = inner = 1  # how many devices apart, in the mesh's order, the members of one group can be
    for name, length in reversed(mesh.sizes):
        inner *= length
        if name in axes:
            reach = inner
    domains = max(1, min(parts, -(-reach // cluster.domain)))
    moved = _VOLUME[kind](parts) * size
    bandwidth = device.collective_bandwidth(size, leaves_domain=domains > 1)
    return device.collective_latency(parts, domains) + moved / bandwidth


_VOLUME: Mapping[str, Callable[[int], float]] = {
    "all-reduce": lambda parts: 2 * (parts - 1) / parts,
    "all-gather": lambda parts: (parts - 1) / parts,
    "reduce-scatter": lambda parts: parts - 1,  # its result is one part of what travels
    "all-to-all": lambda parts: (parts - 1) / parts**2,
    "collective-permute": lambda parts: 1.0,
}


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
