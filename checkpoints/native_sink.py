"""Tensors into the data files of a native checkpoint, quantised where they are to be, each noted in a journal."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spmd_infer.checkpoints import quantise
from spmd_infer.checkpoints.boxes import Box, pieces, whole
from spmd_infer.checkpoints.copying import Check, Quantisation, damaged_before
from spmd_infer.checkpoints.manifest import CHUNK_BYTES, DTYPES, Chunk
from spmd_infer.checkpoints.mesh_boxes import MeshLayout, unsplit
from spmd_infer.checkpoints.native_writer import ArrayWriting, DataWriter, journal_entries, journal_step
from spmd_infer.checkpoints.reader import TensorInfo
from spmd_infer.checkpoints.shares import Part, Share
from spmd_infer.checkpoints.target_folder import Journal
from spmd_infer.errors import CheckpointError
from spmd_infer.tensors import Axes

Array = npt.NDArray[Any]


class NativeSink:
    """Tensors into a native checkpoint's work folder, each noted in a journal when it is written."""

    def __init__(
        self,
        work: Path,
        key: str,
        axes: Mapping[str, Axes],
        layout: MeshLayout | None,
        quantisation: Quantisation | None,
        share: Share,
        file_bytes: int,
        keep: bool = False,
    ) -> None:
        self._work, self._axes, self._layout, self._quantisation = work, axes, layout, quantisation
        self._journal = Journal(work / share.journal, key, lambda: share.clear(work))
        done = [journal_entries(step) for step in self._journal.steps]
        arrays = self._before = {name: entry for entries in done for name, entry in entries.items()}
        part = share.index if share.count > 1 else None
        self.writer = DataWriter(work, arrays, part=part, file_bytes=file_bytes, read_back=True, keep=keep)
        if self._journal.steps:
            files: Any = self._journal.steps[-1]["files"]
            self.writer.resume(files)

    @property
    def done(self) -> set[str]:
        """Tensors that need not be written again."""
        names = set(self.writer.arrays)
        scaled = {name.removesuffix(quantise.SCALES_END) for name in names if name.endswith(quantise.SCALES_END)}
        return names | scaled

    def checks(self, info: TensorInfo) -> list[Check]:
        """Compare what a run before wrote of a tensor; see ``copying.Sink``."""
        names = (info.name, info.name + quantise.VALUES_END, info.name + quantise.SCALES_END)
        chunks = [(name, chunk) for name in names if name in self._before for chunk in self._before[name].chunks]
        return [(chunk.nbytes, partial(self._check, chunk, name)) for name, chunk in chunks]

    def _check(self, chunk: Chunk, name: str) -> None:
        try:
            self.writer.check(chunk, name)
        except CheckpointError as error:
            raise damaged_before(error, self._work) from error

    def begin(self, info: TensorInfo, known: Mapping[Box, Chunk]) -> ArrayWriting | _Quantising:
        """Begin to write one tensor, quantised where it is to be."""
        group = self._quantisation.group_for(info) if self._quantisation else None
        axes = self._axes.get(info.name)
        if self._quantisation is None or group is None:
            return self._begin(info.name, info.shape, info.dtype, axes, known=known)
        kind = self._quantisation.kind
        shapes = quantise.stored_shapes(kind, info.shape, group)
        bands = list(_rows(info))
        small, scales = (
            self._begin(info.name + end, shape, np.dtype(dtype), axes, [(*rows, (0, shape[-1])) for rows in bands])
            for end, shape, dtype in (
                (quantise.VALUES_END, shapes[0], DTYPES[quantise.stored_dtype(kind)]),
                (quantise.SCALES_END, shapes[1], np.float32),
            )
        )
        return _Quantising(kind, group, [(*rows, (0, info.shape[-1])) for rows in bands], small, scales)

    def end(self, info: TensorInfo, writing: ArrayWriting | _Quantising) -> None:
        """Note that one tensor is written."""
        parts = (writing,) if isinstance(writing, ArrayWriting) else (writing.small, writing.scales)
        self._journal.add(journal_step({part.name: part.end() for part in parts}, self.writer.names))

    def part(self) -> Part:
        """What has been written, after closing the files."""
        data = self.writer.files()
        return Part(self.writer.arrays, data)

    def close(self) -> None:
        """Close the data files."""
        self.writer.close()

    def _begin(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        axes: Axes | None,
        bands: Sequence[Box] | None = None,
        known: Collection[Box] = (),
    ) -> ArrayWriting:
        boxes = self._layout.boxes(name, shape, dtype.itemsize, axes) if self._layout else unsplit(shape)
        return self.writer.begin(name, shape, dtype, axes, boxes, bands, known)


class _Quantising:
    """A tensor on its way into small numbers and scales; see ``copying.Writing``."""

    def __init__(self, kind: str, group: int, bands: Sequence[Box], small: ArrayWriting, scales: ArrayWriting) -> None:
        self._kind, self._group, self.bands, self.small, self.scales = kind, group, bands, small, scales

    def put(self, band: Box, values: Array, known: Mapping[Box, Chunk] | None = None) -> None:
        """Quantise a band and write both parts; see ``Writing``."""
        for part, made in zip(
            (self.small, self.scales), quantise.quantise(self._kind, values, self._group), strict=True
        ):
            part.put((*band[:-1], (0, made.shape[-1])), made)

    def streams(self, band: Box, dtype: np.dtype[Any]) -> bool:
        """Never: values are computed with."""
        return False


def _rows(info: TensorInfo) -> Iterator[Box]:
    """A tensor in bands of whole rows, all but their last dimension: a row is quantised at once."""
    return pieces(whole(info.shape[:-1]), max(1, info.shape[-1] * 4), CHUNK_BYTES)
