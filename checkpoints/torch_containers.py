"""The two containers of PyTorch files: zip archives, and the older files of pickles and storages in a row.

Zip archives: https://github.com/pytorch/pytorch/blob/main/caffe2/serialize/inline_container.h
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spmd_infer.checkpoints.file_bytes import FileBytes
from spmd_infer.checkpoints.torch_pickle import entries, read_pickle
from spmd_infer.checkpoints.torch_records import Storage, TensorRecord
from spmd_infer.errors import CheckpointError

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
_LEGACY_VERSION = 1001
_LARGEST_PICKLE = 256 << 20
_LONGEST_LINE = 1 << 16


@dataclass(frozen=True)
class Run:
    """Where a storage's bytes lie."""

    offset: int
    nbytes: int


def open_zip(source: FileBytes) -> tuple[Any, dict[str, Run]]:
    """The value of a zip archive's pickle, and where each storage lies.

    Raises:
        CheckpointError: the archive is damaged or truncated, or is not of PyTorch's kind.
    """
    path = source.path
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, struct.error) as error:
        raise CheckpointError(f"{path}: its zip archive is damaged or truncated: {error}") from error
    runs: dict[str, Run] = {}
    for member in members:
        if member.filename in runs:
            raise CheckpointError(f"{path}: archive member {member.filename!r} occurs twice")
        runs[member.filename] = _member_run(source, member)
    _check_disjoint(runs, path)
    pickles = [name for name in runs if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(
            f"{path}: a zip archive with {len(pickles)} members data.pkl; expected a PyTorch file's one"
        )
    root = pickles[0].removesuffix("data.pkl")
    if root + "constants.pkl" in runs and any(name.startswith(root + "code/") for name in runs):
        raise CheckpointError(f"{path}: is a TorchScript program, expected a state dict; save the model's state_dict()")
    order = runs.get(root + "byteorder")
    if order is not None and source.head(min(order.nbytes, 16), order.offset) != b"little":
        raise CheckpointError(f"{path}: its storages are not little-endian")
    run = runs[pickles[0]]
    if run.nbytes > _LARGEST_PICKLE:
        raise CheckpointError(f"{path}: its pickle takes {run.nbytes} bytes; at most {_LARGEST_PICKLE} are read")
    pickle = source.head(run.nbytes, run.offset)
    expected = next(member.CRC for member in members if member.filename == pickles[0])
    if zlib.crc32(pickle) != expected:
        raise CheckpointError(f"{path}: {pickles[0]} is damaged: its checksum is not the archive's")
    prefix = root + "data/"
    storages = {name.removeprefix(prefix): run for name, run in runs.items() if name.startswith(prefix)}
    return read_pickle(io.BytesIO(pickle), path), storages


def _member_run(source: FileBytes, member: zipfile.ZipInfo) -> Run:
    """Where a member's bytes lie; PyTorch stores members uncompressed."""
    where = f"{source.path}: archive member {member.filename!r}"
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        raise CheckpointError(f"{where} is compressed or encrypted; PyTorch stores members as they are")
    header = source.head(30, member.header_offset) if 0 <= member.header_offset < source.size else b""
    if len(header) < 30 or header[:4] != ZIP_MAGIC:
        raise CheckpointError(f"{where} has no header at byte {member.header_offset}")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    offset = member.header_offset + 30 + name_length + extra_length
    if member.compress_size != member.file_size or offset + member.file_size > source.size:
        raise CheckpointError(
            f"{where} should have {member.file_size} bytes at {offset}, but the file has {source.size} bytes"
        )
    return Run(offset, member.file_size)


def _check_disjoint(runs: Mapping[str, Run], path: Path) -> None:
    end, before = 0, ""
    for name, run in sorted(runs.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if run.offset < end and run.nbytes:
            raise CheckpointError(f"{path}: archive members {before!r} and {name!r} overlap")
        end, before = max(end, run.offset + run.nbytes), name


def open_legacy(source: FileBytes) -> tuple[Any, dict[str, Run]]:
    """The value pickled in a file of the kind that PyTorch wrote before 1.6, and where each storage lies.

    Raises:
        CheckpointError: the file is damaged or truncated.
    """
    path = source.path
    stream = _BoundedStream(source, len(LEGACY_MAGIC))
    version = read_pickle(stream, path)
    if version != _LEGACY_VERSION:
        raise CheckpointError(f"{path}: PyTorch file version {version!s:.40}, expected {_LEGACY_VERSION}")
    system = entries(read_pickle(stream, path))
    if system is None or system.get("little_endian") is not True:
        raise CheckpointError(f"{path}: its storages are not little-endian")
    value = read_pickle(stream, path)
    keys = read_pickle(stream, path)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise CheckpointError(f"{path}: expected the list of its storages, found a {type(keys).__name__}")
    storages: dict[str, Storage] = {}
    for record in _all_tensors(value):
        storages.setdefault(record.storage.key, record.storage)
    runs: dict[str, Run] = {}
    at = stream.tell()
    for key in keys:
        storage = storages.get(key)
        if storage is None or key in runs:
            raise CheckpointError(f"{path}: storage {key!r} is listed twice, or no tensor lies in it")
        count = int.from_bytes(source.head(8, at), "little", signed=True)
        unit = 1 if storage.dtype is None else storage.dtype.itemsize
        if count != storage.size or at + 8 + count * unit > source.size:
            raise CheckpointError(
                f"{path}: storage {key!r} has {count} elements of {unit} bytes at byte {at}, expected {storage.size}; "
                f"the file has {source.size} bytes"
            )
        runs[key] = Run(at + 8, count * unit)
        at += 8 + count * unit
    return value, runs


def _all_tensors(value: Any) -> list[TensorRecord]:
    """Every tensor in a value, however deep; each list and dict is looked at once."""
    found: list[TensorRecord] = []
    waiting, seen = [value], set()
    while waiting:
        item = waiting.pop()
        if isinstance(item, TensorRecord):
            found.append(item)
            continue
        inner = entries(item)
        children = inner.values() if inner is not None else item if isinstance(item, list | tuple) else ()
        if children and id(item) not in seen:
            seen.add(id(item))
            waiting.extend(children)
    return found


class _BoundedStream:
    """A file as a stream of which no read takes more memory than the file has bytes left."""

    def __init__(self, source: FileBytes, at: int) -> None:
        self._source = source
        self._at = at
        self._window = b""
        self._window_at = at

    def read(self, count: int, /) -> bytes:
        """Up to ``count`` bytes."""
        start = self._at - self._window_at
        if start + count > len(self._window):
            if count > min(self._source.size - self._at, _LARGEST_PICKLE):
                raise CheckpointError(
                    f"{self._source.path}: {count} bytes are announced at byte {self._at} of {self._source.size}; "
                    f"the file is damaged or truncated"
                )
            self._window = self._source.head(max(count, _LONGEST_LINE), self._at)
            self._window_at, start = self._at, 0
        self._at += count
        return self._window[start : start + count]

    def readline(self) -> bytes:
        """Up to and with the next line end, which cannot be far."""
        text = self._source.head(_LONGEST_LINE, self._at)
        line = text[: text.find(b"\n") + 1] or text
        self._at += len(line)
        return line

    def tell(self) -> int:
        """Where in the file the next byte is read."""
        return self._at
