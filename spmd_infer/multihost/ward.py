"""The ward: a rank as the guard beside it sees it, over a socket, in shared memory, and by its process id."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spmd_infer.multihost.record import Record

Message = dict[str, Any]

ANSWER_S = 1.0  # for a rank to say where it is
SEEN_S = 0.1  # until what one process wrote in shared memory is seen by the other, with a wide margin


class Ward:
    """A rank that is guarded.

    Args:
        rank: its number.
        pid: its process id.
        record: shared with it.
        stall_s: seconds after which an interpreter that has not run counts as stuck.
        heard: is given what it says.

    Attributes:
        gone: set once its process has ended.
        said: whether it has said why it ends.
    """

    def __init__(self, rank: int, pid: int, record: Record, stall_s: float, heard: Callable[[Message], object]) -> None:
        self.rank, self.pid, self.record = rank, pid, record
        self.gone = asyncio.Event()
        self.said = False
        self._stall_s, self._heard = stall_s, heard
        self._writer: asyncio.StreamWriter | None = None
        self._answer: asyncio.Future[Message] | None = None
        self._listening: asyncio.Task[None] | None = None
        self._late = False

    async def watch(self, connection: socket.socket) -> None:
        """Begin to listen, and to wait for its end."""
        reader, self._writer = await asyncio.open_unix_connection(sock=connection)
        self._listening = asyncio.get_running_loop().create_task(self._listen(reader))
        # A child that the rank forked may hold the socket open, so the process itself is watched where that works.
        if hasattr(os, "pidfd_open"):
            try:
                fd = os.pidfd_open(self.pid)
            except ProcessLookupError:
                self.gone.set()
                return
            asyncio.get_running_loop().add_reader(fd, self.gone.set)

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError, ValueError):
            while line := await reader.readline():
                message: Message = json.loads(line)
                if message["t"] == "where":
                    if self._answer is not None and not self._answer.done():
                        self._answer.set_result(message)
                    continue
                self.said = self.said or message["t"] in ("said", "shown")
                self._heard(message)
        self.gone.set()

    def tell(self, message: Message) -> None:
        """Send it a message, if it still listens."""
        assert self._writer is not None
        if not self._writer.is_closing():
            self._writer.write(json.dumps(message).encode() + b"\n")

    async def ends(self, seconds: float) -> bool:
        """Whether it ends within that time."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.gone.wait(), seconds)
        return self.gone.is_set()

    def kill(self, number: signal.Signals) -> None:
        """Send it a signal, unless it has ended."""
        if not self.gone.is_set():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def say(self, text: str) -> None:
        """Write to its standard error, whole lines at once."""
        with contextlib.suppress(OSError):
            os.write(2, f"[spmd-infer rank {self.rank}] {text}\n".encode())

    async def look(self) -> Message:
        """What it is doing, for the hub to find out who is stuck."""
        self._answer = asyncio.get_running_loop().create_future()
        self.tell({"t": "where?"})
        answer: Message = {"waits": False, "where": "an unknown place"}
        runs = True
        try:
            answer = await asyncio.wait_for(self._answer, ANSWER_S)
        except TimeoutError:
            runs = False
        step = self.record.read_step()
        seen = {"waits": answer["waits"], "where": answer["where"], "runs": runs, "state": self._state()}
        return {"t": "status", "step": step.number, "name": step.name, **seen}

    async def freeze(self) -> int:
        """Hold it at its next point; returns which one that is at the latest.

        It may have looked just before; after a moment it has either come to that point or will wait at the next.
        """
        self.record.freeze()
        await asyncio.sleep(SEEN_S)
        return self.record.point + 1

    def overdue(self) -> str:
        """What it has overstayed, said once; empty where nothing."""
        if self._late or self.gone.is_set():
            return ""
        now, step, alive = time.monotonic(), self.record.read_step(), self.record.alive
        text = ""
        if step.deadline and now > step.deadline:
            limit = step.deadline - step.began
            text = f"step {step.number} ({step.name!r}) of rank {self.rank} ran past its {limit:.0f} s"
        elif alive and now - alive > self._stall_s:
            text = f"the interpreter of rank {self.rank} has not run for {self._stall_s:.0f} s"
        self._late = bool(text)
        return text

    def _state(self) -> str:
        try:
            return Path(f"/proc/{self.pid}/stat").read_text("ascii", "replace").rpartition(")")[2].split()[0]
        except OSError:
            return "?"
