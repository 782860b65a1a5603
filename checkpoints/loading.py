"""Weights from a checkpoint straight onto their devices, slice by slice."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from spmd_infer.checkpoints.casting import cast, cast_problem
from spmd_infer.checkpoints.file_bytes import aligned_empty
from spmd_infer.checkpoints.reader import Reader
from spmd_infer.errors import CheckpointError
from spmd_infer.tensors import Source

logger = logging.getLogger("spmd_infer.checkpoints")

DEFAULT_BUDGET_BYTES = 256 << 20
_MOST_WORKERS = 4

# Tensors that checkpoints carry but models compute: not worth a word when they are left over.
_BUFFERS = re.compile(r"(^|\.)(position_ids|num_batches_tracked|inv_freq|masked_bias|rope_freqs\.weight)$")

Bounds = tuple[tuple[int, int], ...]
Progress = Callable[[int, int], None]


def load_onto(
    reader: Reader,
    table: Mapping[str, Source],
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    *,
    budget_bytes: int = DEFAULT_BUDGET_BYTES,
    on_progress: Progress | None = None,
) -> dict[str, jax.Array]:
    """Read every weight of a model onto the devices that its sharding names.

    Each distinct slice is read once, however many devices hold it, and only slices for this process's devices are
    read. Several weights are under way at a time, as long as the host memory that they take stays within the budget;
    one weight may exceed it alone. On devices that share the host's memory the array takes over the buffer that the
    file was read into; nothing else refers to that buffer, and equal slices on several such devices share it.

    Args:
        reader: an open checkpoint.
        table: for each parameter path, its source in the checkpoint.
        abstract: for each parameter path, the shape, dtype and sharding to load it with; no sharding means the first
            device. Values are cast to this dtype: floats to floats, integers to integers that hold
            them.
        budget_bytes: host memory for slices under way.
        on_progress: called in the calling thread with the bytes loaded so far and in all, counted in the model's
            dtypes, each distinct slice once.

    Returns:
        The weights by parameter path.

    Raises:
        CheckpointError: tensors are missing, or of another shape or kind than the model's (all of them are listed), or
            a tensor cannot be read.
    """
    jobs = _plan(reader, table, abstract)
    left = unused_tensors(reader, table)
    if left:
        logger.info("%s: %d tensors are not used: %s", reader.path, len(left), ", ".join(left[:20]))
    total, done = sum(job.nbytes for job in jobs), 0
    loaded: dict[str, jax.Array] = {}
    workers = max(1, min(_MOST_WORKERS, os.cpu_count() or 1))
    pool = ThreadPoolExecutor(workers, thread_name_prefix="checkpoint")
    try:
        for job, array in _run(jobs, pool, reader, budget_bytes):
            loaded[job.path] = array
            done += job.nbytes
            if on_progress is not None:
                on_progress(done, total)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return {path: loaded[path] for path in abstract}


def unused_tensors(reader: Reader, table: Mapping[str, Source]) -> list[str]:
    """Names of the checkpoint's tensors that no parameter is read from, known buffers left out."""
    used = {source.name for source in table.values()}
    return [name for name in reader.tensors if name not in used and not _BUFFERS.search(name)]


@dataclass(frozen=True)
class _Job:
    """One parameter: where it comes from, and which devices want which box of it."""

    path: str
    source: Source
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    sharding: jax.sharding.Sharding
    boxes: Mapping[Bounds, Sequence[jax.Device]]
    stored_dtype: np.dtype[Any]
    stored_size: int

    @property
    def nbytes(self) -> int:
        return sum(_count(box) for box in self.boxes) * self.dtype.itemsize

    @property
    def host_bytes(self) -> int:
        """The most host memory that is taken while the parameter is under way, beyond the arrays themselves."""
        if self.source.transform is not None:
            return self.stored_size * (self.stored_dtype.itemsize + self.dtype.itemsize) * 2
        return max(map(_count, self.boxes), default=0) * (self.stored_dtype.itemsize + self.dtype.itemsize)


def _plan(reader: Reader, table: Mapping[str, Source], abstract: Mapping[str, jax.ShapeDtypeStruct]) -> list[_Job]:
    """Check every parameter against the checkpoint; jobs in the order in which the tensors lie in it."""
    problems: list[str] = [
        f"{path}: read from {table[path].name!r}, but the model has no such parameter"
        for path in table
        if path not in abstract
    ]
    order = {name: position for position, name in enumerate(reader.tensors)}
    jobs = []
    for path, wanted in abstract.items():
        problem = _problem(reader, table.get(path), wanted)
        if problem is not None:
            problems.append(f"{path}: {problem}")
            continue
        source = table[path]
        info = reader.tensors[source.name]
        sharding = wanted.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        boxes: dict[Bounds, list[jax.Device]] = {}
        for device, index in sharding.addressable_devices_indices_map(wanted.shape).items():
            pieces = [piece.indices(size) for piece, size in zip(index or (), wanted.shape, strict=True)]
            boxes.setdefault(tuple((start, stop) for start, stop, _ in pieces), []).append(device)
        jobs.append(_Job(path, source, tuple(wanted.shape), _on_device(wanted), sharding, boxes, info.dtype, info.size))
    if problems:
        lines = "\n".join(f"  {line}" for line in problems)
        raise CheckpointError(
            f"{reader.path}: {len(problems)} of the model's {len(abstract)} parameters cannot be loaded:\n{lines}"
        )
    return sorted(jobs, key=lambda job: order[job.source.name])


def _problem(reader: Reader, source: Source | None, wanted: jax.ShapeDtypeStruct) -> str | None:
    """Why a parameter cannot be loaded; None where it can."""
    if source is None:
        return "no place in the checkpoint is known for it"
    info = reader.tensors.get(source.name)
    expected = f"expected {np.dtype(wanted.dtype).name}{list(wanted.shape)}"
    if info is None:
        return f"{expected} from tensor {source.name!r}, which the checkpoint does not have"
    order = source.transpose
    if order is not None and sorted(order) != list(range(len(info.shape))):
        return f"{expected} with dimensions {order} of {info}, which has {len(info.shape)} dimensions"
    shape = info.shape if order is None else tuple(info.shape[d] for d in order)
    if source.transform is None and shape != tuple(wanted.shape):
        turned = f" (transposed: {list(shape)})" if order is not None else ""
        return f"{expected}, found {info}{turned}"
    reason = cast_problem(info, _on_device(wanted), reader.tensors)
    return f"{expected}, found {info}; {reason}" if reason else None


def _on_device(wanted: jax.ShapeDtypeStruct) -> np.dtype[Any]:
    """The dtype that the array will have: 64-bit numbers become 32-bit ones unless JAX is told to keep them."""
    return np.dtype(jax.dtypes.canonicalize_dtype(wanted.dtype))


def _run(
    jobs: Sequence[_Job], pool: ThreadPoolExecutor, reader: Reader, budget_bytes: int
) -> Iterator[tuple[_Job, jax.Array]]:
    """Run the jobs, as many at a time as the budget allows; yields each as it ends."""
    running: dict[Future[jax.Array], _Job] = {}
    taken = 0
    for job in jobs:
        while running and taken + job.host_bytes > budget_bytes:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                ended = running.pop(future)
                taken -= ended.host_bytes
                yield ended, future.result()
        running[pool.submit(_load, reader, job)] = job
        taken += job.host_bytes
    while running:
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            yield running.pop(future), future.result()


def _load(reader: Reader, job: _Job) -> jax.Array:
    whole = _transformed(reader, job) if job.source.transform is not None else None
    pieces: dict[jax.Device, jax.Array] = {}
    for box, devices in job.boxes.items():
        piece = _read_box(reader, job, box) if whole is None else whole[tuple(slice(*b) for b in box)]
        ready = _for_device(piece, job, fresh=whole is None and getattr(reader, "fresh_reads", False))
        del piece
        placed = [jax.device_put(ready, device) for device in devices]
        del ready
        jax.block_until_ready(placed)  # the host buffer is free (or taken over) before the next slice is read
        pieces.update(zip(devices, placed, strict=True))
    return jax.make_array_from_single_device_arrays(job.shape, job.sharding, list(pieces.values()), dtype=job.dtype)


def _read_box(reader: Reader, job: _Job, box: Bounds) -> npt.NDArray[Any]:
    order = job.source.transpose
    if order is None:
        return reader.read(job.source.name, tuple(slice(*b) for b in box))
    stored = [slice(None)] * len(order)
    for position, dimension in enumerate(order):
        stored[dimension] = slice(*box[position])
    return reader.read(job.source.name, tuple(stored)).transpose(order)


def _transformed(reader: Reader, job: _Job) -> npt.NDArray[Any]:
    assert job.source.transform is not None
    tensor = reader.read(job.source.name)
    if job.source.transpose is not None:
        tensor = tensor.transpose(job.source.transpose)
    result = job.source.transform(tensor)
    if result.shape != job.shape:
        raise CheckpointError(
            f"{reader.path}: {job.path}: expected shape {list(job.shape)} from {reader.tensors[job.source.name]}, "
            f"but its transform made {list(result.shape)}"
        )
    return result


def _for_device(piece: npt.NDArray[Any], job: _Job, *, fresh: bool) -> npt.NDArray[Any]:
    """The slice in the device's dtype and order, in memory that nothing else refers to.

    A device on the host may take that memory over without a copy, so a reader's result is passed on only where the
    reader promises that it is fresh.
    """
    if fresh and piece.dtype == job.dtype and piece.flags.c_contiguous:
        return piece
    ready = aligned_empty(piece.shape, job.dtype)
    cast(piece, ready, job.source.name)
    return ready


def _count(box: Bounds) -> int:
    count = 1
    for start, stop in box:
        count *= stop - start
    return count
