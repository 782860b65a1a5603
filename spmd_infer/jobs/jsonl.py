"""Rows of a JSONL file: one JSON value a line; blank lines do not count."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from spmd_infer.jobs.rows import Row, RowId, file_fingerprint

_decode = msgspec.json.Decoder().decode


class JsonLines:
    """A JSONL file; a row's place is the byte at which its line begins.

    Args:
        path: the file.
        id_field: the field of an object that names its row.
    """

    def __init__(self, path: Path, id_field: str = "id") -> None:
        self.format = "jsonl" if id_field == "id" else "openai"
        self._path, self._id_field = path, id_field

    def scan(self) -> Iterator[tuple[int, Row]]:
        """Every row in order, each with its place."""
        with self._path.open("rb") as file:
            yield from self._rows(file, 0, 0)

    def read(self, first: int, count: int, place: int) -> list[Row]:
        """Some consecutive rows."""
        rows: list[Row] = []
        with self._path.open("rb") as file:
            file.seek(place)
            for _, row in self._rows(file, first, place):
                rows.append(row)
                if len(rows) == count:
                    break
        return rows

    def fingerprint(self) -> str:
        """Another one where the content is another."""
        return file_fingerprint(self._path)

    def _rows(self, file: BinaryIO, index: int, place: int) -> Iterator[tuple[int, Row]]:
        for line in file:
            if line.strip():
                yield place, self._row(index, line)
                index += 1
            place += len(line)

    def _row(self, index: int, line: bytes) -> Row:
        try:
            value = _decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return Row(index, None, None, f"the line is not JSON: {error}")
        return Row(index, value, row_id(value, self._id_field))


def row_id(value: Any, field: str) -> RowId:
    """What an object calls itself, where that is a string or a whole number."""
    found = value.get(field) if isinstance(value, dict) else None
    return found if isinstance(found, str | int) and not isinstance(found, bool) else None


def looks_like_openai(path: Path) -> bool:
    """Whether the first row that can be read is a request of OpenAI's batch format."""
    for _, row in JsonLines(path).scan():
        if not row.problem:
            return isinstance(row.value, dict) and {"custom_id", "url", "body"} <= row.value.keys()
    return False
