"""Writing the data files of a native checkpoint, chunk by chunk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from spmd_infer.checkpoints.boxes import Box, box_shape, elements, pieces
from spmd_infer.checkpoints.casting import cast
from spmd_infer.checkpoints.file_bytes import aligned_empty
from spmd_infer.checkpoints.manifest import CHUNK_BYTES, DATA_FOLDER, DTYPES, ArrayEntry, Chunk, StoredFile, data_digest
from spmd_infer.errors import CheckpointError

FILE_BYTES = 4 << 30
"""A data file that has reached this size is followed by another."""

_WORKERS = 2
_UNDER_WAY = 4

Array = npt.NDArray[Any]


class DataWriter:
    """Appends arrays to the data files of a folder, one series of files for each host.

    Args:
        folder: the checkpoint's folder, or the one that will become it.
        steps: entries that a run before wrote, as ``add`` returned them; what lies behind them is cut off.
    """

    def __init__(self, folder: Path, steps: Iterable[tuple[str, ArrayEntry]] = ()) -> None:
        self._folder = folder
        self.arrays: dict[str, ArrayEntry] = dict(steps)
        self._names: list[str] = []
        self._sizes: list[int] = []
        self._current: dict[int, int] = {}  # the open file of each host
        self._descriptors: dict[int, int] = {}
        self._pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="checkpoint-write")
        (folder / DATA_FOLDER).mkdir(exist_ok=True)

    def resume(self, files: Sequence[str]) -> None:
        """Go on behind the arrays that were given as ``steps``, which lie in these files."""
        self._names = list(files)
        self._sizes = [0] * len(files)
        for entry in self.arrays.values():
            for chunk in entry.chunks:
                self._sizes[chunk.file] = max(self._sizes[chunk.file], chunk.offset + chunk.nbytes)
        for position, name in enumerate(self._names):
            with (self._folder / name).open("r+b") as file:
                file.truncate(self._sizes[position])
            self._current[int(name.rpartition("host-")[2].partition("-")[0])] = position

    @property
    def names(self) -> list[str]:
        """The data files so far."""
        return self._names

    def add(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        axes: tuple[str | None, ...] | None,
        boxes: Sequence[tuple[Box, int]],
        read: Callable[[Box], Array],
    ) -> ArrayEntry:
        """Write one array, or this process's boxes of it.

        Args:
            name: its name.
            shape: its whole shape.
            dtype: the dtype to store; values that ``read`` returns in another one are cast, checked to fit.
            axes: its logical axes.
            boxes: disjoint boxes, each with the host whose file it goes to.
            read: returns the values of a box; called from this thread.
        """
        if dtype.name not in DTYPES:
            raise CheckpointError(f"tensor {name!r} is {dtype.name}, which checkpoints cannot hold")
        chunks: list[Chunk] = []
        running: list[tuple[Future[str], Callable[[str], Chunk]]] = []

        def ended() -> None:
            future, made = running.pop(0)
            chunks.append(made(future.result()))

        try:
            for box, host in boxes:
                for piece in pieces(box, dtype.itemsize, CHUNK_BYTES):
                    position, offset = self._reserve(host, elements(piece) * dtype.itemsize)
                    if len(running) >= _UNDER_WAY:
                        ended()
                    values = _packed(read(piece), box_shape(piece), dtype, name)
                    future = self._pool.submit(self._write, position, offset, values)
                    start, stop = tuple(a for a, _ in piece), tuple(b for _, b in piece)
                    running.append((future, partial(Chunk, position, offset, values.nbytes, start, stop)))
                    del values
            while running:
                ended()
        finally:
            for future, _ in running:
                future.cancel()
        entry = ArrayEntry(shape, dtype.name, axes, tuple(chunks))
        self.arrays[name] = entry
        return entry

    def files(self) -> list[StoredFile]:
        """Size and digest of each data file, after closing them all."""
        self.close()
        held: list[list[Chunk]] = [[] for _ in self._names]
        for entry in self.arrays.values():
            for chunk in entry.chunks:
                held[chunk.file].append(chunk)
        return [
            StoredFile(name, size, data_digest(chunks))
            for name, size, chunks in zip(self._names, self._sizes, held, strict=True)
        ]

    def close(self) -> None:
        """Close the files."""
        self._pool.shutdown(wait=True)
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _reserve(self, host: int, nbytes: int) -> tuple[int, int]:
        """The file and offset for the next chunk of a host."""
        position = self._current.get(host)
        if position is None or self._sizes[position] >= FILE_BYTES:
            count = sum(f"host-{host:04d}-" in name for name in self._names)
            self._names.append(f"{DATA_FOLDER}/host-{host:04d}-{count:04d}.bin")
            self._sizes.append(0)
            position = self._current[host] = len(self._names) - 1
            (self._folder / self._names[position]).write_bytes(b"")
        offset = self._sizes[position]
        self._sizes[position] += nbytes
        return position, offset

    def _write(self, position: int, offset: int, values: Array) -> str:
        raw = values.reshape(-1).view(np.uint8).data
        digest = hashlib.sha256(raw).hexdigest()
        descriptor = self._descriptors.get(position)
        if descriptor is None:
            descriptor = os.open(self._folder / self._names[position], os.O_WRONLY | os.O_CLOEXEC)
            if self._descriptors.setdefault(position, descriptor) != descriptor:
                os.close(descriptor)
                descriptor = self._descriptors[position]
        done = 0
        while done < len(raw):
            done += os.pwrite(descriptor, raw[done:], offset + done)
        return digest


def journal_step(name: str, entry: ArrayEntry, files: Sequence[str]) -> dict[str, object]:
    """An array's entry as a journal's step."""
    return {"name": name, "entry": msgspec.to_builtins(entry), "files": list(files)}


def journal_entry(step: dict[str, Any]) -> tuple[str, ArrayEntry]:
    """The entry back from a journal's step."""
    return step["name"], msgspec.convert(step["entry"], ArrayEntry, strict=False)


def _packed(values: Array, shape: tuple[int, ...], dtype: np.dtype[Any], name: str) -> Array:
    """Values in C order and in the stored dtype; only copied where they are not."""
    if values.shape != shape:
        raise CheckpointError(f"tensor {name!r}: expected a piece of shape {list(shape)}, got {list(values.shape)}")
    if values.dtype == dtype and values.flags.c_contiguous:
        return values
    out = aligned_empty(shape, dtype)
    if values.dtype == dtype:
        np.copyto(out, values)
    else:
        cast(values, out, name)
    return out
