"""How likely a model finds given tokens: log-probabilities, and from them perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from spmd_infer.axes import BATCH, SEQ, VOCAB, constrain
from spmd_infer.batching import Buckets
from spmd_infer.errors import TaskError
from spmd_infer.generation.steps import Decoder
from spmd_infer.models.cache_formats import CacheFormat
from spmd_infer.models.chunk_attention import ChunkCache

if TYPE_CHECKING:
    from spmd_infer.engine import Engine

_MOST_ROWS = 8
_SMALLEST_LEN = 32
_SCORED_AT_ONCE = 64  # positions whose logits over the whole vocabulary exist at the same time


class Scorer:
    """Scores token sequences with one engine.

    Args:
        engine: holds a decoder.
        config: the decoder's sizes: ``vocab_size`` and ``context_len``.
        cache_dtype: score with keys and values as a cache of this kind gives them back.
    """

    def __init__(self, engine: Engine, config: Any, cache_dtype: str = "auto") -> None:
        self._engine = engine
        self._config = config
        compute = jnp.result_type(engine.dtype, jnp.bfloat16)
        fmt = CacheFormat.of(cache_dtype, engine.mesh.devices.flat[0].platform, compute)
        score = partial(token_logprobs, fmt=fmt if fmt.rounds(compute) else None)
        self._score = engine.jit(f"score_{fmt.name}", score, out_axes=(BATCH, SEQ))

    def __call__(self, sequences: Sequence[Sequence[int]]) -> list[npt.NDArray[np.float32]]:
        """Log-probability of every token after the first, given those before it.

        Args:
            sequences: token ids; each sequence is scored on its own.

        Returns:
            For each sequence of T tokens, ``[T - 1]`` numbers. A text's perplexity is ``exp(-mean)`` of them.

        Raises:
            TaskError: a sequence has fewer than two tokens, one outside the vocabulary, or more than the context holds.
        """
        for index, ids in enumerate(sequences):
            self._check(index, ids)
        order = sorted(range(len(sequences)), key=lambda index: (-len(sequences[index]), index))
        results: dict[int, npt.NDArray[np.float32]] = {}
        for start, stop, bucket in Buckets.default(self._engine.data_parts, _MOST_ROWS).split(len(order)):
            taken = order[start:stop]
            length = _SMALLEST_LEN
            while length < len(sequences[taken[0]]):
                length *= 2
            batch = np.zeros((bucket, length), np.int32)
            for line, index in zip(batch, taken, strict=False):
                line[: len(sequences[index])] = sequences[index]
            scores = np.asarray(self._score(self._engine.place(batch, (BATCH, SEQ))))
            for line, index in zip(scores, taken, strict=False):
                results[index] = line[: len(sequences[index]) - 1]
        return [results[index] for index in range(len(sequences))]

    def _check(self, index: int, ids: Sequence[int]) -> None:
        if len(ids) < 2:
            raise TaskError(f"sequence {index} has {len(ids)} tokens; scoring needs at least 2, the first is given")
        if len(ids) > self._config.context_len:
            raise TaskError(
                f"sequence {index} has {len(ids)} tokens, but the model's context is {self._config.context_len}; cut it"
            )
        outside = next((token for token in ids if not 0 <= token < self._config.vocab_size), None)
        if outside is not None:
            raise TaskError(
                f"sequence {index} has token id {outside}; the vocabulary has ids 0 to {self._config.vocab_size - 1}"
            )


def token_logprobs(model: Decoder, input_ids: jax.Array, *, fmt: CacheFormat | None = None) -> jax.Array:
    """Log-probability of each token given those before it.

    Logits over the vocabulary exist for a few positions at a time and never leave the devices.

    Args:
        model: the decoder.
        input_ids: ``[B, T]`` int32; rows may be padded on the right.
        fmt: what keys and values are rounded to before they are attended over; None for nothing.

    Returns:
        ``[B, T - 1]`` float32: entry ``t`` is that of token ``t + 1``.
    """
    batch, length = input_ids.shape
    positions = jnp.broadcast_to(jnp.arange(length), input_ids.shape)
    caches = () if fmt is None else [ChunkCache(jnp.zeros((batch,), jnp.int32), fmt)] * model.config.num_layers
    states, _ = model.hidden(input_ids, positions, caches)
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
