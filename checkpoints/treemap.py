"""A picture of where a checkpoint's bytes are: nested rectangles whose areas are bytes, as SVG or PNG.

Rectangles are laid out squarified (Bruls, Huizing and van Wijk 2000).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from spmd_infer.checkpoints.inspecting import Node
from spmd_infer.errors import CheckpointError

WIDTH, HEIGHT = 1200.0, 800.0
_HEADING = 16.0
_MOST_DEPTH = 4
_SMALLEST = 3.0  # sides below this many points are not divided further
_COLOURS = (
    "#4e79a7",
    "#f28e2b",
    "#59a14f",
    "#b07aa1",
    "#76b7b2",
    "#edc948",
    "#e15759",
    "#9c755f",
    "#ff9da7",
    "#bab0ac",
)


@dataclass(frozen=True)
class Tile:
    """One rectangle, in points from the upper left corner.

    Attributes:
        node: what it stands for.
        x: its left side.
        y: its upper side.
        width: its width.
        height: its height.
        depth: how deep it lies.
        colour: as ``#rrggbb``.
    """

    node: Node
    x: float
    y: float
    width: float
    height: float
    depth: int
    colour: str


def draw(tree: Node, path: Path) -> None:
    """Write the picture of a tree, as SVG or PNG by the path's ending.

    Raises:
        CheckpointError: the path ends in neither ``.svg`` nor ``.png``.
    """
    if path.suffix == ".svg":
        path.write_text(svg(tree), encoding="utf-8")
    elif path.suffix == ".png":
        _png(tree, path)
    else:
        raise CheckpointError(f"{path}: expected a name that ends in .svg or .png")


def tiles(tree: Node) -> Iterator[Tile]:
    """The rectangles of a tree, outer ones first."""
    yield from _divide(tree, 0.0, 0.0, WIDTH, HEIGHT, 0, "#ffffff")


def svg(tree: Node) -> str:
    """The picture as SVG, with the name and size of each rectangle as its tooltip."""
    size = f'viewBox="0 0 {WIDTH:g} {HEIGHT:g}"'
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">']
    for tile in tiles(tree):
        lines.append(
            f'<g><title>{escape(_label(tile.node))}</title><rect x="{tile.x:.1f}" y="{tile.y:.1f}" '
            f'width="{tile.width:.1f}" height="{tile.height:.1f}" fill="{tile.colour}" stroke="#ffffff"/>'
        )
        text = _fitting(tile)
        if text:
            lines.append(f'<text x="{tile.x + 3:.1f}" y="{tile.y + 12:.1f}">{escape(text)}</text>')
        lines.append("</g>")
    return "\n".join([*lines, "</svg>\n"])


def size_text(nbytes: float) -> str:
    """Bytes with a unit: ``1.5 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def _png(tree: Node, path: Path) -> None:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (int(WIDTH), int(HEIGHT)), "white")
    canvas = ImageDraw.Draw(image)
    for tile in tiles(tree):
        corner = (tile.x + max(0.0, tile.width - 1), tile.y + max(0.0, tile.height - 1))
        canvas.rectangle((tile.x, tile.y, *corner), fill=tile.colour, outline="white")
        text = _fitting(tile)
        if text:
            canvas.text((tile.x + 3, tile.y + 2), text, fill="black")
    image.save(path)


def _divide(node: Node, x: float, y: float, width: float, height: float, depth: int, colour: str) -> Iterator[Tile]:
    yield Tile(node, x, y, width, height, depth, colour)
    parts = sorted((part for part in node.parts if part.nbytes > 0), key=lambda part: -part.nbytes)
    if not parts or depth >= _MOST_DEPTH or min(width, height) < _SMALLEST:
        return
    heading = _HEADING if height > 3 * _HEADING else 0.0
    inset = 1.0 if min(width, height) > 12 else 0.0
    room = (x + inset, y + heading + inset, width - 2 * inset, height - heading - 2 * inset)
    for number, (part, place) in enumerate(zip(parts, _squarified(parts, *room), strict=True)):
        own = _COLOURS[number % len(_COLOURS)] if depth == 0 else _lighter(colour, 0.12)
        yield from _divide(part, *place, depth + 1, own)


def _squarified(
    parts: Sequence[Node], x: float, y: float, width: float, height: float
) -> list[tuple[float, float, float, float]]:
    """A rectangle for each part, largest first, as near to squares as rows along the shorter side make them."""
    scale = width * height / sum(part.nbytes for part in parts)
    areas = [part.nbytes * scale for part in parts]
    result: list[tuple[float, float, float, float]] = []
    first = 0
    while first < len(areas):
        side = max(min(width, height), 1e-9)
        last = first + 1
        while last < len(areas) and _worst(areas[first : last + 1], side) <= _worst(areas[first:last], side):
            last += 1
        thickness, along = sum(areas[first:last]) / side, 0.0
        for area in areas[first:last]:
            length = area / max(thickness, 1e-9)
            box = (x, y + along, thickness, length) if width >= height else (x + along, y, length, thickness)
            result.append(box)
            along += length
        if width >= height:
            x, width = x + thickness, max(0.0, width - thickness)
        else:
            y, height = y + thickness, max(0.0, height - thickness)
        first = last
    return result


def _worst(areas: Sequence[float], side: float) -> float:
    """The worst ratio of sides in a row of these areas."""
    total = max(sum(areas), 1e-9)
    return max(max(side**2 * area / total**2, total**2 / (side**2 * max(area, 1e-9))) for area in areas)


def _label(node: Node) -> str:
    return f"{node.name}, {size_text(node.nbytes)}"


def _fitting(tile: Tile) -> str:
    """As much of a tile's label as fits in it; empty where nothing sensible does."""
    letters = int(tile.width / 6.5)
    if tile.height < _HEADING or letters < 3:
        return ""
    text = _label(tile.node)
    return text if len(text) <= letters else tile.node.name[:letters]


def _lighter(colour: str, by: float) -> str:
    values = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return "#" + "".join(f"{int(value + (255 - value) * by):02x}" for value in values)
