"""A plan as plain data, for ``--json``."""

from __future__ import annotations

from typing import Any

from jax.sharding import PartitionSpec

from spmd_infer.planning.estimates import Candidate, Pipeline, StepTime
from spmd_infer.planning.explain import memory_parts
from spmd_infer.planning.outcome import PlanOutcome
from spmd_infer.planning.tensor_search import TensorSearch


def to_dict(plan: PlanOutcome) -> dict[str, Any]:
    """The plan as plain data."""
    device = plan.cluster.device
    return {
        "model": plan.model,
        "devices": {"kind": device.name, "count": plan.cluster.count, "hosts": plan.cluster.hosts},
        "hardware": {
            "link_domain": plan.cluster.domain,
            "memory_bytes": device.memory_bytes,
            "plannable_bytes": plan.available,
            "memory_bytes_per_s": device.bandwidth,
            "link_bytes_per_s": device.link,
            "network_bytes_per_s": device.network,
            "flops": dict(device.flops),
            "source": device.source,
        },
        "traffic": plan.workload,
        "mesh": plan.mesh.shape,
        "given": plan.given,
        "candidates": [_candidate(candidate) for candidate in plan.candidates],
        "notes": list(plan.notes),
        "weights": [
            {
                "path": layout.path,
                "shape": list(layout.shape),
                "dtype": str(layout.dtype),
                "axes": list(layout.axes) if layout.axes is not None else None,
                "spec": _spec(layout.spec),
                "bytes_per_device": layout.device_bytes,
            }
            for layout in plan.weights
        ],
        "tensor_search": None if plan.tensors is None else _search(plan.tensors),
    }


def _spec(spec: PartitionSpec) -> list[Any]:
    return [list(entry) if isinstance(entry, tuple) else entry for entry in spec]


def _search(search: TensorSearch) -> dict[str, Any]:
    def pair(values: tuple[float, float]) -> dict[str, float]:
        return {"default_rule": values[0], "found": values[1]}

    return {
        "seconds": pair(search.seconds),
        "memory_bytes": pair(search.memory),
        "collectives": pair(search.collectives),
        "evaluations": search.evaluations,
        "finished": search.finished,
        "changes": [
            {
                "weights": change.pattern,
                "count": change.count,
                "shape": list(change.shape),
                "default_rule": _spec(change.before),
                "found": _spec(change.after),
            }
            for change in search.changes
        ],
    }


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {
        "mesh": candidate.mesh.shape,
        "layout": candidate.layout,
        "memory_bytes": {**memory_parts(candidate.memory), "total": candidate.memory.total},
        "seconds": None if candidate.time is None else _seconds(candidate.time),
        "phases": [
            {
                "name": phase.name,
                "layout": phase.layout,
                "times": phase.times,
                "seconds": _seconds(phase.time),
                "collectives": phase.collectives,
            }
            for phase in candidate.phases
        ],
        "switch_seconds": candidate.switch,
        "rows": candidate.rows,
        "most_rows": candidate.most_rows,
        "collectives": candidate.collectives,
        "pipeline": None if candidate.pipeline is None else _pipeline(candidate.pipeline),
        "rejected": candidate.rejected or None,
    }


def _pipeline(pipeline: Pipeline) -> dict[str, float]:
    return {
        "stages": pipeline.stages,
        "layers_per_stage": pipeline.depth,
        "microbatches": pipeline.microbatches,
        "ticks": pipeline.ticks,
        "bubble_share": pipeline.bubble,
    }


def _seconds(time: StepTime) -> dict[str, float]:
    return {"compute": time.compute, "memory": time.memory, "collectives": time.collectives, "total": time.total}
