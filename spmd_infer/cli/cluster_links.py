"""Whether the ranks of a job reach each other on any port, as NCCL and gloo need it, and how fast plain TCP is."""

from __future__ import annotations

import socket
import threading
import time
from typing import TYPE_CHECKING

import msgspec

from spmd_infer.cli.accelerators import Finding

if TYPE_CHECKING:
    from spmd_infer.multihost.job import Job

MOST_PEERS = 64
CONNECT_S = 3.0
_RATE_BYTES = 8 << 20
_CHUNK = 1 << 20

Address = tuple[str, int]


def check_links(job: Job) -> list[Finding]:
    """Connect every rank with every other (of large jobs, with the 64 after it); all ranks call it.

    Returns:
        What was found of ports and rates, the same on all ranks. Where a rank is out of reach, a collective would hang.
    """
    with listen(job) as listener:
        own: Address = listener.getsockname()[:2]
        everyone = [msgspec.json.decode(part, type=Address) for part in _gather(job, "listen", own)]
        threading.Thread(target=_serve, args=(listener,), daemon=True).start()
        failed: dict[int, str] = {}
        for offset in range(1, min(job.size, MOST_PEERS + 1)):
            peer = (job.rank + offset) % job.size
            if (why := _unreachable(everyone[peer])) is not None:
                failed[peer] = why
        following = (job.rank + 1) % job.size
        _gather(job, "connected", None)  # one thing at a time
        rate = 0.0 if following in failed else _rate(everyone[following])
        said = [
            msgspec.json.decode(part, type=tuple[dict[int, str], float])
            for part in _gather(job, "links", (failed, rate))
        ]
    return _findings(job, everyone, said)


def _findings(job: Job, everyone: list[Address], said: list[tuple[dict[int, str], float]]) -> list[Finding]:
    broken = [(rank, peer, why) for rank, (failed, _) in enumerate(said) for peer, why in failed.items()]
    if broken:
        rank, peer, why = broken[0]
        host, port = everyone[peer]
        found = f"{job.name_of(rank)} does not reach {job.name_of(peer)} at {host}:{port}: {why}"
        more = f"; {len(broken)} connections fail" if len(broken) > 1 else ""
        advice = "open all ports between the hosts of a job: NCCL and gloo choose them by themselves"
        return [Finding("ports", found + more, "problem", advice)]
    rates = [rate for _, rate in said]
    slowest = rates.index(min(rates))
    found = (
        f"{min(rates) / 1e9:.2f} to {max(rates) / 1e9:.2f} GB/s from each rank to the next, all at once; the slowest is"
    )
    return [
        Finding(
            "ports", f"{'every rank reaches every other' if job.size <= MOST_PEERS + 1 else 'all that were tried'}"
        ),
        Finding("TCP", f"{found} {job.name_of(slowest)} to {job.name_of((slowest + 1) % job.size)}"),
    ]


def _gather(job: Job, name: str, value: object) -> tuple[bytes, ...]:
    parts: tuple[bytes, ...] = job.channel.gather(name, msgspec.json.encode(value))
    return parts


def listen(job: Job) -> socket.socket:
    """A socket on the address with which this host reaches rank 0's, and on no other."""
    family = socket.getaddrinfo(job.place.host, job.place.port, type=socket.SOCK_DGRAM)[0][0]
    with socket.socket(family, socket.SOCK_DGRAM) as route:  # nothing is sent
        route.connect((job.place.host, job.place.port))
        address = route.getsockname()[0]
    listener = socket.socket(family)
    listener.bind((address, 0))
    listener.listen(MOST_PEERS)
    return listener


def _serve(listener: socket.socket) -> None:
    """Read what comes, answer with how much it was."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return  # closed: all have been tried
        threading.Thread(target=_count, args=(connection,), daemon=True).start()


def _count(connection: socket.socket) -> None:
    with connection:
        connection.settimeout(10 * CONNECT_S)
        count = 0
        try:
            while count < _RATE_BYTES and (part := connection.recv(_CHUNK)):
                count += len(part)
            connection.sendall(count.to_bytes(8, "big"))
        except OSError:
            return


def _unreachable(address: Address) -> str | None:
    try:
        socket.create_connection(address, CONNECT_S).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _rate(address: Address) -> float:
    """Bytes a second."""
    part = bytes(_CHUNK)
    with socket.create_connection(address, CONNECT_S) as connection:
        connection.settimeout(10 * CONNECT_S)
        begin = time.perf_counter()
        for _ in range(_RATE_BYTES // _CHUNK):
            connection.sendall(part)
        connection.recv(8)
        return _RATE_BYTES / (time.perf_counter() - begin)
