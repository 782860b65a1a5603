"""A plan in words, as tables, and as a picture of one weight on the mesh."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from jax.sharding import PartitionSpec

from spmd_infer.axes import axis_tuple
from spmd_infer.planning.estimates import Candidate, Memory, gigabytes
from spmd_infer.planning.outcome import PlanOutcome
from spmd_infer.planning.tensor_search import TensorSearch
from spmd_infer.planning.weight_groups import WeightGroup, holders, pieces, weight_groups

SHOWN_CANDIDATES = 14
SHOWN_GROUPS = 8
SHOWN_CHANGES = 8
_BAR = 60
_LARGEST_PICTURE = 16


def explain(plan: PlanOutcome) -> str:
    """The plan for a terminal."""
    how = "given by the caller" if plan.given else "chosen"
    total = sum(layout.nbytes for layout in plan.weights)
    layout = f", {plan.chosen.layout}" if plan.chosen.layout else ""
    lines = [
        f"Plan for {plan.model} on {plan.cluster}: mesh {plan.mesh}{layout} ({how})",
        f"  traffic: {plan.workload}; weights: {gigabytes(total)} in {len(plan.weights)} tensors",
        *(f"  {line}" for line in _phases(plan.chosen)),
        "",
        *_memory(plan),
        "",
        *_table(plan),
    ]
    if plan.notes:
        lines += ["", *(f"  note: {note}" for note in plan.notes)]
    if plan.tensors is not None:
        lines += ["", *(f"  {line}" for line in tensor_search_words(plan.tensors))]
    groups = weight_groups(plan.weights)
    lines += ["", *_groups(groups)]
    shown = _shown(groups, plan)
    if shown is not None:
        lines += ["", *_picture(plan, shown)]
    return "\n".join(lines)


def memory_parts(memory: Memory) -> dict[str, int]:
    """The parts of a device's memory by name."""
    return {
        "weights": memory.weights,
        "cache": memory.cache,
        "activations": memory.activations,
        "inputs": memory.inputs,
    }


def milliseconds(seconds: float) -> str:
    """A time in the unit that reads best."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def tensor_search_words(search: TensorSearch) -> list[str]:
    """What a search over un-annotated weights came to: the gain, then what it moved."""
    tried = (
        f"{search.evaluations} layouts estimated{'' if search.finished else ', and more left when the budget ended'}"
    )
    if not search.changes:
        return [f"un-annotated weights lie as the default rule says: nothing that was tried is faster ({tried})"]
    (slow, fast), (before, after), (many, few) = search.seconds, search.memory, search.collectives
    gain = f"{milliseconds(slow)} -> {milliseconds(fast)}, {many} -> {few} collectives"
    room = f"{gigabytes(before)} -> {gigabytes(after)} a device"
    lines = [f"un-annotated weights, against the default rule: {gain}, {room} ({tried})"]
    for change in search.changes[:SHOWN_CHANGES]:
        size = " x ".join(map(str, change.shape))
        moved = f"{split_words(change.before)} -> {split_words(change.after)}"
        lines.append(f"  {change.pattern} x{change.count} ({size}): {moved}")
    rest = search.changes[SHOWN_CHANGES:]
    if rest:
        lines.append(f"  and {sum(change.count for change in rest)} weights of {len(rest)} smaller kinds")
    return lines


def split_words(spec: PartitionSpec) -> str:
    """``model along dimension 1``, or ``whole``."""
    parts = [f"{','.join(axis_tuple(e))} along dimension {d}" for d, e in enumerate(spec) if e is not None]
    return " and ".join(parts) or "whole"


def _phases(candidate: Candidate) -> Iterator[str]:
    for phase in candidate.phases:
        time = phase.time
        times = f" x {phase.times}" if phase.times > 1 else ""
        worked = f"compute {milliseconds(time.compute)}", f"memory {milliseconds(time.memory)}"
        limits = f"max({', '.join(worked)})" if time.overlaps else " + ".join(worked)
        talk = f"collectives {milliseconds(time.collectives)} ({phase.collectives})"
        yield f"{phase.name}{times}: {milliseconds(time.total)} a step = {limits} + {talk}"
    if candidate.switch:
        yield f"moving between layouts: {milliseconds(candidate.switch)}"


def _memory(plan: PlanOutcome) -> list[str]:
    """A bar of one device's memory."""
    memory, size = plan.chosen.memory, plan.cluster.device.memory_bytes
    reserve = size - plan.available
    parts = memory_parts(memory) | {"free": max(0, size - reserve - memory.total), "reserve": reserve}
    marks = {"weights": "#", "cache": "=", "activations": "+", "inputs": ":", "free": ".", "reserve": "r"}
    bar, done = "", 0
    for name, part in parts.items():
        done += part
        bar += marks[name] * (round(_BAR * done / max(size, done)) - len(bar))
    said = ", ".join(f"{marks[name]} {name} {gigabytes(part)}" for name, part in parts.items() if part)
    lines = [f"  memory of a device ({gigabytes(size)}): {said}", f"  |{bar}|"]
    if plan.chosen.most_rows:
        lines.append(f"  room for {plan.chosen.most_rows:,} rows at once")
    return lines


def _table(plan: PlanOutcome) -> list[str]:
    names = [phase.name for phase in plan.chosen.phases]
    phases = names if len(names) > 1 else []
    rows = [("mesh", "layout", "weights", "cache", "activations", "total/device", *phases, "time", "")]
    ordered = sorted(plan.candidates, key=too_large)
    for candidate in ordered[:SHOWN_CANDIDATES]:
        memory, time = candidate.memory, candidate.time
        by_name = {phase.name: milliseconds(phase.time.total) for phase in candidate.phases}
        rows.append(
            (
                ("> " if candidate is plan.chosen else "  ") + str(candidate.mesh),
                layout_words(candidate),
                gigabytes(memory.weights),
                gigabytes(memory.cache) if memory.cache else "-",
                gigabytes(memory.activations) if time else "-",
                gigabytes(memory.total),
                *(by_name.get(name, "-") for name in phases),
                milliseconds(time.total) if time else "-",
                ("chosen" if not plan.given else "given") if candidate is plan.chosen else candidate.rejected,
            )
        )
    lines = _columns(rows, left=(0, 1, len(rows[0]) - 1))
    rest = ordered[SHOWN_CANDIDATES:]
    if rest:
        short = sum(map(too_large, rest))
        lines.append(f"    and {len(rest)} more, of which {short} do not fit; --json and --html list them")
    return lines


def layout_words(candidate: Candidate) -> str:
    """The layout; of a pipeline also the part of the time that a stage idles."""
    idle = f", idle {candidate.pipeline.bubble:.0%}" if candidate.pipeline is not None else ""
    return candidate.layout + idle


def too_large(candidate: Candidate) -> bool:
    """Whether it was rejected for want of memory."""
    return candidate.rejected.startswith("does not fit")


def _groups(groups: Sequence[WeightGroup]) -> list[str]:
    rows = [("weights", "", "each, with the mesh axes that split it", "on a device")]
    rows += [(g.pattern, f"x{g.count}", g.words(), gigabytes(g.device_bytes)) for g in groups[:SHOWN_GROUPS]]
    rest = groups[SHOWN_GROUPS:]
    if rest:
        rows.append(
            (
                f"{len(rest)} smaller kinds",
                f"x{sum(group.count for group in rest)}",
                "",
                gigabytes(sum(group.device_bytes for group in rest)),
            )
        )
    return _columns(rows, left=(0, 2))


def _columns(rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines


def _shown(groups: Sequence[WeightGroup], plan: PlanOutcome) -> WeightGroup | None:
    """The weight to draw: the largest matrix that is split into most pieces."""
    matrices = [g for g in groups if len(g.shape) == 2 and max(pieces(g, plan.mesh)) <= _LARGEST_PICTURE]
    return max(matrices, key=lambda group: (group.parts, group.nbytes), default=None)


def _picture(plan: PlanOutcome, weight: WeightGroup) -> list[str]:
    """How one matrix lies on the devices: its rows and columns cut into pieces, each naming who holds it."""
    mesh = plan.mesh
    down, across = pieces(weight, mesh)
    held = holders(weight, mesh)
    cells = [[device_names(held[row, column]) for column in range(across)] for row in range(down)]
    width = max(len(cell) for row in cells for cell in row) + 2
    rule = "+" + "+".join("-" * width for _ in range(across)) + "+"
    axes = weight.axes or ("rows", "columns")
    named = " x ".join(f"{size} {axis or ''}".strip() for size, axis in zip(weight.shape, axes, strict=True))
    each = weight.nbytes // weight.count // weight.parts
    said = f"{weight.parts} pieces of {gigabytes(each)}, each on {mesh.size // weight.parts} device(s)"
    lines = [f"  {weight.pattern} ({named}): {said}", f"  {rule}"]
    for row in cells:
        lines += ["  |" + "|".join(cell.center(width) for cell in row) + "|", f"  {rule}"]
    return lines


def device_names(devices: Sequence[int]) -> str:
    """``device 3``, ``devices 3,7`` or ``devices 0-7,16``."""
    runs = []
    for _, run in groupby(enumerate(devices), key=lambda pair: pair[1] - pair[0]):
        numbers = [device for _, device in run]
        runs += [f"{numbers[0]}-{numbers[-1]}"] if len(numbers) > 2 else [str(number) for number in numbers]
    return f"device{'s' * (len(devices) > 1)} {','.join(runs)}"


def mesh_words(shape: Mapping[str, int]) -> str:
    """``data=2,model=4``."""
    return ",".join(f"{axis}={size}" for axis, size in shape.items())
