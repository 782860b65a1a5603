"""The manifest of a native checkpoint: what every byte of it is, and its SHA-256.

A native checkpoint is a folder::

    manifest.json           everything below
    manifest.json.sha256    its digest, as ``sha256sum -c`` reads it
    data/*.bin              the tensors' chunks, end to end, nothing between them
    tokenizer.json, …       files that belong to the model, copied as they were

A chunk is a box of one tensor in C order. Chunks tile each tensor and each data file, so that every byte has a digest
that says to which tensor it belongs: SHA-256, and BLAKE3 for loading. The digest of a data file is the SHA-256 of its
chunks' SHA-256 (32 bytes each, in the order in which they lie in it); that of any other file is the SHA-256 of its
bytes.
"""

from __future__ import annotations

import hashlib
from typing import Any

import ml_dtypes
import msgspec
import numpy as np

from spmd_infer.checkpoints.boxes import Box

FORMAT = "spmd-infer checkpoint"
VERSION = 1
MANIFEST_NAME = "manifest.json"
DIGEST_NAME = "manifest.json.sha256"
DATA_FOLDER = "data"
METADATA_NAME = "metadata.json"
CHUNK_BYTES = 16 << 20
"""The most bytes in one chunk: little enough to check a slice without reading much else."""

_EXTRA = (
    "bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "int4", "uint4",
)  # fmt: skip
_PLAIN = (
    "float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool",
    "complex64", "complex128",
)  # fmt: skip
DTYPES: dict[str, np.dtype[Any]] = {name: np.dtype(name) for name in _PLAIN} | {
    name: np.dtype(getattr(ml_dtypes, name)) for name in _EXTRA
}


class Chunk(msgspec.Struct, array_like=True, frozen=True):
    """One box of a tensor in a data file.

    Attributes:
        file: which entry of ``Manifest.data``.
        offset: where in it the chunk begins.
        nbytes: its bytes.
        start: the box's first index in each dimension.
        stop: one past its last.
        sha256: SHA-256 of its bytes, in hexadecimal.
        blake3: their BLAKE3, with which they are checked while they are loaded; empty in checkpoints that have none,
            where SHA-256 takes its place.
    """

    file: int
    offset: int
    nbytes: int
    start: tuple[int, ...]
    stop: tuple[int, ...]
    sha256: str
    blake3: str = ""

    @property
    def box(self) -> Box:
        """The box of the tensor that it holds."""
        return tuple(zip(self.start, self.stop, strict=True))


class ArrayEntry(msgspec.Struct, frozen=True):
    """One stored array.

    Attributes:
        shape: its shape.
        dtype: its dtype by name.
        axes: its logical axes; None where they are unknown.
        chunks: the pieces that it consists of.
    """

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...] | None
    chunks: tuple[Chunk, ...]


class QuantisedEntry(msgspec.Struct, frozen=True):
    """A tensor that is stored as small numbers and scales.

    Attributes:
        kind: how, as in ``quantise.KINDS``.
        shape: the tensor's shape.
        dtype: the dtype that it is read as.
        axes: its logical axes.
        values: the array with the small numbers.
        scales: the array with the scales.
        group: numbers that share one scale, along the last dimension; 0 where a whole row does.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...] | None
    values: str
    scales: str
    group: int = 0


class StoredFile(msgspec.Struct, frozen=True):
    """One file of the folder: its path inside, size and digest."""

    name: str
    nbytes: int
    sha256: str


class ModelEntry(msgspec.Struct, frozen=True):
    """Which model the tensors are.

    Attributes:
        family: the model family whose parameter paths name the tensors; None where they keep their source's names.
        names: the format whose names the tensors have: all of them where there is no family, else those that the
            family does not use.
        architecture: what the source said that it is.
        config: its configuration in the terms of a Hugging Face ``config.json``; empty where there was none.
        sizes: the family's own configuration, where there was no other.
        units: indivisible units of logical axes, such as heads.
    """

    family: str | None = None
    names: str = ""
    architecture: str | None = None
    config: dict[str, Any] = msgspec.field(default_factory=dict)
    sizes: dict[str, Any] | None = None
    units: dict[str, int] = msgspec.field(default_factory=dict)


class Manifest(msgspec.Struct, frozen=True):
    """See the module.

    Attributes:
        format: ``FORMAT``.
        version: ``VERSION``.
        arrays: every stored array by name.
        data: the data files.
        model: which model it is.
        quantised: tensors that are made of two stored arrays.
        files: files that belong to the model.
        mesh: the mesh that the chunks were cut for, as in ``data=2,model=4``; empty where for none.
        hosts: over how many hosts that mesh is spread.
        source: where the tensors came from.
        libraries: versions of the libraries that wrote it.
        created: when, in UTC.
    """

    format: str
    version: int
    arrays: dict[str, ArrayEntry]
    data: tuple[StoredFile, ...]
    model: ModelEntry = msgspec.field(default_factory=ModelEntry)
    quantised: dict[str, QuantisedEntry] = msgspec.field(default_factory=dict)
    files: tuple[StoredFile, ...] = ()
    mesh: str = ""
    hosts: int = 1
    source: dict[str, Any] = msgspec.field(default_factory=dict)
    libraries: dict[str, str] = msgspec.field(default_factory=dict)
    created: str = ""


def data_digest(chunks: list[Chunk]) -> str:
    """The digest of a data file with these chunks."""
    digest = hashlib.sha256()
    for chunk in sorted(chunks, key=lambda c: c.offset):
        digest.update(bytes.fromhex(chunk.sha256))
    return digest.hexdigest()
