"""Arrays between the host and meshes that may lie over several processes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from spmd_infer.multihost.job import current_job


def put(value: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """Lay an array out; over several processes each one gives the same values and puts its own part on its devices."""
    placed: jax.Array
    if sharding.is_fully_addressable or (isinstance(value, jax.Array) and not value.is_fully_addressable):
        placed = jax.device_put(value, sharding)
        return placed
    host = np.asarray(value)
    placed = jax.make_array_from_callback(host.shape, sharding, lambda index: host[index], dtype=host.dtype)
    return placed


def whole(tree: Any) -> Any:
    """The same arrays so that this process can read all of each; all processes must call it where there are several."""
    return jax.tree.map(lambda x: x if _readable(x) else _replicate(x.sharding, x.shape, x.dtype)(x), tree)


def wait(tree: Any) -> None:
    """Until the devices have computed these arrays; in a job of several processes within its time."""
    job = current_job()
    with nullcontext() if job is None or job.size == 1 else job.device_step("wait for results"):
        jax.block_until_ready(tree)


def fetch(tree: Any) -> Any:
    """The values as NumPy arrays; all processes must call it where there are several, and all get all of them."""
    job = current_job()
    with nullcontext() if job is None or job.size == 1 else job.device_step("fetch results"):
        return jax.device_get(whole(tree))


def _readable(x: Any) -> bool:
    return not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated


@cache
def _replicate(sharding: NamedSharding, shape: tuple[int, ...], dtype: Any) -> Callable[[jax.Array], jax.Array]:
    from spmd_infer.multihost.compiling import compile_together  # only needed over several processes

    mesh = sharding.mesh
    copy = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))
    lowered = copy.lower(jax.ShapeDtypeStruct(shape, dtype, sharding=sharding))
    what = (shape, np.dtype(dtype).name, sharding.spec)
    compiled = compile_together(lowered, "replicate", what, mesh.devices.flat[0].platform)
    return lambda x: compiled(x)
