"""NumPy archives: ``.npz`` as ``numpy.savez`` writes it. Arrays of Python objects, which are pickles, are refused."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from spmd_infer.checkpoints.boxes import as_slices
from spmd_infer.checkpoints.file_bytes import FileBytes, aligned_empty
from spmd_infer.checkpoints.folder_files import architecture_of, read_config
from spmd_infer.checkpoints.reader import Index, TensorInfo, bounds, check_shape, find_tensor
from spmd_infer.errors import CheckpointError

SUFFIX = ".npz"
_ENTRY_HEAD = 30  # bytes before the name in the head of a zip entry
_MOST_HEADER = 1 << 16
_UNREADABLE = (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, RuntimeError, SyntaxError, MemoryError)


@dataclass(frozen=True)
class _Place:
    entry: str
    data: int | None  # where the data begins in the file; None where the entry is compressed
    header: int
    fortran: bool


class NpzReader:
    """Reader of one ``.npz`` file; entries that are not compressed are read slice by slice."""

    stored = "npz"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path.parent
        self._bytes = FileBytes(path)
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, Any] = {}
        self._places: dict[str, _Place] = {}
        try:
            with zipfile.ZipFile(path) as archive:
                for entry in archive.infolist():
                    self._add(archive, entry)
        except _UNREADABLE as error:
            raise CheckpointError(f"{path}: is not an .npz archive that can be read: {error}") from error
        if not self.tensors:
            raise CheckpointError(f"{path}: holds no arrays")
        self.config: dict[str, Any] = read_config(self.folder) if path.stem in ("model", "flax_model") else {}
        self.architecture = architecture_of(self.config)

    def read(self, name: str, index: Index | None = None) -> npt.NDArray[Any]:
        """One slice of a tensor, in memory of its own; see ``Reader.read``."""
        info = find_tensor(self.tensors, name, self.path)
        place, wanted = self._places[name], bounds(index, info)
        if place.data is not None and not place.fortran:
            return self._bytes.read(place.data, info.shape, info.dtype, wanted)
        if place.data is not None:
            turned = self._bytes.read(place.data, info.shape[::-1], info.dtype, wanted[::-1])
            return np.ascontiguousarray(turned.T)
        return np.ascontiguousarray(self._inflated(place, info)[as_slices(wanted)])

    def takes_whole(self, name: str) -> bool:
        """Whether a tensor is compressed, so that it is best read all at once; see ``Reader``."""
        return self._places[name].data is None

    def _inflated(self, place: _Place, info: TensorInfo) -> npt.NDArray[Any]:
        out = aligned_empty(info.shape[::-1] if place.fortran else info.shape, info.dtype)
        view = out.reshape(-1).view(np.uint8).data
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(place.entry) as file:
                file.read(place.header)
                done = 0
                while done < len(view):
                    part = file.read(min(1 << 20, len(view) - done))
                    if not part:
                        raise CheckpointError(
                            f"{self.path}: tensor {info.name!r} ends after {done} of {len(view)} bytes"
                        )
                    view[done : done + len(part)] = part
                    done += len(part)
                if file.read(1):  # the checksum is compared at the end
                    raise CheckpointError(f"{self.path}: tensor {info.name!r} is longer than its header says")
        except _UNREADABLE as error:
            raise CheckpointError(f"{self.path}: tensor {info.name!r} is damaged: {error}") from error
        return out.T if place.fortran else out

    def _add(self, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
        if not entry.filename.endswith(".npy"):
            return
        name = entry.filename.removesuffix(".npy")
        if name in self.tensors:
            raise CheckpointError(f"{self.path}: array {name!r} is in it twice")
        with archive.open(entry) as file:
            shape, fortran, dtype, header = _read_header(file, self.path, name)
        check_shape(shape, dtype, name, self.path)
        nbytes = int(np.prod(shape, dtype=object)) * dtype.itemsize
        if header + nbytes != entry.file_size:
            raise CheckpointError(
                f"{self.path}: array {name!r} should have {nbytes} bytes behind its header, but has "
                f"{entry.file_size - header}"
            )
        # Deflate makes data at most about a thousand times smaller: a larger claim is a lie.
        if entry.compress_type != zipfile.ZIP_STORED and nbytes > 1100 * entry.compress_size + 4096:
            raise CheckpointError(f"{self.path}: array {name!r} claims {nbytes} bytes in {entry.compress_size}")
        data = None
        if entry.compress_type == zipfile.ZIP_STORED:
            head = self._bytes.head(_ENTRY_HEAD, entry.header_offset)
            if len(head) < _ENTRY_HEAD or entry.compress_size != entry.file_size:
                raise CheckpointError(f"{self.path}: the entry of array {name!r} is cut off")
            lengths = int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
            data = entry.header_offset + _ENTRY_HEAD + lengths + header
            if data + nbytes > self._bytes.size:
                raise CheckpointError(f"{self.path}: array {name!r} ends beyond the file's {self._bytes.size} bytes")
        self.tensors[name] = TensorInfo(name, shape, dtype, nbytes, self.path, str(dtype))
        self._places[name] = _Place(entry.filename, data, header, fortran)


def _read_header(file: IO[bytes], path: Path, name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, order, dtype and length of the header of one ``.npy`` entry."""
    version = np.lib.format.read_magic(file)
    reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if reader is None:
        raise CheckpointError(f"{path}: array {name!r} has a header of version {version}; known are 1.0 and 2.0")
    shape, fortran, dtype = reader(file, max_header_size=_MOST_HEADER)
    if dtype.hasobject or dtype.kind not in "fiucb" or not dtype.isnative:
        raise CheckpointError(f"{path}: array {name!r} is of dtype {dtype}, expected native numbers")
    return tuple(shape), bool(fortran), dtype, file.tell()


def is_npz(path: Path, head: bytes) -> bool:
    """Whether a file is an ``.npz`` archive, by its name and first bytes."""
    return path.is_file() and path.suffix == SUFFIX and head.startswith(b"PK")
