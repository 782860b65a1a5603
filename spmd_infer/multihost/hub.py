"""The hub: rank 0's guard as the one place that knows all ranks, decides who is at fault, and says so to everyone.

No sockets and no clock of its own: guards' messages go in with the time, messages to guards come out through ``send``.
A failure is not announced at once. One failure makes others (a killed rank's peers raise, their clients abort), so the
hub waits a moment, and then names the one that the rest follow from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from spmd_infer.multihost.verdict import Report, blame_report, blame_status

Message = dict[str, Any]

WAIT = {"exception": 0.2, "exit": 0.2, "signal": 0.2, "left": 0.2, "died": 1.0, "lost": 1.0, "peer": 3.0, "stuck": 1.5}
"""Seconds from a report of each kind to the verdict; ``peer`` is an exception that a peer's failure may have caused."""

SAYING_S = 4.0
SHOWING_S = 3.0
TELL_EVERY_S = 5.0


@dataclass
class Member:
    """A rank as the hub knows it."""

    rank: int
    host: str
    pid: int
    heard: float
    done: bool = False
    gone: bool = False
    said: bool = False
    point: int | None = None
    stopped: bool = False
    status: Message | None = None

    @property
    def name(self) -> str:
        """For messages; that rank 0 coordinates explains why its end is everyone's."""
        return f"{'coordinator ' if self.rank == 0 else ''}rank {self.rank} ({self.host}, pid {self.pid})"


@dataclass
class Hub:
    """The state of a job.

    Attributes:
        size: how many ranks it has.
        send: sends a message to a rank's guard.
        tell: says something to the person.
        hosts: the ranks' hosts where a scheduler said them.
        init_s: seconds in which all ranks must have come.
        silence_s: seconds without a word after which a rank's host counts as lost.
        drain_s: seconds from SIGTERM in which every rank must come to a point where it can stop.
        exit_s: seconds in which all ranks must have ended after the first one did.
        started: when the hub began.
        welcome: what every rank is told once all are there.
    """

    size: int
    send: Callable[[int, Message], None]
    tell: Callable[[str], None]
    hosts: Sequence[str]
    init_s: float
    silence_s: float
    drain_s: float
    exit_s: float
    started: float
    welcome: Message
    members: dict[int, Member] = field(default_factory=dict)
    phase: str = "gathering"
    strangers: list[str] = field(default_factory=list)
    _reports: list[Report] = field(default_factory=list)
    _act_at: float = 0.0
    _told: float = 0.0
    _drain_by: float | None = None
    _exit_by: float | None = None
    _stopping: bool = False
    _refusal: str = ""
    _cause: Message = field(default_factory=dict)

    def join(self, hello: Message, now: float) -> str | None:
        """A guard has come; returns why it is refused, or None."""
        rank, size, host, pid = (hello[name] for name in ("rank", "size", "host", "pid"))
        who = f"rank {rank} ({host}, pid {pid})"
        if size != self.size:
            why = (
                f"{who} was told that the job has {size} processes, rank 0 that it has {self.size}; see "
                "SPMD_INFER_NUM_PROCESSES and the scheduler's task count"
            )
        elif rank in self.members:
            why = (
                f"two processes say they are rank {rank}: {self.members[rank].name} and ({host}, pid {pid}); see "
                "SPMD_INFER_PROCESS_ID, or another job uses this coordinator's port"
            )
        elif self._cause:
            why = f"the job ends: {self._cause['title']}"
        elif self._refusal:  # of another one, before this one came
            why = self._refusal
        elif self.phase != "gathering":
            why = f"{who} came when the job was complete; another job may use this coordinator's port"
        else:
            self.members[rank] = Member(rank, host, pid, now)
            if len(self.members) == self.size:
                self.phase = "running"
                roster = [[member.host, member.pid] for _, member in sorted(self.members.items())]
                self._everyone({"t": "welcome", "roster": roster, **self.welcome})
            return None
        if self.phase == "gathering":
            self._refuse_all(why)
        return why

    def message(self, rank: int, message: Message, now: float) -> None:
        """A guard says something."""
        member = self.members[rank]
        member.heard = now
        kind = message["t"]
        if kind == "failed":
            self._report(Report(rank, message["kind"], message["text"], now, message.get("code", 1)), now)
        elif kind == "status":
            member.status = message
        elif kind == "done":
            member.done = True
            self._exit_by = self._exit_by or now + self.exit_s
            if all(other.done for other in self.members.values()) and self.phase == "running":
                self.phase = "over"
                self._everyone({"t": "all done"})
            else:
                self._maybe_stop()
        elif kind == "drain" and self._drain_by is None and self.phase == "running":
            self._drain_by = now + self.drain_s
            self._everyone({"t": "freeze", "by": member.name})
        elif kind == "at":
            member.point = message["point"]
            self._maybe_stop()
        elif kind == "stopped":
            member.stopped = True
        elif kind in ("said", "shown"):
            member.said = True
            self._advance(now)

    def lost(self, rank: int, now: float) -> None:
        """A guard's connection has ended."""
        member = self.members[rank]
        if not member.gone:
            member.gone = True
            self._report(
                Report(
                    rank, "lost", "is lost: its connection ended (killed with its guard, or its host went down)", now
                ),
                now,
            )
            self._advance(now)

    def tick(self, now: float) -> None:
        """Time has passed."""
        if self.phase == "gathering":
            self._wait_on(now)
            if self._reports and now >= self._act_at:
                self._decide(now)
        elif self.phase == "running":
            for member in self.members.values():
                if not member.gone and now - member.heard > self.silence_s:
                    member.gone = True
                    text = f"is lost: no word for {self.silence_s:.0f} s, its host is down or the network is cut"
                    self._report(Report(member.rank, "lost", text, now), now)
            self._check_limits(now)
            if self._reports and now >= self._act_at:
                self._decide(now)
        elif self.phase in ("saying", "showing"):
            self._advance(now)

    def _wait_on(self, now: float) -> None:
        missing = [rank for rank in range(self.size) if rank not in self.members]
        names = ", ".join(f"{rank} ({self.hosts[rank]})" if self.hosts else str(rank) for rank in missing[:8])
        names += f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        left = self.started + self.init_s - now
        if left <= 0:
            also = f"; connections with another job secret came from {', '.join(self.strangers)}"
            self._refuse_all(
                f"{len(self.members)} of {self.size} processes came within {self.init_s:.0f} s; missing: rank {names}"
                + (also if self.strangers else "")
            )
        elif now - max(self._told, self.started) >= TELL_EVERY_S:
            self._told = now
            self.tell(f"waiting for {len(missing)} of {self.size} processes: rank {names}; {left:.0f} s left")

    def _refuse_all(self, why: str) -> None:
        self.phase, self._refusal = "over", why
        self._everyone({"t": "refused", "why": why})

    def _report(self, report: Report, now: float) -> None:
        if self.phase not in ("gathering", "running"):
            return
        if report.kind == "stuck" and all(other.kind != "stuck" for other in self._reports):
            self._everyone({"t": "status?"})
        wait = now + WAIT[report.kind]
        self._act_at = min(self._act_at, wait) if self._reports else wait
        self._reports.append(report)

    def _check_limits(self, now: float) -> None:
        if self._drain_by is not None and now > self._drain_by:
            late = [m.rank for m in self.members.values() if not m.stopped and not m.done]
            if late:
                text = f"came to no point where it can stop within {self.drain_s:.0f} s of SIGTERM"
                self._report(Report(late[0], "left", text, now), now)
            self._drain_by = float("inf")
        if self._exit_by is not None and now > self._exit_by:
            self._exit_by = float("inf")
            ended = [m.rank for m in self.members.values() if m.done]
            running = ", ".join(str(m.rank) for m in self.members.values() if not m.done)
            text = f"ended {self.exit_s:.0f} s ago, while rank {running} still runs"
            self._report(Report(ended[0], "left", text, now), now)

    def _maybe_stop(self) -> None:
        """Once it is known how far every rank can have come, all of them go on to the furthest point."""
        if self._drain_by is None or self._stopping:
            return
        running = [member for member in self.members.values() if not member.done]
        if running and all(member.point is not None for member in running):
            self._stopping = True
            self._everyone({"t": "stop at", "point": max(member.point or 0 for member in running)})

    def _decide(self, now: float) -> None:
        stuck = [report for report in self._reports if report.kind == "stuck"]
        if len(stuck) == len(self._reports):
            ranks, text = blame_status({rank: member.status for rank, member in self.members.items()}, stuck)
            kind, code = "stuck", 1
        else:
            first = blame_report(self._reports)
            ranks, text, kind, code = [first.rank], first.text, first.kind, first.code
        names = " and ".join(self.members[rank].name for rank in ranks)
        self._cause = {"t": "cause", "ranks": ranks, "kind": kind, "title": f"{names} {text}", "code": code}
        self.phase = "saying"
        self._act_at = now + SAYING_S
        self._everyone(self._cause)
        self._advance(now)

    def _advance(self, now: float) -> None:
        """Once the others have said why they end, the rank at fault shows its traceback, and all end."""
        if self.phase == "saying":
            others = [m for m in self.members.values() if m.rank not in self._cause["ranks"]]
            if now >= self._act_at or all(member.said or member.gone for member in others):
                self.phase, self._act_at = "showing", now + SHOWING_S
                for member in self._at_fault():
                    self.send(member.rank, {"t": "show"})
        if self.phase == "showing" and (now >= self._act_at or all(m.said or m.gone for m in self._at_fault())):
            self.phase = "over"
            self._everyone({"t": "exit"})

    def _at_fault(self) -> Iterator[Member]:
        if self._cause["kind"] in ("died", "lost"):
            return
        yield from (self.members[rank] for rank in self._cause["ranks"] if not self.members[rank].gone)

    def _everyone(self, message: Message) -> None:
        for rank in sorted(self.members):
            self.send(rank, message)
