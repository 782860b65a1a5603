"""Writing native checkpoints: from another checkpoint, or from arrays on devices. See ``manifest`` for what they are.

This module is the only one that knows how they are stored; ``native_reader`` is its counterpart.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spmd_infer.checkpoints import quantise
from spmd_infer.checkpoints.boxes import Box
from spmd_infer.checkpoints.copying import (
    Advance,
    CopyPlan,
    Quantisation,
    blocks,
    copy_tensors,
    plan_copy,
    work_key,
)
from spmd_infer.checkpoints.derived import DerivedReader
from spmd_infer.checkpoints.manifest import (
    DTYPES,
    FORMAT,
    VERSION,
    Manifest,
    ModelEntry,
    QuantisedEntry,
    StoredFile,
    write_manifest,
)
from spmd_infer.checkpoints.mesh_boxes import MeshLayout, unsplit
from spmd_infer.checkpoints.native_reader import NativeReader
from spmd_infer.checkpoints.native_writer import DataWriter, journal_entry, journal_step
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
        entries = [journal_entry(step) for step in self._journal.steps]
        self.writer = DataWriter(work, steps=entries)
        if self._journal.steps:
            files: Any = self._journal.steps[-1]["files"]
            self.writer.resume(files)
        self.quantised: dict[str, QuantisedEntry] = {}

    @property
    def done(self) -> set[str]:
        """Tensors that need not be written again."""
        names = set(self.writer.arrays)
        scaled = {name.removesuffix(quantise.SCALES_END) for name in names if name.endswith(quantise.SCALES_END)}
        return names | scaled  # scales are written last

    def write(self, info: TensorInfo, values: Callable[[Box], Array]) -> None:
        """Write one tensor, quantised where it is to be."""
        group = self._quantisation.group_for(info) if self._quantisation else None
        if self._quantisation is None or group is None:
            self._add(info.name, info.shape, info.dtype, self._axes.get(info.name), values)
            return
        kind = self._quantisation.kind
        shapes = quantise.stored_shapes(kind, info.shape, group)
        small = np.empty(shapes[0], DTYPES[quantise.stored_dtype(kind)])
        scales = np.empty(shapes[1], np.float32)
        for box in blocks(info):
            rows = tuple(slice(*bounds) for bounds in box[:-1])
            small[rows], scales[rows] = quantise.quantise(kind, values(box), group)
        axes = self._axes.get(info.name)
        for end, array in ((quantise.VALUES_END, small), (quantise.SCALES_END, scales)):
            self._add(info.name + end, array.shape, array.dtype, axes, _reading(array))

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

    def _add(
        self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], axes: Axes | None, values: Callable[[Box], Array]
    ) -> None:
        if name in self.writer.arrays:
            return
        boxes = self._layout.boxes(name, shape, dtype.itemsize, axes) if self._layout else unsplit(shape)
        entry = self.writer.add(name, shape, dtype, axes, boxes, values)
        self._journal.add(journal_step(name, entry, self.writer.names))


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
            problems = verify_native(NativeReader(work), advance=advance)
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


def _reading(array: Array) -> Callable[[Box], Array]:
    return lambda box: array[tuple(slice(*bounds) for bounds in box)]


def _empty(work: Path) -> None:
    for item in work.iterdir():
        shutil.rmtree(item) if item.is_dir() else item.unlink()
