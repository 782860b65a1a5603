"""Slices of arrays that lie in a file, each read with no more than its own bytes.

Reads are positioned (``pread``) into fresh memory rather than through a memory map: nothing that is returned aliases
the file, a file that shrinks while it is read gives an error instead of killing the process, and pages of the file
do not count as the process's memory.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spmd_infer.checkpoints.remote import object_at
from spmd_infer.errors import CheckpointError

_ALIGNMENT = 64  # what XLA asks of host memory that it takes over without a copy
_WORTH_MAPPING = 4 << 20  # bytes from which NumPy asks for huge pages
_CAN_MAP = hasattr(mmap, "MAP_ANONYMOUS")
_WORTH_SKIPPING = 4096  # bytes between two runs from which a second read is cheaper than reading through
_CHUNK = 4 << 20  # bytes of scratch memory for runs that are read through


def aligned_empty(shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Fresh memory for an array, aligned so that a device on the host can take it over without a copy.

    Large arrays get small pages of their own: NumPy asks for huge ones, for which the kernel first has to make room
    among the pages of the files that are read. Loading 8 GB took half as long again with them.
    """
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes >= _WORTH_MAPPING and _CAN_MAP:
        mapped = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return np.frombuffer(mapped, np.uint8).view(dtype).reshape(tuple(shape))
    memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + nbytes].view(dtype).reshape(tuple(shape))


class Scratch(threading.local):
    """Memory that each thread uses again and again: fresh memory costs the system more than reading a file does."""

    def __init__(self) -> None:
        self._memory = aligned_empty((0,), np.uint8)

    def take(self, shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Memory for an array; what was taken before in this thread must no longer be used."""
        dtype = np.dtype(dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        if self._memory.size < nbytes:
            self._memory = aligned_empty((nbytes,), np.uint8)
        return self._memory[:nbytes].view(dtype).reshape(tuple(shape))


class FileBytes:
    """A file open for positioned reads; safe to use from several threads.

    Attributes:
        path: the file.
        size: its size in bytes when it was opened.
        block_bytes: how many bytes are best read at a time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._remote = object_at(path)
        self.block_bytes, self._gap, self._chunk = 1 << 20, _WORTH_SKIPPING, _CHUNK
        if self._remote is not None:
            self.size = self._remote.size
            self.block_bytes = self._gap = self._chunk = 16 << 20
            return
        try:
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from error
        weakref.finalize(self, os.close, self._descriptor)
        self.size = os.fstat(self._descriptor).st_size

    def fill(self, target: npt.NDArray[np.uint8], offset: int) -> None:
        """Read as many bytes as ``target`` holds, from ``offset`` on.

        Raises:
            CheckpointError: the file ends before, or cannot be read.
        """
        view = target.data.cast("B") if target.size else memoryview(b"")
        if self._remote is not None:
            view[:] = self._remote.read(offset, len(view)) if len(view) else b""
            return
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"{self.path}: reading at byte {offset + done} failed: {error}") from error
            if count == 0:
                raise CheckpointError(
                    f"{self.path}: ends at byte {offset + done}, but {len(view)} bytes from {offset} on were expected; "
                    f"it had {self.size} bytes when it was opened"
                )
            done += count

    def stream(self, offset: int, count: int, scratch: Scratch) -> Iterator[npt.NDArray[np.uint8]]:
        """Read ``count`` bytes block by block, each into the same memory."""
        memory = scratch.take((self.block_bytes,), np.uint8)
        for start in range(0, count, self.block_bytes):
            block = memory[: count - start]
            self.fill(block, offset + start)
            yield block

    def head(self, count: int, offset: int = 0) -> bytes:
        """Up to ``count`` bytes from ``offset`` on; fewer where the file ends."""
        target = np.empty(max(0, min(count, self.size - offset)), np.uint8)
        self.fill(target, offset)
        return target.tobytes()

    def read(
        self, offset: int, shape: Sequence[int], dtype: npt.DTypeLike, wanted: Sequence[tuple[int, int]]
    ) -> npt.NDArray[Any]:
        """A box of an array that lies in C order from ``offset`` on, in fresh memory; see ``read_into``."""
        out = aligned_empty([stop - start for start, stop in wanted], dtype)
        self.read_into(offset, shape, wanted, out)
        return out

    def read_into(
        self, offset: int, shape: Sequence[int], wanted: Sequence[tuple[int, int]], out: npt.NDArray[Any]
    ) -> None:
        """Read a box of an array that lies in C order from ``offset`` on.

        Args:
            offset: where in the file the array's first element is.
            shape: the whole array's shape.
            wanted: start and stop in each dimension.
            out: where to; C-ordered, of the box's shape and the array's dtype.
        """
        if out.size == 0:
            return
        dtype = out.dtype
        flat = out.reshape(-1).view(np.uint8)
        strides = [math.prod(shape[d + 1 :]) * dtype.itemsize for d in range(len(shape))]
        base = offset + sum(start * stride for (start, _), stride in zip(wanted, strides, strict=True))
        # Dimensions behind the last one that is cut lie in one run with it.
        cut = max((d for d, (start, stop) in enumerate(wanted) if stop - start != shape[d]), default=0)
        if not shape or cut == 0:
            self.fill(flat, base)
            return
        run = (wanted[cut][1] - wanted[cut][0]) * strides[cut]
        if strides[cut - 1] - run >= self._gap:
            self._read_runs(flat, base, run, [stop - start for start, stop in wanted[:cut]], strides[:cut])
        else:
            self._read_through(flat, base, run, [stop - start for start, stop in wanted[:cut]], strides[:cut])

    def _read_runs(
        self, flat: npt.NDArray[np.uint8], base: int, run: int, counts: list[int], strides: list[int]
    ) -> None:
        for position, outer in enumerate(itertools.product(*map(range, counts))):
            at = base + sum(i * stride for i, stride in zip(outer, strides, strict=True))
            self.fill(flat[position * run : (position + 1) * run], at)

    def _read_through(
        self, flat: npt.NDArray[np.uint8], base: int, run: int, counts: list[int], strides: list[int]
    ) -> None:
        rows, stride = counts[-1], strides[-1]
        many = max(1, min(rows, self._chunk // stride))
        scratch = np.empty(many * stride, np.uint8)
        done = 0
        for outer in itertools.product(*map(range, counts[:-1])):
            at = base + sum(i * s for i, s in zip(outer, strides[:-1], strict=True))
            for first in range(0, rows, many):
                count = min(many, rows - first)
                span = scratch[: (count - 1) * stride + run]  # the last row ends where its run ends
                self.fill(span, at + first * stride)
                target = flat[done : done + count * run].reshape(count, run)
                np.copyto(target, np.lib.stride_tricks.as_strided(span, (count, run), (stride, 1)))
                done += count * run
