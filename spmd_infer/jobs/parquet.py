"""Parquet in and out, by pyarrow, which is imported only where it is needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from spmd_infer.errors import BatchError, JobError
from spmd_infer.jobs.jsonl import row_id
from spmd_infer.jobs.rows import Row, file_fingerprint

GROUP_BYTES = 64 << 20
"""Of a row group that is written."""

_SCAN_ROWS = 4096


def require_pyarrow() -> Any:
    """The package ``pyarrow``.

    Raises:
        JobError: it is not installed.
    """
    try:
        pyarrow = import_module("pyarrow")
        import_module("pyarrow.parquet")
    except ImportError as error:
        raise JobError(
            f"Parquet needs pyarrow, which cannot be imported ({error}): pip install 'spmd-infer[batch]', or use JSONL"
        ) from error
    return pyarrow


class ParquetRows:
    """A Parquet file; each row is an object with its columns, and its place is its number.

    Args:
        path: the file.
        columns: the only columns to read; None for all.
    """

    format = "parquet"

    def __init__(self, path: Path, columns: Sequence[str] | None) -> None:
        pyarrow = require_pyarrow()
        self._path = path
        try:
            self._file = pyarrow.parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise BatchError(f"{path} is not a Parquet file that can be read: {error}") from error
        known = self._file.schema_arrow.names
        for name in columns or ():
            if name not in known:
                raise BatchError(f"{path} has no column {name!r}; it has {', '.join(known)}")
        self._columns = None if columns is None else [*columns, *({"id"} & set(known) - set(columns))]
        metadata = self._file.metadata
        counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._held: tuple[int, Any] = (-1, None)

    def scan(self) -> Iterator[tuple[int, Row]]:
        """Every row in order, each with its place."""
        index = 0
        for batch in self._file.iter_batches(_SCAN_ROWS, columns=self._columns):
            for value in batch.to_pylist():
                yield index, Row(index, value, row_id(value, "id"))
                index += 1

    def read(self, first: int, count: int, place: int) -> list[Row]:
        """Some consecutive rows."""
        rows: list[Row] = []
        while len(rows) < count:
            at = place + len(rows)
            group = int(np.searchsorted(self._starts, at, side="right")) - 1
            begin = at - int(self._starts[group])
            part = self._group(group).slice(begin, count - len(rows))
            for value in part.to_pylist():
                rows.append(Row(first + len(rows), value, row_id(value, "id")))
        return rows

    def fingerprint(self) -> str:
        """Another one where the content is another."""
        return file_fingerprint(self._path)

    def _group(self, group: int) -> Any:
        """A row group; the last one is kept, since units follow each other in it."""
        if self._held[0] != group:
            self._held = (group, self._file.read_row_group(group, columns=self._columns))
        return self._held[1]


def encode_table(records: Sequence[dict[str, Any]]) -> bytes:
    """Records as one Arrow stream; an array of several dimensions as its numbers in a row, and its shape beside it."""
    pyarrow = require_pyarrow()
    if not records:
        return b""
    names = list(dict.fromkeys(name for record in records for name in record))
    columns: dict[str, Any] = {}
    for name in names:
        values = [record.get(name) for record in records]
        if name == "id":
            values = [None if value is None else str(value) for value in values]
        deep = [value for value in values if isinstance(value, np.ndarray) and value.ndim != 1]
        if deep:
            columns[f"{name}_shape"] = pyarrow.array([None if v is None else list(np.shape(v)) for v in values])
            values = [None if value is None else np.ravel(value) for value in values]
        columns[name] = pyarrow.array(values)
    table = pyarrow.table(columns)
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    encoded: bytes = sink.getvalue().to_pybytes()
    return encoded


def write_parquet(path: Path, streams: Iterable[bytes], again: Iterable[bytes]) -> None:
    """A Parquet file of Arrow streams, in row groups of some size.

    Args:
        path: the file.
        streams: what ``encode_table`` made, in order.
        again: the same once more: a column that is empty in one stream has its type from the others, so all are looked
            at before the first is written.
    """
    pyarrow = require_pyarrow()
    schemas = [_open_stream(pyarrow, stream).schema for stream in streams if stream]
    distinct = list(dict.fromkeys(schemas))
    schema = pyarrow.unify_schemas(distinct, promote_options="permissive") if distinct else pyarrow.schema([])
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        held: list[Any] = []
        for stream in again:
            if not stream:
                continue
            held.append(_fitted(pyarrow, _open_stream(pyarrow, stream).read_all(), schema))
            if sum(table.nbytes for table in held) >= GROUP_BYTES:
                writer.write_table(pyarrow.concat_tables(held))
                held = []
        if held:
            writer.write_table(pyarrow.concat_tables(held))


def _open_stream(pyarrow: Any, stream: bytes) -> Any:
    return pyarrow.ipc.open_stream(pyarrow.py_buffer(stream))


def _fitted(pyarrow: Any, table: Any, schema: Any) -> Any:
    columns = [
        table[field.name].cast(field.type)
        if field.name in table.column_names
        else pyarrow.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pyarrow.table(columns, schema=schema)
