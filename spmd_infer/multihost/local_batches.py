"""A batch of each rank's own: every rank gives its rows and gets their results; no row travels between processes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import msgspec
import numpy as np
import numpy.typing as npt

from spmd_infer.axes import BATCH
from spmd_infer.batching import Buckets, pad_rows
from spmd_infer.errors import BatchError
from spmd_infer.multihost.job import Job
from spmd_infer.placement import Placement
from spmd_infer.runner import BatchRunner
from spmd_infer.signature import CheckedBatch, Signature
from spmd_infer.transfer import put

if TYPE_CHECKING:
    from jax.sharding import NamedSharding

    Array = npt.NDArray[Any]


def infer_local(job: Job, runner: BatchRunner, batch: Any) -> Any:
    """Run every rank's own rows; see ``Engine.infer_local``."""
    placement = runner.programs.placement
    signature = runner.signature or Signature.from_example(batch)
    try:
        checked, problem = signature.check(batch), ""
    except BatchError as error:
        checked, problem = None, str(error)
    rows = 0 if checked is None else checked.rows
    said = [msgspec.json.decode(part) for part in job.channel.gather("rows", msgspec.json.encode([rows, problem]))]
    for rank, (_, wrong) in enumerate(said):
        if wrong:
            raise BatchError(f"{job.name_of(rank)}: {wrong}")
    assert checked is not None
    sizes = [size // job.size for size in runner.buckets.sizes if size % job.size == 0]
    _check_rows_by_process(job, placement, sizes)
    pieces = []
    for start, stop, bucket in Buckets(tuple(sizes), 1).split(max(count for count, _ in said)):
        shared = _global(placement, checked, min(start, rows - 1), min(stop, rows), bucket, job.size)
        (result,) = runner.run((shared,), None, "placed")
        kept = max(0, min(stop, rows) - start)
        pieces.append(jax.tree.map(partial(_own_rows, kept), result))
    return pieces[0] if len(pieces) == 1 else jax.tree.map(lambda *parts: np.concatenate(parts), *pieces)


def _check_rows_by_process(job: Job, placement: Placement, sizes: list[int]) -> None:
    """Each process's devices must hold one run of the rows, in the order of ranks."""
    if sizes:
        rows = sizes[0] * job.size
        found: Mapping[Any, Any] = placement.sharding((BATCH,), (rows,)).devices_indices_map((rows,))
        if all(
            device.process_index * sizes[0] <= (index[0].start or 0)
            and (rows if index[0].stop is None else index[0].stop) <= (device.process_index + 1) * sizes[0]
            for device, index in found.items()
        ):
            return
    raise BatchError(
        f"mesh {placement.plan.mesh} does not split the rows of a batch by process, so the {job.size} processes cannot "
        f"each give their own: use a mesh whose data axis is a multiple of {job.size}, or infer() with rank 0's batch"
    )


def _global(placement: Placement, batch: CheckedBatch, start: int, stop: int, bucket: int, size: int) -> Any:
    """This rank's rows, padded, as a part of arrays over all processes; a rank that has none left repeats one."""

    def lay(leaf: Any, axes: Any, by_rows: bool) -> jax.Array:
        if not by_rows:
            return put(leaf, placement.sharding(axes, leaf.shape))
        local = np.asarray(pad_rows(np.asarray(leaf), start, max(stop, start + 1), bucket))
        shape = (bucket * size, *local.shape[1:])
        sharding: NamedSharding = placement.sharding(axes, shape)
        whole: jax.Array = jax.make_array_from_process_local_data(sharding, local, shape)
        return whole

    leaves = [lay(leaf, spec.axes, BATCH in spec.shape) for leaf, spec in zip(batch.leaves, batch.specs, strict=True)]
    return jax.tree_util.tree_unflatten(batch.treedef, leaves)


def _own_rows(kept: int, x: jax.Array) -> Array:
    """The first rows on this process's devices, put together from what each of these holds."""
    starts = {shard.index[0].start or 0 for shard in x.addressable_shards}
    first = min(starts)
    own = np.empty((len(starts) * x.addressable_shards[0].data.shape[0], *x.shape[1:]), x.dtype)
    filled = 0
    for shard in {str(shard.index): shard for shard in x.addressable_shards}.values():
        rows = shard.index[0].start or 0
        own[(slice(rows - first, rows - first + shard.data.shape[0]), *shard.index[1:])] = np.asarray(shard.data)
        filled += shard.data.size
    if filled != own.size:
        raise BatchError(
            f"a result of shape {list(x.shape)} lies over several processes in other dimensions than its rows"
        )
    return own[:kept]
