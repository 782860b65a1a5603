"""Attention over rows whose positions are split over devices.

Each device keeps the queries of its own positions and needs the keys and values of all of them. Where the rules leave
keys whole, XLA brings them together first (one all-gather of keys and one of values). Where the rules split keys like
queries, they travel around the ring of devices instead, one neighbour further in each step, while every device merges
the part that it has just received into a running softmax (Liu et al. 2023, "Ring Attention with Blockwise
Transformers"): no device holds more than two parts of the keys, and the messages can overlap with the products.

The mask is made from positions in the whole row, so it does not matter where a row is cut. With a causal mask the
device with the last positions has the most to do, and the others, which compute what is masked, take as long: rows are
not dealt out in a balanced order.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from spmd_infer.axes import ATTN_BATCH, ATTN_HEADS, ATTN_KV_HEADS, HEAD_DIM, KEY_SEQ, SEQ, AxisRules, current_scope
from spmd_infer.tensors import Axes

# Above this many positions on a device the scores of all its queries at once would outgrow the weights.
_WHOLE_BLOCK = 1024

_State = tuple[jax.Array, jax.Array, jax.Array]
"""Largest score and sum of weights ``[B, K, G, T]``, and weighted values ``[B, K, G, T, H]``, of the keys so far."""


@dataclass(frozen=True)
class SequenceSplit:
    """How attention over split positions lies on the mesh.

    Attributes:
        mesh: the devices.
        axis: the mesh axis that positions of queries are split over.
        rings: whether keys and values are split over it too.
        rows: mesh axes of the rows.
        query_heads: mesh axes of the query heads.
        key_heads: mesh axes of the key heads, the first of the query heads' or none.
    """

    mesh: Mesh
    axis: str
    rings: bool
    rows: tuple[str, ...]
    query_heads: tuple[str, ...]
    key_heads: tuple[str, ...]

    @property
    def parts(self) -> int:
        """Devices along the split."""
        return int(self.mesh.shape[self.axis])


def find_split(queries: jax.Array, keys: jax.Array) -> SequenceSplit | None:
    """The split of positions in the current scope; None where rows are whole, as they are outside an engine.

    Args:
        queries: ``[B, T, N, H]``.
        keys: ``[B, T, K, H]``.
    """
    scope = current_scope()
    if scope is None:
        return None
    rules: AxisRules = scope[0].of_activations
    shape = dict(scope[1].shape)
    axes = rules.split(SEQ, queries.shape[1], shape)
    if len(axes) != 1:
        return None
    wanted: tuple[Axes, ...] = ((ATTN_BATCH, SEQ, ATTN_HEADS, HEAD_DIM), (ATTN_BATCH, KEY_SEQ, ATTN_KV_HEADS, HEAD_DIM))
    for names, array in zip(wanted, (queries, keys), strict=True):
        rules.resolve(names, array.shape, shape)  # says which axes collide, where some do
    return SequenceSplit(
        scope[1],
        axes[0],
        rules.split(KEY_SEQ, keys.shape[1], shape) == axes,
        rules.split(ATTN_BATCH, queries.shape[0], shape),
        rules.split(ATTN_HEADS, queries.shape[2], shape),
        rules.split(ATTN_KV_HEADS, keys.shape[2], shape),
    )


def split_attention(
    split: SequenceSplit,
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    *,
    causal: bool,
    segments: jax.Array | None = None,
) -> jax.Array:
    """Attention with queries that are split by position.

    Args:
        split: how they lie, from ``find_split``.
        queries: ``[B, T, N, H]``, scaled; query head ``n`` reads key head ``n // (N / K)``.
        keys: ``[B, T, K, H]``.
        values: ``[B, T, K, H]``.
        causal: whether a position sees only itself and those before it.
        segments: ``[B, T]``; positions see each other only where these are equal. None where all do.

    Returns:
        ``[B, T, N, H]`` float32.
    """
    group = queries.shape[2] // keys.shape[2]
    seq = split.axis if split.rings else None
    spec = PartitionSpec(split.rows or None, split.axis, split.query_heads or None, None)
    keys_spec = PartitionSpec(split.rows or None, seq, split.key_heads or None, None)

    def attend(queries: jax.Array, keys: jax.Array, values: jax.Array, *segments: jax.Array) -> jax.Array:
        heads = _read_heads(split, queries.shape[2], keys.shape[2], group)
        if heads is not None:
            keys = jax.lax.dynamic_slice_in_dim(keys, *heads, axis=2)
            values = jax.lax.dynamic_slice_in_dim(values, *heads, axis=2)
        return _around_the_ring(split, queries, keys, values, _Mask(causal, segments[0] if segments else None))

    # Segment ids are needed whole by every device; they are few bytes, gathered once for all layers.
    extra = () if segments is None else (segments,)
    attended: jax.Array = jax.shard_map(
        attend,
        mesh=split.mesh,
        in_specs=(spec, keys_spec, keys_spec, *(PartitionSpec(split.rows or None) for _ in extra)),
        out_specs=spec,
    )(queries, keys, values, *extra)
    return attended


def _read_heads(split: SequenceSplit, num_heads: int, num_kv_heads: int, group: int) -> tuple[jax.Array, int] | None:
    """First and number of a device's key heads that its query heads read; None for all."""
    count = max(1, num_heads // group)
    if count == num_kv_heads:
        return None
    first_query = jax.lax.axis_index(split.query_heads) * num_heads
    first_key = jax.lax.axis_index(split.key_heads) * num_kv_heads if split.key_heads else 0
    return first_query // group - first_key, count


@dataclass(frozen=True)
class _Mask:
    """Which positions of whole rows see which: causal or not, and only within a segment ``[B, T]`` where there are."""

    causal: bool
    segments: jax.Array | None

    def of(self, queries: jax.Array, keys: jax.Array) -> jax.Array | None:
        """For positions ``[T]`` and ``[S]``, ``[T, S]`` or ``[B, 1, 1, T, S]``; None where all see all."""
        seen = queries[:, None] >= keys if self.causal else None
        if self.segments is None:
            return seen
        same = self.segments[:, queries, None] == self.segments[:, None, keys]
        return (same if seen is None else same & seen)[:, None, None]


def _around_the_ring(
    split: SequenceSplit, queries: jax.Array, keys: jax.Array, values: jax.Array, mask: _Mask
) -> jax.Array:
    """One device's queries ``[B, T, N, H]`` over all keys, of which ``[B, S, K, H]`` are here at first."""
    batch, length, num_heads, head_dim = queries.shape
    part, num_kv_heads = keys.shape[1:3]
    blocks = -(-length // _WHOLE_BLOCK)
    padded = -(-length // blocks) * blocks
    rows = jnp.pad(queries, ((0, 0), (0, padded - length), (0, 0), (0, 0)))
    rows = rows.reshape(batch, blocks, padded // blocks, num_kv_heads, -1, head_dim)
    rows = rows.transpose(1, 0, 3, 4, 2, 5)  # [blocks, B, K, G, T, H]
    here = jax.lax.axis_index(split.axis)
    places = here * length + jnp.minimum(jnp.arange(padded), length - 1).reshape(blocks, -1)
    steps = split.parts if split.rings else 1
    neighbours = [(device, (device + 1) % steps) for device in range(steps)]
    travelling = jnp.stack((keys, values))  # one message a step instead of two
    state: _State | None = None
    for step in range(steps):
        # The first part is a device's own, in which every query sees itself at least: no row's maximum is infinite.
        source = (here - step) % steps if steps > 1 else 0
        state = _over_blocks(rows, places, travelling, source * part + jnp.arange(part), mask, state)
        if step + 1 < steps:
            travelling = jax.lax.ppermute(travelling, split.axis, neighbours)
    assert state is not None
    _, total, mixed = state
    mixed = mixed / total[..., None]  # [blocks, B, K, G, T, H]
    return mixed.transpose(1, 0, 4, 2, 3, 5).reshape(batch, padded, num_heads, head_dim)[:, :length]


def _over_blocks(
    rows: jax.Array, places: jax.Array, travelling: jax.Array, sources: jax.Array, mask: _Mask, state: _State | None
) -> _State:
    """One part of the keys merged into the states of all blocks of queries, a block at a time."""

    def block(args: tuple[jax.Array, jax.Array, _State | None]) -> _State:
        rows, places, state = args
        return _merge(rows, travelling[0], travelling[1], mask.of(places, sources), state)

    if len(rows) == 1:
        largest, total, mixed = block(jax.tree.map(lambda x: x[0], (rows, places, state)))
        return largest[None], total[None], mixed[None]
    mapped: _State = jax.lax.map(block, (rows, places, state))
    return mapped


def _merge(rows: jax.Array, keys: jax.Array, values: jax.Array, seen: jax.Array | None, state: _State | None) -> _State:
    """Queries ``[B, K, G, T, H]`` over one part of the keys ``[B, S, K, H]``, added to what they have seen so far."""
    scores = jnp.einsum("bkgth,bskh->bkgts", rows, keys, preferred_element_type=jnp.float32)
    if seen is not None:
        scores = jnp.where(seen, scores, -jnp.inf)
    largest = jnp.max(scores, axis=-1)
    if state is not None:
        largest = jnp.maximum(largest, state[0])
    weights = jnp.exp(scores - largest[..., None])
    total = jnp.sum(weights, axis=-1)
    mixed = jnp.einsum("bkgts,bskh->bkgth", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    if state is not None:
        kept = jnp.exp(state[0] - largest)
        total, mixed = total + state[1] * kept, mixed + state[2] * kept[..., None]
    return largest, total, mixed


__all__ = ["SequenceSplit", "find_split", "split_attention"]
