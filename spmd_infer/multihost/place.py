"""A process's place in its job: what start-up must know, wherever it comes from."""

from __future__ import annotations

from dataclasses import dataclass

from spmd_infer.errors import ClusterError

DEFAULT_PORT = 12321
"""The coordinator's port where an address names none."""

MOST_PROCESSES = 65536


@dataclass(frozen=True)
class Place:
    """Which process this is, of how many, and where they meet.

    Attributes:
        rank: 0 for the coordinator.
        size: how many processes the job has.
        host: the coordinator's host; empty in a job of one process.
        port: the port on which it waits for the others.
        source: where this was found.
        local_rank: which of the processes on this host; None where unknown.
        local_size: how many processes are on this host; None where unknown.
        hosts: the host of each rank, where the scheduler says it.
    """

    rank: int
    size: int
    host: str
    port: int
    source: str
    local_rank: int | None = None
    local_size: int | None = None
    hosts: tuple[str, ...] = ()

    @property
    def coordinator(self) -> str:
        """``host:port``, with brackets around an IPv6 address."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def describe(self) -> str:
        """One line for the person who started the job."""
        if self.size == 1:
            return f"one process ({self.source})"
        local = f", number {self.local_rank} of {self.local_size} on its host" if self.local_size else ""
        return f"rank {self.rank} of {self.size}{local}, coordinator {self.coordinator} ({self.source})"


def parse_address(text: str, said_by: str) -> tuple[str, int]:
    """Host and port from ``host``, ``host:port`` or ``[v6]:port``.

    Raises:
        ClusterError: it is no such address; the message names ``said_by``.
    """
    host, port = text.strip(), ""
    if host.startswith("["):
        host, bracket, port = host[1:].partition("]")
        if not bracket or (port and not port.startswith(":")):
            raise ClusterError(f"{said_by}={text!r} is no address: expected host:port or [IPv6]:port")
        port = port[1:]
    elif host.count(":") == 1:
        host, _, port = host.partition(":")
        if not port:
            raise ClusterError(f"{said_by}={text!r} ends in a colon: expected host:port")
    if not host or any(character.isspace() or character in "/," for character in host):
        raise ClusterError(f"{said_by}={text!r} names no host: expected host:port")
    if not port:
        return host, DEFAULT_PORT
    return host, parse_int(port, said_by, 1, 65535, whole=text)


def parse_int(text: str, said_by: str, least: int, most: int, *, whole: str | None = None) -> int:
    """A whole number within bounds.

    Raises:
        ClusterError: it is none; the message names ``said_by``.
    """
    plain = text.strip()
    if not (plain.isascii() and plain.isdecimal() and len(plain) < 12 and least <= int(plain) <= most):
        raise ClusterError(f"{said_by}={whole or text!r}: expected a whole number from {least} to {most}, got {text!r}")
    return int(plain)
