"""Whether a checkpoint is whole: every byte where there are digests, and values that no weight should have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from spmd_infer.checkpoints.boxes import Box, as_slices, box_shape, pieces, whole
from spmd_infer.checkpoints.file_bytes import FileBytes, Scratch
from spmd_infer.checkpoints.manifest import DTYPES, ArrayEntry, Chunk
from spmd_infer.checkpoints.native_reader import NativeReader, chunk_blocks
from spmd_infer.checkpoints.pipeline import Pipeline
from spmd_infer.checkpoints.reader import Reader, TensorInfo, takes_whole
from spmd_infer.errors import CheckpointError

_BLOCK_BYTES = 16 << 20
_BUDGET_BYTES = 256 << 20


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a checkpoint.

    Attributes:
        file: where.
        tensor: which tensor; empty where no single one is.
        what: what is wrong, in words.
        offset: the byte in the file at which the damaged part begins; None where it is not known.
        kind: ``damaged``, ``values`` or ``dtype``.
    """

    file: Path
    tensor: str
    what: str
    offset: int | None = None
    kind: str = "damaged"

    def __str__(self) -> str:
        return self.what


def verify(
    reader: Reader, *, dtype: str | None = None, advance: Callable[[int], None] = lambda count: None
) -> list[Problem]:
    """Everything that is wrong with a checkpoint that could be opened.

    All bytes are read. Those of a native checkpoint are compared with their digests; a checkpoint of another format has
    none, so that only values that are not numbers and the dtypes can be told.

    Args:
        reader: the open checkpoint.
        dtype: the dtype that its floats should have.
        advance: called with the bytes of each tensor when it has been checked.
    """
    if isinstance(reader, NativeReader):
        problems = verify_native(reader, advance=advance)
        return [*problems, *_dtype_problems(reader, dtype)]
    problems = []
    for info in reader.tensors.values():
        problems.extend(_value_problems(reader, info))
        advance(info.nbytes)
    return [*problems, *_dtype_problems(reader, dtype)]


def _dtype_problems(reader: Reader, dtype: str | None) -> Iterator[Problem]:
    for info in reader.tensors.values():
        if dtype is not None and info.dtype.name != dtype and _is_float(info.dtype):
            yield Problem(info.file, info.name, f"{info}; expected {dtype}", kind="dtype")


def verify_native(reader: NativeReader, *, advance: Callable[[int], None] = lambda count: None) -> list[Problem]:
    """Chunks of a native checkpoint whose bytes do not match their SHA-256, and numbers that are not finite.

    Of a quantised tensor, the numbers are what is stored of it.
    """
    owners = {part: name for name, entry in reader.manifest.quantised.items() for part in (entry.values, entry.scales)}
    problems, wrong = verify_chunks(reader.manifest.arrays, reader.files, values=True, advance=advance)
    for name, places in wrong.items():
        info = reader.tensors[owners.get(name, name)]
        problems.append(_values_problem(info, sum(count for count, _ in places), min(place for _, place in places)))
    return problems


NotFinite = dict[str, list[tuple[int, tuple[int, ...]]]]
"""For each array with numbers that are not finite: how many there are in a block, and where its first one is."""


def verify_chunks(
    arrays: Mapping[str, ArrayEntry],
    files: Sequence[FileBytes],
    *,
    values: bool = False,
    advance: Callable[[int], None] = lambda count: None,
) -> tuple[list[Problem], NotFinite]:
    """Compare the bytes of every chunk with their SHA-256, in several threads.

    Args:
        arrays: the arrays.
        files: their data files.
        values: also look for numbers that are not finite, where the bytes are right.
        advance: called with the bytes of each array when it has been checked.
    """
    problems: list[Problem] = []
    wrong: NotFinite = {}
    scratch = Scratch()

    def check(name: str, chunk: Chunk) -> None:
        dtype = DTYPES[arrays[name].dtype]
        look = values and _may_be_infinite(dtype)
        here = []
        try:
            memory = scratch.take((files[chunk.file].block_bytes,), np.uint8)
            for start, block in chunk_blocks(files[chunk.file], name, chunk, "sha256", memory):
                found = _not_finite(block.view(dtype)) if look else None
                if found is not None:
                    here.append((found[0], _place(chunk.box, start // dtype.itemsize + found[1])))
        except CheckpointError as error:
            problems.append(Problem(files[chunk.file].path, name, str(error), chunk.offset))
        else:
            if here:
                wrong.setdefault(name, []).extend(here)

    with Pipeline(_BUDGET_BYTES, "checkpoint-verify") as line:
        for name, entry in sorted(arrays.items(), key=_begin_of):
            for chunk in entry.chunks:
                line.run(chunk.nbytes, partial(check, name, chunk))
            line.then(partial(advance, sum(chunk.nbytes for chunk in entry.chunks)))
    return problems, wrong


def _begin_of(item: tuple[str, ArrayEntry]) -> tuple[int, int]:
    return min(((chunk.file, chunk.offset) for chunk in item[1].chunks), default=(0, 0))


def _value_problems(reader: Reader, info: TensorInfo) -> Iterator[Problem]:
    """Values of a tensor that are not finite, and damage that shows only on reading."""
    bad = 0
    first: tuple[int, ...] | None = None
    try:
        for box in _boxes(reader, info):
            values = reader.read(info.name, as_slices(box))
            found = _not_finite(values) if _may_be_infinite(info.dtype) else None
            if found is not None:
                bad += found[0]
                first = first or _place(box, found[1])
    except CheckpointError as error:
        yield Problem(info.file, info.name, str(error))
        return
    if first is not None:
        yield _values_problem(info, bad, first)


def _values_problem(info: TensorInfo, count: int, first: tuple[int, ...]) -> Problem:
    return Problem(
        info.file,
        info.name,
        f"{info}: {count} of {info.size} values are not finite, the first at {list(first)}",
        kind="values",
    )


def _not_finite(values: npt.NDArray[Any]) -> tuple[int, int] | None:
    """How many values are not finite, and the first one's number; None where all are."""
    wrong = ~_finite(values)
    return (int(wrong.sum()), int(np.argmax(wrong))) if wrong.any() else None


def _place(box: Box, number: int) -> tuple[int, ...]:
    """Where in its tensor an element of a box lies."""
    place = np.unravel_index(number, box_shape(box))
    return tuple(int(p) + start for p, (start, _) in zip(place, box, strict=True))


def _finite(values: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    if values.dtype == ml_dtypes.bfloat16:  # numpy's own test would widen each number
        exponent = np.uint16(0x7F80)
        return np.asarray((values.view(np.uint16) & exponent) != exponent)
    if values.dtype.kind not in "fc":  # float8
        values = values.astype(np.float32)
    return np.asarray(np.isfinite(values))


def _boxes(reader: Reader, info: TensorInfo) -> Iterator[Box]:
    if takes_whole(reader, info.name):
        return iter([whole(info.shape)])
    # Values are looked at as float32, so blocks are counted in those.
    return pieces(whole(info.shape), max(4, info.dtype.itemsize), _BLOCK_BYTES)


def _may_be_infinite(dtype: np.dtype[Any]) -> bool:
    return _is_float(dtype) or dtype.kind == "c"


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" or dtype.name.startswith(("bfloat", "float"))
