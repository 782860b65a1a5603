"""Rules about single tokens: penalties, biases, bad words and masks, applied to logits where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from spmd_infer.errors import TaskError
from spmd_infer.generation.sampling_params import MAX_BAD_WORDS, MAX_LOGIT_BIAS, SamplingParams
from spmd_infer.generation.token_state import MAX_BAD_WORD_TOKENS, TokenState
from spmd_infer.generation.vocab_shards import VocabShard, over_vocabulary

TokenIds = tuple[int, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenRules:
    """The rules of a batch, or of all slots, as arrays.

    Attributes:
        repetition_penalty: ``[B]`` float32.
        frequency_penalty: ``[B]`` float32.
        presence_penalty: ``[B]`` float32.
        bias_ids: ``[B, X]`` int32, filled up with -1.
        bias_values: ``[B, X]`` float32.
        bad_words: ``[B, N, 8]`` int32, the tokens of each bad word, filled up with -1 in front.
        penalises: whether any row has a penalty; where none does, the work is skipped on the device.
        biases: whether any row has a logit bias.
        bans: whether any row has bad words.
        masks: whether any row has a mask; where none does, the mask that is given is not looked at.
        scores: whether any row asks for log-probabilities.
    """

    repetition_penalty: jax.Array
    frequency_penalty: jax.Array
    presence_penalty: jax.Array
    bias_ids: jax.Array
    bias_values: jax.Array
    bad_words: jax.Array
    penalises: jax.Array
    biases: jax.Array
    bans: jax.Array
    masks: jax.Array
    scores: jax.Array


@dataclass(frozen=True)
class RuleWidths:
    """Sizes of the arrays of rules: a program is compiled for one of them.

    Attributes:
        biases: logit biases of a row.
        bad_words: bad words of a row, each with and without a space before it.
    """

    biases: int = MAX_LOGIT_BIAS
    bad_words: int = 2 * MAX_BAD_WORDS

    @classmethod
    def fitting(cls, params: Sequence[SamplingParams], bad_words: Sequence[Sequence[TokenIds]]) -> RuleWidths:
        """The smallest powers of two, from 8 on, that hold these."""
        biases = max((len(p.logit_bias) for p in params), default=0)
        return cls(_bucket(biases), _bucket(max(map(len, bad_words), default=0)))


def _bucket(size: int) -> int:
    bucket = 8
    while bucket < size:
        bucket *= 2
    return bucket


def rule_arrays(
    params: Sequence[SamplingParams], bad_words: Sequence[Sequence[TokenIds]], widths: RuleWidths
) -> dict[str, np.ndarray]:
    """The fields of ``TokenRules`` for a batch, as numpy arrays.

    Args:
        params: one for each row.
        bad_words: each row's bad words as tokens, from ``bad_word_ids``.
        widths: the sizes of the arrays.

    Raises:
        TaskError: a row has more biases or bad words than ``widths``.
    """
    batch = len(params)
    bias_ids = np.full((batch, widths.biases), -1, np.int32)
    bias_values = np.zeros((batch, widths.biases), np.float32)
    words = np.full((batch, widths.bad_words, MAX_BAD_WORD_TOKENS), -1, np.int32)
    for row, (each, banned) in enumerate(zip(params, bad_words, strict=True)):
        if len(each.logit_bias) > widths.biases or len(banned) > widths.bad_words:
            raise TaskError(
                f"a request has {len(each.logit_bias)} logit biases and {len(banned)} bad words as tokens; the program "
                f"has room for {widths.biases} and {widths.bad_words}"
            )
        bias_ids[row, : len(each.logit_bias)] = list(each.logit_bias)
        bias_values[row, : len(each.logit_bias)] = list(each.logit_bias.values())
        for place, word in enumerate(banned):
            words[row, place, -len(word) :] = word
    return {
        "repetition_penalty": np.array([p.repetition_penalty for p in params], np.float32),
        "frequency_penalty": np.array([p.frequency_penalty for p in params], np.float32),
        "presence_penalty": np.array([p.presence_penalty for p in params], np.float32),
        "bias_ids": bias_ids,
        "bias_values": bias_values,
        "bad_words": words,
        **rule_flags(params),
    }


def rule_flags(params: Sequence[SamplingParams]) -> dict[str, np.ndarray]:
    """The flags of ``TokenRules`` for the rows that a step has."""
    return {
        "penalises": np.array(any(p.penalises for p in params)),
        "biases": np.array(any(p.logit_bias for p in params)),
        "bans": np.array(any(p.bad_words for p in params)),
        "masks": np.array(any(p.masks for p in params)),
        "scores": np.array(any(p.scores for p in params)),
    }


def apply_rules(logits: jax.Array, rules: TokenRules, state: TokenState, mask: jax.Array) -> jax.Array:
    """Logits as the rules change them.

    Args:
        logits: ``[B, V]`` float32.
        rules: of the rows.
        state: of the rows.
        mask: ``[B, ceil(V / 32)]`` uint32, a bit for each token that may be chosen.

    Returns:
        ``[B, V]`` float32; minus infinity where a token may not be chosen.
    """

    def on_shard(
        shard: VocabShard,
        logits: jax.Array,
        counts: jax.Array,
        rules: TokenRules,
        seen: jax.Array,
        recent: jax.Array,
        mask: jax.Array,
    ) -> jax.Array:
        logits = jax.lax.cond(
            rules.bans | rules.biases,
            lambda logits: _bias(shard, _ban(shard, logits, rules.bad_words, recent), rules),
            lambda logits: logits,
            logits,
        )

        def touch(logits: jax.Array) -> jax.Array:
            here = logits.shape[1]
            penalised = _penalise(logits, rules, _unpack(shard, seen, here), counts)
            allowed = _unpack(shard, mask, here) | ~rules.masks
            return jnp.where(allowed, penalised, -jnp.inf)

        touched: jax.Array = jax.lax.cond(rules.penalises | rules.masks, touch, lambda logits: logits, logits)
        return touched

    wide = [logits, state.output_counts]
    changed: jax.Array = over_vocabulary(
        on_shard, wide, rules, state.prompt_seen, state.recent, mask, returns_wide=True
    )
    return changed


def _ban(shard: VocabShard, logits: jax.Array, words: jax.Array, recent: jax.Array) -> jax.Array:
    """Minus infinity at the last token of each word ``[B, N, 8]`` whose other tokens were the last to come."""
    before = words[:, :, :-1]
    complete = jnp.all((before == -1) | (before == recent[:, None, :]), axis=-1)
    places = shard.local(jnp.where(complete, words[:, :, -1], -1), logits.shape[1])  # [B, N]
    rows = jnp.arange(logits.shape[0])[:, None]
    return logits.at[rows, places].set(-jnp.inf, mode="drop")


def _bias(shard: VocabShard, logits: jax.Array, rules: TokenRules) -> jax.Array:
    places = shard.local(rules.bias_ids, logits.shape[1])
    rows = jnp.arange(logits.shape[0])[:, None]
    return logits.at[rows, places].add(rules.bias_values, mode="drop")


def _penalise(logits: jax.Array, rules: TokenRules, in_prompt: jax.Array, counts: jax.Array) -> jax.Array:
    repetition = rules.repetition_penalty[:, None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(in_prompt | (counts > 0), repeated, logits)
    logits = logits - rules.frequency_penalty[:, None] * counts
    return logits - rules.presence_penalty[:, None] * (counts > 0)


def _unpack(shard: VocabShard, bits: jax.Array, here: int) -> jax.Array:
    """``[B, ceil(V / 32)]`` uint32 to this part's ``[B, V / parts]`` bool."""
    if here % 32 and shard.parts > 1:
        ids = shard.first(here) + jnp.arange(here)
        return (jnp.take(bits, ids >> 5, axis=1) >> (ids & 31).astype(jnp.uint32)) & 1 == 1
    words = jax.lax.dynamic_slice_in_dim(bits, shard.first(here) // 32, -(-here // 32), axis=1)
    unpacked = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return unpacked.reshape(bits.shape[0], -1)[:, :here] == 1


__all__ = ["RuleWidths", "TokenIds", "TokenRules", "apply_rules", "rule_arrays", "rule_flags"]
