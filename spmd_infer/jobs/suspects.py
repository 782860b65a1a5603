"""Which rows of a unit crash the process: each is tried alone, then all together, in a process that may die of it.

A rank that is killed from outside leaves the same trace as one that dies of a row. The trial tells them apart: a row is
found guilty only where the trial's process ends twice while that row alone is computed, and this one lives.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path

import msgspec

from spmd_infer.errors import JobError
from spmd_infer.jobs.log import Judged
from spmd_infer.jobs.state import CRASHES
from spmd_infer.jobs.units import Unit

READY_S = 1800.0
"""For a trial to load the model."""

NONE, TOGETHER = -1, -2
"""In place of a row's number: none yet; all rows of the unit that are not guilty, at once."""

_PROGRAM = "import sys; from spmd_infer.jobs.trial import main; main(*sys.argv[1:])"


class Word(msgspec.Struct, frozen=True):
    """What a trial says.

    Attributes:
        t: ``"ready"``; ``"begin"`` or ``"end"`` of a row; ``"all"`` at the end; ``"unable"`` where the model cannot
            be loaded by one process.
        row: which row.
        raised: the error that would have ended the process; empty for a row that did no harm.
    """

    t: str
    row: int = NONE
    raised: str = ""


def try_rows(output: Path, unit: Unit, seconds: float, say: Callable[[str], None]) -> Judged:
    """Find the rows of a unit that end the process that computes them.

    Args:
        output: the job's output.
        unit: the unit.
        seconds: that one row, or all together, may take.
        say: tells the person.

    Returns:
        What was found; that nothing could be, where the model needs more than one process.

    Raises:
        JobError: a trial ended before it computed any row.
    """
    say(
        f"unit {unit.index} was begun {CRASHES} times and not finished: trying its {unit.count} rows "
        f"({unit.first} to {unit.first + unit.count - 1}) one by one"
    )
    guilty: dict[int, str] = {}
    ends: dict[int, list[str]] = {}
    begin, end = unit.first, unit.first + unit.count
    while True:
        trial = _Trial(output, unit.index, begin, guilty, seconds)
        try:
            row, how = trial.run(guilty)
        finally:
            trial.end()
        if how == "all":
            break
        if how == "unable":
            return Judged(unit.index, None, apart=True)
        if row == NONE:
            raise JobError(f"the process that tries the rows of unit {unit.index} {how} before it computed any")
        ends.setdefault(row, []).append(how)
        begin = end if row == TOGETHER else row
        if len(ends[row]) == CRASHES:
            if row == TOGETHER:
                break
            guilty[row] = f"the process that computed this row alone {' and then '.join(ends[row])}"
            begin = row + 1
    raised = guilty.pop(TOGETHER, "")
    apart = bool(raised) or len(ends.get(TOGETHER, ())) == CRASHES
    left_out = f": left out are {', '.join(map(str, sorted(guilty)))}" if guilty else ""
    how = raised or " and then ".join(ends.get(TOGETHER, ()))
    rest = f"; together the others do too ({how}), so they are computed one by one" if apart else ""
    say(f"unit {unit.index}: {len(guilty)} of its rows end the process{left_out}{rest}")
    return Judged(unit.index, guilty, apart)


class _Trial:
    """One process that tries rows."""

    def __init__(self, output: Path, unit: int, begin: int, guilty: Collection[int], seconds: float) -> None:
        self._seconds = seconds
        self._read, write = os.pipe()
        env = {**os.environ, "SPMD_INFER_TRIAL_FD": str(write)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(output), str(unit), str(begin), ",".join(map(str, guilty))],
            env=env, pass_fds=[write], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(write)
        self._pending = b""

    def run(self, guilty: dict[int, str]) -> tuple[int, str]:
        """Until it ends; what it was at, a row, ``NONE`` or ``TOGETHER``, and how it ended."""
        row, limit = NONE, READY_S
        while True:
            word = self._next(limit)
            if word is None:
                return row, self._ended(limit)
            if word.t in ("all", "unable"):
                return row, word.t
            limit = self._seconds
            if word.t == "begin":
                row = word.row
            elif word.raised:
                what = "them" if word.row == TOGETHER else "this row alone"
                guilty[word.row] = f"computing {what} raised {word.raised}"

    def end(self) -> None:
        """Leave nothing behind."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        os.close(self._read)

    def _next(self, seconds: float) -> Word | None:
        until = time.monotonic() + seconds
        while b"\n" not in self._pending:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._read], [], [], left)[0]:
                return None
            got = os.read(self._read, 1 << 16)
            if not got:
                return None
            self._pending += got
        line, self._pending = self._pending.split(b"\n", 1)
        return msgspec.json.decode(line, type=Word)

    def _ended(self, limit: float) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        code = self._process.poll()
        if code is None:
            return f"did not end within {limit:.0f} s"
        if code < 0:
            return f"was ended by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"
