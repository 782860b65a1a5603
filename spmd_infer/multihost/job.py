"""The job that this process is a rank of: steps with deadlines, the agreed last step, the end."""

from __future__ import annotations

import atexit
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import FrameType, TracebackType
from typing import Any, NoReturn

from spmd_infer.errors import ClusterError
from spmd_infer.multihost.exit_codes import REQUEUE, TERMINATED
from spmd_infer.multihost.link import Link
from spmd_infer.multihost.place import Place
from spmd_infer.multihost.record import StepState

_PEERS = re.compile(r"gloo|nccl|coordination|heartbeat|connection (closed|reset|refused)|broken pipe|unavailable", re.I)

_job: Job | None = None


def current_job() -> Job | None:
    """The job that this process has joined; None before ``initialize``."""
    return _job


def this_job() -> Job:
    """The job that this process has joined.

    Raises:
        ClusterError: it has joined none.
    """
    if _job is None:
        raise ClusterError("a mesh over several processes needs spmd_infer.initialize() before JAX is used")
    return _job


class _Step:
    """A step under way; used with ``with``."""

    __slots__ = ("_job", "_name", "_outer", "_seconds")

    def __init__(self, job: Job, name: str, seconds: float) -> None:
        self._job, self._name, self._seconds = job, name, seconds

    def __enter__(self) -> None:
        self._outer = self._job._begin(self._name, self._seconds)

    def __exit__(self, *_: object) -> None:
        self._job._end(self._outer)


class Job:
    """A job of one or more processes.

    Use it with ``with``: then ``sys.exit`` with a code, too, ends all ranks. Without, an exception does, and a normal
    end waits for the others.

    Attributes:
        place: this process's place in it.
        hosts: the host of each rank.
        pids: the process id of each rank.
    """

    def __init__(
        self, place: Place, link: Link | None, hosts: Sequence[str], pids: Sequence[int], step_s: float = 600.0
    ) -> None:
        self.place = place
        self.hosts = tuple(hosts)
        self.pids = tuple(pids)
        self._link = link
        self._step_s = step_s
        self._steps = 0
        self._state: StepState | None = None
        self._point = 0
        self._asked = False
        self._ended = False
        self._stop_at: int | None = None
        self.channel: Any = None
        """The control channel; None in a job of one process."""
        self.shares_cache = False
        """Whether this rank sees the programs that rank 0 has compiled."""

    @property
    def rank(self) -> int:
        """This process's rank; 0 leads."""
        return self.place.rank

    @property
    def size(self) -> int:
        """How many processes the job has."""
        return self.place.size

    def name_of(self, rank: int) -> str:
        """A rank as messages name it."""
        return f"rank {rank} ({self.hosts[rank]}, pid {self.pids[rank]})"

    def step(self, name: str, seconds: float) -> _Step:
        """A piece of work that must end in time: ``with job.step("decode", 30): ...``.

        When it does not, all ranks end, every rank's stacks are on its standard error, and the message names the rank
        that the others wait for. Steps may stand inside one another; the inner one's deadline then counts.

        Args:
            name: what it does, at most 48 bytes.
            seconds: how long it may take.
        """
        return _Step(self, name, seconds)

    def device_step(self, name: str) -> AbstractContextManager[None]:
        """A step of the engine's own, with the job's deadline for these; part of the caller's step where one is."""
        return nullcontext() if self._state is not None else _Step(self, name, self._step_s)

    def _begin(self, name: str, seconds: float) -> StepState | None:
        outer, now = self._state, time.monotonic()
        self._steps += 1
        self._state = StepState(self._steps, now + seconds, now, name)
        if self._link is not None:
            self._link.record.write_step(self._state)
        return outer

    def _end(self, outer: StepState | None) -> None:
        self._state = outer
        if self._link is None:
            return
        if outer is None:
            self._link.record.end_step(self._steps)
        else:
            self._link.record.write_step(StepState(self._steps, outer.deadline, outer.began, outer.name))

    def should_stop(self) -> bool:
        """Whether the job was told to stop (SIGTERM) and this is the step after which all ranks do.

        Every rank must call it equally often, once a step, at the same place of the program. After SIGTERM to any rank,
        each waits here until it is known how far the furthest one is, and all go on to there: they stop after the same
        step.
        """
        self._point += 1
        if self._link is None:
            return self._asked
        record = self._link.record
        record.point = self._point
        if self._stop_at is None and record.frozen:
            with self.step("agree on the last step", 3600.0):
                said = self._link.wait(("stop at",), 3600.0)
            if said is None:
                raise ClusterError("no word from rank 0 on the last step within 3600 s")
            self._stop_at = int(said["point"])
        if self._stop_at is None or self._point < self._stop_at:
            return False
        self._link.send({"t": "stopped"})
        return True

    @property
    def stopping(self) -> bool:
        """Whether the job has been told to stop; ranks may learn it at different times, so decide nothing by it."""
        return self._asked or (self._link is not None and self._link.record.frozen)

    def requeue(self) -> NoReturn:
        """End this process so that the scheduler starts the job again; all ranks must call it.

        Raises:
            SystemExit: with code 75.
        """
        raise SystemExit(REQUEUE)

    def fail(self, error: BaseException, shown: str, code: int) -> NoReturn:
        """End all ranks because of an error of this one; returns to nobody."""
        if self._link is None:
            sys.stderr.write(shown)
            sys.stderr.flush()
            os._exit(code)
        first = (traceback.format_exception_only(error) or [type(error).__name__])[-1].strip()
        peers = isinstance(error, ValueError | RuntimeError | OSError) and _PEERS.search(str(error)) is not None
        kind = "peer" if peers and not isinstance(error, ClusterError) else "exception"
        self._link.fail(kind, f"raised {first[:2000]}", code, shown)

    def shutdown(self) -> None:
        """Wait until all ranks have come here, and leave the job; called at a normal exit by itself."""
        if self._ended:
            return
        self._ended = True
        if self._link is None:
            return
        self._link.send({"t": "done"})
        while self._link.wait(("all done",), 3600.0) is None:  # another's failure ends this process meanwhile
            pass
        self._link.finished = True
        if self.channel is not None:
            self.channel.close()
        import jax

        jax.distributed.shutdown()
        self._link.send({"t": "bye"})

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or (isinstance(error, SystemExit) and error.code in (None, 0, REQUEUE)):
            self.shutdown()
        elif isinstance(error, SystemExit) and self._link is not None:
            code = error.code if isinstance(error.code, int) else 1
            said = f"{error.code}\n" if not isinstance(error.code, int) else ""
            self._link.fail("exit", f"ended with exit code {code}", code & 255, said)

    def arm(self) -> None:
        """Take over uncaught exceptions, SIGTERM and the normal exit of this process."""
        global _job
        _job = self
        atexit.register(self.shutdown)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_sigterm)
        if self._link is not None:
            sys.excepthook = self._on_exception

    def _on_exception(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            shown, code = f"[spmd-infer rank {self.rank}] interrupted\n", 130
        else:
            shown, code = "".join(traceback.format_exception(kind, error, trace)), 1
        self.fail(error, shown, code)

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        again, self._asked = self._asked, True
        if self._point and not again:
            if self._link is not None:
                self._link.send({"t": "drain"})
            return
        text = "was ended by a second SIGTERM" if again else "was ended by SIGTERM"
        if self._link is None:
            raise SystemExit(TERMINATED)
        self._link.fail("signal", text, TERMINATED, f"[spmd-infer rank {self.rank}] {text}")
