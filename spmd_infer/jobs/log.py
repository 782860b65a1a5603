"""What a rank has done, in one file to which it only ever appends: the journal and the results in one.

A record is a line of JSON; behind the line of a finished unit come its results and its failed rows, as they will be in
the output. A unit counts as done when its record is whole and its digest right, so a process may die, or the disk fill
up, in the middle of one: the rest of the file after that is passed over, and a run that goes on writes another file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NoReturn

import msgspec
from blake3 import blake3

from spmd_infer.errors import JobError


class Begun(msgspec.Struct, frozen=True, tag="begin", tag_field="t"):
    """A unit, or one row of it alone, is about to be computed."""

    unit: int
    row: int | None = None


class Left(msgspec.Struct, frozen=True, tag="left", tag_field="t"):
    """It was left again without fault of its rows, or a row alone was computed well."""

    unit: int
    row: int | None = None


class Judged(msgspec.Struct, frozen=True, tag="judged", tag_field="t"):
    """A unit that was begun several times and not finished has been looked at.

    Attributes:
        unit: the unit.
        poison: rows that crash the process by themselves, with what happened; None where that could not be found out.
        apart: the others crash it together: they are to be computed one by one.
    """

    unit: int
    poison: dict[int, str] | None
    apart: bool = False


class Done(msgspec.Struct, frozen=True, tag="done", tag_field="t"):
    """A unit is finished; ``results`` and then ``errors`` bytes follow.

    Attributes:
        unit: the unit.
        rows: how many rows it has.
        failed: how many of them have no result.
        cut: how many texts lost their ends.
        results: bytes of the results.
        errors: bytes of the failed rows' records.
        digest: over all of that.
    """

    unit: int
    rows: int
    failed: int
    cut: int
    results: int
    errors: int
    digest: str


class DoneAt(msgspec.Struct, frozen=True):
    """Where a finished unit's results are.

    Attributes:
        done: its record.
        path: the file.
        offset: where the results begin in it.
    """

    done: Done
    path: Path
    offset: int

    def results(self) -> bytes:
        """The results' bytes."""
        return self._read(self.offset, self.done.results)

    def errors(self) -> bytes:
        """The bytes of the failed rows' records."""
        return self._read(self.offset + self.done.results, self.done.errors)

    def _read(self, offset: int, count: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(count)


Record = Begun | Left | Judged | Done

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Record).decode


def digest_of(unit: int, rows: int, failed: int, cut: int, results: bytes, errors: bytes) -> str:
    """Over a finished unit's record and what follows it."""
    digest = blake3(f"{unit} {rows} {failed} {cut} {len(results)} {len(errors)} ".encode())
    digest.update(results)
    digest.update(errors)
    return digest.hexdigest()[:32]


class Log:
    """A rank's file, for writing.

    Args:
        path: a file that must not exist.

    Raises:
        JobError: it cannot be made or written; what was written before stays good.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._size = 0
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise JobError(f"{path}: cannot be made: {error.strerror}") from error

    def begin(self, unit: int, row: int | None = None) -> None:
        """Say what is computed next. Not flushed to the disk: it is of use when the process dies, not the host."""
        self._append(_encode(Begun(unit, row)) + b"\n")

    def leave(self, unit: int, row: int | None = None) -> None:
        """Say that what was begun did no harm."""
        with suppress(JobError):  # it may be left because nothing can be written
            self._append(_encode(Left(unit, row)) + b"\n")

    def judge(self, judged: Judged) -> None:
        """Write down what was found out about a unit."""
        self._append(_encode(judged) + b"\n")
        self._flush()

    def done(self, unit: int, rows: int, failed: int, cut: int, results: bytes, errors: bytes) -> None:
        """Write down a finished unit; on return the disk holds it."""
        digest = digest_of(unit, rows, failed, cut, results, errors)
        head = Done(unit, rows, failed, cut, len(results), len(errors), digest)
        self._append(b"".join((_encode(head), b"\n", results, errors)))
        self._flush()

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _append(self, data: bytes) -> None:
        written = 0
        try:
            while written < len(data):
                written += os.write(self._file, data[written:])
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file, self._size)  # so that a short word of farewell can still be read
            self._failed(error)
        self._size += written

    def _flush(self) -> None:
        try:
            os.fdatasync(self._file) if hasattr(os, "fdatasync") else os.fsync(self._file)
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> NoReturn:
        raise JobError(
            f"{self.path}: cannot be written: {error.strerror}; what was done before is kept, and the same command "
            "goes on from there"
        ) from error


class LogReader:
    """Reads a rank's file, also while it grows.

    Args:
        path: the file.
        check: compare digests; without, results are skipped.
    """

    def __init__(self, path: Path, *, check: bool = True) -> None:
        self.path = path
        self._check, self._offset = check, 0

    def records(self) -> Iterator[tuple[Record, DoneAt | None]]:
        """The whole records since the last time, finished units with where their results are."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return
        with file:
            size = os.fstat(file.fileno()).st_size
            file.seek(self._offset)
            while (record := self._next(file, size)) is not None:
                self._offset = file.tell()
                place = None
                if isinstance(record, Done):
                    place = DoneAt(record, self.path, self._offset - record.results - record.errors)
                yield record, place

    def _next(self, file: BinaryIO, size: int) -> Record | None:
        line = file.readline()
        if not line.endswith(b"\n"):
            return None
        try:
            record: Record = _decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None
        if not isinstance(record, Done):
            return record
        if file.tell() + record.results + record.errors > size:
            return None
        if not self._check:
            file.seek(record.results + record.errors, os.SEEK_CUR)
            return record
        results, errors = file.read(record.results), file.read(record.errors)
        good = digest_of(record.unit, record.rows, record.failed, record.cut, results, errors) == record.digest
        return record if good else None
