"""Decoding over pages on NVIDIA's Hopper GPUs: one kernel that splits each row's pages among thread blocks.

Written in Pallas for Mosaic GPU. Every block takes one row, one key head and a share of the row's pages; it fetches
them one after the other, some ahead, and keeps a running softmax (Milakov & Gimelshein 2018) of the queries that share
the key head. The shares are merged afterwards (split keys: Dao et al. 2023, Flash-Decoding). Pages lie as the tensor
cores want them: keys ``[H, S]`` and values ``[S, H]`` are right-hand sides as they are.

Only the pages of the rows are read, and shared ones once for each of their rows, mostly from the GPU's cache.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec

from spmd_infer.axes import ATTN_BATCH, ATTN_HEADS, ATTN_KV_HEADS, KEY_SEQ, current_device, current_scope
from spmd_infer.errors import ModelError
from spmd_infer.models.cache_formats import Packed
from spmd_infer.models.page_view import PageView

_TILE = 64  # rows of a product at least
_AHEAD = 4  # pages under way at a time
_BLOCKS = 264  # two for each multiprocessor of an H100 or H200
_NOTHING = -1e30


def mosaic_problem(queries: jax.Array, keys: Packed) -> str | None:
    """Why the kernel cannot take these operands of ``page_attention``; None where it can."""
    length, _, folded, width = queries.shape[2:]
    size, dtype = keys.numbers.shape[4], keys.numbers.dtype
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"pages hold {dtype}, the kernel takes bfloat16 and float16"
    if width not in (64, 128) or size != _TILE:  # so that some pages fit into shared memory at a time
        return f"heads of {width} numbers and pages of {size} positions; it takes 64 or 128, and 64"
    if length * folded > _TILE:
        return f"{length * folded} queries of a row share a key head; it takes {_TILE}"
    scope = current_scope()
    if scope is not None:
        rules, shape = scope[0].of_activations, dict(scope[1].shape)
        if found := rules.split(KEY_SEQ, keys.numbers.shape[1], shape):
            return f"pages are split over {', '.join(found)}"
        heads = rules.split(ATTN_HEADS, queries.shape[3] * folded, shape)
        if heads != rules.split(ATTN_KV_HEADS, queries.shape[3], shape):
            return f"query heads are split over {', '.join(heads) or 'nothing'}, key heads otherwise"
    return None


def _device_problem() -> str | None:
    device = current_device()
    capability = str(getattr(device, "compute_capability", "none"))
    return None if capability.startswith("9.") else f"it is for compute capability 9, not {capability}"


def attend_mosaic(
    queries: jax.Array,
    keys: Packed,
    values: Packed,
    positions: jax.Array,
    view: PageView,
    *,
    interpret: Any = None,
) -> jax.Array:
    """See ``page_attention``; a row's positions follow one another.

    Args:
        queries: as there.
        keys: as there, without scales.
        values: likewise.
        positions: as there.
        view: as there; of it tables and limits are read.
        interpret: how Pallas interprets the kernel where there is no such GPU; None to compile it.

    Raises:
        ModelError: the kernel cannot take these; the message says why.
    """
    problem = mosaic_problem(queries, keys) or (_device_problem() if interpret is None else None)
    if problem is not None:
        raise ModelError(f"the Mosaic kernel is not used: {problem}")
    run = partial(_attend, interpret=interpret)
    operands = (queries, keys.numbers, values.numbers, positions, view.tables, view.limits)
    scope = current_scope()
    if scope is None or scope[1].size == 1:
        return run(*operands)
    rules, mesh = scope
    shape = dict(mesh.shape)
    parts = rules.of_activations.split(ATTN_BATCH, queries.shape[0], shape) or None
    heads = rules.of_activations.split(ATTN_KV_HEADS, queries.shape[3], shape) or None
    spec: Any = PartitionSpec
    pool, rows = spec(parts, None, heads), spec(parts)
    by_head = spec(parts, None, None, heads)
    mapped: Any = jax.shard_map(
        run, mesh=mesh, in_specs=(by_head, pool, pool, rows, rows, rows), out_specs=by_head, check_vma=False
    )
    found: jax.Array = mapped(*operands)
    return found


def _attend(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    tables: jax.Array,
    limits: jax.Array,
    *,
    interpret: Any,
) -> jax.Array:
    """The parts of one device: their pages become one pool, their rows one batch."""
    parts, rows, length, groups, folded, width = queries.shape
    num_pages = keys.shape[1]
    used = length * folded
    q = queries.astype(keys.dtype).transpose(0, 1, 3, 2, 4, 5).reshape(parts * rows, groups, used, width)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, _TILE - used), (0, 0)))
    tables = (tables + num_pages * jnp.arange(parts)[:, None, None]).reshape(parts * rows, -1)
    first = positions[..., 0].reshape(-1)
    counts = jnp.where(limits.reshape(-1) > 0, first + length, 0)
    splits = max(1, min(tables.shape[1], _BLOCKS // (parts * rows * groups)))
    kept = -(-used // 8) * 8
    largest, total, mixed = _kernel(
        q.shape, keys.shape[2:], keys.dtype, splits=splits, kept=kept, folded=folded, interpret=interpret
    )(
        q,
        keys.reshape(parts * num_pages, *keys.shape[2:]),
        values.reshape(parts * num_pages, *values.shape[2:]),
        tables,
        jnp.stack((counts, first), axis=1),
    )
    largest, total, mixed = (x[:, :, :, :used] for x in (largest, total, mixed))  # [B, K, splits, R, ...]
    most = largest.max(axis=2, keepdims=True)
    scale = jnp.exp2(largest - most)
    mixed = (mixed * scale[..., None]).sum(axis=2) / jnp.maximum((total * scale).sum(axis=2), 1e-30)[..., None]
    found: jax.Array = mixed.reshape(parts, rows, groups, length, folded, width).transpose(0, 1, 3, 2, 4, 5)
    return found


def _kernel(
    queries: tuple[int, ...],
    page: tuple[int, ...],
    dtype: Any,
    *,
    splits: int,
    kept: int,
    folded: int,
    interpret: Any,
) -> Any:
    """The kernel for queries ``[B, K, 64, H]`` and pages ``[K, H, S]``.

    It takes queries, keys, values, tables ``[B, M]`` and, of each row, how many positions it sees and where its first
    query is, ``[B, 2]``; and gives for each row, key head and split the largest score (in powers of two), the sum of
    the weights, and the weighted values of the first ``kept`` queries.
    """
    rows, groups, _, width = queries
    size = page[2]
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    outs = [
        jax.ShapeDtypeStruct((rows, groups, splits, _TILE), jnp.float32),
        jax.ShapeDtypeStruct((rows, groups, splits, _TILE), jnp.float32),
        jax.ShapeDtypeStruct((rows, groups, splits, kept, width), jnp.float32),
    ]

    def body(q: Any, keys: Any, values: Any, tables: Any, spans: Any, *rest: Any) -> None:
        largest_out, total_out, mixed_out, q_here, keys_here, values_here, weights_here, *others = rest
        sums, mixed_here, q_in, keys_in, values_in = others
        row, group, split = (lax.axis_index(name) for name in ("rows", "groups", "splits"))
        seen, first = spans[row, 0], spans[row, 1]
        pages = pl.cdiv(seen, size)
        share = pl.cdiv(pages, splits)
        begin = jnp.minimum(split * share, pages)
        count = jnp.minimum(begin + share, pages) - begin

        def fetch(index: jax.Array) -> None:
            which = tables[row, begin + index]
            slot = lax.rem(index, _AHEAD)
            plgpu.copy_gmem_to_smem(keys.at[which, group], keys_here.at[slot], keys_in.at[slot])
            plgpu.copy_gmem_to_smem(values.at[which, group], values_here.at[slot], values_in.at[slot])

        def held(x: jax.Array) -> jax.Array:  # in the registers that products leave their sums in
            layout = plgpu.Layout.WGMMA if x.ndim == 2 else plgpu.Layout.WGMMA.reduce(1)
            cast: jax.Array = x if interpret is not None else plgpu.layout_cast(x, layout)
            return cast

        def count_up(dimension: int) -> jax.Array:
            shape = (_TILE, size)
            if interpret is not None:
                return lax.broadcasted_iota(jnp.int32, shape, dimension)
            counted: jax.Array = plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=plgpu.Layout.WGMMA)
            return counted

        for ahead in range(_AHEAD):
            pl.when(ahead < count)(partial(fetch, jnp.int32(ahead)))
        plgpu.copy_gmem_to_smem(q.at[row, group], q_here, q_in)
        plgpu.barrier_wait(q_in)

        def over_page(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            largest, total, mixed = carry
            slot = lax.rem(index, _AHEAD)
            plgpu.barrier_wait(keys_in.at[slot])
            scores = _product(q_here, keys_here.at[slot], (_TILE, size)) * _LOG2_E
            reach = first + lax.div(count_up(0), folded)
            place = (begin + index) * size + count_up(1)
            scores = jnp.where(place <= reach, scores, _NOTHING)
            most = jnp.maximum(largest, scores.max(axis=1))
            weights = jnp.exp2(scores - lax.broadcast_in_dim(most, scores.shape, [0]))
            scale = jnp.exp2(largest - most)
            total = total * scale + weights.sum(axis=1)
            plgpu.barrier_wait(values_in.at[slot])
            weights_here[...] = weights.astype(dtype)
            plgpu.commit_smem()
            added = _product(weights_here, values_here.at[slot], (_TILE, width))
            mixed = mixed * lax.broadcast_in_dim(scale, mixed.shape, [0]) + added
            pl.when(index + _AHEAD < count)(lambda: fetch(index + _AHEAD))
            return most, total, mixed

        start = (
            held(jnp.full((_TILE,), _NOTHING, jnp.float32)),
            held(jnp.zeros((_TILE,), jnp.float32)),
            held(jnp.zeros((_TILE, width), jnp.float32)),
        )
        largest, total, mixed = lax.fori_loop(0, count, over_page, start)
        sums[0], sums[1] = largest, total
        mixed_here[...] = mixed
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(sums.at[0], largest_out.at[row, group, split])
        plgpu.copy_smem_to_gmem(sums.at[1], total_out.at[row, group, split])
        plgpu.copy_smem_to_gmem(mixed_here.at[pl.ds(0, kept)], mixed_out.at[row, group, split])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=outs,
        grid=(rows, groups, splits),
        grid_names=("rows", "groups", "splits"),
        scratch_types=[
            plgpu.SMEM((_TILE, width), dtype, transforms=tiled),
            plgpu.SMEM((_AHEAD, *page[1:]), dtype, transforms=tiled),
            plgpu.SMEM((_AHEAD, size, width), dtype, transforms=tiled),
            plgpu.SMEM((_TILE, size), dtype, transforms=tiled),
            plgpu.SMEM((2, _TILE), jnp.float32),
            plgpu.SMEM((_TILE, width), jnp.float32),
            plgpu.Barrier(),
            plgpu.Barrier(num_barriers=_AHEAD),
            plgpu.Barrier(num_barriers=_AHEAD),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )


_LOG2_E = 1.4426950408889634


def _product(left: Any, right: Any, shape: tuple[int, int]) -> jax.Array:
    def product(sums: Any) -> jax.Array:
        plgpu.wgmma(sums, left, right)
        found: jax.Array = sums[...]
        return found

    found: jax.Array = pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))
    return found
