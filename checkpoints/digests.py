"""The two digests of a chunk: SHA-256, which any tool can compute, and BLAKE3, which costs a fraction of it to check.

Both are cryptographic. See ``docs/adr/0008-blake3-beside-sha-256.md`` for what each is used for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from blake3 import blake3

BLOCK_BYTES = 1 << 20
"""Bytes are read, digested and written in blocks that stay in a core's cache."""

Kind = Literal["sha256", "blake3"]
NAMES = {"sha256": "SHA-256", "blake3": "BLAKE3"}


class Digest(Protocol):
    """A digest under way."""

    def update(self, data: memoryview, /) -> Any:
        """Take up some bytes."""
        ...

    def hexdigest(self) -> str:
        """The digest of what was taken up, in hexadecimal."""
        ...


def new(kind: Kind) -> Digest:
    """A digest of nothing yet."""
    return hashlib.sha256() if kind == "sha256" else blake3()


def blocks(raw: npt.NDArray[np.uint8]) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """Bytes in blocks, each with where it begins."""
    for start in range(0, raw.size, BLOCK_BYTES):
        yield start, raw[start : start + BLOCK_BYTES]


def flat_bytes(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """The bytes of a C-ordered array, in place."""
    return values.reshape(-1).view(np.uint8)
