"""Writing native checkpoints from other ones, and what they say of their model. See ``manifest`` for what they are.

This module and those it calls are the only ones that know how they are stored; ``native_reader`` is the counterpart.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import msgspec

from spmd_infer.checkpoints import quantise
from spmd_infer.checkpoints.copying import Advance, CopyPlan, Quantisation, copy_tensors, plan_copy, work_key
from spmd_infer.checkpoints.derived import DerivedReader
from spmd_infer.checkpoints.manifest import FORMAT, VERSION, Manifest, ModelEntry, QuantisedEntry
from spmd_infer.checkpoints.manifest_file import write_manifest
from spmd_infer.checkpoints.mesh_boxes import MeshLayout
from spmd_infer.checkpoints.native_reader import NativeReader
from spmd_infer.checkpoints.native_sink import NativeSink
from spmd_infer.checkpoints.native_writer import file_bytes_for
from spmd_infer.checkpoints.reader import Reader
from spmd_infer.checkpoints.remote import is_remote, named, url_of
from spmd_infer.checkpoints.shares import Part, Share, joined
from spmd_infer.checkpoints.side_files import write_side_files
from spmd_infer.checkpoints.target_folder import check_space, described, locked, new_folder, work_folder
from spmd_infer.errors import CheckpointError
from spmd_infer.tensors import Axes

_LIBRARIES = ("spmd-infer", "numpy", "ml_dtypes", "jax", "flax")


def store(
    reader: Reader,
    target: Path,
    *,
    model: ModelEntry,
    axes: Mapping[str, Axes] | None = None,
    layout: MeshLayout | None = None,
    quantisation: Quantisation | None = None,
    overwrite: bool = False,
    share: Share | None = None,
    what: str = "convert",
    advance: Advance = lambda count: None,
) -> CopyPlan:
    """Write a checkpoint as a native one, tensor by tensor.

    A run that is killed is taken up by the next one with the same source and options. Each chunk that was written is
    read again and its digest compared, what an earlier run wrote as well; then the page cache lets go of it.

    Args:
        reader: what to write; its names become the tensors' names.
        target: the new folder.
        model: which model it is.
        axes: logical axes of the tensors that have any.
        layout: cut tensors for this mesh, each host's pieces in its own files; by default they stay whole.
        quantisation: make weights small on the way.
        overwrite: replace what is at the target.
        share: which of several processes this is that write the checkpoint together; all of them call this with the
            same arguments. The first returns when the checkpoint is whole, the others when their share is written.
        what: what this is called in messages and in the lock.
        advance: called with bytes of the source as they are done.

    Raises:
        CheckpointError: the source is damaged, the disk too small or not writable, or what was written differs.
    """
    plan, share = plan_copy(reader, quantisation), share or Share()
    options = {
        "layout": str(layout),
        "quantisation": str(quantisation),
        "axes": {name: list(named) for name, named in (axes or {}).items()},
        "processes": share.count,
    }
    if share.count > 1 and is_remote(target):
        raise CheckpointError(f"{url_of(target)}: several processes need a folder on storage that they share")
    key = work_key(reader, options)
    mine = share.names({name: info.nbytes for name, info in reader.tensors.items()})

    def write(work: Path) -> Part:
        sink = NativeSink(work, key, axes or {}, layout, quantisation, share, file_bytes_for(target), is_remote(target))
        if share.index == 0 and share.count > 1:
            share.announce(work, key)
        try:
            left = sum(info.nbytes for info in reader.tensors.values() if info.name in mine - sink.done)
            check_space(work, int(plan.write_bytes * left / max(1, plan.read_bytes)))
            copy_tensors(reader, sink, advance, only=mine)
            return sink.part()
        finally:
            sink.close()

    if share.index:
        work = work_folder(target.absolute())
        share.await_announcement(work, key)
        with (
            locked(share.lock_path(work), f"{what}, share {share.index} of {share.count}", patience=2.0),
            described(target, what, work),
        ):
            part = write(work)
        share.post(work, part)
        return plan
    with new_folder(target, what, overwrite=overwrite, resumable=True) as work:
        parts = [write(work), *share.collect(work)]
        manifest = _manifest(reader, joined(parts), model, axes or {}, layout, quantisation)
        write_manifest(msgspec.structs.replace(manifest, files=tuple(write_side_files(reader, work))), work)
    return plan


def _manifest(
    reader: Reader,
    written: Part,
    model: ModelEntry,
    axes: Mapping[str, Axes],
    layout: MeshLayout | None,
    quantisation: Quantisation | None,
) -> Manifest:
    arrays, quantised = {}, {}
    for name, info in reader.tensors.items():
        group = quantisation.group_for(info) if quantisation else None
        if quantisation is None or group is None:
            arrays[name] = written.arrays[name]
            continue
        parts = name + quantise.VALUES_END, name + quantise.SCALES_END
        arrays |= {part: written.arrays[part] for part in parts}
        quantised[name] = QuantisedEntry(quantisation.kind, info.shape, info.dtype.name, axes.get(name), *parts, group)
    return Manifest(
        format=FORMAT,
        version=VERSION,
        arrays=arrays,
        data=tuple(written.data),
        model=model,
        quantised=quantised,
        mesh=str(layout.mesh) if layout else "",
        hosts=layout.hosts if layout else 1,
        source={"path": named(reader.path), "stored": reader.stored},
        libraries=library_versions(),
        created=now(),
    )


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
