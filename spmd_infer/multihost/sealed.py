"""Messages between guards over TCP: JSON in frames, each with a MAC over direction, number and content.

Both sides draw a nonce, so that what was recorded of one connection is worth nothing in another; frames are numbered,
so that none can be repeated, left out or moved. Standard library only: guards must start fast and hold little.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import secrets
import struct
from typing import Any

NONCE_BYTES = 16
MAC_BYTES = 32
MOST_BYTES = 1 << 20
GREETING = b"spmd-infer guard 1\n"

Message = dict[str, Any]


class BadSealError(Exception):
    """A frame that the holder of the secret has not written, or not at this place."""


class Seal:
    """Seals and opens the frames of one connection."""

    def __init__(self, secret: bytes, server_nonce: bytes, client_nonce: bytes, *, server: bool) -> None:
        self._key = hmac.digest(secret, GREETING + server_nonce + client_nonce, hashlib.sha256)
        self._ours, self._theirs = (b"s", b"c") if server else (b"c", b"s")
        self._sent = self._received = 0

    def close(self, message: Message) -> bytes:
        """The next frame."""
        content = json.dumps(message).encode()
        if len(content) > MOST_BYTES:
            raise ValueError(f"a message of {len(content)} bytes, at most {MOST_BYTES} are sent")
        mac = self._mac(self._ours, self._sent, content)
        self._sent += 1
        return struct.pack(">I", len(content)) + mac + content

    def open(self, mac: bytes, content: bytes) -> Message:
        """The message in the next frame received.

        Raises:
            BadSealError: it was not written by the other side, or not as the next one.
        """
        if not hmac.compare_digest(mac, self._mac(self._theirs, self._received, content)):
            raise BadSealError
        self._received += 1
        message: Message = json.loads(content)
        return message

    def _mac(self, direction: bytes, number: int, content: bytes) -> bytes:
        return hmac.digest(self._key, direction + struct.pack(">Q", number) + content, hashlib.sha256)


class Connection:
    """A sealed connection; ``receive`` from one task, ``send`` from any."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seal: Seal) -> None:
        self._reader, self._writer, self._seal = reader, writer, seal

    def send(self, message: Message) -> None:
        """Queue a message; a connection that has ended swallows it."""
        if not self._writer.is_closing():
            self._writer.write(self._seal.close(message))

    async def receive(self) -> Message:
        """The next message.

        Raises:
            EOFError: the connection has ended.
            BadSealError: a frame is not the other side's next one.
        """
        try:
            head = await self._reader.readexactly(4 + MAC_BYTES)
            (length,) = struct.unpack(">I", head[:4])
            if length > MOST_BYTES:
                raise BadSealError
            return self._seal.open(head[4:], await self._reader.readexactly(length))
        except (OSError, asyncio.IncompleteReadError) as error:
            raise EOFError from error

    def close(self) -> None:
        """End the connection after what is queued."""
        self._writer.close()


async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: bytes) -> Connection:
    """Greet a connection as the side that listens; raises EOFError where it ends at once."""
    nonce = secrets.token_bytes(NONCE_BYTES)
    writer.write(GREETING + nonce)
    try:
        theirs = await reader.readexactly(NONCE_BYTES)
    except (OSError, asyncio.IncompleteReadError) as error:
        raise EOFError from error
    return Connection(reader, writer, Seal(secret, nonce, theirs, server=True))


async def connect(host: str, port: int, secret: bytes) -> Connection:
    """Connect to the side that listens.

    Raises:
        OSError: nothing answers.
        EOFError: it ended the connection at once.
        BadSealError: what answers is no guard.
    """
    reader, writer = await asyncio.open_connection(host, port)
    try:
        head = await asyncio.wait_for(reader.readexactly(len(GREETING) + NONCE_BYTES), 5)
    except TimeoutError as error:
        writer.close()
        raise BadSealError from error
    except (OSError, asyncio.IncompleteReadError) as error:
        writer.close()
        raise EOFError from error
    if not head.startswith(GREETING):
        writer.close()
        raise BadSealError
    nonce = secrets.token_bytes(NONCE_BYTES)
    writer.write(nonce)
    return Connection(reader, writer, Seal(secret, head[len(GREETING) :], nonce, server=False))
