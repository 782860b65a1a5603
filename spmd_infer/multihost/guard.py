"""The guard: a small process beside each rank that lives on when the rank is stuck, stopped or dead.

It meets the other guards over TCP (rank 0's is the hub), tells them when its rank dies or overstays a step, and ends
its rank when another has failed: first by asking, then with SIGABRT, on which the rank's stacks are dumped even where a
call in C holds the interpreter, then with SIGKILL, which also ends a stopped process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import sys
import time
from collections.abc import Coroutine
from typing import Any

from spmd_infer.multihost.hub import Hub
from spmd_infer.multihost.record import Record
from spmd_infer.multihost.sealed import BadSealError, Connection, Message, accept, connect
from spmd_infer.multihost.ward import Ward

TICK_S = 0.2
BEAT_S = 1.0
RETRY_S = 0.25
SAY_S = 2.0  # for a rank to say why it ends, before it is made to
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
        self._ward = Ward(self.rank, config["pid"], Record(config["record_fd"]), config["stall_s"], self._to_all)
        self._socket = rank_socket
        self._to_hub: Connection | None = None
        self._hub: Hub | None = None
        self._members: dict[int, Connection] = {}
        self._hub_heard = time.monotonic()
        self._over = asyncio.Event()
        self._ending: asyncio.Task[None] | None = None
        self._cause: Message | None = None
        self._finished = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Until the rank has ended and nobody needs this guard any more."""
        await self._ward.watch(self._socket)
        try:
            if self.rank == 0:
                await self._be_hub()
            else:
                await self._join_hub()
        except _RefusedError as error:
            self._ward.tell({"t": "refused", "why": str(error)})
            await self._ward.ends(5)
            return
        self._spawn(self._tick())
        await self._ward.gone.wait()
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

    async def _end_rank(self, cause: Message) -> None:
        """Ask the rank to say why it ends; say it for one that cannot, and dump its stacks."""
        own = self.rank in cause["ranks"]
        shows = own and cause["kind"] in ("exception", "peer", "exit", "signal")
        self._ward.tell({**cause, "shows": shows})
        await self._ward.ends(8.0 if shows else SAY_S)
        if not self._ward.said and not (own and cause["kind"] in ("died", "lost")) and not shows:
            self._ward.say(f"the job ends: {cause['title']}")
            self._ward.said = True
            self._ward.kill(signal.SIGABRT)
            self._to_all({"t": "said"})

    async def _exit_rank(self) -> None:
        if self._hub is not None:  # JAX's clients abort, loudly, when rank 0 ends before them
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._others_gone(), END_S)
        self._ward.tell({"t": "exit"})
        await self._ward.ends(END_S)
        self._ward.kill(signal.SIGKILL)
        self._over.set()

    async def _look(self) -> None:
        self._to_all(await self._ward.look())

    async def _freeze(self) -> None:
        self._to_all({"t": "at", "point": await self._ward.freeze()})

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
            self._ward.tell(message)

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
            send=self._send, tell=self._ward.say, started=config["began"], welcome=config["welcome"],
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
            link.send({"t": "joined", "hub": [self.config["host"], self.config["pid"]]})
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
        deadline = self.config["began"] + self.config["init_s"]
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
            if self._to_hub is None and self._ward.gone.is_set():
                return  # once connected it says hello, and then what became of its rank
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
            self._ward.tell({"t": "refused", "why": refused})
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
            if self._cause is None and (text := self._ward.overdue()):
                self._to_all({"t": "failed", "kind": "stuck", "text": text})
            await asyncio.sleep(TICK_S)

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
