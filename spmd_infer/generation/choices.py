"""The token of the largest number in a row, and the same under top-k and top-p without sorting.

Tokens in falling order of logit plus Gumbel noise are a sample without replacement, so the first of them that the
filters keep is distributed as the softmax over those that they keep (Gumbel 1954). Whether they keep a token is a sum
over the tokens that are likelier than it. One that they drop rules out all that are no likelier, so few passes are
needed: with top-p 0.95 the first draw is kept 95 times in 100. The token is the one that a sort would have led to.
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spmd_infer.generation.vocab_shards import VocabShard, over_vocabulary

Chosen = tuple[jax.Array, jax.Array]
"""Tokens ``[B]`` int32, and the numbers ``[B]`` float32 that were the largest of their rows."""

_MOST_RANKED = 128
_BLOCK = 256


class _Passes(NamedTuple):
    """``pivot [B]``: no token up to this logit is kept; ``chosen``: the last draw; ``stands``: if it is kept."""

    pivot: jax.Array
    chosen: Chosen
    stands: jax.Array


def likeliest(numbers: jax.Array) -> Chosen:
    """The first token of the largest number in each row ``[B, V]``."""

    def choose(shard: VocabShard, numbers: jax.Array) -> Chosen:
        return _over_shards(shard, *_largest(numbers), numbers)[:2]

    chosen: Chosen = over_vocabulary(choose, [numbers])
    return chosen


def first_kept(logits: jax.Array, noisy: jax.Array, floor: jax.Array, top_k: jax.Array, top_p: jax.Array) -> Chosen:
    """The token of the largest noisy logit among those that a filter keeps.

    Tokens as likely as the last one that is kept are kept too.

    Args:
        logits: ``[B, V]`` float32.
        noisy: ``[B, V]`` float32, the same with noise.
        floor: ``[B]`` float32; smaller logits are dropped first, and what follows is of the rest.
        top_k: ``[B]`` int32; keep the k likeliest, all where 0.
        top_p: ``[B]`` float32; keep the likeliest that together reach this part of the probability of all above the
            floor; all where 1.

    Returns:
        Tokens and their noisy logits; minus infinity in a row where nothing is kept.
    """

    def draw(
        shard: VocabShard, logits: jax.Array, noisy: jax.Array, floor: jax.Array, top_k: jax.Array, top_p: jax.Array
    ) -> Chosen:
        largest = shard.max(jnp.max(logits, axis=-1))
        weights = jnp.where(logits >= floor[:, None], jnp.exp(logits - largest[:, None]), 0.0)
        mass = jnp.where(top_p < 1, top_p * shard.sum(weights.sum(-1)), jnp.inf)
        room = jnp.where(top_k > 0, top_k, jnp.iinfo(jnp.int32).max)
        low = jnp.maximum(floor, shard.max(_below_top_k(logits, top_k)))

        def again(passes: _Passes) -> _Passes:
            open_ = (logits > passes.pivot[:, None]) & (logits >= low[:, None])
            token, best, logit = _over_shards(shard, *_largest(jnp.where(open_, noisy, -jnp.inf)), logits)
            above = logits > logit[:, None]
            likelier = jnp.stack([jnp.where(above, weights, 0.0).sum(-1), above.sum(-1).astype(jnp.float32)])
            likelier = shard.sum(likelier)  # [2, B]
            # Every row comes to an end: its pivot rises with each draw, and it stands where none is left, or with NaN.
            dropped = (likelier[0] >= mass) | (likelier[1] >= room)
            stands = ~dropped | (best == -jnp.inf)
            return _Passes(jnp.where(stands, passes.pivot, logit), (token, best), stands)

        nothing = jnp.full(logits.shape[:1], -jnp.inf, jnp.float32)
        start = _Passes(nothing, (jnp.zeros_like(top_k), nothing), jnp.zeros(top_k.shape, bool))
        done: _Passes = jax.lax.while_loop(lambda passes: ~jnp.all(passes.stands), again, start)
        return done.chosen

    chosen: Chosen = over_vocabulary(draw, [logits, noisy], floor, top_k, top_p)
    return chosen


def _largest(numbers: jax.Array) -> Chosen:
    """The first place of the largest of each row ``[B, X]``, and that number.

    By blocks: one pass over the numbers, where ``argmax`` over the whole row takes XLA on CPU ten times as long.
    """
    blocks = _blocks(numbers, _BLOCK)
    first = jnp.argmax(blocks.max(axis=-1), axis=-1).astype(jnp.int32)
    taken = jnp.take_along_axis(blocks, first[:, None, None], axis=1)[:, 0]  # [B, block]
    place = jnp.argmax(taken, axis=-1).astype(jnp.int32)
    best = jnp.take_along_axis(taken, place[:, None], axis=1)[:, 0]
    return jnp.minimum(first * blocks.shape[2] + place, numbers.shape[1] - 1), best


def _blocks(numbers: jax.Array, most: int) -> jax.Array:
    """``[B, X]`` as ``[B, X / block, block]``: a power of two of at most ``most`` that divides X, or X is filled up."""
    batch, width = numbers.shape
    block = gcd(width, most)
    if block < 32:
        block = most
        numbers = jnp.pad(numbers, ((0, 0), (0, -width % block)), constant_values=-jnp.inf)
    return numbers.reshape(batch, -1, block)


def _over_shards(
    shard: VocabShard, place: jax.Array, best: jax.Array, logits: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each part's best the best of all: its token, its number and its logit. Of equals the lower token."""
    logit = jnp.take_along_axis(logits, place[:, None], axis=1)[:, 0]
    token = place + shard.first(logits.shape[1])
    if shard.parts == 1:
        return token, best, logit
    # One message of three numbers a row; float32 holds any token id exactly.
    offered = shard.gather(jnp.stack([best, token.astype(jnp.float32), logit], axis=1))
    offered = offered.reshape(-1, shard.parts, 3)
    part = jnp.argmax(offered[:, :, 0], axis=1)
    taken = jnp.take_along_axis(offered, part[:, None, None], axis=1)[:, 0]
    return taken[:, 1].astype(jnp.int32), taken[:, 0], taken[:, 2]


def _below_top_k(logits: jax.Array, top_k: jax.Array) -> jax.Array:
    """A logit ``[B]`` that none of the top-k tokens is below: k blocks have one as large. It saves most passes."""
    blocks = _blocks(logits, _BLOCK // 4)
    most = min(_MOST_RANKED, blocks.shape[1])
    ranked = jax.lax.top_k(blocks.max(axis=-1), most)[0]
    bound = jnp.take_along_axis(ranked, jnp.clip(top_k - 1, 0, most - 1)[:, None], axis=1)[:, 0]
    return jnp.where((top_k > 0) & (top_k <= most), bound, -jnp.inf)


__all__ = ["Chosen", "first_kept", "likeliest"]
