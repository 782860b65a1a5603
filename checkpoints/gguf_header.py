"""The header of a GGUF file: its fields and the places of its tensors.

Every count, length and offset is held against the bytes that are left in the file before anything is allocated for it.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from spmd_infer.checkpoints.file_bytes import FileBytes
from spmd_infer.errors import CheckpointError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MOST_DIMENSIONS = 4
_MOST_ELEMENTS = 1 << 24  # of one array field; the largest vocabularies have some 300,000 entries
_DEEPEST_ARRAY = 4
_LONGEST_NAME = 1 << 16
_SMALLEST_FIELD = 8 + 4 + 1  # an empty name, a type, one byte
_SMALLEST_TENSOR = 8 + 4 + 4 + 8
_WINDOW = 1 << 20

_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
    GGUFValueType.BOOL: "?",
}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies.

    Attributes:
        name: its name.
        shape: its shape, outermost dimension first (the file has them innermost first).
        kind: how its blocks are encoded.
        offset: where in the file its data begins.
        nbytes: how many bytes it takes.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """Fields by name (arrays as lists), and the tensors in the file's order."""

    fields: dict[str, Any]
    tensors: list[StoredTensor]


def read_header(source: FileBytes) -> Header:
    """The header of a GGUF file of version 2 or 3, little-endian.

    Raises:
        CheckpointError: it is not one, is truncated, or a count, length, offset or name in it cannot be right.
    """
    cursor = _Cursor(source)
    if cursor.take(4) != MAGIC:
        raise CheckpointError(f"{source.path}: does not begin with GGUF")
    version = cursor.unsigned(4)
    if version not in _VERSIONS:
        swapped = " (a big-endian file?)" if version & 0xFFFF == 0 else ""
        raise CheckpointError(f"{source.path}: GGUF version {version}{swapped}; versions 2 and 3 are read")
    tensor_count = cursor.count(8, _SMALLEST_TENSOR, "tensors")
    field_count = cursor.count(8, _SMALLEST_FIELD, "fields")
    fields: dict[str, Any] = {}
    for _ in range(field_count):
        name = cursor.string(_LONGEST_NAME)
        if name in fields:
            raise cursor.error(f"field {name!r} occurs twice")
        fields[name] = _read_value(cursor, cursor.unsigned(4), name, 0)
    alignment = fields.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1) or alignment > source.size:
        raise cursor.error(f"general.alignment is {alignment!r}, expected a power of two")
    rough = [_read_tensor(cursor) for _ in range(tensor_count)]
    data_start = -(-cursor.at // alignment) * alignment
    tensors = [StoredTensor(t.name, t.shape, t.kind, data_start + t.offset, t.nbytes) for t in rough]
    _check_places(tensors, source, alignment, data_start)
    return Header(fields, tensors)


def _read_value(cursor: _Cursor, kind: int, name: str, depth: int) -> Any:
    if kind == GGUFValueType.STRING:
        return cursor.string(cursor.left)
    if kind == GGUFValueType.ARRAY:
        if depth == _DEEPEST_ARRAY:
            raise cursor.error(f"field {name!r} nests arrays deeper than {_DEEPEST_ARRAY}")
        return _read_array(cursor, name, depth)
    code = _SCALARS.get(kind)  # type: ignore[call-overload]  # the enumeration's members are integers
    if code is None:
        raise cursor.error(f"field {name!r} has type {kind}, which GGUF does not define")
    return cursor.numbers(code, 1)[0]


def _read_array(cursor: _Cursor, name: str, depth: int) -> list[Any]:
    kind = cursor.unsigned(4)
    code = _SCALARS.get(kind)  # type: ignore[call-overload]  # the enumeration's members are integers
    smallest = np.dtype(code).itemsize if code else 12 if kind == GGUFValueType.ARRAY else 8
    length = cursor.count(8, smallest, f"elements of field {name!r}")
    if length > _MOST_ELEMENTS:
        raise cursor.error(f"field {name!r} has {length} elements; at most {_MOST_ELEMENTS} are read")
    if code:
        return cursor.numbers(code, length)
    return [_read_value(cursor, kind, name, depth + 1) for _ in range(length)]


def _read_tensor(cursor: _Cursor) -> StoredTensor:
    name = cursor.string(_LONGEST_NAME)
    rank = cursor.unsigned(4)
    if rank > _MOST_DIMENSIONS:
        raise cursor.error(f"tensor {name!r} has {rank} dimensions; at most {_MOST_DIMENSIONS} are defined")
    dims: list[int] = cursor.numbers("<u8", rank)
    shape = tuple(reversed(dims))
    number = cursor.unsigned(4)
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise cursor.error(f"tensor {name!r} has encoding {number}, which the gguf package does not know") from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    row = shape[-1] if shape else 1
    if row % block:
        raise cursor.error(
            f"tensor {name!r} of shape {list(shape)} is {kind.name}, whose blocks of {block} do not fill its rows"
        )
    nbytes = math.prod(shape) // block * block_bytes
    offset = cursor.unsigned(8)
    if nbytes > cursor.size or offset > cursor.size:
        raise cursor.error(
            f"tensor {name!r} of shape {list(shape)} as {kind.name} needs {nbytes} bytes at offset {offset}, "
            f"but the file has {cursor.size}"
        )
    return StoredTensor(name, shape, kind, offset, nbytes)


def _check_places(tensors: list[StoredTensor], source: FileBytes, alignment: int, data_start: int) -> None:
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen:
            raise CheckpointError(f"{source.path}: tensor {tensor.name!r} occurs twice")
        seen.add(tensor.name)
        if (tensor.offset - data_start) % alignment:
            raise CheckpointError(
                f"{source.path}: tensor {tensor.name!r} at offset {tensor.offset - data_start} is not aligned to "
                f"{alignment} bytes"
            )
    end, before = data_start, ""
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset < end and tensor.nbytes:
            raise CheckpointError(
                f"{source.path}: tensors {before!r} and {tensor.name!r} overlap at byte {tensor.offset}"
            )
        end, before = max(end, tensor.offset + tensor.nbytes), tensor.name
        if end > source.size:
            raise CheckpointError(
                f"{source.path}: tensor {tensor.name!r} ends at byte {end}, but the file has {source.size}; "
                f"it is truncated"
            )


class _Cursor:
    """Reads a file from its beginning on through a small window."""

    def __init__(self, source: FileBytes) -> None:
        self._source = source
        self._window = b""
        self._window_at = 0
        self.at = 0
        self.size = source.size

    @property
    def left(self) -> int:
        return self.size - self.at

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._source.path}: {what} (header read up to byte {self.at})")

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise self.error(f"{count} bytes are announced, but only {self.left} are left; the file is truncated")
        start = self.at - self._window_at
        if start + count > len(self._window):
            self._window = self._source.head(max(count, _WINDOW), self.at)
            self._window_at, start = self.at, 0
        self.at += count
        return self._window[start : start + count]

    def unsigned(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def count(self, width: int, smallest: int, what: str) -> int:
        """A count of things that take at least ``smallest`` bytes each."""
        count = self.unsigned(width)
        if count * smallest > self.left:
            raise self.error(f"{count} {what} are announced, but only {self.left} bytes are left")
        return count

    def string(self, longest: int) -> str:
        length = self.unsigned(8)
        if length > longest:
            raise self.error(f"a string of {length} bytes is announced; at most {longest} can be here")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as problem:
            raise self.error(f"a string is not UTF-8: {problem}") from None

    def numbers(self, code: str, count: int) -> list[Any]:
        values: list[Any] = np.frombuffer(self.take(count * np.dtype(code).itemsize), code).tolist()
        return values


def is_gguf(head: bytes) -> bool:
    """Whether a file that begins with these bytes is a GGUF file."""
    return head.startswith(MAGIC)
