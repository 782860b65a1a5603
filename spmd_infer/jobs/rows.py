"""Rows of a job's input, what becomes of them, and what every kind of input offers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from blake3 import blake3

RowId = str | int | None


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        index: its number, from 0 in the order of the input.
        value: what it holds: a text, an object, arrays by name, a path.
        id: what the input calls it; copied to the output.
        problem: why it cannot be read; empty where it can.
    """

    index: int
    value: Any
    id: RowId = None
    problem: str = ""


@dataclass(frozen=True)
class Failure:
    """Why a row has no result.

    Attributes:
        kind: the error's class, ``"Unreadable"``, or ``"Quarantined"`` for a row that crashed the process.
        message: what was wrong with it.
    """

    kind: str
    message: str


Answer = dict[str, Any] | Failure
"""A row's result by column, or why it has none."""


class Source(Protocol):
    """A job's input. Reading any part of it again gives the same rows."""

    format: str
    """Its name, as ``--format`` takes it."""

    def scan(self) -> Iterator[tuple[int, Row]]:
        """Every row in order, each with its place."""
        ...

    def read(self, first: int, count: int, place: int) -> list[Row]:
        """Some consecutive rows.

        Args:
            first: number of the first one.
            count: how many.
            place: of the first one, as ``scan`` gave it.
        """
        ...

    def fingerprint(self) -> str:
        """Another one where the content is another."""
        ...


def file_fingerprint(path: Path) -> str:
    """Size and digest of a file."""
    digest = blake3(max_threads=blake3.AUTO)
    digest.update_mmap(path)
    return f"{path.stat().st_size} bytes, {digest.hexdigest()[:32]}"


def files_fingerprint(folder: Path, files: Sequence[Path]) -> str:
    """Names and sizes of a folder's files; reading them all could take as long as the job."""
    digest = blake3()
    for file in files:
        digest.update(f"{file.relative_to(folder)}\0{file.stat().st_size}\n".encode())
    return f"{len(files)} files, {digest.hexdigest()[:32]}"
