"""A file that several threads write to, each at places of its own."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy.typing as npt


class OutputFile:
    """A file that is there, open for positioned writes; safe to use from several threads.

    The kernel lets one thread at a time write to a file and has the others wait by spinning, which took a quarter of
    the processors' time. Here they wait asleep, so that a core is free for a thread that has digests to compute.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        self._turn = threading.Lock()

    def write(self, raw: npt.NDArray[Any], offset: int) -> None:
        """Write all of some bytes at a place."""
        view, done = raw.data, 0
        with self._turn:
            while done < len(view):
                done += os.pwrite(self._descriptor, view[done:], offset + done)

    def close(self) -> None:
        """Close it."""
        os.close(self._descriptor)
