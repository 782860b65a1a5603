"""The control channel: from the leader (rank 0) to all followers, and back, over ZeroMQ.

Every message carries an HMAC, under a key that only this run of the job has, of its direction, its number and all its
frames. So nothing can be forged, altered, repeated or left out without notice, but everything can be read.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import struct
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec
import zmq

from spmd_infer.errors import ClusterError
from spmd_infer.multihost.messages import Arrays, EndOfBatches, Hello, Message, Part, Parts, decode, encode
from spmd_infer.multihost.place import Place

logger = logging.getLogger("spmd_infer.multihost")

MOST_FROM_FOLLOWER = 16 << 20
_SLICE_MS = 500
_FROM_LEADER = 0xFFFFFFFF

M = TypeVar("M", bound=Message)


class Channel:
    """One rank's end of the control channel. Used by one thread at a time.

    Args:
        rank: this rank.
        size: how many ranks there are.
        key: the run's key.
        socket: the leader's ROUTER, bound, or a follower's DEALER.
        port: on which the leader listens.
    """

    def __init__(self, rank: int, size: int, key: bytes, socket: zmq.Socket[bytes], port: int) -> None:
        self.rank, self.size, self.port = rank, size, port
        self._key, self._socket = key, socket
        self._sent = 0
        self._received: defaultdict[int, int] = defaultdict(int)
        self._early: defaultdict[int, deque[tuple[Message, list[Any]]]] = defaultdict(deque)
        self.sent_bytes = 0
        self.streams = self.closed = 0
        """Calls of ``infer`` begun, and the last one that has ended; see ``batches``."""

    def send(self, message: Message, frames: Sequence[Any] = ()) -> None:
        """From the leader to all followers, or from a follower to the leader; returns once it is queued.

        Args:
            message: what to say.
            frames: buffers that go with it; not copied where they are large, so they must stay as they are until the
                followers have answered.
        """
        content = encode(message)
        direction = _FROM_LEADER if self.rank == 0 else self.rank
        parts = [self._mac(direction, self._sent, content, frames), content, *frames]
        self._sent += 1
        if self.rank != 0:
            self._socket.send_multipart(parts)
            return
        for rank in range(1, self.size):
            self._socket.send_multipart([_identity(rank), *parts], copy=not frames)
        self.sent_bytes += sum(memoryview(part).nbytes for part in parts)

    def receive(self, kind: type[M], seconds: float = 3600.0) -> tuple[M, list[Any]]:
        """A follower's next message from the leader.

        Args:
            kind: what it must be; may be a union.
            seconds: how long to wait for it.

        Returns:
            The message and its frames.

        Raises:
            ClusterError: none came in time, it is not the leader's next message, or it is of another kind, which
                means that the ranks run different programs.
        """
        parts = self._next(seconds)
        if parts is None:
            raise ClusterError(f"rank {self.rank} got no word from the leader within {seconds:.0f} s")
        opened = self._open(parts, _FROM_LEADER)
        if opened is None:
            raise ClusterError(
                f"message {self._received[_FROM_LEADER]} from the leader to rank {self.rank} was forged, altered, "
                "repeated, or one before it is missing"
            )
        message, frames = opened
        if isinstance(message, Arrays | EndOfBatches) and message.stream <= self.closed:
            return self.receive(kind, seconds)  # what this rank left unread of a call that has ended
        if not isinstance(message, kind):
            raise ClusterError(
                f"rank {self.rank} expects {getattr(kind, '__name__', kind)} from the leader, which sent "
                f"{type(message).__name__}: the ranks do not run the same program"
            )
        return message, frames

    def gather(self, name: str, value: bytes, seconds: float = 3600.0) -> tuple[bytes, ...]:
        """Every rank's value, on every rank; all must call it, with the same name.

        Raises:
            ClusterError: not all came in time, or a rank does something else.
        """
        if self.rank != 0:
            self.send(Part(name, value))
            message, _ = self.receive(Parts, seconds)
            self._same(name, message.name, 0)
            return message.values
        values = {0: value}
        until = time.monotonic() + seconds
        for rank in range(1, self.size):
            part, _ = self._from_rank(rank, until, name)
            if not isinstance(part, Part):
                raise ClusterError(f"rank {rank} sent {type(part).__name__} where {name!r} was expected")
            self._same(name, part.name, rank)
            values[rank] = part.value
        everyone = tuple(values[rank] for rank in range(self.size))
        self.send(Parts(name, everyone))
        return everyone

    def join(self, host: str, port: int, nonce: bytes, secret: bytes, seconds: float) -> None:
        """Connect every follower with the leader; returns on each rank once it is connected.

        Raises:
            ClusterError: not all came in time.
        """
        self._key = run_key(secret, nonce)
        if self.rank != 0:
            self._socket.connect(f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}")
            self.send(Hello(self.rank))
        else:
            until = time.monotonic() + seconds
            for rank in range(1, self.size):
                self._from_rank(rank, until, "connecting")
        self.gather("connected", b"", seconds)

    def close(self) -> None:
        """End it; what is queued and not yet sent is dropped."""
        self._socket.close(linger=0)

    def _same(self, name: str, theirs: str, rank: int) -> None:
        if name != theirs:
            raise ClusterError(
                f"rank {self.rank} exchanges {name!r}, rank {rank} {theirs!r}: the ranks do not run the same program"
            )

    def _from_rank(self, rank: int, until: float, what: str) -> tuple[Message, list[Any]]:
        """The leader's next message from one rank; others' are kept."""
        while not self._early[rank]:
            parts = self._next(until - time.monotonic())
            if parts is None:
                raise ClusterError(f"rank {rank} did not come to {what!r} in time")
            sender = int.from_bytes(parts[0], "little")
            opened = self._open(parts[1:], sender) if len(parts) > 2 and 0 < sender < self.size else None
            if opened is None:
                logger.warning("dropped a message on the control channel that no rank of this job has sent")
            else:
                self._early[sender].append(opened)
        return self._early[rank].popleft()

    def _next(self, seconds: float) -> list[Any] | None:
        until = time.monotonic() + seconds
        while not self._socket.poll(_SLICE_MS if seconds > 1 else max(0, int(1000 * seconds))):
            if time.monotonic() >= until:
                return None
        frames = self._socket.recv_multipart(copy=False)
        return [
            frame.bytes if index < 3 and len(frame) < 1 << 16 else frame.buffer for index, frame in enumerate(frames)
        ]

    def _open(self, parts: Sequence[Any], sender: int) -> tuple[Message, list[Any]] | None:
        if len(parts) < 2:
            return None
        mac, content, *frames = parts
        number = self._received[sender]
        if not hmac.compare_digest(bytes(mac), self._mac(sender, number, content, frames)):
            return None
        try:
            message = decode(content)
        except msgspec.MsgspecError:
            return None
        self._received[sender] = number + 1
        return message, list(frames)

    def _mac(self, sender: int, number: int, content: Any, frames: Sequence[Any]) -> bytes:
        head = struct.pack("<IQI", sender, number, len(frames))
        lengths = b"".join(struct.pack("<Q", memoryview(part).nbytes) for part in (content, *frames))
        if not frames:
            return hmac.digest(self._key, head + lengths + bytes(content), hashlib.sha256)
        mac = hmac.new(self._key, head + lengths, hashlib.sha256)
        for part in (content, *frames):
            mac.update(part)
        return mac.digest()


def run_key(secret: bytes, nonce: bytes) -> bytes:
    """The key of one run, so that messages of an earlier run with the same secret are worth nothing."""
    return hmac.digest(secret, b"spmd-infer control channel 1" + nonce, hashlib.sha256)


def _identity(rank: int) -> bytes:
    return rank.to_bytes(4, "little")


def open_channel(place: Place, bound: str) -> tuple[Channel, bytes]:
    """A rank's end, not yet connected: the leader listens on ``bound`` only.

    Returns:
        The channel, and the leader's nonce (empty on followers), which guards carry to the others.

    Raises:
        ClusterError: the leader cannot listen there.
    """
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    socket = context.socket(zmq.ROUTER if place.rank == 0 else zmq.DEALER)
    socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.LINGER, 0)
    if place.rank != 0:
        # A ROUTER keeps identities that begin with a zero byte for itself; ranks from 1 on have none in front.
        socket.setsockopt(zmq.IDENTITY, _identity(place.rank))
        return Channel(place.rank, place.size, b"", socket, 0), b""
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.MAXMSGSIZE, MOST_FROM_FOLLOWER)
    try:
        port = socket.bind_to_random_port(f"tcp://[{bound}]" if ":" in bound else f"tcp://{bound}")
    except zmq.ZMQError as error:
        raise ClusterError(f"rank 0 cannot listen on {bound}: {error.strerror}; set SPMD_INFER_BIND") from error
    return Channel(0, place.size, b"", socket, port), secrets.token_bytes(16)
