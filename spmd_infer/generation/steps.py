"""The two programs of generation, as pure functions of the model: run the prompts, run one token more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from spmd_infer.axes import BATCH, SEQ, VOCAB, constrain
from spmd_infer.generation.cache import CacheSizes, KVCache
from spmd_infer.generation.sampling import SamplingArrays, sample
from spmd_infer.models.attention import LayerCache

Cache = TypeVar("Cache", bound=LayerCache)

_SCORED_AT_ONCE = 64  # positions whose logits over the whole vocabulary exist at the same time


class Decoder(Protocol):
    """What generation asks of a model; ``Llama`` documents each method."""

    @property
    def config(self) -> CacheSizes:
        """Sizes of the model."""

    def prefill(
        self, input_ids: jax.Array, lengths: jax.Array, caches: Sequence[Cache]
    ) -> tuple[jax.Array, tuple[Cache, ...]]:
        """Logits at each row's last token, and the filled caches."""

    def decode(
        self, tokens: jax.Array, positions: jax.Array, caches: Sequence[Cache]
    ) -> tuple[jax.Array, tuple[Cache, ...]]:
        """Logits after one token more, and the caches with it."""

    def hidden(self, input_ids: jax.Array, positions: jax.Array) -> tuple[jax.Array, tuple[LayerCache, ...]]:
        """States before the head."""

    def logits(self, x: jax.Array) -> jax.Array:
        """Scores of every token."""


def prefill(
    model: Decoder,
    input_ids: jax.Array,
    lengths: jax.Array,
    sampling: SamplingArrays,
    *,
    capacity: int,
    dtype: DTypeLike,
) -> tuple[jax.Array, KVCache]:
    """Run prompts and choose the first token of each.

    Args:
        model: the decoder.
        input_ids: ``[B, T]`` int32, rows padded on the right.
        lengths: ``[B]`` int32, tokens in each row.
        sampling: the rows' parameters.
        capacity: positions of the new cache, at least T.
        dtype: of the new cache.

    Returns:
        ``[B]`` int32 tokens, and the cache.
    """
    empty = KVCache.zeros(model.config, input_ids.shape[0], capacity, dtype)
    logits, layers = model.prefill(input_ids, lengths, empty.layers)
    return sample(logits, sampling, jnp.zeros_like(lengths)), KVCache(layers, lengths)


def decode(
    model: Decoder, cache: KVCache, tokens: jax.Array, prompt_lengths: jax.Array, sampling: SamplingArrays
) -> tuple[jax.Array, KVCache]:
    """Run each row's last token and choose its next.

    Rows that are finished run along; once such a row's cache is full it rewrites its own last position.

    Args:
        model: the decoder.
        cache: what the rows hold so far; donate it.
        tokens: ``[B]`` int32, chosen by the step before.
        prompt_lengths: ``[B]`` int32.
        sampling: the rows' parameters.

    Returns:
        ``[B]`` int32 tokens, and the cache with one position more in each row.
    """
    positions = jnp.minimum(cache.lengths, cache.capacity - 1)
    logits, layers = model.decode(tokens, positions, cache.layers)
    generated = cache.lengths - prompt_lengths + 1
    return sample(logits, sampling, generated), KVCache(layers, cache.lengths + 1)


def token_logprobs(model: Decoder, input_ids: jax.Array) -> jax.Array:
    """Log-probability of each token given those before it.

    Logits over the vocabulary exist for a few positions at a time and never leave the devices.

    Args:
        model: the decoder.
        input_ids: ``[B, T]`` int32; rows may be padded on the right.

    Returns:
        ``[B, T - 1]`` float32: entry ``t`` is that of token ``t + 1``.
    """
    batch, length = input_ids.shape
    positions = jnp.broadcast_to(jnp.arange(length), input_ids.shape)
    states, _ = model.hidden(input_ids, positions)
    blocks = -(-(length - 1) // _SCORED_AT_ONCE)
    padding = blocks * _SCORED_AT_ONCE - (length - 1)
    states = jnp.pad(states[:, :-1], ((0, 0), (0, padding), (0, 0)))
    targets = jnp.pad(input_ids[:, 1:], ((0, 0), (0, padding)))

    def block(_: None, index: jax.Array) -> tuple[None, jax.Array]:
        start = index * _SCORED_AT_ONCE
        x = jax.lax.dynamic_slice_in_dim(states, start, _SCORED_AT_ONCE, axis=1)
        target = jax.lax.dynamic_slice_in_dim(targets, start, _SCORED_AT_ONCE, axis=1)
        logits = constrain(model.logits(x), BATCH, SEQ, VOCAB)
        # A sum over a mask, not a gather: a vocabulary that is split needs only its sum across devices.
        chosen = jnp.where(jnp.arange(logits.shape[-1]) == target[..., None], logits, 0.0).sum(-1)
        return None, chosen - jax.nn.logsumexp(logits, axis=-1)

    _, scores = jax.lax.scan(block, None, jnp.arange(blocks))  # [blocks, B, 64]
    return scores.transpose(1, 0, 2).reshape(batch, -1)[:, : length - 1]
