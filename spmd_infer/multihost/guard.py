"""The guard: a small process beside each rank that lives on when the rank is stuck, stopped or dead.

It meets the other guards over TCP (rank 0's is the hub), tells them when its rank dies or overstays a step, and ends
its rank when another has failed: first by asking, then with SIGABRT, on which the rank's stacks are dumped even where a
call in C holds the interpreter, then with SIGKILL, which also ends a stopped process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from spmd_infer.multihost.hub import Hub
from spmd_infer.multihost.record import Record
from spmd_infer.multihost.sealed import BadSealError, Connection, Message, accept, connect

TICK_S = 0.2
BEAT_S = 1.0
RETRY_S = 0.25
ANSWER_S = 1.0  # for a rank to say where it is
SAY_S = 2.0  # for a rank to say why it ends, before it is made to
SEEN_S = 0.1  # until what one process wrote in shared memory is seen by the other, with a wide margin
END_S = 1.0  # from SIGABRT to SIGKILL, and for a rank to exit when told


class Guard:
    """Guards one rank.

    Args:
        config: what the rank says of itself and its job; see ``job.start_guard``.
        rank_socket: the socket that leads to the rank.
    """

    def __init__(self, config: Message, rank_socket: socket.socket) -> None:
        self.config = config
        self.rank: int = config["rank"]
        self.pid: int = config["pid"]
        self.record = Record(config["record_fd"])
        self._socket = rank_socket
        self._to_rank: asyncio.StreamWriter | None = None
        self._to_hub: Connection | None = None
        self._hub: Hub | None = None
        self._members: dict[int, Connection] = {}
        self._hub_heard = time.monotonic()
        self._rank_gone = asyncio.Event()
        self._over = asyncio.Event()
        self._answer: asyncio.Future[Message] | None = None
        self._ending: asyncio.Task[None] | None = None
        self._cause: Message | None = None
        self._finished = self._said = self._late = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Until the rank has ended and nobody needs this guard any more."""
        reader, self._to_rank = await asyncio.open_unix_connection(sock=self._socket)
        self._spawn(self._listen_to_rank(reader))
        self._watch_pid()
        try:
            if self.rank == 0:
                await self._be_hub()
            else:
                await self._join_hub()
        except _RefusedError as error:
            self._tell_rank({"t": "refused", "why": str(error)})
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._rank_gone.wait(), 5)
            return
        self._spawn(self._tick())
        await self._rank_gone.wait()
        if self._ending is not None:
            await self._ending
        elif not self._finished:
            text = "died: killed (kill -9, or out of memory), or crashed"
            self._to_all({"t": "failed", "kind": "died", "text": text})
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), 10)
        if self._hub is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._others_gone(), 10)

    # --- the rank -----------------------------------------------------------------------------------------------------

    def _tell_rank(self, message: Message) -> None:
        assert self._to_rank is not None
        if not self._to_rank.is_closing():
            self._to_rank.write(json.dumps(message).encode() + b"\n")

    async def _listen_to_rank(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError, ValueError):
            while line := await reader.readline():
                message: Message = json.loads(line)
                if message["t"] == "where" and self._answer is not None and not self._answer.done():
                    self._answer.set_result(message)
                elif message["t"] in ("said", "shown"):
                    self._said = True
                    self._to_all(message)
                elif message["t"] != "where":
                    self._to_all(message)
        self._rank_gone.set()

    def _watch_pid(self) -> None:
        """A child that the rank forked may hold the socket open, so the process itself is watched where that works."""
        if hasattr(os, "pidfd_open"):
            try:
                fd = os.pidfd_open(self.pid)
            except ProcessLookupError:
                self._rank_gone.set()
                return
            asyncio.get_running_loop().add_reader(fd, self._rank_gone.set)

    async def _end_rank(self, cause: Message) -> None:
        """Ask the rank to say why it ends; say it for one that cannot, and dump its stacks."""
        own = self.rank in cause["ranks"]
        shows = own and cause["kind"] in ("exception", "peer", "exit", "signal")
        self._tell_rank({**cause, "shows": shows})
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._rank_gone.wait(), 8.0 if shows else SAY_S)
        if not self._said and not (own and cause["kind"] in ("died", "lost")) and not shows:
            self.say(f"the job ends: {cause['title']}")
            self._said = True
            self._kill(signal.SIGABRT)
            self._to_all({"t": "said"})

    async def _exit_rank(self) -> None:
        if self._hub is not None:  # JAX's clients abort, loudly, when rank 0 ends before them
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._others_gone(), END_S)
        self._tell_rank({"t": "exit"})
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._rank_gone.wait(), END_S)
        self._kill(signal.SIGKILL)
        self._over.set()

    def _kill(self, number: signal.Signals) -> None:
        if not self._rank_gone.is_set():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def _look(self) -> None:
        """What the rank is doing, for the hub to find out who is stuck."""
        self._answer = asyncio.get_running_loop().create_future()
        self._tell_rank({"t": "where?"})
        answer: Message = {"waits": False, "where": "an unknown place"}
        runs = True
        try:
            answer = await asyncio.wait_for(self._answer, ANSWER_S)
        except TimeoutError:
            runs = False
        step = self.record.read_step()
        seen = {"waits": answer["waits"], "where": answer["where"], "runs": runs, "state": self._state()}
        self._to_all({"t": "status", "step": step.number, "name": step.name, **seen})

    async def _freeze(self) -> None:
        """Hold the rank at its next point, and say which one that is at the latest.

        It may have looked just before; after a moment it has either come to that point or will wait at the next.
        """
        self.record.freeze()
        await asyncio.sleep(SEEN_S)
        self._to_all({"t": "at", "point": self.record.point + 1})

    def _state(self) -> str:
        try:
            return Path(f"/proc/{self.pid}/stat").read_text("ascii", "replace").rpartition(")")[2].split()[0]
        except OSError:
            return "?"

    # --- the hub ------------------------------------------------------------------------------------------------------

    def _to_all(self, message: Message) -> None:
        if message["t"] == "bye":
            self._finished = True
        elif self._hub is not None:
            self._hub.message(0, message, time.monotonic())
        elif self._to_hub is not None:
            self._to_hub.send(message)

    def _from_hub(self, message: Message) -> None:
        self._hub_heard = time.monotonic()
        kind = message["t"]
        if kind == "cause" and self._cause is None:
            self._cause = message
            self._ending = self._spawn(self._end_rank(message))
        elif kind == "exit":
            self._spawn(self._exit_rank())
        elif kind == "status?":
            self._spawn(self._look())
        elif kind in ("welcome", "refused", "stop at", "all done", "show", "freeze"):
            if kind == "freeze":
                self._spawn(self._freeze())
            self._finished = self._finished or kind in ("all done", "refused")
            self._tell_rank(message)

    def _lost_hub(self, why: str) -> None:
        if self._cause is None and not self._finished:
            who = "coordinator rank 0 ({}, pid {})".format(*self.config["hub"])
            self._cause = {"t": "cause", "ranks": [0], "kind": "lost", "title": f"{who} is lost: {why}", "code": 1}
            self._ending = self._spawn(self._end_rank(self._cause))
            asyncio.get_running_loop().call_later(SAY_S + 0.5, lambda: self._spawn(self._exit_rank()))
        elif self._cause is not None:
            self._spawn(self._exit_rank())

    async def _be_hub(self) -> None:
        config = self.config
        names = ("size", "hosts", "init_s", "silence_s", "drain_s", "exit_s")
        self._hub = Hub(
            send=self._send, tell=self.say, started=time.monotonic(), welcome=config["welcome"],
            **{name: config[name] for name in names},
        )  # fmt: skip
        try:
            await asyncio.start_server(self._member, config["bind"], config["port"])
        except OSError as error:
            where = f"{config['bind']}:{config['port']}"
            taken = "is taken: another job or program listens there" if error.errno == 98 else f"({error.strerror})"
            raise _RefusedError(
                f"rank 0 cannot listen at {where}: {'the port ' if error.errno == 98 else ''}{taken}; choose another "
                "with SPMD_INFER_COORDINATOR=host:port, or another interface with SPMD_INFER_BIND"
            ) from error
        self._hub.join(self._hello(), time.monotonic())

    def _send(self, rank: int, message: Message) -> None:
        if rank == 0:
            asyncio.get_running_loop().call_soon(self._from_hub, message)
        elif rank in self._members:
            self._members[rank].send(message)

    async def _member(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One other rank's guard, from its first word to its last."""
        assert self._hub is not None
        rank: int | None = None
        try:
            link = await asyncio.wait_for(accept(reader, writer, bytes.fromhex(self.config["secret"])), 10)
            hello = await asyncio.wait_for(link.receive(), 10)
            self._members.setdefault(hello["rank"], link)
            refused = self._hub.join(hello, time.monotonic())
            if refused is not None:
                link.send({"t": "refused", "why": refused})
                return
            rank = hello["rank"]
            link.send({"t": "joined", "hub": [self.config["host"], self.pid]})
            while True:
                message = await link.receive()
                if message["t"] == "beat":
                    self._hub.members[rank].heard = time.monotonic()
                    link.send({"t": "beat"})
                else:
                    self._hub.message(rank, message, time.monotonic())
        except BadSealError:
            self._hub.strangers.append(str((writer.get_extra_info("peername") or ("?",))[0]))
        except (EOFError, TimeoutError):
            pass
        finally:
            writer.close()
            if rank is not None:
                self._hub.lost(rank, time.monotonic())
                self._members.pop(rank, None)

    async def _others_gone(self) -> None:
        while self._members:
            await asyncio.sleep(TICK_S / 4)

    def _hello(self) -> Message:
        return {name: self.config[name] for name in ("rank", "size", "host", "pid")}

    async def _join_hub(self) -> None:
        """Connect to rank 0's guard as soon as it listens."""
        host, port = self.config["address"]
        deadline = time.monotonic() + self.config["init_s"]
        seen = "nothing answers"
        while self._to_hub is None:
            try:
                self._to_hub = await connect(host, port, bytes.fromhex(self.config["secret"]))
            except BadSealError:
                seen = "what answers there is no coordinator of spmd-infer"
            except EOFError:
                seen = "the connection is closed at once"
            except OSError as error:
                seen = error.strerror or str(error)
            if self._rank_gone.is_set():
                return
            if time.monotonic() > deadline:
                raise _RefusedError(
                    f"rank {self.rank} did not reach the coordinator at {host}:{port} within "
                    f"{self.config['init_s']:.0f} s ({seen}): rank 0 did not start, or its port is blocked; see "
                    "SPMD_INFER_COORDINATOR"
                )
            if self._to_hub is None:
                await asyncio.sleep(RETRY_S)
        self._to_hub.send(self._hello())
        self._hub_heard = time.monotonic()
        self._spawn(self._listen_to_hub(self._to_hub))

    async def _listen_to_hub(self, link: Connection) -> None:
        try:
            while True:
                message = await link.receive()
                if message["t"] == "joined":
                    self.config["hub"] = message["hub"]
                self._from_hub(message)
        except BadSealError:
            why = "a message from it was forged or damaged"
        except EOFError:
            why = "its connection ended (killed with its guard, or its host went down)"
        if "hub" not in self.config and not self._finished:
            host, port = self.config["address"]
            refused = (
                f"rank {self.rank} and the coordinator at {host}:{port} hold different job secrets, or it ended; set "
                "the same SPMD_INFER_JOB_SECRET for all"
            )
            self._tell_rank({"t": "refused", "why": refused})
            self._finished = True
        self._lost_hub(why)

    # --- time ---------------------------------------------------------------------------------------------------------

    async def _tick(self) -> None:
        beat = 0.0
        while True:
            now = time.monotonic()
            if self._hub is not None:
                self._hub.members[0].heard = now
                self._hub.tick(now)
            elif self._to_hub is not None:
                if now - beat >= BEAT_S:
                    beat = now
                    self._to_hub.send({"t": "beat"})
                if now - self._hub_heard > self.config["silence_s"] and "hub" in self.config:
                    wait = self.config["silence_s"]
                    self._lost_hub(f"no word for {wait:.0f} s, its host is down or the network is cut")
            self._check_rank(now)
            await asyncio.sleep(TICK_S)

    def _check_rank(self, now: float) -> None:
        if self._late or self._cause is not None or self._rank_gone.is_set():
            return
        step, alive = self.record.read_step(), self.record.alive
        who = f"rank {self.rank}"
        text = ""
        if step.deadline and now > step.deadline:
            text = f"step {step.number} ({step.name!r}) of {who} ran past its {step.deadline - step.began:.0f} s"
        elif alive and now - alive > self.config["stall_s"]:
            text = f"the interpreter of {who} has not run for {self.config['stall_s']:.0f} s"
        if text:
            self._late = True
            self._to_all({"t": "failed", "kind": "stuck", "text": text})

    def say(self, text: str) -> None:
        """Write to the rank's standard error, whole lines at once."""
        with contextlib.suppress(OSError):
            os.write(2, f"[spmd-infer rank {self.rank}] {text}\n".encode())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class _RefusedError(Exception):
    """This guard cannot take part."""


def main() -> None:
    """Guard the process that started this one; its configuration is the one line on standard input."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)  # the rank answers to these; its guard ends when it does
    config: Message = json.loads(sys.stdin.readline())
    rank_socket = socket.socket(fileno=config["socket_fd"])
    asyncio.run(Guard(config, rank_socket).run())
