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


class Admission(msgspec.Struct, array_like=True, frozen=True):
    """A request that the schedulers of all ranks take in.

    Attributes:
        request: its number, the same on all ranks.
        token_ids: its prompt.
        params: its sampling parameters, encoded by the leader.
    """

    request: Count
    token_ids: tuple[Count, ...]
    params: bytes


class Step(msgspec.Struct, tag="step", array_like=True, frozen=True):
    """One step of replicated schedulers: what is new since the last one, so its size does not grow with the batch.

    Attributes:
        number: of the step.
        admitted: requests that came.
        cancelled: numbers of requests that went.
        stop: whether this is the last step.
    """

    number: Count
    admitted: tuple[Admission, ...] = ()
    cancelled: tuple[Count, ...] = ()
    stop: bool = False


Message = Hello | Part | Parts | Arrays | EndOfBatches | Step

encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Message).decode
