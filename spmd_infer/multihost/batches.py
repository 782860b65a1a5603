"""Batches from the leader to all ranks, over the control channel."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import ml_dtypes  # noqa: F401  # makes NumPy know bfloat16 and its like by name
import msgspec
import numpy as np

from spmd_infer.errors import BatchError, ClusterError
from spmd_infer.multihost.job import Job
from spmd_infer.multihost.messages import Arrays, EndOfBatches

_PLAIN = "biufcV"


def shared_batches(job: Job, batches: Iterable[Any]) -> Iterator[Any]:
    """The leader's batches, on every rank; the followers' own argument is not looked at.

    A batch that cannot be sent, or an error of the leader's iterable, ends all ranks' iteration with the same error.

    Raises:
        BatchError: a batch is not made of arrays in dicts, lists and tuples.
    """
    channel = job.channel
    channel.streams += 1
    stream = channel.streams
    error = ""
    try:
        if job.rank == 0:
            for batch in batches:
                message, arrays = pack(batch, stream)
                # Bytes of their own: the caller may change its arrays before they are all sent.
                channel.send(message, [array.tobytes() for array in arrays])
                yield unpack(message, arrays)
            return
        while True:
            message, frames = channel.receive(Arrays | EndOfBatches)
            if message.stream != stream:
                raise ClusterError(f"rank 0 is in its call {message.stream} of infer, rank {job.rank} in its {stream}")
            if isinstance(message, EndOfBatches):
                if message.error:
                    raise BatchError(message.error)
                return
            yield unpack(message, frames)
    except Exception as problem:
        error = f"{type(problem).__name__} on rank 0: {problem}"
        raise
    finally:
        channel.closed = stream
        if job.rank == 0:
            channel.send(EndOfBatches(stream, error))


def ending_together(results: Iterator[Any], batches: Iterator[Any]) -> Iterator[Any]:
    """The results; with them, or with an error, the batches' iteration ends too, at once and on every rank."""
    try:
        yield from results
    finally:
        batches.close()  # type: ignore[attr-defined]  # a generator


def pack(batch: Any, stream: int = 0) -> tuple[Arrays, list[Any]]:
    """A batch's structure, and its arrays one after the other.

    Raises:
        BatchError: it is not made of arrays in dicts, lists and tuples.
    """
    arrays: list[Any] = []

    def node(value: Any) -> Any:
        if isinstance(value, dict):
            if not all(isinstance(key, str) for key in value):
                raise BatchError(f"over several processes a batch's keys are strings; got {list(value)}")
            return {"d": {key: node(part) for key, part in value.items()}}
        if isinstance(value, list | tuple) and any(not isinstance(part, int | float | bool) for part in value):
            return {"l" if isinstance(value, list) else "t": [node(part) for part in value]}
        array = np.asarray(value, order="C")
        if array.dtype.kind not in _PLAIN:
            raise BatchError(
                "over several processes a batch is made of arrays in dicts, lists and tuples; got "
                f"{type(value).__name__}"
            )
        arrays.append(array)
        return len(arrays) - 1

    tree = msgspec.json.encode(node(batch))
    return Arrays(stream, tree, tuple(a.dtype.name for a in arrays), tuple(a.shape for a in arrays)), arrays


def unpack(message: Arrays, frames: list[Any]) -> Any:
    """The batch again.

    Raises:
        ClusterError: the frames do not fit their description.
    """
    described = list(zip(message.dtypes, message.shapes, strict=True))
    sizes = [np.dtype(name).itemsize * math.prod(shape) for name, shape in described]
    if sizes != [memoryview(frame).nbytes for frame in frames]:
        raise ClusterError(
            f"a batch of arrays of {sizes} bytes came with {[memoryview(f).nbytes for f in frames]} bytes"
        )
    arrays = [
        frame if isinstance(frame, np.ndarray) else np.frombuffer(frame, np.dtype(name)).reshape(shape)
        for frame, (name, shape) in zip(frames, described, strict=True)
    ]

    def build(node: Any) -> Any:
        if isinstance(node, int):
            return arrays[node]
        ((kind, parts),) = node.items()
        if kind == "d":
            return {key: build(part) for key, part in parts.items()}
        return [build(part) for part in parts] if kind == "l" else tuple(build(part) for part in parts)

    return build(msgspec.json.decode(message.tree))
