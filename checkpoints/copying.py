"""Tensors streamed from a reader into a new checkpoint: bounded memory, progress, going on after a kill.

A few threads each read a band of a tensor into memory that they use again for the next one, digest it and write it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from spmd_infer.checkpoints import quantise
from spmd_infer.checkpoints.boxes import Box, box_shape, elements, part
from spmd_infer.checkpoints.derived import stored_chunks
from spmd_infer.checkpoints.file_bytes import Scratch
from spmd_infer.checkpoints.manifest import Chunk
from spmd_infer.checkpoints.pipeline import Pipeline
from spmd_infer.checkpoints.reader import Reader, TensorInfo, read_into, stream, takes_whole
from spmd_infer.checkpoints.remote import named, object_at
from spmd_infer.errors import CheckpointError

BUDGET_BYTES = 256 << 20
"""How many bytes of bands may be under way."""

SLACK_BYTES = 512 << 20
"""What bands under way, their casts and the interpreter may take beside tensors that must be held whole."""

Array = npt.NDArray[Any]
Advance = Callable[[int], None]
Check = tuple[int, Callable[[], None]]
"""Something to do, and how many bytes it reads."""


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
        largest_bytes: bytes of the largest tensor.
        peak_bytes: the most memory that the copy takes beyond the page cache.
    """

    tensors: int
    read_bytes: int
    write_bytes: int
    largest_bytes: int
    peak_bytes: int


class Writing(Protocol):
    """One tensor on its way into a new checkpoint."""

    @property
    def bands(self) -> Sequence[Box]:
        """Boxes that tile the tensor: in which pieces its values are wanted."""
        ...

    def put(self, band: Box, values: Array, known: Mapping[Box, Chunk] | None = None) -> None:
        """Write one band; called from several threads.

        Args:
            band: one of ``bands``.
            values: its values, in memory that is used again afterwards.
            known: chunks of the source with the same values, whose SHA-256 need not be computed again.
        """
        ...

    def streams(self, band: Box, dtype: np.dtype[Any]) -> bool:
        """Whether a band of this dtype may be written with ``put_blocks``."""
        ...

    def put_blocks(
        self, band: Box, blocks: Iterable[npt.NDArray[np.uint8]], known: Mapping[Box, Chunk] | None = None
    ) -> None:
        """Write one band from its bytes in C order, which come block by block in the same memory.

        Those of a known chunk have been compared with its digest once the last block has come.
        """
        ...


class Sink(Protocol):
    """Where tensors go, in a work folder; it remembers what a run before has finished."""

    @property
    def done(self) -> set[str]:
        """Tensors that need not be written again."""
        ...

    def checks(self, info: TensorInfo) -> Sequence[Check]:
        """What is to be done to compare what a run before wrote of a tensor with what it should be."""
        ...

    def begin(self, info: TensorInfo, known: Mapping[Box, Chunk]) -> Any:
        """Begin to write a tensor, of which the source has these chunks; returns its ``Writing``."""
        ...

    def end(self, info: TensorInfo, writing: Any) -> None:
        """Note that all of a tensor is written; called in the order of ``begin``."""
        ...


def plan_copy(reader: Reader, quantisation: Quantisation | None = None) -> CopyPlan:
    """What copying a checkpoint takes, from its header alone."""
    largest = written = held = 0
    for info in reader.tensors.values():
        memory = disk = info.size * info.dtype.itemsize
        group = quantisation.group_for(info) if quantisation else None
        if quantisation is not None and group is not None:
            values, scales = quantise.stored_shapes(quantisation.kind, info.shape, group)
            disk = prod(values) + prod(scales) * 4
        if takes_whole(reader, info.name):
            held = max(held, 2 * memory)
        largest, written = max(largest, memory), written + disk
    read = sum(info.nbytes for info in reader.tensors.values())
    return CopyPlan(len(reader.tensors), read, written, largest, held + SLACK_BYTES)


def copy_tensors(reader: Reader, sink: Sink, advance: Advance, only: Container[str] | None = None) -> None:
    """Write every tensor of a reader that the sink does not have yet, and compare those that it has.

    Args:
        reader: where from.
        sink: where to.
        advance: called with the bytes of each tensor, in its own dtype, when it has been written.
        only: names of the tensors to write, where it is not all of them.
    """
    scratch = Scratch()
    with Pipeline(BUDGET_BYTES, "checkpoint-copy") as line:
        for info in reader.tensors.values():
            if only is not None and info.name not in only:
                continue
            if info.name in sink.done:
                for nbytes, check in sink.checks(info):
                    line.run(nbytes, check)
                line.then(partial(advance, info.nbytes))
                continue
            known = stored_chunks(reader, info.name)
            writing = sink.begin(info, known)
            if takes_whole(reader, info.name):
                line.run(2 * _bytes(info), partial(_move_whole, reader, info, writing))
            else:
                for band in writing.bands:
                    nbytes = elements(band) * info.dtype.itemsize
                    line.run(nbytes, partial(_move, reader, info, writing, band, scratch, known))
            line.then(partial(_ended, sink, info, writing, advance))


def _move(
    reader: Reader, info: TensorInfo, writing: Writing, band: Box, scratch: Scratch, known: Mapping[Box, Chunk]
) -> None:
    blocks = stream(reader, info.name, band, scratch) if writing.streams(band, info.dtype) else None
    if blocks is not None:
        writing.put_blocks(band, blocks, known)
        return
    values = scratch.take(box_shape(band), info.dtype)
    read_into(reader, info.name, band, values)
    writing.put(band, values, known)


def _move_whole(reader: Reader, info: TensorInfo, writing: Writing) -> None:
    tensor = reader.read(info.name)
    for band in writing.bands:
        writing.put(band, np.ascontiguousarray(part(tensor, band)))


def _ended(sink: Sink, info: TensorInfo, writing: Writing, advance: Advance) -> None:
    sink.end(info, writing)
    advance(info.nbytes)


def damaged_before(error: CheckpointError, work: Path) -> CheckpointError:
    """What is said where a run before left something that is not what it should be."""
    return CheckpointError(f"{error}; a run before this one wrote it: remove {work} to begin anew")


def work_key(reader: Reader, options: Mapping[str, Any]) -> str:
    """Identifies a piece of work: the same source, unchanged, with the same options."""
    files = sorted({info.file for info in reader.tensors.values()})
    facts: list[Any] = [named(reader.path), dict(options)]
    for file in files:
        if object_at(file) is not None:
            facts.append([named(file), file.stat().st_size])
        elif file.is_file():
            facts.append([str(file), file.stat().st_size, file.stat().st_mtime_ns])
    facts.append([[name, list(info.shape), info.dtype.name] for name, info in reader.tensors.items()])
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _bytes(info: TensorInfo) -> int:
    return info.size * info.dtype.itemsize
