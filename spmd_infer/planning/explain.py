"""A plan in words, as a table, as a picture of one weight on the mesh, and as plain data."""

from __future__ import annotations

from typing import Any

from spmd_infer.planning.layout import WeightLayout
from spmd_infer.planning.mesh_plan import Candidate, MeshPlan
from spmd_infer.planning.search import gigabytes


def explain(plan: MeshPlan) -> str:
    """The plan for a terminal."""
    how = "given by the caller" if plan.given else "chosen"
    total = sum(layout.nbytes for layout in plan.weights)
    lines = [
        f"Plan for {plan.model} on {plan.cluster}: mesh {plan.mesh} ({how})",
        f"  traffic: {plan.workload}; weights: {gigabytes(total)} in {len(plan.weights)} tensors",
        "",
        *_table(plan),
    ]
    if plan.notes:
        lines += ["", *(f"  note: {note}" for note in plan.notes)]
    weight = _shown(plan)
    if weight is not None:
        lines += ["", *_picture(plan, weight)]
    return "\n".join(lines)


def to_dict(plan: MeshPlan) -> dict[str, Any]:
    """The plan as plain data."""
    return {
        "model": plan.model,
        "devices": {"kind": plan.cluster.device.name, "count": plan.cluster.count, "hosts": plan.cluster.hosts},
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
                "spec": [list(e) if isinstance(e, tuple) else e for e in layout.spec],
                "bytes_per_device": layout.device_bytes,
            }
            for layout in plan.weights
        ],
    }


def _candidate(candidate: Candidate) -> dict[str, Any]:
    memory, time = candidate.memory, candidate.time
    return {
        "mesh": candidate.mesh.shape,
        "memory_bytes": {
            "weights": memory.weights,
            "cache": memory.cache,
            "activations": memory.activations,
            "inputs": memory.inputs,
            "total": memory.total,
        },
        "seconds": None
        if time is None
        else {"compute": time.compute, "memory": time.memory, "collectives": time.collectives, "total": time.total},
        "collectives": candidate.collectives,
        "rejected": candidate.rejected or None,
    }


def _table(plan: MeshPlan) -> list[str]:
    rows = [("mesh", "weights", "cache", "activations", "total/device", "step", "collectives a step", "")]
    for candidate in plan.candidates:
        memory, time = candidate.memory, candidate.time
        rows.append(
            (
                ("> " if candidate is plan.chosen else "  ") + str(candidate.mesh),
                gigabytes(memory.weights),
                gigabytes(memory.cache) if memory.cache else "-",
                gigabytes(memory.activations) if time else "-",
                gigabytes(memory.total),
                f"{time.total * 1e3:.2f} ms" if time else "-",
                candidate.collectives if time else "-",
                ("chosen" if not plan.given else "given") if candidate is plan.chosen else candidate.rejected,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        cells = [row[0].ljust(widths[0] + 2 * (number == 0))[: widths[0]]]
        cells += [cell.rjust(width) for cell, width in zip(row[1:6], widths[1:6], strict=True)]
        cells += [row[6].ljust(widths[6]), row[7]]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines


def _shown(plan: MeshPlan) -> WeightLayout | None:
    """The weight to draw: the largest matrix that is split into most pieces."""
    matrices = [layout for layout in plan.weights if len(layout.shape) == 2]
    return max(matrices, key=lambda layout: (layout.parts, layout.nbytes), default=None)


def _picture(plan: MeshPlan, weight: WeightLayout) -> list[str]:
    """How one matrix lies on the devices: its rows and columns cut into pieces, each naming who holds it."""
    mesh = plan.mesh
    entries = [*weight.spec, *(None,) * (2 - len(weight.spec))]
    down, across = (mesh.shape.get(entry, 1) if isinstance(entry, str) else 1 for entry in entries)
    holders: dict[tuple[int, int], list[int]] = {}
    for device in range(mesh.size):
        place, rest = {}, device
        for name, size in reversed(mesh.sizes):
            rest, place[name] = divmod(rest, size)
        key = tuple(place[entry] if isinstance(entry, str) and entry in place else 0 for entry in entries)
        holders.setdefault((key[0], key[1]), []).append(device)
    cells = [[_names(holders[row, column]) for column in range(across)] for row in range(down)]
    width = max(len(cell) for row in cells for cell in row) + 2
    rule = "+" + "+".join("-" * width for _ in range(across)) + "+"
    axes = weight.axes or ("rows", "columns")
    named = " x ".join(f"{size} {axis or ''}".strip() for size, axis in zip(weight.shape, axes, strict=True))
    pieces = f"{weight.parts} pieces of {gigabytes(weight.device_bytes)}, each on {mesh.size // weight.parts} device(s)"
    lines = [f"  {weight.path} ({named}): {pieces}", f"  {rule}"]
    for row in cells:
        lines += ["  |" + "|".join(cell.center(width) for cell in row) + "|", f"  {rule}"]
    return lines


def _names(devices: list[int]) -> str:
    return "device " + ",".join(map(str, devices)) if len(devices) == 1 else "devices " + ",".join(map(str, devices))
