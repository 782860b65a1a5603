"""Log-probabilities of chosen tokens and of the likeliest ones, from logits that may be split over devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from spmd_infer.generation.vocab_shards import VocabShard, over_vocabulary

Scores = tuple[jax.Array, jax.Array, jax.Array]


def score_tokens(logits: jax.Array, tokens: jax.Array, count: int) -> Scores:
    """Log-probability of one token a row, and the ``count`` likeliest tokens with theirs.

    Each device offers its own largest logits; the logits themselves stay where they are.

    Args:
        logits: ``[B, V]`` float32, the model's own: the result is their log-softmax.
        tokens: ``[B]`` int32; one outside the vocabulary has minus infinity.
        count: how many of the likeliest, at most V; 0 for none, which is cheaper.

    Returns:
        ``[B]`` float32, ``[B, count]`` int32 in falling order (of equals the lower id first), ``[B, count]`` float32.
    """

    def scores(shard: VocabShard, logits: jax.Array, tokens: jax.Array) -> Scores:
        here = logits.shape[1]
        largest = shard.max(jnp.max(logits, axis=-1))
        total = shard.sum(jnp.exp(logits - largest[:, None]).sum(-1))
        normaliser = largest + jnp.log(total)
        place = shard.local(tokens, here)
        # A reduction over a mask, not a gather: XLA on CPU fuses it with the other passes over the logits.
        own = jnp.where(jnp.arange(here) == place[:, None], logits, -jnp.inf)
        chosen = shard.max(jnp.max(own, axis=-1)) - normaliser
        if count == 0:
            return chosen, *no_scores(len(logits), 0)[1:]
        top, ids = jax.lax.top_k(logits, min(count, here))
        top, ids = shard.gather(top), shard.gather(ids.astype(jnp.int32) + shard.first(here))
        if shard.parts > 1:  # parts come in the order of their ids, and top_k keeps the order of equals
            top, places = jax.lax.top_k(top, count)
            ids = jnp.take_along_axis(ids, places, axis=1)
        return chosen, ids, top - normaliser[:, None]

    found: Scores = over_vocabulary(scores, [logits], tokens)
    return found


def no_scores(batch: int, count: int) -> Scores:
    """What ``score_tokens`` returns, of a batch in which nobody asked."""
    return jnp.zeros(batch, jnp.float32), jnp.zeros((batch, count), jnp.int32), jnp.zeros((batch, count), jnp.float32)


__all__ = ["Scores", "no_scores", "score_tokens"]
