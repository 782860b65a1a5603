"""Choosing among candidates: the best by the objective, the simplest of those that are as good, or why none works."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from spmd_infer.axes import DATA, MODEL
from spmd_infer.errors import DoesNotFitError, PlanError
from spmd_infer.mesh import MeshSpec
from spmd_infer.planning.estimates import RESERVE, Candidate, Memory, gigabytes
from spmd_infer.planning.hardware import Cluster
from spmd_infer.planning.workload import Workload

CLOSE = 0.02
"""Estimates that differ by less than this part count as equal; the simplest layout that splits least then wins."""


def score(candidate: Candidate, workload: Workload) -> float:
    """What the objective wants small."""
    if candidate.time is None:
        return 0.0
    if workload.objective == "latency":
        return candidate.time.total
    devices = candidate.mesh.size if workload.objective == "cost" else 1
    return candidate.time.total / max(1, candidate.rows) * devices


def choose(
    candidates: Sequence[Candidate],
    mesh: MeshSpec | None,
    workload: Workload,
    layouts: Sequence[str],
    model: str,
    cluster: Cluster,
) -> Candidate:
    """The best candidate (of the given mesh, if one is given); the simplest of those that are as good.

    Args:
        candidates: all of them.
        mesh: the caller's choice.
        workload: says what is best.
        layouts: names of layouts, the simplest first.
        model: its name.
        cluster: the devices.

    Raises:
        DoesNotFitError: none has enough memory.
        PlanError: none works for another reason.
    """
    wanted = [c for c in candidates if mesh is None or c.mesh == mesh]
    fitting = [c for c in wanted if not c.rejected]
    if fitting:
        best = min(score(c, workload) for c in fitting)
        close = [c for c in fitting if score(c, workload) <= best * (1 + CLOSE)]
        order = {name: number for number, name in enumerate(layouts)}
        return min(close, key=lambda c: (*_splits(c.mesh), order.get(c.layout, len(order))))
    smallest = min((c for c in wanted if c.memory.weights), key=lambda c: c.memory.total, default=None)
    if smallest is None or not smallest.rejected.startswith("does not fit"):
        raise PlanError("no mesh works: " + "; ".join(f"{c.mesh}, {c.layout}: {c.rejected}" for c in wanted))
    needed, size = smallest.memory.total, cluster.device.memory_bytes
    available = int(size * (1 - RESERVE))
    elsewhere = min((c for c in candidates if not c.rejected), key=lambda c: c.memory.total, default=None)
    # Devices over which the whole of it would spread, each with this memory.
    devices = -(-needed * smallest.mesh.size // available)
    advice = (
        f"mesh {elsewhere.mesh} would fit"
        if elsewhere is not None
        else f"use at least {devices} devices, a smaller dtype, or fewer rows"
    )
    raise DoesNotFitError(
        f"{model} does not fit on {cluster}: mesh {smallest.mesh} needs {needed:,} bytes a device "
        f"({memory_words(smallest.memory)}), {available:,} are available ({RESERVE:.0%} of {size:,} is kept free); "
        f"{advice}",
        needed_bytes=needed,
        available_bytes=available,
    )


def memory_words(memory: Memory) -> str:
    """The parts of a device's memory in words."""
    return (
        f"weights {gigabytes(memory.weights)}, cache {gigabytes(memory.cache)}, "
        f"activations {gigabytes(memory.activations)}, inputs and results {gigabytes(memory.inputs)}"
    )


def _splits(mesh: MeshSpec) -> tuple[int, int]:
    """How far from plain copies a mesh is: parts over axes besides data and model first, then over the model."""
    shape = mesh.shape
    return prod(size for axis, size in shape.items() if axis not in (DATA, MODEL)), shape.get(MODEL, 1)
