"""Reading native checkpoints: every byte is checked against its digest before it is used."""

from __future__ import annotations

import hashlib
import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from spmd_infer.checkpoints import digests, quantise
from spmd_infer.checkpoints.boxes import Box, box_shape, elements, intersection, part, relative
from spmd_infer.checkpoints.file_bytes import FileBytes, Scratch, aligned_empty
from spmd_infer.checkpoints.folder_files import read_json
from spmd_infer.checkpoints.manifest import (
    DTYPES,
    METADATA_NAME,
    ArrayEntry,
    Chunk,
    Manifest,
    QuantisedEntry,
)
from spmd_infer.checkpoints.manifest_file import read_manifest
from spmd_infer.checkpoints.reader import Index, TensorInfo, bounds, find_tensor
from spmd_infer.errors import CheckpointError

logger = logging.getLogger("spmd_infer.checkpoints")

Verify = Literal["full", "fast", "off"]
"""``full``: every chunk is checked when it is first read. ``fast``: sizes, and a sample of the chunks when opened.
``off``: sizes. The manifest and the small files are checked in any case."""

FAST_SAMPLES = 16


class NativeReader:
    """Reader of a native checkpoint.

    Opening checks the manifest, that every file is there with its size, and the digests of the small files. Tensors
    that are stored quantised are listed, and read, as the floats that they stand for.

    Args:
        path: the checkpoint's folder.
        verify: how much is checked while reading.

    Raises:
        CheckpointError: something is missing, damaged or not what the manifest says.
    """

    stored = "native"

    def __init__(self, path: Path, verify: Verify = "full") -> None:
        if verify not in get_args(Verify):
            raise CheckpointError(f"verify={verify!r}; expected {', '.join(map(repr, get_args(Verify)))}")
        self.path = self.folder = path
        self.verify: Verify = verify
        self.manifest: Manifest = read_manifest(path)
        self._verified: set[tuple[int, int]] = set()
        self._scratch = Scratch()  # for chunks of which only a part is wanted
        self._by_box: dict[str, Mapping[Box, Chunk]] = {}
        self._files = list(self._open_files())
        model = self.manifest.model
        self.family = model.family
        self.config: dict[str, Any] = model.config
        self.architecture = model.architecture
        self.metadata: dict[str, Any] = {}
        if any(stored.name == METADATA_NAME for stored in self.manifest.files):
            self.metadata = read_json(path / METADATA_NAME)
        parts = {name for entry in self.manifest.quantised.values() for name in (entry.values, entry.scales)}
        self.tensors: dict[str, TensorInfo] = {
            name: self._describe(name, entry) for name, entry in self.manifest.arrays.items() if name not in parts
        }
        for name, quantised in self.manifest.quantised.items():
            self.tensors[name] = self._describe_quantised(name, quantised)
        if verify == "fast":
            self._check_samples()
        elif verify == "off":
            logger.warning("%s: verify=off checks sizes alone; damage would not be noticed", path)

    @property
    def axes(self) -> dict[str, tuple[str | None, ...]]:
        """Logical axes of the tensors that have any."""
        entries: dict[str, ArrayEntry | QuantisedEntry] = {**self.manifest.arrays, **self.manifest.quantised}
        return {name: entries[name].axes or () for name in self.tensors if entries[name].axes is not None}

    def read(self, name: str, index: Index | None = None) -> npt.NDArray[Any]:
        """One slice of a tensor, in memory of its own; see ``Reader.read``.

        Raises:
            CheckpointError: also where a digest does not match; names the file, tensor and bytes.
        """
        info = find_tensor(self.tensors, name, self.path)
        box = bounds(index, info)
        out = aligned_empty(box_shape(box), info.dtype)
        self.read_into(name, box, out)
        return out

    def read_into(self, name: str, box: Box, out: npt.NDArray[Any]) -> None:
        """Read a box of a tensor into memory that is there; see ``Reader``."""
        quantised = self.manifest.quantised.get(name)
        if quantised is None:
            self._read_array(name, box, out)
        elif out.size:
            wanted = quantise.stored_boxes(quantised.kind, box, quantised.group)
            values, scales = (
                self.read_stored(part, part_box)
                for part, part_box in zip((quantised.values, quantised.scales), wanted, strict=True)
            )
            quantise.dequantise(quantised.kind, values, scales, box, quantised.group, out)

    def stream(self, name: str, box: Box, scratch: Scratch) -> Iterator[npt.NDArray[np.uint8]] | None:
        """The bytes of one chunk block by block, its digest compared at the end, however the checkpoint is verified.

        What streams is copied, and the copy takes over the digest; see ``Reader``.
        """
        chunk = self.stored_chunks(name).get(box)
        return None if chunk is None else self._stream(name, chunk, scratch)

    def _stream(self, name: str, chunk: Chunk, scratch: Scratch) -> Iterator[npt.NDArray[np.uint8]]:
        file = self._files[chunk.file]
        memory = scratch.take((file.block_bytes,), np.uint8)
        for _, block in chunk_blocks(file, name, chunk, "blake3" if chunk.blake3 else "sha256", memory):
            yield block
        self._verified.add((chunk.file, chunk.offset))

    def read_stored(self, name: str, box: Box) -> npt.NDArray[Any]:
        """A box of a stored array, the parts of quantised tensors among them."""
        out = aligned_empty(box_shape(box), DTYPES[self.manifest.arrays[name].dtype])
        self._read_array(name, box, out)
        return out

    def stored_chunks(self, name: str) -> Mapping[Box, Chunk]:
        """The chunks of a tensor by their boxes; none where it is stored quantised."""
        if name not in self._by_box:
            entry = self.manifest.arrays.get(name)
            self._by_box[name] = {chunk.box: chunk for chunk in entry.chunks} if entry is not None else {}
        return self._by_box[name]

    @property
    def files(self) -> Sequence[FileBytes]:
        """The data files, in the manifest's order."""
        return self._files

    def _read_array(self, name: str, box: Box, out: npt.NDArray[Any]) -> None:
        entry = self.manifest.arrays[name]
        dtype = DTYPES[entry.dtype]
        for chunk in entry.chunks:
            shared = intersection(chunk.box, box) if entry.shape else ()
            if shared is None or out.size == 0:
                continue
            target = part(out, relative(shared, box))
            unchecked = self.verify == "full" and (chunk.file, chunk.offset) not in self._verified
            if elements(shared) == elements(chunk.box) and target.flags.c_contiguous:
                raw = target.reshape(-1).view(np.uint8)
                if unchecked:
                    self._verified_bytes(name, chunk, raw)
                else:
                    self._files[chunk.file].fill(raw, chunk.offset)
            elif unchecked:
                raw = self._verified_bytes(name, chunk, self._scratch.take((chunk.nbytes,), np.uint8))
                piece = raw.view(dtype).reshape(box_shape(chunk.box))
                np.copyto(target, part(piece, relative(shared, chunk.box)))
            else:
                shape, wanted = box_shape(chunk.box), relative(shared, chunk.box)
                np.copyto(target, self._files[chunk.file].read(chunk.offset, shape, dtype, wanted))

    def _verified_bytes(self, name: str, chunk: Chunk, raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        for _ in chunk_blocks(self._files[chunk.file], name, chunk, "blake3" if chunk.blake3 else "sha256", raw):
            pass
        self._verified.add((chunk.file, chunk.offset))
        return raw

    def _open_files(self) -> Iterator[FileBytes]:
        home = self.path.resolve()
        for stored in (*self.manifest.files, *self.manifest.data):
            file = self.path / stored.name
            if not file.resolve().is_relative_to(home):
                raise CheckpointError(f"{file}: is a link to {file.resolve()}, outside its folder")
            if not file.is_file():
                raise CheckpointError(f"{file}: is missing; the manifest lists it with {stored.nbytes} bytes")
            opened = FileBytes(file)
            if opened.size != stored.nbytes:
                raise CheckpointError(
                    f"{file}: has {opened.size} bytes, expected {stored.nbytes}; it is "
                    f"{'truncated' if opened.size < stored.nbytes else 'not the file that was written'}"
                )
            if stored in self.manifest.data:
                yield opened
                continue
            found = file_digest(opened)
            if found != stored.sha256:
                raise CheckpointError(f"{file}: is damaged: it has SHA-256 {found}, expected {stored.sha256}")

    def _check_samples(self) -> None:
        chunks = [(name, chunk) for name, entry in self.manifest.arrays.items() for chunk in entry.chunks]
        chosen = random.Random(os.urandom(8)).sample(chunks, min(FAST_SAMPLES, len(chunks)))  # noqa: S311 - no secret
        for name, chunk in chosen:
            self._verified_bytes(name, chunk, aligned_empty((chunk.nbytes,), np.uint8))
        logger.warning(
            "%s: verify=fast checked the sizes of %d files and %d of %d chunks; other damage would not be noticed",
            self.path,
            len(self.manifest.data),
            len(chosen),
            len(chunks),
        )

    def _describe(self, name: str, entry: ArrayEntry) -> TensorInfo:
        dtype = DTYPES[entry.dtype]
        file = self._files[entry.chunks[0].file].path if entry.chunks else self.path
        nbytes = sum(chunk.nbytes for chunk in entry.chunks)
        return TensorInfo(name, tuple(entry.shape), dtype, nbytes, file, entry.dtype)

    def _describe_quantised(self, name: str, entry: QuantisedEntry) -> TensorInfo:
        parts = [self.manifest.arrays[part] for part in (entry.values, entry.scales)]
        nbytes = sum(chunk.nbytes for part in parts for chunk in part.chunks)
        file = self._files[parts[0].chunks[0].file].path if parts[0].chunks else self.path
        return TensorInfo(name, tuple(entry.shape), DTYPES[entry.dtype], nbytes, file, entry.kind)


def chunk_blocks(
    file: FileBytes, name: str, chunk: Chunk, kind: digests.Kind, memory: npt.NDArray[np.uint8]
) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """The bytes of one chunk of a stored array, block by block, and at the end one of its digests compared.

    Args:
        file: the data file that the chunk lies in.
        name: the array.
        chunk: one of its chunks.
        kind: which digest.
        memory: where to read to: as large as the chunk, or one block that is used again.

    Yields:
        Where a block begins in the chunk, and its bytes.

    Raises:
        CheckpointError: the chunk is damaged.
    """
    digest = digests.new(kind)
    step = file.block_bytes if memory.size >= chunk.nbytes else min(file.block_bytes, memory.size)
    for start in range(0, chunk.nbytes, step):
        at = start if memory.size >= chunk.nbytes else 0
        block = memory[at : at + min(step, chunk.nbytes - start)]
        file.fill(block, chunk.offset + start)
        digest.update(block.data)
        yield start, block
    found, wanted = digest.hexdigest(), chunk.sha256 if kind == "sha256" else chunk.blake3
    if found != wanted:
        raise CheckpointError(
            f"{file.path}: tensor {name!r} is damaged: bytes {chunk.offset} to {chunk.offset + chunk.nbytes} (its part "
            f"{list(chunk.box)}) have {digests.NAMES[kind]} {found}, expected {wanted}"
        )


def file_digest(source: FileBytes) -> str:
    """SHA-256 of a whole file, read piece by piece."""
    digest = hashlib.sha256()
    scratch = np.empty(min(source.size, 4 << 20), np.uint8)
    for offset in range(0, source.size, max(1, scratch.size)):
        part = scratch[: source.size - offset]
        source.fill(part, offset)
        digest.update(part.data)
    return digest.hexdigest()
