"""The manifest's file: written with its digest beside it, and read with all that it says checked against itself."""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath

import msgspec

from spmd_infer.checkpoints.boxes import elements, tiling_problem
from spmd_infer.checkpoints.manifest import (
    DIGEST_NAME,
    DTYPES,
    FORMAT,
    MANIFEST_NAME,
    VERSION,
    ArrayEntry,
    Chunk,
    Manifest,
    QuantisedEntry,
    data_digest,
)
from spmd_infer.checkpoints.quantise import stored_problem
from spmd_infer.checkpoints.reader import check_shape
from spmd_infer.errors import CheckpointError

_MOST_BYTES = 512 << 20


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
