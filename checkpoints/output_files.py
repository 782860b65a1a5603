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
"""How much of what has been let go may be on its way to the disk before its pages are asked back."""

_CAN_LET_GO = hasattr(os, "posix_fadvise")


class OutputFiles:
    """Files of a folder that are there, open for positioned writes; safe to use from several threads.

    The kernel lets one thread at a time write to a file and has the others wait by spinning, which took a quarter of
    the processors' time. Here they wait asleep, so that a core is free for a thread that has digests to compute.

    Args:
        folder: where they are.
        keep: leave what is let go in the page cache: it is read again soon.
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

    def write_compared(self, name: str, offset: int, raw: npt.NDArray[np.uint8], tensor: str) -> None:
        """Write all of some bytes at a place, read them back while a core's cache has them, and compare each.

        Args:
            name: the file.
            offset: where they begin.
            raw: the bytes; a block of about ``digests.BLOCK_BYTES``.
            tensor: which tensor they belong to.

        Raises:
            CheckpointError: they are not what was written.
        """
        self.write(name, offset, raw)
        back = self._scratch.take((raw.size,), np.uint8)
        done = self._read(name, offset, back)
        words = raw.size // 8 * 8  # eight bytes at a time, and what is left
        if (
            done == raw.size
            and np.array_equal(back[:words].view(np.uint64), raw[:words].view(np.uint64))
            and np.array_equal(back[words:], raw[words:])
        ):
            return
        at = done if done < raw.size else int(np.flatnonzero(back != raw)[0])
        found = f"is {back[at]:#04x}" if at < done else "is missing"
        raise CheckpointError(
            f"{self._folder / name}: tensor {tensor!r}: byte {offset + at} {found}, but {raw[at]:#04x} was written: "
            "the disk or memory may be failing"
        )

    def check(self, name: str, offset: int, nbytes: int, blake3: str, tensor: str) -> None:
        """Read what a run before wrote at a place and compare its digest; its pages are let go.

        Args:
            name: the file.
            offset: where it begins.
            nbytes: how many bytes.
            blake3: what their BLAKE3 should be.
            tensor: which tensor they belong to.

        Raises:
            CheckpointError: they are not what was written.
        """
        digest = digests.new("blake3")
        for start in range(0, nbytes, digests.BLOCK_BYTES):
            block = self._scratch.take((min(digests.BLOCK_BYTES, nbytes - start),), np.uint8)
            digest.update(block.data[: self._read(name, offset + start, block)])
        if digest.hexdigest() != blake3:
            raise CheckpointError(
                f"{self._folder / name}: tensor {tensor!r}: bytes {offset} to {offset + nbytes} have BLAKE3 "
                f"{digest.hexdigest()}, but {blake3} was written: the disk or memory may be failing"
            )
        self.let_go(name, offset, nbytes)

    def let_go(self, name: str, offset: int, nbytes: int) -> None:
        """Have the disk take what is at a place, and its pages serve for what comes next.

        What is not yet on the disk begins to be written by this, and is asked for again later.
        """
        if not _CAN_LET_GO or self._keep:
            return
        place = self._file(name)[0], offset, nbytes
        os.posix_fadvise(*place, os.POSIX_FADV_DONTNEED)
        with self._lock:
            self._leaving.append(place)
            self._leaving_bytes += nbytes
            gone = []
            while self._leaving_bytes > WINDOW_BYTES:
                gone.append(self._leaving.popleft())
                self._leaving_bytes -= gone[-1][2]
        for place in gone:
            os.posix_fadvise(*place, os.POSIX_FADV_DONTNEED)

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

    def _read(self, name: str, offset: int, block: npt.NDArray[np.uint8]) -> int:
        """Read as much of a block as is there; returns how many bytes."""
        descriptor, _ = self._file(name)
        done = 0
        while done < block.size and (count := os.preadv(descriptor, [block.data[done:]], offset + done)):
            done += count
        return done
