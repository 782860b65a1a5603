"""Whether a checkpoint is whole: every byte where there are digests, and values that no weight should have."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from spmd_infer.checkpoints.boxes import Box, as_slices, pieces, whole
from spmd_infer.checkpoints.native_reader import NativeReader
from spmd_infer.checkpoints.reader import Reader, TensorInfo
from spmd_infer.errors import CheckpointError

_BLOCK_BYTES = 16 << 20
_MOST_WORKERS = 4


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
        advance: called with the bytes of each piece when it has been checked: for a native checkpoint once for digests
            and once for values.
    """
    problems: list[Problem] = []
    damaged: set[str] = set()
    if isinstance(reader, NativeReader):
        problems = verify_native(reader, advance=advance)
        damaged = {problem.tensor for problem in problems}
    problems.extend(_tensor_problems(reader, damaged, dtype, advance))
    return problems


def _tensor_problems(
    reader: Reader, damaged: set[str], dtype: str | None, advance: Callable[[int], None]
) -> Iterator[Problem]:
    for info in reader.tensors.values():
        if dtype is not None and info.dtype.name != dtype and _is_float(info.dtype):
            yield Problem(info.file, info.name, f"{info}; expected {dtype}", kind="dtype")
        if info.name not in damaged:
            yield from _value_problems(reader, info)
        advance(info.nbytes)


def verify_native(reader: NativeReader, *, advance: Callable[[int], None] = lambda count: None) -> list[Problem]:
    """Chunks of a native checkpoint whose bytes do not match their digests, in several threads."""

    def check(item: tuple[str, Any]) -> tuple[int, Problem | None]:
        name, chunk = item
        try:
            reader.check_chunk(name, chunk)
        except CheckpointError as error:
            return chunk.nbytes, Problem(reader.file_of(chunk), name, str(error), chunk.offset)
        return chunk.nbytes, None

    chunks = sorted(
        ((name, chunk) for name, entry in reader.manifest.arrays.items() for chunk in entry.chunks),
        key=lambda item: (item[1].file, item[1].offset),
    )
    problems = []
    with ThreadPoolExecutor(max(1, min(_MOST_WORKERS, os.cpu_count() or 1))) as pool:
        for nbytes, problem in pool.map(check, chunks):
            advance(nbytes)
            if problem is not None:
                problems.append(problem)
    return problems


def _value_problems(reader: Reader, info: TensorInfo) -> Iterator[Problem]:
    """Values of a tensor that are not finite, and damage that shows only on reading."""
    try:
        if not _is_float(info.dtype) and info.dtype.kind != "c":
            for box in _boxes(info):
                reader.read(info.name, as_slices(box))
            return
        bad = 0
        first: tuple[int, ...] | None = None
        for box in _boxes(info):
            values = reader.read(info.name, as_slices(box))
            wrong = ~_finite(values)
            count = int(wrong.sum())
            if count and first is None:
                place = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
                first = tuple(int(p) + start for p, (start, _) in zip(place, box, strict=True))
            bad += count
    except CheckpointError as error:
        yield Problem(info.file, info.name, str(error))
        return
    if first is not None:
        yield Problem(
            info.file,
            info.name,
            f"{info}: {bad} of {info.size} values are not finite, the first at {list(first)}",
            kind="values",
        )


def _finite(values: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    if values.dtype == ml_dtypes.bfloat16:  # numpy's own test would widen each number
        exponent = np.uint16(0x7F80)
        return np.asarray((values.view(np.uint16) & exponent) != exponent)
    if values.dtype.kind not in "fc":  # float8
        values = values.astype(np.float32)
    return np.asarray(np.isfinite(values))


def _boxes(info: TensorInfo) -> Iterator[Box]:
    if not info.shape:
        yield ()
        return
    # Values are looked at as float32, so blocks are counted in those.
    yield from pieces(whole(info.shape), max(4, info.dtype.itemsize), _BLOCK_BYTES)


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" or dtype.name.startswith(("bfloat", "float"))
