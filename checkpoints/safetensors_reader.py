"""Safetensors files: one file, or a Hugging Face folder with one file or an index of several.

Every header is first checked by the official library (overlaps, holes, offsets, sizes, duplicate names); only then are
the offsets used.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from spmd_infer.checkpoints.boxes import Box, elements, run_of
from spmd_infer.checkpoints.file_bytes import FileBytes, Scratch
from spmd_infer.checkpoints.folder_files import architecture_of, inside, read_config, read_json
from spmd_infer.checkpoints.reader import (
    Index,
    TensorInfo,
    bounds,
    check_shape,
    find_tensor,
)
from spmd_infer.errors import CheckpointError

SUFFIX = ".safetensors"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

DTYPES: Mapping[str, npt.DTypeLike] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "C64": np.complex64,
}


@dataclass(frozen=True)
class _Place:
    bytes_of: FileBytes
    offset: int


class SafetensorsReader:
    """Reader of one safetensors file, or of a Hugging Face folder of them."""

    stored = "safetensors"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path if path.is_dir() else path.parent
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, Any] = {}
        self._places: dict[str, _Place] = {}
        if path.is_dir():
            self._open_folder()
        else:
            self._open_file(path)
        self.config: dict[str, Any] = read_config(self.folder)
        self.architecture = architecture_of(self.config)

    def read(self, name: str, index: Index | None = None) -> npt.NDArray[Any]:
        """One slice of a tensor, in memory of its own; see ``Reader.read``."""
        info = find_tensor(self.tensors, name, self.path)
        place = self._places[name]
        return place.bytes_of.read(place.offset, info.shape, info.dtype, bounds(index, info))

    def read_into(self, name: str, box: Box, out: npt.NDArray[Any]) -> None:
        """Read a box of a tensor into memory that is there; see ``Reader``."""
        place = self._places[name]
        place.bytes_of.read_into(place.offset, self.tensors[name].shape, box, out)

    def stream(self, name: str, box: Box, scratch: Scratch) -> Iterator[npt.NDArray[np.uint8]] | None:
        """The bytes of a box block by block, where they lie together; see ``Reader``."""
        place, info = self._places[name], self.tensors[name]
        first = run_of(info.shape, box)
        if first is None:
            return None
        itemsize = info.dtype.itemsize
        return place.bytes_of.stream(place.offset + first * itemsize, elements(box) * itemsize, scratch)

    def _open_folder(self) -> None:
        files = sorted(self.folder.glob("*" + SUFFIX))
        if (self.folder / SINGLE_NAME).is_file():
            self._open_file(inside(self.folder, SINGLE_NAME))
        elif (self.folder / INDEX_NAME).is_file():
            self._open_index(inside(self.folder, INDEX_NAME))
        elif len(files) == 1:
            self._open_file(inside(self.folder, files[0].name))
        else:
            raise CheckpointError(
                f"{self.folder}: {len(files)} safetensors files but no {INDEX_NAME} that says what each holds: "
                f"{', '.join(file.name for file in files[:8])}; add the index, or give one file's path"
            )

    def _open_index(self, file: Path) -> None:
        weight_map = read_json(file).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{file}: expected a 'weight_map' from tensor names to file names")
        shards: dict[str, list[str]] = {}
        for name, shard in weight_map.items():
            if not isinstance(shard, str):
                raise CheckpointError(f"{file}: tensor {name!r} is mapped to {shard!r}, expected a file name")
            shards.setdefault(shard, []).append(name)
        missing = [shard for shard in shards if not inside(self.folder, shard).is_file()]
        if missing:
            raise CheckpointError(
                f"{file}: {len(missing)} of {len(shards)} files that it names are not there: {', '.join(missing[:8])}"
            )
        for shard, names in shards.items():
            held = self._open_file(inside(self.folder, shard))
            lost = [name for name in names if name not in held]
            if lost:
                raise CheckpointError(
                    f"{self.folder / shard}: {len(lost)} tensors that {INDEX_NAME} puts there are not in it: "
                    f"{', '.join(lost[:4])}"
                )

    def _open_file(self, file: Path) -> set[str]:
        """Add a file's tensors; returns their names."""
        source = FileBytes(file)
        header, data_start = _checked_header(source)
        for name, entry in header.items():
            if name == "__metadata__":
                self.metadata.update(entry)
                continue
            if name in self.tensors:
                raise CheckpointError(f"{file}: tensor {name!r} is also in {self.tensors[name].file}")
            if entry["dtype"] not in DTYPES:
                raise CheckpointError(
                    f"{file}: tensor {name!r} has dtype {entry['dtype']}; known are {', '.join(DTYPES)}"
                )
            begin, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            dtype: np.dtype[Any] = np.dtype(DTYPES[entry["dtype"]])
            check_shape(shape, dtype, name, file)
            self.tensors[name] = TensorInfo(name, shape, dtype, end - begin, file, entry["dtype"])
            self._places[name] = _Place(source, data_start + begin)
        return header.keys() - {"__metadata__"}


def _checked_header(source: FileBytes) -> tuple[dict[str, Any], int]:
    """A file's header, checked by the official library, and where the data begins."""
    if source.size < 8:
        raise CheckpointError(f"{source.path}: {source.size} bytes are too few for a safetensors file")
    (length,) = struct.unpack("<Q", source.head(8))
    if length > source.size - 8:
        raise CheckpointError(
            f"{source.path}: its header claims {length} bytes, but the file has only {source.size}; "
            f"it is truncated or not a safetensors file"
        )
    try:
        with safe_open(source.path, framework="np"):
            pass
        header = json.loads(source.head(length, 8), object_pairs_hook=_without_duplicates)
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{source.path}: not a valid safetensors file: {error}") from error
    return header, 8 + length


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} occurs twice in the header")
    return result
