"""The collectives that XLA really put into a program, read off its HLO: what a layout must be held to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from jax.sharding import Mesh

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

_INSTRUCTION = re.compile(rf"= (?P<shape>.*?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(")
_ARRAY = re.compile(r"\b(?P<dtype>pred|[a-z]+\d+(?:e\d+m\d+\w*)?)\[(?P<sizes>[\d,]*)\]")
_LISTED = re.compile(r"replica_groups=\{(?P<groups>\{[\d,{}]*\})\}")
_TILED = re.compile(r"replica_groups=\[(?P<shape>[\d,]+)\]<=\[(?P<source>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?")
# Newer XLA names axes of a mesh of its own: mesh['axis_0'=1,'axis_1'=4] {'axis_1'}. The mesh may order the devices as
# an iota, and a group may run along a factor of an axis: {'axis_0':(2)4}, the factor of size 4 within blocks of 2.
_NAMED = re.compile(
    r"replica_groups=mesh\[(?P<sizes>[^\]]*)\]"
    r"(?:, device_ids=\((?P<devices>[^)]*(?:T\([\d,]+\))?)\))? \{(?P<axes>[^}]*)\}"
)
_PAIRS = re.compile(r"source_target_pairs=\{(?P<pairs>\{[\d,{}]*\})\}")


@dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
        kind: one of ``KINDS``.
        nbytes: bytes of its result on one device.
        groups: the devices that talk with each other, by position in the mesh; for a permute its (source, target)
            pairs.
    """

    kind: str
    nbytes: int
    groups: tuple[tuple[int, ...], ...]

    @property
    def group_size(self) -> int:
        """Devices in one group."""
        return max((len(group) for group in self.groups), default=0)

    def axes(self, mesh: Mesh) -> tuple[str, ...]:
        """The mesh axes along which devices talk: those whose coordinate differs within a group."""
        grid = np.unravel_index(np.arange(mesh.devices.size), mesh.devices.shape)
        groups = self.groups or (tuple(range(mesh.devices.size)),)
        return tuple(
            str(name)
            for name, coordinate in zip(mesh.axis_names, grid, strict=True)
            if any(len(set(coordinate[list(group)].tolist())) > 1 for group in groups)
        )


def collectives(program: Any) -> list[Collective]:
    """Every collective of a compiled program.

    Args:
        program: HLO text, or anything with ``as_text()`` (``jax.stages.Compiled``).

    Returns:
        In program order. One inside a loop's body counts once.
    """
    text = program if isinstance(program, str) else program.as_text()
    return [found for line in text.splitlines() if (found := collective_in(line)) is not None]


def collective_in(line: str) -> Collective | None:
    """The collective that a line of HLO text is; None where it is something else."""
    match = _INSTRUCTION.search(line)
    if match is None:
        return None
    return Collective(match["kind"], _result_bytes(match["shape"], bool(match["start"])), _groups(line))


def summary(found: Iterable[Collective], mesh: Mesh) -> str:
    """Collectives in words: ``"61 all-reduce over model (1.2 MB)"``; ``"none"`` where there are none."""
    counts: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for collective in found:
        key = (collective.kind, ",".join(collective.axes(mesh)))
        counts[key] += 1
        sizes[key] += collective.nbytes
    parts = [f"{count} {kind} over {axes} ({sizes[kind, axes] / 1e6:.2f} MB)" for (kind, axes), count in counts.items()]
    return ", ".join(parts) or "none"


def _result_bytes(shape: str, started: bool) -> int:
    """Bytes of an instruction's result; a started one returns (operands, results), of which the last half counts."""
    arrays = [
        prod(int(size) for size in match["sizes"].split(",") if size) * _itemsize(match["dtype"])
        for match in _ARRAY.finditer(shape)
    ]
    return sum(arrays[len(arrays) // 2 :] if started and len(arrays) > 1 else arrays)


def _itemsize(dtype: str) -> int:
    if dtype == "pred":
        return 1
    bits = int(re.sub(r"^[a-z]+", "", dtype).split("e")[0])
    return max(1, bits // 8)


def _groups(line: str) -> tuple[tuple[int, ...], ...]:
    listed = _LISTED.search(line) or _PAIRS.search(line)
    if listed is not None:
        return tuple(tuple(int(n) for n in group.split(",")) for group in re.findall(r"\{([\d,]+)\}", listed.group(1)))
    named = _NAMED.search(line)
    if named is not None:
        return _named_groups(named["sizes"], named["devices"], named["axes"])
    tiled = _TILED.search(line)
    if tiled is None:
        return ()
    source = [int(n) for n in tiled["source"].split(",")]
    devices = np.arange(prod(source)).reshape(source)
    if tiled["order"]:
        devices = devices.transpose([int(n) for n in tiled["order"].split(",")])
    rows = devices.reshape([int(n) for n in tiled["shape"].split(",")])
    return tuple(tuple(int(n) for n in row) for row in rows)


def _named_groups(sizes: str, order: str | None, axes: str) -> tuple[tuple[int, ...], ...]:
    """Groups along named axes of a mesh, or along factors of them."""
    shape: dict[str, int] = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    wanted = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    factors: list[int] = []
    along: list[bool] = []
    for name, size in shape.items():
        cuts = sorted((int(before or 1), int(factor or size)) for axis, before, factor in wanted if axis == name)
        done = 1
        for before, factor in cuts:
            factors += [before // done, factor]
            along += [False, True]
            done = before * factor
        factors.append(size // done)
        along.append(False)
    kept = [i for i, is_along in enumerate(along) if not is_along]
    moved = [i for i, is_along in enumerate(along) if is_along]
    devices = _ordered(order, prod(shape.values())).reshape(factors).transpose(kept + moved)
    rows = devices.reshape(-1, prod(factors[i] for i in moved))
    return tuple(tuple(int(n) for n in row) for row in rows)


def _ordered(order: str | None, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Devices in the order that a mesh lists them: an iota of some shape, maybe transposed, or a plain list."""
    if order is None:
        return np.arange(count)
    iota = re.fullmatch(r"\[(?P<shape>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?", order)
    if iota is None:
        return np.array([int(n) for n in order.split(",")])
    devices = np.arange(count).reshape([int(n) for n in iota["shape"].split(",")])
    if iota["order"]:
        devices = devices.transpose([int(n) for n in iota["order"].split(",")])
    return devices.reshape(-1)
