"""Writing the data files of a native checkpoint, chunk by chunk."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from spmd_infer.checkpoints import digests
from spmd_infer.checkpoints.boxes import (
    Box,
    box_shape,
    elements,
    intersection,
    part,
    pieces,
    relative,
    whole,
)
from spmd_infer.checkpoints.casting import cast
from spmd_infer.checkpoints.file_bytes import aligned_empty
from spmd_infer.checkpoints.manifest import CHUNK_BYTES, DATA_FOLDER, DTYPES, ArrayEntry, Chunk, StoredFile, data_digest
from spmd_infer.checkpoints.output_files import OutputFiles
from spmd_infer.checkpoints.remote import is_remote
from spmd_infer.checkpoints.remote_target import OBJECT_BYTES
from spmd_infer.errors import CheckpointError
from spmd_infer.tensors import Axes

FILE_BYTES = 4 << 30
"""A data file that has reached this size is followed by another; see ``file_bytes_for``."""

BAND_BYTES = 64 << 20
"""The most bytes of a tensor that are read at once, where its columns go to several boxes."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class _Place:
    """Where a chunk is to lie."""

    box: Box
    file: int
    offset: int


class ArrayWriting:
    """One array on its way into the data files, its places in them taken.

    Attributes:
        name: the array's name.
        bands: boxes that tile what is written, in the order in which they lie in the files.
    """

    def __init__(
        self, writer: DataWriter, name: str, entry: ArrayEntry, places: Mapping[Box, Sequence[_Place]]
    ) -> None:
        self._writer, self.name, self._entry, self._places = writer, name, entry, places
        self._dtype = DTYPES[entry.dtype]
        self._chunks: dict[tuple[int, int], Chunk] = {}
        self.bands = list(places)

    def put(self, band: Box, values: Array, known: Mapping[Box, Chunk] | None = None) -> None:
        """Write the chunks of one band; safe to call from several threads.

        Args:
            band: one of ``bands``.
            values: its values; in another dtype than the stored one they are cast, checked to fit.
            known: chunks of another checkpoint with the same values, whose SHA-256 need not be computed again.

        Raises:
            CheckpointError: the values are not those that a known chunk had.
        """
        if values.shape != box_shape(band):
            raise CheckpointError(
                f"tensor {self.name!r}: expected a piece of shape {list(box_shape(band))}, got {list(values.shape)}"
            )
        for place in self._places[band]:
            raw = digests.flat_bytes(_packed(part(values, relative(place.box, band)), self._dtype, self.name))
            self._put(place, (block for _, block in digests.blocks(raw)), known, compare=True)

    def streams(self, band: Box, dtype: np.dtype[Any]) -> bool:
        """Whether a band of that dtype may be put block by block: it is one chunk, and nothing is cast."""
        return dtype == self._dtype and [place.box for place in self._places[band]] == [band]

    def put_blocks(
        self, band: Box, blocks: Iterable[npt.NDArray[np.uint8]], known: Mapping[Box, Chunk] | None = None
    ) -> None:
        """Write a band for which ``streams`` is true from its bytes in C order; see ``copying.Writing``."""
        self._put(self._places[band][0], blocks, known, compare=False)

    def _put(
        self,
        place: _Place,
        blocks: Iterable[npt.NDArray[np.uint8]],
        known: Mapping[Box, Chunk] | None,
        *,
        compare: bool,
    ) -> None:
        same = known.get(place.box) if known else None
        if same is not None and not same.blake3:
            same = None
        slow, fast = digests.new("sha256"), digests.new("blake3")
        nbytes = 0
        for block in blocks:
            if same is None:
                slow.update(block.data)
            if same is None or compare:
                fast.update(block.data)
            self._writer.write(place.file, place.offset + nbytes, block, self.name)
            nbytes += block.size
        if same is not None and compare and fast.hexdigest() != same.blake3:
            raise CheckpointError(
                f"tensor {self.name!r}: its part {list(place.box)} has BLAKE3 {fast.hexdigest()}, expected "
                f"{same.blake3}: the checkpoint that it comes from is damaged"
            )
        sha256, blake3 = (same.sha256, same.blake3) if same else (slow.hexdigest(), fast.hexdigest())
        start, stop = tuple(a for a, _ in place.box), tuple(b for _, b in place.box)
        chunk = Chunk(place.file, place.offset, nbytes, start, stop, sha256, blake3)
        self._writer.written(chunk)
        self._chunks[place.file, place.offset] = chunk

    def end(self) -> ArrayEntry:
        """The array's entry, when all its bands have been put; with what has been written of it before."""
        chunks = tuple(chunk for _, chunk in sorted(self._chunks.items()))
        before = self._writer.arrays.get(self.name, self._entry)
        entry = msgspec.structs.replace(before, chunks=(*before.chunks, *chunks))
        self._writer.arrays[self.name] = entry
        return entry


class DataWriter:
    """Appends arrays to the data files of a folder, one series of files for each host.

    Args:
        folder: the checkpoint's folder, or the one that will become it.
        arrays: what a run before wrote, as ``ArrayWriting.end`` returned it; what lies behind it is cut off.
        part: which process this is, where several write into the folder, each into files of its own.
        file_bytes: a data file that has reached this size is followed by another.
        read_back: read each block again once it is written, and compare; chunks that are done leave the page cache.
        keep: leave it there nevertheless.
    """

    def __init__(
        self,
        folder: Path,
        arrays: Mapping[str, ArrayEntry] | None = None,
        *,
        part: int | None = None,
        file_bytes: int = FILE_BYTES,
        read_back: bool = False,
        keep: bool = False,
    ) -> None:
        self._folder, self._file_bytes, self._read_back = folder, file_bytes, read_back
        self._series = "" if part is None else f"part-{part:04d}-"
        self.arrays: dict[str, ArrayEntry] = dict(arrays or {})
        self._names: list[str] = []
        self._sizes: list[int] = []
        self._current: dict[int, int] = {}  # the open file of each host
        self._files = OutputFiles(folder, keep=keep)
        (folder / DATA_FOLDER).mkdir(exist_ok=True)

    def resume(self, files: Sequence[str]) -> None:
        """Go on behind the arrays that were given, which lie in these files."""
        self._names = list(files)
        self._sizes = [0] * len(files)
        for entry in self.arrays.values():
            for chunk in entry.chunks:
                self._sizes[chunk.file] = max(self._sizes[chunk.file], chunk.offset + chunk.nbytes)
        for position, name in enumerate(self._names):
            with (self._folder / name).open("r+b") as file:
                file.truncate(self._sizes[position])
            self._current[int(name.rpartition("host-")[2].partition("-")[0])] = position

    @property
    def names(self) -> list[str]:
        """The data files so far."""
        return self._names

    def begin(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        axes: Axes | None,
        boxes: Sequence[tuple[Box, int]],
        bands: Iterable[Box] | None = None,
        known: Collection[Box] = (),
    ) -> ArrayWriting:
        """Take the places for one array, or for this process's boxes of it.

        Args:
            name: its name.
            shape: its whole shape.
            dtype: the dtype to store.
            axes: its logical axes.
            boxes: disjoint boxes, each with the host whose file it goes to.
            bands: in which pieces the values will come; no chunk reaches over the end of one.
            known: the chunks of the checkpoint that the values come from, where it has any.
        """
        if dtype.name not in DTYPES:
            raise CheckpointError(f"tensor {name!r} is {dtype.name}, which checkpoints cannot hold")
        places: dict[Box, list[_Place]] = {}
        for band in bands_of(shape, dtype, boxes, known) if bands is None else bands:
            places[band] = []
            for box, host in boxes:
                shared = intersection(band, box) if shape else ()
                for piece in pieces(shared, dtype.itemsize, CHUNK_BYTES) if shared is not None else ():
                    places[band].append(_Place(piece, *self._reserve(host, elements(piece) * dtype.itemsize)))
        return ArrayWriting(self, name, ArrayEntry(shape, dtype.name, axes, ()), places)

    def write(self, position: int, offset: int, raw: npt.NDArray[np.uint8], name: str) -> None:
        """Write bytes of an array at a place that was taken; compared, where that is wanted."""
        if self._read_back:
            self._files.write_compared(self._names[position], offset, raw, name)
        else:
            self._files.write(self._names[position], offset, raw)

    def written(self, chunk: Chunk) -> None:
        """All of a chunk is written."""
        if self._read_back:
            self._files.let_go(self._names[chunk.file], chunk.offset, chunk.nbytes)

    def check(self, chunk: Chunk, name: str) -> None:
        """Compare a chunk that a run before wrote with what is in its file, which then leaves the page cache.

        Raises:
            CheckpointError: it is not what it should be.
        """
        self._files.check(self._names[chunk.file], chunk.offset, chunk.nbytes, chunk.blake3, name)

    def files(self) -> list[StoredFile]:
        """Size and digest of each data file, after closing them all."""
        self.close()
        held: list[list[Chunk]] = [[] for _ in self._names]
        for entry in self.arrays.values():
            for chunk in entry.chunks:
                held[chunk.file].append(chunk)
        return [
            StoredFile(name, size, data_digest(chunks))
            for name, size, chunks in zip(self._names, self._sizes, held, strict=True)
        ]

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def _reserve(self, host: int, nbytes: int) -> tuple[int, int]:
        """The file and offset for the next chunk of a host."""
        position = self._current.get(host)
        if position is None or self._sizes[position] >= self._file_bytes:
            count = sum(f"host-{host:04d}-" in name for name in self._names)
            self._names.append(f"{DATA_FOLDER}/host-{host:04d}-{self._series}{count:04d}.bin")
            self._sizes.append(0)
            position = self._current[host] = len(self._names) - 1
            (self._folder / self._names[position]).write_bytes(b"")
        offset = self._sizes[position]
        self._sizes[position] += nbytes
        return position, offset


def file_bytes_for(target: Path) -> int:
    """How large a target's data files may become."""
    return OBJECT_BYTES if is_remote(target) else FILE_BYTES


def bands_of(
    shape: Sequence[int], dtype: np.dtype[Any], boxes: Sequence[tuple[Box, int]], known: Collection[Box] = ()
) -> list[Box]:
    """How a tensor is best read to be cut into boxes.

    Chunk by chunk; by rows where those go to several boxes; and in larger pieces of the boxes where the source's chunks
    (``known``) reach over the ends of the new ones, so that each of them is read once.
    """
    cut = any(bounds != (0, size) for box, _ in boxes for bounds, size in zip(box[1:], shape[1:], strict=True))
    if cut and len(boxes) > 1:
        return list(pieces(whole(shape), dtype.itemsize, BAND_BYTES))
    fine, coarse = (
        [piece for box, _ in sorted(boxes) for piece in pieces(box, dtype.itemsize, most)]
        for most in (CHUNK_BYTES, BAND_BYTES)
    )
    return coarse if known and reach_over(known, fine) else fine


def reach_over(chunks: Iterable[Box], boxes: Sequence[Box]) -> bool:
    """Whether one of some chunks lies in more than one box."""
    return any(sum(intersection(chunk, box) is not None for box in boxes) > 1 for chunk in chunks)


def journal_step(entries: Mapping[str, ArrayEntry], files: Sequence[str]) -> dict[str, object]:
    """Arrays that belong together as a journal's step."""
    return {"arrays": msgspec.to_builtins(entries), "files": list(files)}


def journal_entries(step: dict[str, Any]) -> dict[str, ArrayEntry]:
    """The arrays back from a journal's step."""
    return msgspec.convert(step["arrays"], dict[str, ArrayEntry], strict=False)


def _packed(values: Array, dtype: np.dtype[Any], name: str) -> Array:
    """Values in C order and in the stored dtype; only copied where they are not."""
    if values.dtype == dtype and values.flags.c_contiguous:
        return values
    out = aligned_empty(values.shape, dtype)
    if values.dtype == dtype:
        np.copyto(out, values)
    else:
        cast(values, out, name)
    return out
