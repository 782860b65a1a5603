"""Which tokens each slot's request has seen: for penalties and bad words. On the device, one row a slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from spmd_infer.axes import constrain

MAX_BAD_WORD_TOKENS = 8
"""Tokens of the longest bad word; a state remembers one less."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenState:
    """The tokens that requests have seen.

    It takes ``4 V + V / 8 + 28`` bytes a slot.

    Attributes:
        prompt_seen: ``[slots, ceil(V / 32)]`` uint32, a bit for each token in the prompt, the lowest id lowest.
        output_counts: ``[slots, V]`` int32, how often each token is in the output.
        recent: ``[slots, 7]`` int32, the output's last tokens, the newest last; -1 before its first.
    """

    prompt_seen: jax.Array
    output_counts: jax.Array
    recent: jax.Array

    def count(self, rows: jax.Array, tokens: jax.Array) -> TokenState:
        """The state after one token more in each of ``rows``.

        Args:
            rows: ``[B]`` int32; rows that fill a batch up share a slot that nobody uses.
            tokens: ``[B]`` int32; -1 for none.
        """
        vocab = self.output_counts.shape[1]
        # Every device hears of all rows; left to itself XLA lets each count its own and adds up whole states.
        rows, tokens = constrain(rows, None), constrain(tokens, None)
        places = jnp.where(tokens >= 0, tokens, vocab)
        recent = self.recent[rows]
        shifted = jnp.concatenate([recent[:, 1:], tokens[:, None]], axis=1)
        shifted = jnp.where(tokens[:, None] >= 0, shifted, recent)
        return TokenState(
            self.prompt_seen,
            self.output_counts.at[rows, places].add(1, mode="drop"),
            self.recent.at[rows].set(shifted),
        )


def token_state(
    prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]], vocab_size: int
) -> dict[str, np.ndarray]:
    """The fields of a ``TokenState`` for requests that enter, as numpy arrays.

    Args:
        prompts: each request's prompt; empty for a slot that is free.
        outputs: what each has generated before: nothing, or its tokens when it starts again after preemption.
        vocab_size: of the logits.
    """
    counts = np.zeros((len(prompts), vocab_size), np.int32)
    recent = np.full((len(prompts), MAX_BAD_WORD_TOKENS - 1), -1, np.int32)
    for row, output in enumerate(outputs):
        if len(output):
            counts[row] = np.bincount(np.asarray(output), minlength=vocab_size)
            last = list(output)[-recent.shape[1] :]
            recent[row, -len(last) :] = last
    seen = np.stack([token_bits(prompt, vocab_size) for prompt in prompts])
    return {"prompt_seen": seen, "output_counts": counts, "recent": recent}


def token_bits(ids: Sequence[int], vocab_size: int) -> npt.NDArray[np.uint32]:
    """A set of token ids as ``[ceil(V / 32)]`` uint32, one bit each, the lowest id lowest."""
    bits = np.zeros(-(-vocab_size // 32), np.uint32)
    tokens = np.asarray(ids, np.uint32)
    np.bitwise_or.at(bits, tokens >> 5, np.uint32(1) << (tokens & 31))
    return bits


__all__ = ["MAX_BAD_WORD_TOKENS", "TokenState", "token_bits", "token_state"]
