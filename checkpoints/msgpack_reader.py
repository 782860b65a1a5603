"""Flax's msgpack files (``flax.serialization.to_bytes``, ``flax_model.msgpack``): nested dicts of arrays.

Only the structure is walked; arrays stay in the file until they are read. Arrays are msgpack extensions of type 1 that
hold ``(shape, dtype name, bytes)``; those of 1 GiB and more are cut into several.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spmd_infer.checkpoints.boxes import as_slices
from spmd_infer.checkpoints.file_bytes import FileBytes, aligned_empty
from spmd_infer.checkpoints.folder_files import architecture_of, read_config
from spmd_infer.checkpoints.manifest import DTYPES
from spmd_infer.checkpoints.reader import Index, TensorInfo, bounds, check_shape, find_tensor
from spmd_infer.errors import CheckpointError

SUFFIXES = (".msgpack", ".flax")
_ARRAY, _SCALAR = 1, 3  # extension types
_MOST_DEPTH = 64
_MOST_STRING = 1 << 16
_CHUNKED = "__msgpack_chunked_array__"
_SIZED = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4, 0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4}
_NUMBERS = {
    0xCA: ">f4", 0xCB: ">f8", 0xCC: "u1", 0xCD: ">u2", 0xCE: ">u4", 0xCF: ">u8", 0xD0: "i1", 0xD1: ">i2", 0xD2: ">i4",
    0xD3: ">i8",
}  # fmt: skip
_FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
_EXTENSIONS = {0xC7: 1, 0xC8: 2, 0xC9: 4}


@dataclass(frozen=True)
class _Stored:
    """One array in the file, in one run or several."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    runs: tuple[tuple[int, int], ...]  # offset and bytes of each


class MsgpackReader:
    """Reader of one msgpack file; names are the dicts' keys joined by dots."""

    stored = "msgpack"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path.parent
        self._bytes = FileBytes(path)
        walker = _Walker(self._bytes)
        tree = walker.value(0)
        if walker.at != self._bytes.size:
            raise CheckpointError(f"{path}: has {self._bytes.size - walker.at} bytes behind its end")
        self._arrays: dict[str, _Stored] = {}
        self._collect((), tree)
        if not self._arrays:
            raise CheckpointError(f"{path}: holds no arrays")
        self.tensors: dict[str, TensorInfo] = {
            name: TensorInfo(name, a.shape, a.dtype, math.prod(a.shape) * a.dtype.itemsize, path, a.dtype.name)
            for name, a in self._arrays.items()
        }
        self.metadata: dict[str, Any] = {}
        self.config: dict[str, Any] = read_config(self.folder) if path.stem == "flax_model" else {}
        self.architecture = architecture_of(self.config)

    def read(self, name: str, index: Index | None = None) -> npt.NDArray[Any]:
        """One slice of a tensor, in memory of its own; see ``Reader.read``."""
        info = find_tensor(self.tensors, name, self.path)
        array, wanted = self._arrays[name], bounds(index, info)
        if len(array.runs) == 1:
            return self._bytes.read(array.runs[0][0], array.shape, array.dtype, wanted)
        out = aligned_empty(array.shape, array.dtype)
        raw, done = out.reshape(-1).view(np.uint8), 0
        for offset, nbytes in array.runs:
            self._bytes.fill(raw[done : done + nbytes], offset)
            done += nbytes
        return np.ascontiguousarray(out[as_slices(wanted)])

    def takes_whole(self, name: str) -> bool:
        """Whether a tensor lies in several runs, so that it is best read all at once; see ``Reader``."""
        return len(self._arrays[name].runs) > 1

    def _collect(self, path: tuple[str, ...], value: Any) -> None:
        name = ".".join(path)
        if isinstance(value, dict) and _CHUNKED in value:
            value = self._joined(name, value)
        if isinstance(value, dict):
            for key, inner in value.items():
                self._collect((*path, str(key)), inner)
        elif isinstance(value, list):
            for position, inner in enumerate(value):
                self._collect((*path, str(position)), inner)
        elif isinstance(value, _Stored):
            if name in self._arrays:
                raise CheckpointError(f"{self.path}: two arrays are called {name!r}")
            self._arrays[name] = value

    def _joined(self, name: str, value: Mapping[Any, Any]) -> _Stored:
        shape, chunks = value.get("shape"), value.get("chunks")
        if not isinstance(shape, dict) or not isinstance(chunks, dict) or not chunks:
            raise CheckpointError(f"{self.path}: array {name!r} is in parts without shape or chunks")
        sizes = tuple(shape.get(str(d)) for d in range(len(shape)))
        parts = [chunks.get(str(i)) for i in range(len(chunks))]
        if not all(type(size) is int and size >= 0 for size in sizes):
            raise CheckpointError(f"{self.path}: array {name!r} has shape {sizes!s:.80}")
        dtype = parts[0].dtype if isinstance(parts[0], _Stored) else None
        if dtype is None or any(not isinstance(part, _Stored) or part.dtype != dtype for part in parts):
            raise CheckpointError(f"{self.path}: array {name!r} has parts that are not arrays of one dtype")
        check_shape(sizes, dtype, name, self.path)  # type: ignore[arg-type]  # checked to be integers
        runs = tuple(run for part in parts for run in part.runs)  # type: ignore[union-attr]  # checked to be arrays
        if sum(nbytes for _, nbytes in runs) != math.prod(sizes) * dtype.itemsize:  # type: ignore[arg-type]  # checked to be integers
            raise CheckpointError(f"{self.path}: the parts of array {name!r} do not make up its shape {list(sizes)}")
        return _Stored(sizes, dtype, runs)  # type: ignore[arg-type]  # checked to be integers


class _Walker:
    """Reads values from a position on; arrays become where they lie."""

    def __init__(self, source: FileBytes) -> None:
        self._source = source
        self._window = b""
        self._start = 0
        self.at = 0

    def value(self, depth: int) -> Any:
        """The value at the current position."""
        if depth > _MOST_DEPTH:
            raise self._refuse(f"is nested deeper than {_MOST_DEPTH}")
        kind = self._take(1)[0]
        if kind <= 0x7F or kind >= 0xE0:
            return kind if kind <= 0x7F else kind - 256
        if kind in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[kind]
        if kind in _NUMBERS:
            dtype = np.dtype(_NUMBERS[kind])
            return np.frombuffer(self._take(dtype.itemsize), dtype)[0].item()
        if kind in _EXTENSIONS or kind in _FIXED_EXTENSIONS:
            size = _FIXED_EXTENSIONS.get(kind) or self._number(_EXTENSIONS[kind])
            return self._extension(size)
        if kind <= 0x8F or kind in (0xDE, 0xDF):
            return self._dict(kind & 15 if kind <= 0x8F else self._number(_SIZED[kind]), depth)
        if kind <= 0x9F or kind in (0xDC, 0xDD):
            return self._list(kind & 15 if kind <= 0x9F else self._number(_SIZED[kind]), depth)
        if kind <= 0xBF or kind in _SIZED:
            size = kind & 31 if kind <= 0xBF else self._number(_SIZED[kind])
            return self._text(size, binary=kind in (0xC4, 0xC5, 0xC6))
        raise self._refuse(f"has a byte {kind:#04x} that begins nothing")

    def _dict(self, count: int, depth: int) -> dict[Any, Any]:
        self._room(2 * count)
        result = {}
        for _ in range(count):
            key = self.value(depth + 1)
            if not isinstance(key, str | int) or key in result:
                raise self._refuse(f"has a dict with the key {key!s:.60}, which is no name or occurs twice")
            result[key] = self.value(depth + 1)
        return result

    def _list(self, count: int, depth: int) -> list[Any]:
        self._room(count)
        return [self.value(depth + 1) for _ in range(count)]

    def _text(self, size: int, *, binary: bool) -> Any:
        self._room(size)
        if binary or size > _MOST_STRING:
            self.at += size  # loose bytes are no tensor
            return None
        try:
            return self._take(size).decode()
        except UnicodeDecodeError as error:
            raise self._refuse(f"has a string that is not UTF-8: {error}") from error

    def _extension(self, size: int) -> _Stored | None:
        code = self._take(1)[0]
        self._room(size)
        end = self.at + size
        if code not in (_ARRAY, _SCALAR):
            self.at = end
            return None
        if self._take(1)[0] != 0x93:
            raise self._refuse("has an array that is not shape, dtype and bytes")
        shape, dtype = self.value(_MOST_DEPTH - 1), self.value(_MOST_DEPTH)
        kind = self._take(1)[0]
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape) or dtype not in DTYPES:
            raise self._refuse(f"has an array of shape {shape!s:.80} and dtype {dtype!s:.40}")
        if kind not in (0xC4, 0xC5, 0xC6) and not 0xA0 <= kind <= 0xBF and kind not in (0xD9, 0xDA, 0xDB):
            raise self._refuse("has an array without bytes")
        nbytes = kind & 31 if 0xA0 <= kind <= 0xBF else self._number(_SIZED[kind])
        check_shape(shape, DTYPES[dtype], f"at byte {self.at}", self._source.path)
        if nbytes != math.prod(shape) * DTYPES[dtype].itemsize or self.at + nbytes != end:
            raise self._refuse(f"has an array {dtype}{shape} of {nbytes} bytes in an extension of {size}")
        place, self.at = self.at, end
        return _Stored(tuple(shape), DTYPES[dtype], ((place, nbytes),))

    def _number(self, size: int) -> int:
        return int.from_bytes(self._take(size), "big")

    def _room(self, count: int) -> None:
        if self.at + count > self._source.size:
            raise self._refuse(f"claims {count} more bytes than there are")

    def _take(self, count: int) -> bytes:
        begin = self.at - self._start
        if begin < 0 or begin + count > len(self._window):
            self._window, self._start, begin = self._source.head(max(count, 1 << 16), self.at), self.at, 0
        piece = self._window[begin : begin + count]
        if len(piece) < count:
            raise self._refuse(f"ends, though {count - len(piece)} more bytes are expected")
        self.at += count
        return piece

    def _refuse(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._source.path}: {what} (byte {self.at} of {self._source.size})")


def is_msgpack(path: Path, head: bytes) -> bool:
    """Whether a file is one of Flax's, by its name and first byte (a dict)."""
    return path.is_file() and path.suffix in SUFFIXES and bool(head) and (head[0] >> 4 == 8 or head[0] in (0xDE, 0xDF))
