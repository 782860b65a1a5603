"""What all devices of this process reach together: matrix products by dtype, and memory.

Every device runs the same program on arrays of its own at the same time, so that devices which share a machine
(simulated ones) are measured while they get in each other's way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spmd_infer.bench.timing import median_seconds
from spmd_infer.models.experts import Experts, ExpertSizes
from spmd_infer.scratch import keep_scratch

_ACCUMULATED = {"float32": jnp.float32, "bfloat16": jnp.float32, "int8": jnp.int32}
"""What products of each dtype are summed in: what models here ask for, and what XLA is fast at."""


@dataclass(frozen=True)
class DeviceFigures:
    """What was measured.

    Attributes:
        platform: ``cpu``, ``gpu`` or ``tpu``.
        kind: the device's name for its driver.
        count: how many devices ran at once.
        flops: FLOP/s (OP/s) of all of them together, by dtype name.
        experts: FLOP/s of float32 products within blocks of experts, with all that brings their rows together; 0 where
            it was not measured, which it is on CPU.
        read: bytes/s that all of them read together, in products of a matrix and one row.
        copy: bytes/s read plus written in a copy.
        call: seconds of a call that computes next to nothing.
        memory_bytes: a device's memory as its driver says; 0 where it does not.
    """

    platform: str
    kind: str
    count: int
    flops: dict[str, float]
    experts: float
    read: float
    copy: float
    call: float
    memory_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def measure_device(seconds: float = 0.4) -> DeviceFigures:
    """Measure all devices that JAX has, at once.

    Args:
        seconds: time for each figure; there are six, on CPU seven.
    """
    devices = jax.devices()
    on_cpu = devices[0].platform == "cpu"
    if on_cpu:
        keep_scratch()  # as programs of an engine have it
    mesh = Mesh(devices, ("device",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, width = (512, 2048) if on_cpu else (8192, 8192)
    per_device = (256 << 20) // len(devices) if on_cpu else 4 << 30
    flops = {}
    for name, summed in _ACCUMULATED.items():
        product = _on_all(mesh, lambda x, w, summed=summed: _times(x, w, summed), 2)
        x, w = (_ones(mesh, (size, width), name) for size in (rows, width))
        run = _call(product, x, w)
        flops[name] = len(devices) * 2.0 * rows * width * width / median_seconds(run, seconds)
    length = per_device // 4 // width
    matrix, row = _ones(mesh, (length, width), "float32"), _ones(mesh, (1, width), "float32")
    read = _call(_on_all(mesh, lambda x, w: _times(x, w, jnp.float32), 2), row, matrix)
    copied = _call(_on_all(mesh, lambda x: x + 1, 1), matrix)
    tiny = _call(_on_all(mesh, lambda x: x + 1, 1), _ones(mesh, (8,), "float32"))
    moved = float(len(devices) * length * width * 4)
    return DeviceFigures(
        platform=devices[0].platform,
        kind=devices[0].device_kind,
        count=len(devices),
        flops=flops,
        experts=_expert_rate(mesh, seconds) if on_cpu else 0.0,
        read=moved / median_seconds(read, seconds),
        copy=2 * moved / median_seconds(copied, seconds),
        call=median_seconds(tiny, seconds / 2, most=1000),
        memory_bytes=int((devices[0].memory_stats() or {}).get("bytes_limit", 0)),
    )


_EXPERTS = ExpertSizes(embed_dim=256, mlp_dim=512, num_experts=4, experts_per_token=2)
_TOKENS = 512


def _expert_rate(mesh: Mesh, seconds: float) -> float:
    """FLOP/s of all devices in blocks of experts, each device with experts and tokens of its own."""
    block = nnx.eval_shape(lambda: Experts(_EXPERTS, rngs=nnx.Rngs(0)))
    structure, params = nnx.split(block)
    leaves, treedef = jax.tree.flatten(params)
    placed = NamedSharding(mesh, PartitionSpec("device"))
    keys = jax.random.split(jax.random.key(0), len(leaves) + 1)
    shapes = [(1, _TOKENS, _EXPERTS.embed_dim), *(leaf.shape for leaf in leaves)]
    # Numbers that differ, so that tokens spread over the experts.
    x, *weights = (
        jax.jit(partial(jax.random.normal, shape=(mesh.size, *shape)), out_shardings=placed)(key)
        for key, shape in zip(keys, shapes, strict=True)
    )

    def mixed(x: jax.Array, *weights: jax.Array) -> jax.Array:
        found: jax.Array = nnx.merge(structure, jax.tree.unflatten(treedef, weights))(x)
        return found

    run = _call(_on_all(mesh, mixed, len(shapes)), x, *weights)
    multiplied = 3 * _EXPERTS.embed_dim * _EXPERTS.mlp_dim * _TOKENS * _EXPERTS.experts_per_token
    return mesh.size * 2.0 * multiplied / median_seconds(run, seconds)


def _times(x: jax.Array, w: jax.Array, summed: Any) -> jax.Array:
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=summed)


def _on_all(mesh: Mesh, fn: Callable[..., jax.Array], arguments: int) -> Callable[..., jax.Array]:
    """``fn`` on each device's own part, of which the leading dimension of size one is hidden from it."""
    spec = PartitionSpec("device")
    run: Callable[..., jax.Array] = jax.jit(
        jax.shard_map(
            lambda *parts: fn(*(part[0] for part in parts))[None],
            mesh=mesh,
            in_specs=(spec,) * arguments,
            out_specs=spec,
            check_vma=False,
        )
    )
    return run


def _ones(mesh: Mesh, shape: tuple[int, ...], dtype: str) -> jax.Array:
    placed = NamedSharding(mesh, PartitionSpec("device"))
    made: jax.Array = jax.jit(lambda: jnp.ones((mesh.size, *shape), dtype), out_shardings=placed)()
    return made


def _call(fn: Callable[..., jax.Array], *args: jax.Array) -> Callable[[], jax.Array]:
    return lambda: fn(*args)
