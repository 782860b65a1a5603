"""A feed-forward block of several experts, of which a router picks a few for each token (Shazeer et al. 2017).

Routing drops nothing and has no capacity: however tokens crowd on one expert, each gets the experts that it was given
(Gale et al. 2022, "MegaBlocks"). Every device sorts the tokens that it sees by expert and multiplies each group by its
own expert's weights. Experts are split over one mesh axis and their hidden width over another. Tokens that are split
over the experts' axis too are first brought together, and the partial sums scattered back afterwards; tokens that every
expert's device already holds cost one sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from spmd_infer.axes import BATCH, EMBED, EXPERTS, MLP, SEQ, AxisRules, axis_tuple, constrain, current_scope
from spmd_infer.errors import ModelError

# A group of tokens is multiplied in blocks of rows: small ones waste little on experts with few tokens, larger ones
# read the weights less often. Measured on two cores; above 128 nothing is gained.
_LEAST_BLOCK, _MOST_BLOCK = 8, 128

_initial = nnx.initializers.normal(0.02)


@dataclass(frozen=True)
class ExpertSizes:
    """Sizes of a block of experts.

    Attributes:
        embed_dim: width of the residual stream.
        mlp_dim: hidden width of one expert.
        num_experts: how many experts there are.
        experts_per_token: how many of them each token gets.
    """

    embed_dim: int
    mlp_dim: int
    num_experts: int
    experts_per_token: int

    def __post_init__(self) -> None:
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ModelError(f"{self.experts_per_token} experts a token, of {self.num_experts}")


class Experts(nnx.Module):
    """Top-k routed SwiGLU experts.

    Args:
        sizes: how many and how large.
        rngs: source of the initial weights.
    """

    def __init__(self, sizes: ExpertSizes, *, rngs: nnx.Rngs) -> None:
        experts, hidden, width = sizes.num_experts, sizes.mlp_dim, sizes.embed_dim
        self.router = nnx.Param(_initial(rngs.params(), (experts, width)), axes=(None, EMBED))
        self.gate_proj = nnx.Param(_initial(rngs.params(), (experts, hidden, width)), axes=(EXPERTS, MLP, EMBED))
        self.up_proj = nnx.Param(_initial(rngs.params(), (experts, hidden, width)), axes=(EXPERTS, MLP, EMBED))
        self.down_proj = nnx.Param(_initial(rngs.params(), (experts, width, hidden)), axes=(EXPERTS, EMBED, MLP))
        self.sizes = sizes

    def __call__(self, x: jax.Array) -> jax.Array:
        """The weighted sum of each token's experts, for ``x [B, T, D]``."""
        x = constrain(x, BATCH, SEQ, EMBED)
        weights = (self.router[...], self.gate_proj[...], self.up_proj[...], self.down_proj[...])
        scope = current_scope()
        layout = _Layout.find(*scope, x.shape, self.sizes) if scope is not None else None
        local = partial(_experts_here, layout, self.sizes)
        if layout is None or not layout.axes:
            return local(x, *weights)
        tokens = PartitionSpec(*layout.tokens)
        wide = PartitionSpec(layout.experts or None, layout.hidden or None, None)
        tall = PartitionSpec(layout.experts or None, None, layout.hidden or None)
        mixed: jax.Array = jax.shard_map(
            local,
            mesh=layout.mesh,
            in_specs=(tokens, PartitionSpec(), wide, wide, tall),
            out_specs=tokens,
            axis_names=set(layout.axes),
            check_vma=False,
        )(x, *weights)
        return constrain(mixed, BATCH, SEQ, EMBED)

    def tokens_per_expert(self, x: jax.Array) -> jax.Array:
        """How many of the tokens ``x [B, T, D]`` each expert gets, ``[E]`` integers that sum to B T k."""
        ids, _ = route(x.reshape(-1, x.shape[-1]), self.router[...], self.sizes.experts_per_token)
        return jnp.bincount(ids.reshape(-1), length=self.sizes.num_experts)


def route(tokens: jax.Array, router: jax.Array, per_token: int) -> tuple[jax.Array, jax.Array]:
    """Each token's experts, and what each of them counts.

    Args:
        tokens: ``[n, D]``.
        router: ``[E, D]``.
        per_token: how many experts a token gets.

    Returns:
        ``[n, k]`` expert numbers, and ``[n, k]`` float32 weights: a softmax over the scores of those k.
    """
    scores = jax.lax.dot_general(tokens, router, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    best, ids = jax.lax.top_k(scores, per_token)
    return ids, jax.nn.softmax(best, axis=-1)


def imbalance(tokens_per_expert: jax.Array, parts: int = 1) -> jax.Array:
    """How much longer the busiest of ``parts`` devices works than if tokens were spread evenly; 1 is even.

    Args:
        tokens_per_expert: ``[E]`` counts.
        parts: devices over which the experts are split; 1 compares the experts themselves.
    """
    loads = tokens_per_expert.reshape(parts if parts > 1 else tokens_per_expert.shape[0], -1).sum(axis=1)
    return loads.max() * loads.shape[0] / jnp.maximum(loads.sum(), 1)


@dataclass(frozen=True)
class _Layout:
    """Mesh axes of a block of experts: of each dimension of the tokens, of the experts, and of their hidden width."""

    mesh: Mesh
    tokens: tuple[tuple[str, ...], ...]
    experts: tuple[str, ...]
    hidden: tuple[str, ...]

    @classmethod
    def find(cls, rules: AxisRules, mesh: Mesh, shape: tuple[int, ...], sizes: ExpertSizes) -> _Layout:
        mesh_shape = dict(mesh.shape)
        spec = rules.of_activations.resolve((BATCH, SEQ, None), shape, mesh_shape).spec
        wide = (sizes.num_experts, sizes.mlp_dim, sizes.embed_dim)
        entries = [*rules.resolve((EXPERTS, MLP, None), wide, mesh_shape).spec, None, None]
        tokens = tuple(axis_tuple(entry) for entry in spec)
        return cls(mesh, tokens, axis_tuple(entries[0]), axis_tuple(entries[1]))

    @property
    def axes(self) -> tuple[str, ...]:
        """Every mesh axis that anything is split over."""
        return tuple(dict.fromkeys(axis for axes in (*self.tokens, self.experts, self.hidden) for axis in axes))

    @property
    def shared(self) -> tuple[tuple[int, tuple[str, ...]], ...]:
        """Dimensions of the tokens that lie on axes of the weights, with these axes."""
        found = (
            (dimension, tuple(axis for axis in axes if axis in (*self.experts, *self.hidden)))
            for dimension, axes in enumerate(self.tokens)
        )
        return tuple((dimension, axes) for dimension, axes in found if axes)

    @property
    def summed(self) -> tuple[str, ...]:
        """Axes over which devices hold the same tokens and different weights."""
        gathered = {axis for _, axes in self.shared for axis in axes}
        return tuple(axis for axis in (*self.experts, *self.hidden) if axis not in gathered)


def _experts_here(
    layout: _Layout | None,
    sizes: ExpertSizes,
    x: jax.Array,
    router: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
) -> jax.Array:
    """One device's part: its own experts, or parts of them, on every token that its group holds."""
    shared = layout.shared if layout is not None else ()
    for dimension, axes in shared:
        x = jax.lax.all_gather(x, axes, axis=dimension, tiled=True)
    tokens = x.reshape(-1, x.shape[-1])
    ids, weights = route(tokens, router, sizes.experts_per_token)
    first = jax.lax.axis_index(layout.experts) * gate.shape[0] if layout is not None and layout.experts else 0
    own = (ids.reshape(-1) - first) % sizes.num_experts  # this device's experts come first
    order = jnp.argsort(own)
    counts = jnp.bincount(own, length=sizes.num_experts)[: gate.shape[0]]
    share = weights.reshape(-1)[order]
    out = _grouped(tokens, order // sizes.experts_per_token, share, counts, gate, up, down, sizes.num_experts)
    out = out.astype(x.dtype).reshape(x.shape)
    for dimension, axes in reversed(shared):
        out = jax.lax.psum_scatter(out, axes, scatter_dimension=dimension, tiled=True)
    return jax.lax.psum(out, layout.summed) if layout is not None and layout.summed else out


def _grouped(
    tokens: jax.Array,
    source: jax.Array,
    share: jax.Array,
    counts: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    num_experts: int,
) -> jax.Array:
    """Each expert on its group of tokens, added up by token.

    XLA for CPU multiplies every row by every expert in ``ragged_dot``: with 8 experts five times slower than a loop
    over blocks of rows, which works only on the rows that there are.

    Args:
        tokens: ``[n, D]``.
        source: ``[n k]`` tokens in the order of the experts here; those of experts elsewhere at the end.
        share: ``[n k]`` what each of them counts.
        counts: ``[E]`` how many of them each expert here has.
        gate: ``[E, F, D]``.
        up: ``[E, F, D]``.
        down: ``[E, D, F]``.
        num_experts: how many experts there are everywhere.

    Returns:
        ``[n, D]`` float32, without what experts elsewhere add.
    """
    result: jax.Array = jax.lax.platform_dependent(
        tokens, source, share, counts, gate, up, down, cpu=partial(_in_blocks, num_experts), default=_ragged
    )
    return result


def _ragged(
    tokens: jax.Array,
    source: jax.Array,
    share: jax.Array,
    counts: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
) -> jax.Array:
    product = partial(
        jax.lax.ragged_dot_general,
        group_sizes=counts.astype(jnp.int32),
        ragged_dot_dimension_numbers=jax.lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0]),
        preferred_element_type=jnp.float32,
    )
    rows = jnp.take(tokens, source, axis=0)
    hidden = jax.nn.silu(product(rows, gate)) * product(rows, up)
    mixed = product(hidden.astype(tokens.dtype), down)
    here = (jnp.arange(source.shape[0]) < counts.sum())[:, None]
    return jnp.zeros(tokens.shape, jnp.float32).at[source].add(jnp.where(here, mixed * share[:, None], 0))


def _in_blocks(
    num_experts: int,
    tokens: jax.Array,
    source: jax.Array,
    share: jax.Array,
    counts: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
) -> jax.Array:
    block = _block_rows(source.shape[0], num_experts)
    ends = jnp.cumsum(counts)
    blocks = -(-counts // block)
    last = jnp.cumsum(blocks)
    source, share = jnp.pad(source, (0, block)), jnp.pad(share, (0, block))
    product = partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    inner = (((1,), (1,)), ((), ()))

    def one(index: jax.Array, out: jax.Array) -> jax.Array:
        expert = jnp.searchsorted(last, index, side="right")
        start = ends[expert] - counts[expert] + (index - (last[expert] - blocks[expert])) * block
        places = jax.lax.dynamic_slice_in_dim(source, start, block)
        rows = jnp.take(tokens, places, axis=0)
        hidden = jax.nn.silu(product(rows, gate[expert], inner)) * product(rows, up[expert], inner)
        mixed = product(hidden.astype(tokens.dtype), down[expert], inner)
        # A group's last block reaches into the next group, where it counts nothing.
        counted = jnp.arange(block) < ends[expert] - start
        counting = jnp.where(counted, jax.lax.dynamic_slice_in_dim(share, start, block), 0)
        return out.at[places].add(mixed * counting[:, None])

    summed: jax.Array = jax.lax.fori_loop(0, last[-1], one, jnp.zeros(tokens.shape, jnp.float32))
    return summed


def _block_rows(rows: int, num_experts: int) -> int:
    """Rows of a block: as many as an expert has on average, as a power of two within the bounds."""
    average = -(-rows // num_experts)
    return min(_MOST_BLOCK, max(_LEAST_BLOCK, 1 << (average - 1).bit_length()))
