"""What the tests of malformed files share: a damaged file gives one kind of error, and takes no memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import strategies as st

from spmd_infer.checkpoints import open_checkpoint
from spmd_infer.errors import CheckpointError

SLACK = 2 << 20
"""Bytes that opening anything may take: reading a small file, making messages."""


@contextmanager
def memory_below(most: int) -> Iterator[None]:
    """Check that what happens inside takes at most so many bytes at once."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < most


def refused(content: bytes, path: Path, message: str = "", times: int = 16) -> str:
    """The error that opening a file with this content gives, which must name the file.

    ``times`` bounds the memory it may take beyond ``SLACK``, in sizes of the file.
    """
    path.write_bytes(content)
    with (
        memory_below(times * len(content) + SLACK),
        pytest.raises(CheckpointError, match=rf"{path.stem}\{path.suffix}.*{message}") as caught,
    ):
        open_checkpoint(path)
    return str(caught.value)


def read_or_refused(path: Path, most: int = SLACK) -> None:
    """Open a file and read all that it claims to hold; only a ``CheckpointError`` may come of it, and no memory."""
    with memory_below(most):
        try:
            reader = open_checkpoint(path)
            for name in reader.tensors:
                reader.read(name)
        except CheckpointError:
            pass


def changed(sound: bytes, data: st.DataObject, most: int = 4, first: int = 0) -> bytearray:
    """A file with a few bytes changed, from ``first`` on."""
    content = bytearray(sound)
    for _ in range(data.draw(st.integers(1, most))):
        content[data.draw(st.integers(first, len(content) - 1))] = data.draw(st.integers(0, 255))
    return content
