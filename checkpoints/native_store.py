"""Writing native checkpoints: from another checkpoint, or from arrays on devices. See ``manifest`` for what they are.

This module is the only one that knows how they are stored; ``native_reader`` is its counterpart.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spmd_infer.checkpoints import quantise
from spmd_infer.checkpoints.boxes import Box, pieces, whole
from spmd_infer.checkpoints.copying import (
    Advance,
    CopyPlan,
    Quantisation,
    copy_tensors,
    plan_copy,
    work_key,
)
from spmd_infer.checkpoints.derived import DerivedReader
from spmd_infer.checkpoints.manifest import (
    CHUNK_BYTES,
    DTYPES,
    FORMAT,
    VERSION,
    Chunk,
    Manifest,
    ModelEntry,
    QuantisedEntry,
    StoredFile,
    write_manifest,
)
from spmd_infer.checkpoints.mesh_boxes import MeshLayout, unsplit
from spmd_infer.checkpoints.native_reader import NativeReader
from spmd_infer.checkpoints.native_writer import ArrayWriting, DataWriter, journal_entries, journal_step
from spmd_infer.checkpoints.reader import Reader, TensorInfo
from spmd_infer.checkpoints.side_files import write_side_files
from spmd_infer.checkpoints.target_folder import Journal, check_space, new_folder
from spmd_infer.checkpoints.verifying import verify_native
from spmd_infer.errors import CheckpointError
from spmd_infer.tensors import Axes

Array = npt.NDArray[Any]

JOURNAL_NAME = "journal.jsonl"
_LIBRARIES = ("spmd-infer", "numpy", "ml_dtypes", "jax", "flax")


class NativeSink:
    """Tensors into a native checkpoint's work folder, each noted in a journal when it is written."""

    def __init__(
        self,
        work: Path,
        key: str,
        axes: Mapping[str, Axes],
        layout: MeshLayout | None,
        quantisation: Quantisation | None,
    ) -> None:
        self._axes, self._layout, self._quantisation = axes, layout, quantisation
        self._journal = Journal(work / JOURNAL_NAME, key, lambda: _empty(work))
        done = [journal_entries(step) for step in self._journal.steps]
        self.writer = DataWriter(work, {name: entry for entries in done for name, entry in entries.items()})
        if self._journal.steps:
            files: Any = self._journal.steps[-1]["files"]
            self.writer.resume(files)

    @property
    def done(self) -> set[str]:
        """Tensors that need not be written again."""
        names = set(self.writer.arrays)
        scaled = {name.removesuffix(quantise.SCALES_END) for name in names if name.endswith(quantise.SCALES_END)}
        return names | scaled

    def begin(self, info: TensorInfo) -> ArrayWriting | _Quantising:
        """Begin to write one tensor, quantised where it is to be."""
        group = self._quantisation.group_for(info) if self._quantisation else None
        axes = self._axes.get(info.name)
        if self._quantisation is None or group is None:
            return self._begin(info.name, info.shape, info.dtype, axes)
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

    def manifest(self, reader: Reader, model: ModelEntry, files: list[StoredFile]) -> Manifest:
        """The manifest of what has been written, and the end of the journal."""
        data = self.writer.files()
        entries = self.writer.arrays
        arrays, quantised = {}, {}
        for name, info in reader.tensors.items():
            group = self._quantisation.group_for(info) if self._quantisation else None
            if self._quantisation is None or group is None:
                arrays[name] = entries[name]
                continue
            parts = name + quantise.VALUES_END, name + quantise.SCALES_END
            arrays |= {part: entries[part] for part in parts}
            quantised[name] = QuantisedEntry(
                self._quantisation.kind, info.shape, info.dtype.name, self._axes.get(name), *parts, group
            )
        self._journal.end()
        return Manifest(
            format=FORMAT,
            version=VERSION,
            arrays=arrays,
            data=tuple(data),
            model=model,
            quantised=quantised,
            files=tuple(files),
            mesh=str(self._layout.mesh) if self._layout else "",
            hosts=self._layout.hosts if self._layout else 1,
            source={"path": str(reader.path), "stored": reader.stored},
            libraries=library_versions(),
            created=now(),
        )

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
    ) -> ArrayWriting:
        boxes = self._layout.boxes(name, shape, dtype.itemsize, axes) if self._layout else unsplit(shape)
        return self.writer.begin(name, shape, dtype, axes, boxes, bands)


class _Quantising:
    """A tensor on its way into small numbers and scales."""

    def __init__(self, kind: str, group: int, bands: Sequence[Box], small: ArrayWriting, scales: ArrayWriting) -> None:
        self._kind, self._group, self.bands, self.small, self.scales = kind, group, bands, small, scales

    def put(self, band: Box, values: Array, known: Mapping[Box, Chunk] | None = None) -> None:
        """Quantise a band and write both parts; see ``Writing``."""
        for part, made in zip(
            (self.small, self.scales), quantise.quantise(self._kind, values, self._group), strict=True
        ):
            part.put((*band[:-1], (0, made.shape[-1])), made)


def _rows(info: TensorInfo) -> Iterator[Box]:
    """A tensor in bands of whole rows, all but their last dimension: a row is quantised at once."""
    return pieces(whole(info.shape[:-1]), max(1, info.shape[-1] * 4), CHUNK_BYTES)


def store(
    reader: Reader,
    target: Path,
    *,
    model: ModelEntry,
    axes: Mapping[str, Axes] | None = None,
    layout: MeshLayout | None = None,
    quantisation: Quantisation | None = None,
    overwrite: bool = False,
    check: bool = True,
    what: str = "convert",
    advance: Advance = lambda count: None,
) -> CopyPlan:
    """Write a checkpoint as a native one, tensor by tensor.

    A run that is killed is taken up by the next one with the same source and options. At the end everything that was
    written is read again and its digests compared.

    Args:
        reader: what to write; its names become the tensors' names.
        target: the new folder.
        model: which model it is.
        axes: logical axes of the tensors that have any.
        layout: cut tensors for this mesh, each host's pieces in its own files; by default they stay whole.
        quantisation: make weights small on the way.
        overwrite: replace what is at the target.
        check: read everything again at the end.
        what: what this is called in messages and in the lock.
        advance: called with bytes of the source as they are done, then with bytes written as they are checked.

    Raises:
        CheckpointError: the source is damaged, the disk too small or not writable, or what was written differs.
    """
    plan = plan_copy(reader, quantisation)
    options = {
        "layout": str(layout),
        "quantisation": str(quantisation),
        "axes": {name: list(named) for name, named in (axes or {}).items()},
    }
    key = work_key(reader, options)
    with new_folder(target, what, overwrite=overwrite, resumable=True) as work:
        sink = NativeSink(work, key, axes or {}, layout, quantisation)
        try:
            left = sum(info.nbytes for info in reader.tensors.values() if info.name not in sink.done)
            check_space(work, int(plan.write_bytes * left / max(1, plan.read_bytes)))
            copy_tensors(reader, sink, advance)
            manifest = sink.manifest(reader, model, write_side_files(reader, work))
        finally:
            sink.close()
        write_manifest(manifest, work)
        if check:
            problems = verify_native(NativeReader(work), digest="blake3", advance=advance)
            if problems:
                raise CheckpointError(
                    f"{target}: what was written differs from what should have been: {problems[0]}; the disk or "
                    f"memory may be failing"
                )
    return plan


def stored_model(reader: Reader) -> ModelEntry | None:
    """What a native checkpoint says of its model, also where it is seen through changes; None for other formats."""
    base = _underneath(reader)
    return base.manifest.model if isinstance(base, NativeReader) else None


def stored_axes(reader: Reader) -> dict[str, Axes]:
    """Logical axes that a native checkpoint gives, also where it is seen through changes; none for other formats."""
    base = _underneath(reader)
    return base.axes if isinstance(base, NativeReader) else {}


def _underneath(reader: Reader) -> Reader:
    while isinstance(reader, DerivedReader):
        reader = reader.base
    return reader


def model_entry(reader: Reader) -> ModelEntry:
    """What a checkpoint says of its model, without knowing the family."""
    stored = stored_model(reader)
    if stored is not None:
        return stored
    return ModelEntry(names=reader.stored, architecture=reader.architecture, config=dict(reader.config))


def library_versions() -> dict[str, str]:
    """Versions of the libraries that take part in writing."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def now() -> str:
    """The time, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _empty(work: Path) -> None:
    for item in work.iterdir():
        shutil.rmtree(item) if item.is_dir() else item.unlink()
