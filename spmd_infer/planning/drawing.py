"""The SVG drawings of a plan's page. Colours are classes that the page's style sheet fills in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, sqrt

from spmd_infer.mesh import MeshSpec
from spmd_infer.planning.explain import device_names
from spmd_infer.planning.weight_groups import WeightGroup, coordinates, holders, pieces

_COLOURS = 4
_WIDTH = 960


@dataclass(frozen=True)
class Part:
    """One part of a bar.

    Attributes:
        name: what it is.
        number: how much of it.
        colour: which of the page's colours.
    """

    name: str
    number: float
    colour: int


def shares(
    parts: Sequence[Part],
    whole: float,
    height: int,
    title: str,
    words: Callable[[float], str],
    *,
    width: int = _WIDTH,
    label: bool = False,
) -> str:
    """A horizontal bar; what exceeds ``whole`` is cut off.

    Args:
        parts: from left to right.
        whole: what the full width stands for.
        height: of the bar.
        title: for readers who cannot see it.
        words: a number as text.
        width: of the whole drawing.
        label: write name and number of the (single) part next to the bar.
    """
    left = 210 if label else 0
    room = width - left
    boxes, x = [], 0.0
    for part in parts:
        wide = min(room - x, room * part.number / whole) if whole else 0.0
        if wide > 0.3:
            boxes.append(
                f'<rect class="p{part.colour}" x="{left + x:.1f}" y="0" width="{wide:.1f}" height="{height}">'
                f"<title>{escape(part.name)}: {escape(words(part.number))}</title></rect>"
            )
        x += max(0.0, wide)
    said = ""
    if label:
        said = (
            f'<text x="0" y="{height - 2}">{escape(parts[0].name)}</text>'
            f'<text x="{left - 12}" y="{height - 2}" text-anchor="end">{escape(words(parts[0].number))}</text>'
        )
    frame = "" if label or width < _WIDTH else f'<rect class="b" x="0" y="0" width="{width}" height="{height}"/>'
    return _svg(width, height + (4 if label else 0), frame + "".join(boxes) + said, title)


def legend(parts: Sequence[Part], words: Callable[[float], str] | None) -> str:
    """The names of parts with their colours, and their numbers."""
    said = [f"{part.name} {words(part.number)}" if words else part.name for part in parts]
    items = [
        f'<span><i class="p{part.colour}"></i> {escape(name)}</span>' for part, name in zip(parts, said, strict=True)
    ]
    return f'<div class="legend">{"".join(items)}</div>'


def mesh_picture(shape: Mapping[str, int], per_host: int, domain: int) -> str:
    """Devices as squares within frames for hosts, link domains as brackets above them.

    Devices stand in the mesh's order; colour and letter say which part along the last axis a device holds.
    """
    axes = list(shape)
    size = 1
    for length in shape.values():
        size *= length
    per_host = min(per_host, size)
    hosts = ceil(size / per_host)
    cell = 34 if size <= 32 else 24 if size <= 128 else 15
    across = min(per_host, max(4, ceil(sqrt(per_host))) if per_host > 16 else per_host)
    down = ceil(per_host / across)
    wide, high = across * cell + 16, down * cell + 34
    columns = max(1, min(hosts, (_WIDTH + 14) // (wide + 14)))
    rows = ceil(hosts / columns)
    brackets = 16 if domain > per_host else 0
    parts = []
    last = axes[-1] if axes else ""
    for host in range(hosts):
        x0, y0 = (host % columns) * (wide + 14), (host // columns) * (high + 14 + brackets) + brackets
        parts.append(f'<rect class="b" x="{x0}" y="{y0}" width="{wide}" height="{high}" rx="6"/>')
        parts.append(f'<text class="s" x="{x0 + 8}" y="{y0 + 17}">host {host}</text>')
        for local in range(min(per_host, size - host * per_host)):
            device = host * per_host + local
            place = coordinates(device, shape)
            part = place.get(last, 0)
            x, y = x0 + 8 + (local % across) * cell, y0 + 25 + (local // across) * cell
            where = ", ".join(f"{axis} {place[axis]}" for axis in axes)
            parts.append(
                f'<rect class="p{part % _COLOURS} e" x="{x}" y="{y}" width="{cell - 3}" height="{cell - 3}" rx="3">'
                f"<title>device {device}: {escape(where)}</title></rect>"
            )
            if cell >= 24:
                named = device if shape.get(last, 1) == 1 else _letter(part)
                parts.append(
                    f'<text class="o" x="{x + (cell - 3) / 2}" y="{y + (cell - 3) / 2 + 4}" text-anchor="middle">'
                    f"{named}</text>"
                )
        if brackets:
            first = host * per_host % domain == 0
            ends = (host + 1) * per_host % domain == 0 or host == hosts - 1
            reach = wide + (0 if ends or host % columns == columns - 1 else 14)
            tick = f"M{x0} {y0 - 4}v-6" if first else f"M{x0} {y0 - 10}"
            parts.append(f'<path class="k" d="{tick}h{reach}{"v6" if ends else ""}"/>')
    said = ", ".join(f"{axis} {length}" for axis, length in shape.items())
    title = f"{size} devices on {hosts} hosts: {said}"
    width = min(_WIDTH, columns * (wide + 14) - 14)
    return _svg(max(width, columns * (wide + 14) - 14), rows * (high + 14 + brackets), "".join(parts), title)


def weight_picture(group: WeightGroup, mesh: MeshSpec) -> str:
    """A weight's first two dimensions, cut into the pieces that devices hold."""
    cuts = pieces(group, mesh)
    held = holders(group, mesh)
    down, across = [*cuts, 1, 1][:2] if len(cuts) != 1 else (1, cuts[0])
    rows = group.shape[0] if group.shape else 1
    columns = group.shape[1] if len(group.shape) > 1 else max(1, rows // 12)
    ratio = min(3.0, max(0.4, sqrt(rows / max(1, columns))))
    width, height = 240, int(min(150, max(44, 90 * ratio))) if len(group.shape) > 1 else 22
    boxes = []
    for row in range(down):
        for column in range(across):
            at = (column,) if len(cuts) == 1 else tuple((row, column, *(0,) * len(cuts))[: len(cuts)])
            devices = held.get(at, [])
            x, y = width * column / across, height * row / down
            wide, high = width / across, height / down
            colour = (row * across + column) % _COLOURS if down * across > 1 else 5
            boxes.append(
                f'<rect class="p{colour} e" x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{high:.1f}">'
                f"<title>{escape(device_names(devices)) if devices else ''}</title></rect>"
            )
            text = device_names(devices).split(" ")[-1] if devices else ""
            if high >= 13 and len(text) * 7 + 4 <= wide:
                middle = f'x="{x + wide / 2:.1f}" y="{y + high / 2 + 4:.1f}"'
                kind = "o" if down * across > 1 else "w"
                boxes.append(f'<text class="{kind}" {middle} text-anchor="middle">{text}</text>')
    return _svg(width, height + 4, "".join(boxes), f"{group.pattern}: {group.words()}")


def _letter(number: int) -> str:
    return chr(ord("a") + number) if number < 26 else str(number)


def _svg(width: float, height: float, body: str, title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img"><title>{escape(title)}</title>{body}</svg>'
    )
