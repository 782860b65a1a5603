"""What a step costs on a mesh: memory of the fullest device, and a roofline time with collectives.

The time is ``max(arithmetic / peak rate, bytes / bandwidth) + collectives``, or the sum of all three on simulated
devices, whose cores do not compute while they wait for memory; a ring all-reduce of B bytes over p devices moves
``2 (p - 1) / p * B`` per device, an all-gather half of that, and each starts with a latency.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from spmd_infer.axes import ATTN_KV_HEADS, AxisRules
from spmd_infer.mesh import MeshSpec
from spmd_infer.planning.buffers import Effect, peak_bytes
from spmd_infer.planning.estimates import Memory, StepTime
from spmd_infer.planning.hardware import Cluster
from spmd_infer.planning.layout import WeightLayout
from spmd_infer.planning.messages import Message, completion, of_product, of_reduction, of_relabel, of_window
from spmd_infer.planning.splits import Splits
from spmd_infer.planning.values import Product, Relabel, Value
from spmd_infer.planning.windows import spelled_out
from spmd_infer.planning.work import Work


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


def cost_of(
    mesh: MeshSpec,
    rules: AxisRules,
    layouts: Sequence[WeightLayout],
    work: Work | None,
    cluster: Cluster,
    *,
    early_gathers: bool | None = None,
) -> MeshCost:
    """Estimate memory and time of one step.

    Args:
        mesh: the mesh.
        rules: where each logical axis goes.
        layouts: where each weight goes.
        work: what a step computes; None where the inputs are unknown.
        cluster: the devices.
        early_gathers: whether all weights that must be gathered are so as the step begins; by default on simulated
            devices, whose scheduler starts whatever can start, and not on accelerators.
    """
    splits = Splits(rules, mesh.shape, layouts)
    weights = sum(layout.device_bytes for layout in layouts)
    if work is None:
        return MeshCost(Memory(weights, 0, 0, 0), None, {})
    device = cluster.device.running(cluster.count)
    share = cluster.count if device.shared else 1
    compute = moved = 0.0
    messages: list[Message] = []
    for product in work.products:
        messages += of_product(product, splits)
        rate = device.peak(product.left.dtype if product.right.weight else product.right.dtype)
        rate *= device.matmul_efficiency / share
        compute += product.times * product.flops / splits.parts(_working_axes(product, splits)) / rate
        read = (product.left,) if product.lookup else (product.left, product.right)
        moved += product.times * sum(splits.device_bytes(value) for value in (*read, product.out))
    for reduction in work.reductions:
        messages += of_reduction(reduction, splits)
    for relabel in work.relabels:
        messages += of_relabel(relabel, splits)
    for window in work.windows:
        messages += of_window(window, splits)
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
        activations=_activations(work, splits, early_gathers=device.shared if early_gathers is None else early_gathers),
        inputs=sum(splits.device_bytes(value) for value in arrays),
    )
    reading = moved / (device.bandwidth * device.bandwidth_efficiency / share)
    return MeshCost(memory, StepTime(compute, reading, talk, overlaps=not device.shared), traffic)


def _activations(work: Work, splits: Splits, *, early_gathers: bool) -> int:
    """The most bytes of intermediate results, gathered weights among them, on a device at once."""
    if work.flow is None:
        return 0
    values, padded = work.flow.values, work.flow.padded
    known: dict[Product | Relabel, Effect] = {}

    def effects(item: Product | Relabel) -> Effect:
        found = known.get(item)
        if found is None:
            found = known[item] = _effect(item, splits)
        return found

    def size(value: int) -> int:
        inner = padded.get(value)
        if inner is None:
            return splits.device_bytes(values[value])
        return size(inner) * values[value].nbytes // max(1, values[inner].nbytes)

    flow, size_of = spelled_out(work.flow, size, lambda window: completion(window, splits))
    return peak_bytes(flow, size_of, effects, early_gathers=early_gathers)


def _effect(item: Product | Relabel, splits: Splits) -> Effect:
    if isinstance(item, Relabel):
        return Effect(moves=any(True for _ in of_relabel(item, splits)))
    found = list(of_product(item, splits))
    return Effect(
        reduced=next((message.axes for message in found if message.kind == "all-reduce"), ()),
        fetched=sum(m.nbytes for m in found if m.kind != "all-reduce" and not m.weight),
        weight=max((message.nbytes for message in found if message.weight), default=0),
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
    old, new = Splits(before, mesh.shape, ()), Splits(after, mesh.shape, ())
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


def _working_axes(product: Product, splits: Splits) -> set[str]:
    """The mesh axes over which a product's arithmetic is shared out."""
    axes = splits.axes(product.out)
    left, right = splits.of(product.left), splits.of(product.right)
    for a, b in product.summed_dimensions:
        axes |= set(left[a]) if a is not None else set()
        axes |= set(right[b])
    return axes


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
