"""Arrays on devices into a native checkpoint; in a job of several processes each writes what its devices hold."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
import msgspec
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh, NamedSharding

from spmd_infer.checkpoints.boxes import Box, part, relative
from spmd_infer.checkpoints.copying import BUDGET_BYTES
from spmd_infer.checkpoints.manifest import (
    FORMAT,
    VERSION,
    Manifest,
    ModelEntry,
)
from spmd_infer.checkpoints.manifest_file import write_manifest
from spmd_infer.checkpoints.native_store import library_versions, now
from spmd_infer.checkpoints.native_writer import FILE_BYTES, ArrayWriting, DataWriter, file_bytes_for
from spmd_infer.checkpoints.pipeline import Pipeline
from spmd_infer.checkpoints.reader import Reader
from spmd_infer.checkpoints.remote import is_remote, url_of
from spmd_infer.checkpoints.remote import named as place_of
from spmd_infer.checkpoints.shares import Part, joined
from spmd_infer.checkpoints.side_files import write_side_files
from spmd_infer.checkpoints.target_folder import check_space, flush, new_folder, work_folder
from spmd_infer.errors import CheckpointError
from spmd_infer.mesh import spec_of
from spmd_infer.tensors import Axes

Array = npt.NDArray[Any]

_PATIENCE_MS = 4 * 3600 * 1000  # a lost process is noticed by its heartbeat, long before
_steps: dict[Path, int] = {}  # how many steps this process has taken with the others, for each target
_steps_lock = threading.Lock()


def save(
    params: Mapping[str, jax.Array],
    path: str | Path,
    *,
    axes: Mapping[str, Axes] | None = None,
    model: ModelEntry | None = None,
    source: Reader | None = None,
    overwrite: bool = False,
) -> None:
    """Save arrays as a native checkpoint that appears whole or not at all.

    In a job of several processes all of them call this with the same arguments; the folder must be on storage that they
    share. Of each distinct slice one copy is written, by a process that holds it.

    Args:
        params: arrays by parameter path.
        path: the new folder; or a place in an object store, as ``s3://bucket/folder``, where a job is one process.
        axes: logical axes by parameter path, for those that have any.
        model: which model it is; without it the arrays are just tensors of these names.
        source: the checkpoint that they were loaded from, for the files that lie beside it (the tokenizer).
        overwrite: replace what is at ``path``.

    Raises:
        CheckpointError: another process is saving there, the path exists, the disk is full or not writable. In a job
            every process raises when one fails, and says which one did.
    """
    check_arrays(params)
    target, named = Path(path) if is_remote(path) else Path(path).absolute(), axes or {}
    needed = sum(array.nbytes for array in params.values())
    if jax.process_count() == 1:
        with new_folder(target, "save", overwrite=overwrite) as work:
            check_space(work, needed)
            part = _write_part(params, work, named, file_bytes_for(target))
            _finish([part], work, params, model, source)
        return
    if is_remote(target):
        raise CheckpointError(f"{url_of(target)}: several processes need a folder on storage that they share")
    work, first = work_folder(target), jax.process_index() == 0
    with ExitStack() as stack:
        # Everybody passes these points in turn, and everybody leaves at the first where one of them has failed.

        def begin() -> None:
            stack.enter_context(new_folder(target, "save", overwrite=overwrite))
            check_space(work, needed)

        _together(begin if first else None, target)

        def write() -> None:
            part = _write_part(params, work, named, FILE_BYTES)
            file = work / f"part-{jax.process_index():05d}.json"
            file.write_bytes(msgspec.json.encode(part))
            for written in (file, *(work / stored.name for stored in part.data)):
                flush(written)

        _together(write, target)

        def finish() -> None:
            files = sorted(work.glob("part-*.json"))
            parts = [msgspec.json.decode(file.read_bytes(), type=Part) for file in files]
            if len(parts) != jax.process_count():
                raise CheckpointError(
                    f"{work}: {len(parts)} of {jax.process_count()} processes' parts are there; the folder must be on "
                    f"storage that all of them share"
                )
            _finish(parts, work, params, model, source)
            for file in files:
                file.unlink()
            stack.close()  # gives the folder its name

        _together(finish if first else None, target)


def check_arrays(params: Mapping[str, jax.Array]) -> None:
    """Refuse what cannot be saved."""
    for name, array in params.items():
        if not isinstance(array, jax.Array) or jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
            raise CheckpointError(f"{name!r} is a {type(array).__name__}; expected a jax.Array of numbers")


def _together(step: Callable[[], None] | None, target: Path) -> None:
    """Take a step, then learn whether every process could take its own; raises in all of them where one could not.

    Over the coordination service and not with a collective, so that a save in the background does not get between the
    collectives of the program in front.
    """
    from jax._src.distributed import global_state  # the service has no public interface

    failure: Exception | None = None
    try:
        if step is not None:
            step()
    except Exception as error:  # whatever it is: the others must not wait for this process for ever
        failure = error
    service: Any = global_state.client
    with _steps_lock:
        _steps[target] = _steps.get(target, 0) + 1
        key = f"spmd-infer/save/{hashlib.sha256(str(target).encode()).hexdigest()[:16]}/{_steps[target]}"
    text = f"{failure}" or type(failure).__name__ if failure is not None else ""
    service.key_value_set(f"{key}/{jax.process_index()}", text or "-")
    try:
        service.wait_at_barrier(key, _PATIENCE_MS)
    except Exception as error:
        raise CheckpointError(f"{target}: save failed: a process was lost or is stuck: {error}") from error
    said = [service.blocking_key_value_get(f"{key}/{rank}", 60_000) for rank in range(jax.process_count())]
    found = [f"process {rank}: {text}" for rank, text in enumerate(said) if text != "-"]
    if found:
        raise CheckpointError(f"{target}: save failed: {'; '.join(found)}") from failure


def _write_part(params: Mapping[str, jax.Array], work: Path, axes: Mapping[str, Axes], file_bytes: int) -> Part:
    """Write this process's shards, one copy of each."""
    host = jax.process_index()
    writer = DataWriter(work, file_bytes=file_bytes)
    try:
        with Pipeline(BUDGET_BYTES, "checkpoint-save") as line:
            for name, array in params.items():
                shards: dict[Box, jax.Array] = {}
                for shard in array.addressable_shards:
                    pieces = [piece.indices(size) for piece, size in zip(shard.index, array.shape, strict=True)]
                    if shard.replica_id == 0:
                        shards[tuple((start, stop) for start, stop, _ in pieces)] = shard.data
                dtype = np.dtype(array.dtype)
                for box, data in shards.items():
                    writing = writer.begin(name, tuple(array.shape), dtype, axes.get(name), [(box, host)])
                    values = _on_host(data)
                    for band in writing.bands:
                        piece = part(values, relative(band, box))
                        line.run(piece.nbytes, partial(writing.put, band, piece))
                    line.then(partial(_ended, writing))
        return Part(writer.arrays, writer.files())
    finally:
        writer.close()


def _ended(writing: ArrayWriting) -> None:
    writing.end()


def _on_host(shard: jax.Array) -> Array:
    """A shard's values; on the host they are not copied."""
    if next(iter(shard.devices())).platform != "cpu":
        shard = shard.copy()  # an array keeps the host copy that is made of it; this one goes away
    return np.asarray(shard)


def _finish(
    parts: Sequence[Part], work: Path, params: Mapping[str, jax.Array], model: ModelEntry | None, source: Reader | None
) -> None:
    """Join the processes' parts into one manifest."""
    written = joined(parts)
    meshes = {
        str(spec_of(array.sharding.mesh))
        for array in params.values()
        if isinstance(array.sharding, NamedSharding) and isinstance(array.sharding.mesh, Mesh)
    }
    files = write_side_files(source, work) if source is not None else []
    manifest = Manifest(
        format=FORMAT,
        version=VERSION,
        arrays={name: written.arrays[name] for name in params},
        data=tuple(written.data),
        model=model or ModelEntry(),
        files=tuple(files),
        mesh=meshes.pop() if len(meshes) == 1 else "",
        hosts=jax.process_count(),
        source={"path": place_of(source.path), "stored": source.stored} if source is not None else {},
        libraries=library_versions(),
        created=now(),
    )
    write_manifest(manifest, work)
