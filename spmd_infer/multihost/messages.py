"""What the leader tells its followers, and they it: a fixed schema, refused where it does not fit."""

from __future__ import annotations

from typing import Annotated

import msgspec

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Name = Annotated[str, msgspec.Meta(max_length=200)]


class Hello(msgspec.Struct, tag="hello", array_like=True, frozen=True):
    """A follower has connected."""

    rank: Count


class Part(msgspec.Struct, tag="part", array_like=True, frozen=True):
    """A follower's part of what all ranks exchange."""

    name: Name
    value: bytes


class Parts(msgspec.Struct, tag="parts", array_like=True, frozen=True):
    """The parts of all ranks, in their order."""

    name: Name
    values: tuple[bytes, ...]


class Arrays(msgspec.Struct, tag="arrays", array_like=True, frozen=True):
    """Arrays follow, one frame each.

    Attributes:
        stream: number of the call that they belong to.
        tree: their places in a nest of dicts, lists and tuples, as JSON; see ``batches``.
        dtypes: by NumPy's names, with those of ml_dtypes.
        shapes: likewise.
    """

    stream: Count
    tree: bytes
    dtypes: tuple[Name, ...]
    shapes: tuple[tuple[Count, ...], ...]


class EndOfBatches(msgspec.Struct, tag="end", array_like=True, frozen=True):
    """No further batch comes.

    Attributes:
        stream: number of the call that ends.
        error: what went wrong where the leader takes its batches from; empty where nothing did.
    """

    stream: Count
    error: str = ""


class Step(msgspec.Struct, tag="step", array_like=True, frozen=True):
    """What the leader's scheduler does next, for the others to do the same; its size does not grow with the batch.

    Attributes:
        number: of this message.
        cancelled: names of requests that end now.
        turn: whether a step is planned and run then.
    """

    number: Count
    cancelled: tuple[Name, ...] = ()
    turn: bool = True


Message = Hello | Part | Parts | Arrays | EndOfBatches | Step

encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Message).decode
