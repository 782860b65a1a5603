"""Tensors streamed from a reader into a new checkpoint: bounded memory, progress, going on after a kill.

While one tensor is written the next is read, as long as both together stay within the largest tensor plus a little.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from spmd_infer.checkpoints import quantise
from spmd_infer.checkpoints.boxes import Box, as_slices, pieces, whole
from spmd_infer.checkpoints.derived import piecewise, takes_whole
from spmd_infer.checkpoints.file_bytes import aligned_empty
from spmd_infer.checkpoints.reader import Reader, TensorInfo
from spmd_infer.errors import CheckpointError

AHEAD_BYTES = 256 << 20
"""How far memory may exceed the largest tensor so that the next one can be read ahead."""

SLACK_BYTES = 256 << 20
"""What chunks under way, hashing and the interpreter are allowed beside the tensors."""

_BLOCK_BYTES = 16 << 20
Array = npt.NDArray[Any]
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Quantisation:
    """How weights are made small on the way.

    Attributes:
        kind: one of ``quantise.KINDS``.
        group: for ``int4``, how many numbers share a scale; the largest divisor of a row up to it is taken.
    """

    kind: str
    group: int = quantise.DEFAULT_GROUP

    def __post_init__(self) -> None:
        if self.kind not in quantise.KINDS:
            raise CheckpointError(f"cannot quantise to {self.kind!r}; known are {', '.join(quantise.KINDS)}")

    def group_for(self, info: TensorInfo) -> int | None:
        """The group size for a tensor; None where it is not quantised."""
        if not quantise.worth_quantising(info.name, info.shape, info.dtype):
            return None
        group = quantise.fitting_group(self.kind, info.shape[-1], self.group)
        return None if self.kind == "int4" and group == 0 else group


@dataclass(frozen=True)
class CopyPlan:
    """What a copy will take.

    Attributes:
        tensors: how many tensors there are.
        read_bytes: bytes that are read from the source.
        write_bytes: bytes that are written, and so disk space that is needed.
        largest_bytes: bytes of the largest tensor in memory.
        peak_bytes: the most memory that the copy takes beyond the page cache.
    """

    tensors: int
    read_bytes: int
    write_bytes: int
    largest_bytes: int
    peak_bytes: int

    def seconds(self, read_rate: float, write_rate: float, check_rate: float) -> float:
        """How long it takes at these rates in bytes per second: reading while writing, then the check at the end."""
        return max(self.read_bytes / read_rate, self.write_bytes / write_rate) + self.write_bytes / check_rate


class Sink(Protocol):
    """Where tensors go, in a work folder; it remembers what a run before has finished."""

    @property
    def done(self) -> set[str]:
        """Tensors that need not be written again."""
        ...

    def write(self, info: TensorInfo, values: Callable[[Box], Array]) -> None:
        """Write one tensor from a function that gives its values in a box."""
        ...


def plan_copy(reader: Reader, quantisation: Quantisation | None = None) -> CopyPlan:
    """What copying a checkpoint takes, from its header alone."""
    largest = written = 0
    for info in reader.tensors.values():
        memory, disk = info.size * info.dtype.itemsize, info.size * info.dtype.itemsize
        group = quantisation.group_for(info) if quantisation else None
        if quantisation is not None and group is not None:
            values, scales = quantise.stored_shapes(quantisation.kind, info.shape, group)
            disk = prod(values) + prod(scales) * 4
            memory += disk
        if takes_whole(reader, info.name):
            memory *= 2
        largest, written = max(largest, memory), written + disk
    read = sum(info.nbytes for info in reader.tensors.values())
    return CopyPlan(len(reader.tensors), read, written, largest, largest + AHEAD_BYTES + SLACK_BYTES)


def copy_tensors(reader: Reader, sink: Sink, advance: Advance) -> None:
    """Write every tensor of a reader that the sink does not have yet.

    Args:
        reader: where from.
        sink: where to.
        advance: called with the bytes of each tensor, in its own dtype, when it has been written.
    """
    todo = []
    for info in reader.tensors.values():
        if info.name in sink.done:
            advance(info.nbytes)
        else:
            todo.append(info)
    largest = max((_bytes(info) for info in todo), default=0)
    with ThreadPoolExecutor(1, thread_name_prefix="checkpoint-read") as ahead:
        upcoming = None
        for position, info in enumerate(todo):
            tensor = upcoming.result() if upcoming is not None else _whole(reader, info)
            following = todo[position + 1] if position + 1 < len(todo) else None
            upcoming = None
            if following is not None and _bytes(info) + _bytes(following) <= largest + AHEAD_BYTES:
                upcoming = ahead.submit(_whole, reader, following)
            sink.write(info, _held(tensor))
            del tensor
            advance(info.nbytes)


def blocks(info: TensorInfo) -> Iterator[Box]:
    """A tensor in blocks of whole rows, for work that needs a row at a time."""
    rows = info.shape[:-1]
    row_bytes = max(1, info.shape[-1] * 4)
    for box in pieces(whole(rows), row_bytes, _BLOCK_BYTES):
        yield (*box, (0, info.shape[-1]))


def work_key(reader: Reader, options: Mapping[str, Any]) -> str:
    """Identifies a piece of work: the same source, unchanged, with the same options."""
    files = sorted({info.file for info in reader.tensors.values()})
    facts: list[Any] = [str(reader.path.resolve()), dict(options)]
    facts += [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
    facts.append([[name, list(info.shape), info.dtype.name] for name, info in reader.tensors.items()])
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _held(tensor: Array) -> Callable[[Box], Array]:
    return lambda box: tensor[as_slices(box)]


def _bytes(info: TensorInfo) -> int:
    return info.size * info.dtype.itemsize


def _whole(reader: Reader, info: TensorInfo) -> Array:
    """A tensor in memory: in one read where that is what it takes, else piece by piece so that casts stay small."""
    if takes_whole(reader, info.name) or not piecewise(reader, info.name):
        return reader.read(info.name)
    out = aligned_empty(info.shape, info.dtype)
    for box in pieces(whole(info.shape), info.dtype.itemsize, _BLOCK_BYTES):
        np.copyto(out[as_slices(box)], reader.read(info.name, as_slices(box)))
    return out
