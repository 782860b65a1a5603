"""What a rank is doing, in memory that its guard reads: a step costs two small writes and no system call."""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
from dataclasses import dataclass

_STEP = struct.Struct("<Qdd48s")  # number, deadline, begun, name
_ALIVE = struct.Struct("<d")
_STOPPING = struct.Struct("<Q")
_ALIVE_AT, _FROZEN_AT, _POINT_AT, _SIZE = 80, 88, 96, 128


@dataclass(frozen=True)
class StepState:
    """A rank's step.

    Attributes:
        number: steps begun so far.
        deadline: when the step must have ended, by the clock of ``time.monotonic``; 0 between steps.
        began: when it began.
        name: what it does.
    """

    number: int
    deadline: float
    began: float
    name: str


class Record:
    """The shared memory; the rank writes steps and points, its guard the wish to stop."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, _SIZE)

    @classmethod
    def create(cls) -> Record:
        """New memory without a name in the file system."""
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("spmd-infer", os.MFD_CLOEXEC)
        else:
            with tempfile.TemporaryFile() as file:
                fd = os.dup(file.fileno())
        os.ftruncate(fd, _SIZE)
        return cls(fd)

    def write_step(self, state: StepState) -> None:
        """Say which step this is."""
        _STEP.pack_into(self._map, 0, state.number, state.deadline, state.began, state.name.encode()[:48])

    def end_step(self, number: int) -> None:
        """Say that the rank is between steps."""
        _STEP.pack_into(self._map, 0, number, 0.0, 0.0, b"")

    def read_step(self) -> StepState:
        """The step; read until two readings agree, since the rank writes at any time."""
        while True:
            values = _STEP.unpack_from(self._map, 0)
            if values == _STEP.unpack_from(self._map, 0):
                number, deadline, began, name = values
                return StepState(number, deadline, began, name.rstrip(b"\0").decode(errors="replace"))

    @property
    def alive(self) -> float:
        """When the rank's interpreter last ran, by ``time.monotonic``; 0 before it first did."""
        return float(_ALIVE.unpack_from(self._map, _ALIVE_AT)[0])

    @alive.setter
    def alive(self, when: float) -> None:
        _ALIVE.pack_into(self._map, _ALIVE_AT, when)

    @property
    def frozen(self) -> bool:
        """Whether the rank must wait at its next point for the word where to stop."""
        return bool(self._map[_FROZEN_AT])

    def freeze(self) -> None:
        """Make the rank wait at its next point."""
        self._map[_FROZEN_AT] = 1

    @property
    def point(self) -> int:
        """How many points, at which it could stop, the rank has come to."""
        return int(_STOPPING.unpack_from(self._map, _POINT_AT)[0])

    @point.setter
    def point(self, count: int) -> None:
        _STOPPING.pack_into(self._map, _POINT_AT, count)
