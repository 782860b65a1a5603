"""Data files on their way to the disk: written by several threads, read back, and then let go.

A checkpoint may be larger than the memory, so what has been written is not kept in the page cache: it is read back
while it is there, the kernel is told to write it, and its pages are used again for what comes next. Pages that were not
used lately cost more than copying into them, in virtual machines several times as much.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spmd_infer.checkpoints import digests
from spmd_infer.checkpoints.file_bytes import Scratch
from spmd_infer.errors import CheckpointError

WINDOW_BYTES = 256 << 20
"""How much of what has been settled may be on its way to the disk before its pages are asked back."""

_CAN_LET_GO = hasattr(os, "posix_fadvise")


class OutputFiles:
    """Files of a folder that are there, open for positioned writes; safe to use from several threads.

    The kernel lets one thread at a time write to a file and has the others wait by spinning, which took a quarter of
    the processors' time. Here they wait asleep, so that a core is free for a thread that has digests to compute.

    Args:
        folder: where they are.
        keep: leave what has been settled in the page cache: it is read again soon.
    """

    def __init__(self, folder: Path, *, keep: bool = False) -> None:
        self._folder, self._keep = folder, keep
        self._open: dict[str, tuple[int, threading.Lock]] = {}
        self._lock = threading.Lock()
        self._leaving: deque[tuple[int, int, int]] = deque()
        self._leaving_bytes = 0
        self._scratch = Scratch()

    def write(self, name: str, offset: int, raw: npt.NDArray[Any]) -> None:
        """Write all of some bytes at a place."""
        descriptor, turn = self._file(name)
        view, done = raw.data, 0
        with turn:
            while done < len(view):
                done += os.pwrite(descriptor, view[done:], offset + done)

    def settle(self, name: str, offset: int, nbytes: int, blake3: str, tensor: str) -> None:
        """Read back what was written at a place, compare it, and have the disk take it.

        Args:
            name: the file.
            offset: where it begins.
            nbytes: how many bytes.
            blake3: what their BLAKE3 should be.
            tensor: which tensor they belong to.

        Raises:
            CheckpointError: they are not what was written.
        """
        descriptor, _ = self._file(name)
        digest, block = digests.new("blake3"), self._scratch.take((digests.BLOCK_BYTES,), np.uint8)
        done = 0
        while done < nbytes:
            count = os.preadv(descriptor, [block.data[: nbytes - done]], offset + done)
            if count == 0:
                break
            digest.update(block.data[:count])
            done += count
        if digest.hexdigest() != blake3:
            raise CheckpointError(
                f"{self._folder / name}: tensor {tensor!r}: bytes {offset} to {offset + nbytes} have BLAKE3 "
                f"{digest.hexdigest()}, but {blake3} was written: the disk or memory may be failing"
            )
        if _CAN_LET_GO and not self._keep:
            self._let_go(descriptor, offset, nbytes)

    def close(self) -> None:
        """Close the files."""
        self._leaving.clear()
        while self._open:
            os.close(self._open.popitem()[1][0])

    def _file(self, name: str) -> tuple[int, threading.Lock]:
        with self._lock:
            found = self._open.get(name)
            if found is None:
                found = os.open(self._folder / name, os.O_RDWR | os.O_CLOEXEC), threading.Lock()
                self._open[name] = found
            return found

    def _let_go(self, descriptor: int, offset: int, nbytes: int) -> None:
        """Give up pages: what is not yet on the disk begins to be written by this, and is asked for again later."""
        os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)
        with self._lock:
            self._leaving.append((descriptor, offset, nbytes))
            self._leaving_bytes += nbytes
            gone = []
            while self._leaving_bytes > WINDOW_BYTES:
                gone.append(self._leaving.popleft())
                self._leaving_bytes -= gone[-1][2]
        for place in gone:
            os.posix_fadvise(*place, os.POSIX_FADV_DONTNEED)
