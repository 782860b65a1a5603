"""How likely the model finds the tokens of a prompt, computed beside it, chunk by chunk.

Logits over the vocabulary exist for a few positions at a time, and stay on the devices that hold their part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from spmd_infer.axes import ATTN_BATCH, BATCH, SEQ, VOCAB, constrain
from spmd_infer.generation.logprobs import score_tokens

_LOGITS_AT_ONCE = 256  # positions of one part's rows whose logits exist at the same time
_FEWEST_POSITIONS = 8  # of each row


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Targets:
    """The tokens to score in a chunk.

    Attributes:
        ids: ``[D, b, T]`` int32, the token after each position; -1 where none is to be scored.
        num_top: how many of the likeliest tokens to find in the place of each.
    """

    ids: jax.Array
    num_top: int = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PromptScores:
    """Scores of the token after each position of a chunk; of no meaning where none is to be scored.

    Attributes:
        logprobs: ``[D, b, T]`` float32.
        top_ids: ``[D, b, T, N]`` int32, in falling order.
        top_logprobs: ``[D, b, T, N]`` float32.
    """

    logprobs: jax.Array
    top_ids: jax.Array
    top_logprobs: jax.Array


def score_chunk(logits: Callable[[jax.Array], jax.Array], x: jax.Array, targets: Targets) -> PromptScores:
    """Score the token after each position.

    Args:
        logits: from states ``[B, t, E]`` to logits ``[B, t, V]``.
        x: states ``[D b, T, E]`` of a chunk; T a power of two.
        targets: what to score.
    """
    parts, rows, length = targets.ids.shape
    positions = min(length, max(_FEWEST_POSITIONS, _LOGITS_AT_ONCE // rows))
    ids = targets.ids.reshape(parts * rows, length)

    def block(_: None, start: jax.Array) -> tuple[None, tuple[jax.Array, ...]]:
        states = jax.lax.dynamic_slice_in_dim(x, start, positions, axis=1)
        own = jax.lax.dynamic_slice_in_dim(ids, start, positions, axis=1)
        scores = constrain(logits(states), BATCH, SEQ, VOCAB)
        flat = constrain(scores.reshape(-1, scores.shape[-1]), BATCH, VOCAB)
        found = score_tokens(flat, own.reshape(-1), targets.num_top)
        return None, tuple(each.reshape(parts * rows, positions, *each.shape[1:]) for each in found)

    def whole(each: jax.Array) -> jax.Array:
        """``[T / t, B, t, ...]`` as ``[D, b, T, ...]``."""
        joined = each.swapaxes(0, 1).reshape(parts, rows, length, *each.shape[3:])
        return constrain(joined, ATTN_BATCH, *(None,) * (joined.ndim - 1))

    _, found = jax.lax.scan(block, None, jnp.arange(0, length, positions))
    return PromptScores(*map(whole, found))


__all__ = ["PromptScores", "Targets", "score_chunk"]
