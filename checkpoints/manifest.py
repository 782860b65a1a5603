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
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import msgspec
import numpy as np

from spmd_infer.checkpoints.boxes import Box, elements, tiling_problem
from spmd_infer.checkpoints.reader import check_shape
from spmd_infer.errors import CheckpointError

FORMAT = "spmd-infer checkpoint"
VERSION = 1
MANIFEST_NAME = "manifest.json"
DIGEST_NAME = "manifest.json.sha256"
DATA_FOLDER = "data"
METADATA_NAME = "metadata.json"
CHUNK_BYTES = 16 << 20
"""The most bytes in one chunk: little enough to check a slice without reading much else."""

_MOST_BYTES = 512 << 20
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


class _Head(msgspec.Struct):
    """What every version of the manifest has."""

    format: str
    version: int


def is_native(path: Path) -> bool:
    """Whether a path is a native checkpoint's folder, by its files' names and the manifest's first bytes."""
    manifest = path / MANIFEST_NAME
    if not path.is_dir() or not manifest.is_file():
        return False
    if (path / DIGEST_NAME).is_file():
        return True
    try:
        with manifest.open("rb") as file:
            return FORMAT.encode() in file.read(256)
    except OSError:
        return False


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write a manifest and its digest."""
    content = msgspec.json.encode(manifest)
    (folder / MANIFEST_NAME).write_bytes(content)
    line = f"{hashlib.sha256(content).hexdigest()}  {MANIFEST_NAME}\n"
    (folder / DIGEST_NAME).write_text(line, "ascii")


def read_manifest(folder: Path) -> Manifest:
    """Read a manifest and check all that it says against itself.

    Raises:
        CheckpointError: it is damaged, of another version, or says what cannot be.
    """
    file = folder / MANIFEST_NAME
    content = _checked_bytes(folder)
    try:
        head = msgspec.json.decode(content, type=_Head)
        if head.format != FORMAT or head.version != VERSION:
            raise CheckpointError(
                f"{file}: is {head.format[:80]!r} version {head.version}; this program reads {FORMAT!r} "
                f"version {VERSION}"
            )
        manifest = msgspec.json.decode(content, type=Manifest)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: is not a manifest: {error}") from error
    _check(manifest, file)
    return manifest


def data_digest(chunks: list[Chunk]) -> str:
    """The digest of a data file with these chunks."""
    digest = hashlib.sha256()
    for chunk in sorted(chunks, key=lambda c: c.offset):
        digest.update(bytes.fromhex(chunk.sha256))
    return digest.hexdigest()


def _checked_bytes(folder: Path) -> bytes:
    file, beside = folder / MANIFEST_NAME, folder / DIGEST_NAME
    try:
        for each, most in ((file, _MOST_BYTES), (beside, 1 << 10)):
            if each.stat().st_size > most:
                raise CheckpointError(f"{each}: has {each.stat().st_size} bytes, more than the {most} that are read")
        content, line = file.read_bytes(), beside.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}") from error
    found = hashlib.sha256(content).hexdigest()
    if line != f"{found}  {MANIFEST_NAME}\n".encode():
        raise CheckpointError(
            f"{file}: its SHA-256 is {found}, but {DIGEST_NAME} says {line[:64]!r}; one of the two files is damaged"
        )
    return content


def _check(manifest: Manifest, file: Path) -> None:
    """Everything that the types do not say."""
    names = [stored.name for stored in (*manifest.data, *manifest.files)]
    for stored in (*manifest.data, *manifest.files):
        parts = PurePosixPath(stored.name).parts
        plain = stored.name == "/".join(parts) and parts and not {"..", "/", "."} & set(parts)
        if not plain or "\\" in stored.name or "\0" in stored.name or names.count(stored.name) > 1:
            raise CheckpointError(f"{file}: file name {stored.name!r} is not a plain path inside the folder, once")
        if stored.nbytes < 0 or not _is_digest(stored.sha256):
            raise CheckpointError(f"{file}: {stored.name!r} has {stored.nbytes} bytes and digest {stored.sha256!r}")
    by_file: list[list[tuple[Chunk, str]]] = [[] for _ in manifest.data]
    for name, entry in manifest.arrays.items():
        _check_array(name, entry, file)
        for chunk in entry.chunks:
            if not 0 <= chunk.file < len(manifest.data):
                raise CheckpointError(f"{file}: tensor {name!r} lies in data file {chunk.file} of {len(manifest.data)}")
            by_file[chunk.file].append((chunk, name))
    for stored, held in zip(manifest.data, by_file, strict=True):
        end = 0
        for chunk, name in sorted(held, key=lambda pair: pair[0].offset):
            if chunk.offset != end:
                raise CheckpointError(
                    f"{file}: tensor {name!r} begins at byte {chunk.offset} of {stored.name!r}, expected {end}"
                )
            end += chunk.nbytes
        if end != stored.nbytes:
            raise CheckpointError(f"{file}: {stored.name!r} has {stored.nbytes} bytes, but tensors of {end} in it")
        if data_digest([chunk for chunk, _ in held]) != stored.sha256:
            raise CheckpointError(f"{file}: the digest of {stored.name!r} is not that of its chunks' digests")
    for name, quantised in manifest.quantised.items():
        _check_quantised(name, quantised, manifest, file)


def _check_array(name: str, entry: ArrayEntry, file: Path) -> None:
    if entry.dtype not in DTYPES:
        raise CheckpointError(f"{file}: tensor {name!r} has dtype {entry.dtype!r}; known are {', '.join(DTYPES)}")
    dtype = DTYPES[entry.dtype]
    check_shape(entry.shape, dtype, name, file)
    if entry.axes is not None and len(entry.axes) != len(entry.shape):
        raise CheckpointError(f"{file}: tensor {name!r} of shape {list(entry.shape)} has axes {list(entry.axes)}")
    for chunk in entry.chunks:
        digests = _is_digest(chunk.sha256) and (chunk.blake3 == "" or _is_digest(chunk.blake3))
        if len(chunk.start) != len(chunk.stop) or not digests:
            raise CheckpointError(f"{file}: tensor {name!r} has a chunk {chunk} that is none")
        if chunk.offset < 0 or chunk.nbytes != elements(chunk.box) * dtype.itemsize:
            raise CheckpointError(
                f"{file}: tensor {name!r} has a chunk of {chunk.nbytes} bytes at {chunk.offset} for box "
                f"{list(chunk.box)} of {entry.dtype}"
            )
    problem = tiling_problem(entry.shape, [chunk.box for chunk in entry.chunks])
    if problem is not None:
        raise CheckpointError(f"{file}: tensor {name!r} {problem}")


def _check_quantised(name: str, entry: QuantisedEntry, manifest: Manifest, file: Path) -> None:
    from spmd_infer.checkpoints.quantise import stored_problem

    if name in manifest.arrays:
        raise CheckpointError(f"{file}: tensor {name!r} is both stored and quantised")
    values, scales = manifest.arrays.get(entry.values), manifest.arrays.get(entry.scales)
    if values is None or scales is None or entry.dtype not in DTYPES:
        raise CheckpointError(f"{file}: quantised tensor {name!r} lacks its values, its scales or a known dtype")
    check_shape(entry.shape, DTYPES[entry.dtype], name, file)
    problem = stored_problem(entry, values, scales)
    if problem is not None:
        raise CheckpointError(f"{file}: quantised tensor {name!r} {problem}")


def _is_digest(text: str) -> bool:
    return len(text) == 64 and all(letter in "0123456789abcdef" for letter in text)
