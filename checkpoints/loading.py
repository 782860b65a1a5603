"""Weights from a checkpoint straight onto their devices, slice by slice."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from spmd_infer.checkpoints.boxes import Box, as_slices, box_shape, elements, part, pieces, relative
from spmd_infer.checkpoints.casting import cast, cast_problem
from spmd_infer.checkpoints.file_bytes import aligned_empty
from spmd_infer.checkpoints.pipeline import Pipeline
from spmd_infer.checkpoints.reader import Reader, read_into, takes_whole
from spmd_infer.errors import CheckpointError
from spmd_infer.tensors import Source

logger = logging.getLogger("spmd_infer.checkpoints")

DEFAULT_BUDGET_BYTES = 256 << 20
_PIECE_BYTES = 16 << 20

# Tensors that checkpoints carry but models compute: not worth a word when they are left over.
_BUFFERS = re.compile(r"(^|\.)(position_ids|num_batches_tracked|inv_freq|masked_bias|rope_freqs\.weight)$")

Progress = Callable[[int, int], None]
Become = Callable[[str, jax.Array], Mapping[str, jax.Array]]


def load_onto(
    reader: Reader,
    table: Mapping[str, Source],
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    *,
    budget_bytes: int = DEFAULT_BUDGET_BYTES,
    on_progress: Progress | None = None,
    become: Become | None = None,
) -> dict[str, jax.Array]:
    """Read every weight of a model onto the devices that its sharding names.

    Each distinct slice is read once, however many devices hold it, and only slices for this process's devices are
    read. A few threads read pieces of slices, as long as the host memory that they take stays within the budget; one
    piece may exceed it alone. On devices that share the host's memory the array takes over the buffer that the file
    was read into; nothing else refers to that buffer, and equal slices on several such devices share it.

    Args:
        reader: an open checkpoint.
        table: for each parameter path, its source in the checkpoint.
        abstract: for each parameter path, the shape, dtype and sharding to load it with; no sharding means the first
            device. Values are cast to this dtype: floats to floats, integers to integers that hold
            them.
        budget_bytes: host memory for slices under way.
        on_progress: called in the calling thread with the bytes loaded so far and in all, counted in the model's
            dtypes, each distinct slice once.
        become: called in the calling thread with each weight as soon as it is on the devices, in the checkpoint's
            order; what it returns, by path, is kept in the weight's place.

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
    total = sum(job.nbytes for job in jobs)
    loaded: dict[str, jax.Array] = {}
    done = 0

    def ended(job: _Job, pieces_of_it: Mapping[jax.Device, jax.Array]) -> None:
        nonlocal done
        weight = jax.make_array_from_single_device_arrays(
            job.shape, job.sharding, list(pieces_of_it.values()), dtype=job.dtype
        )
        loaded.update({job.path: weight} if become is None else become(job.path, weight))
        done += job.nbytes
        if on_progress is not None:
            on_progress(done, total)

    with Pipeline(budget_bytes) as line:
        for job in jobs:
            placed: dict[jax.Device, jax.Array] = {}
            if job.source.transform is not None:
                line.run(job.host_bytes, partial(_place_transformed, reader, job, placed))
            else:
                for box, devices in job.boxes.items():
                    _read_box(line, reader, job, box, devices, placed)
            line.then(partial(ended, job, placed))
    return {path: loaded[path] for path in abstract} if become is None else loaded


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
    boxes: Mapping[Box, Sequence[jax.Device]]
    stored_dtype: np.dtype[Any]
    stored_size: int

    @property
    def nbytes(self) -> int:
        return sum(elements(box) for box in self.boxes) * self.dtype.itemsize

    @property
    def host_bytes(self) -> int:
        """The most host memory that a parameter with a transform takes while it is under way."""
        return self.stored_size * (self.stored_dtype.itemsize + self.dtype.itemsize) * 2


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
        boxes: dict[Box, list[jax.Device]] = {}
        for device, index in sharding.addressable_devices_indices_map(wanted.shape).items():
            bounds = [piece.indices(size) for piece, size in zip(index or (), wanted.shape, strict=True)]
            boxes.setdefault(tuple((start, stop) for start, stop, _ in bounds), []).append(device)
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


def _read_box(
    line: Pipeline,
    reader: Reader,
    job: _Job,
    box: Box,
    devices: Sequence[jax.Device],
    placed: dict[jax.Device, jax.Array],
) -> None:
    """Have one slice read, in pieces, into memory of its own, and then put on the devices that hold it.

    A device on the host takes that memory over without a copy.
    """
    name, order = job.source.name, job.source.transpose
    ready = aligned_empty(box_shape(box), job.dtype)
    view, stored = ready, box  # the slice as the checkpoint orders its dimensions
    if order is not None:
        back = [order.index(dimension) for dimension in range(len(order))]
        view, stored = ready.transpose(back), tuple(box[position] for position in back)
    whole = takes_whole(reader, name)
    for piece in [stored] if whole else pieces(stored, job.stored_dtype.itemsize, _PIECE_BYTES):
        nbytes = elements(piece) * (job.stored_dtype.itemsize + job.dtype.itemsize)
        line.run(nbytes, partial(_fill, reader, name, piece, part(view, relative(piece, stored))))
    line.then(partial(_place, ready, devices, placed))


def _fill(reader: Reader, name: str, piece: Box, target: npt.NDArray[Any]) -> None:
    if target.flags.c_contiguous and target.dtype == reader.tensors[name].dtype:
        read_into(reader, name, piece, target)
    else:
        cast(reader.read(name, as_slices(piece)), target, name)


def _place(ready: npt.NDArray[Any], devices: Sequence[jax.Device], placed: dict[jax.Device, jax.Array]) -> None:
    arrays = [jax.device_put(ready, device) for device in devices]
    jax.block_until_ready(arrays)  # the host's memory is free (or taken over) before more is read
    placed.update(zip(devices, arrays, strict=True))


def _place_transformed(reader: Reader, job: _Job, placed: dict[jax.Device, jax.Array]) -> None:
    tensor = _transformed(reader, job)
    for box, devices in job.boxes.items():
        piece = part(tensor, box)
        ready = aligned_empty(piece.shape, job.dtype)  # nothing else may refer to what a device takes over
        cast(piece, ready, job.source.name)
        _place(ready, devices, placed)


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
