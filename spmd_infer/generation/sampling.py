"""The choice of the next token, on the device: greedy or drawn, each row of a batch by parameters of its own.

A row's random stream depends on its seed and on how many tokens it has generated, and on nothing else: not on the other
rows, the batch size or the mesh.

Two variants. ``sample`` takes logits and the parameters that most requests have. ``sample_by_rules`` is for batches in
which some row needs more: penalties, biases, bad words, a mask of allowed tokens, log-probabilities. Both choose the
same token for a row that needs nothing more. The order of everything is vLLM's: the model's own log-probabilities are
taken first; then mask, bad words, end tokens before ``min_tokens``, logit bias, penalties; then, for rows that draw,
temperature, min-p, top-k, top-p.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spmd_infer.axes import BATCH, VOCAB, constrain
from spmd_infer.errors import TaskError
from spmd_infer.generation.choices import Chosen, first_kept, likeliest
from spmd_infer.generation.logprobs import no_scores, score_tokens
from spmd_infer.generation.noise import gumbel
from spmd_infer.generation.sampling_params import SamplingParams, stop_tokens
from spmd_infer.generation.thresholds import min_p_threshold, top_k_threshold
from spmd_infer.generation.token_rules import TokenRules, apply_rules
from spmd_infer.generation.token_state import TokenState
from spmd_infer.generation.vocab_shards import VocabShard, over_vocabulary
from spmd_infer.tensors import Axes


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingArrays:
    """The parameters of a batch, or of all slots, as arrays.

    Attributes:
        temperature: ``[B]`` float32.
        top_k: ``[B]`` int32.
        top_p: ``[B]`` float32.
        min_p: ``[B]`` float32.
        seed: ``[B]`` uint32.
        min_tokens: ``[B]`` int32.
        stop_ids: ``[B, X]`` int32, the end and stop tokens of each row with ``min_tokens``, filled up with -1.
        draws: whether any row samples; where none does, the work is skipped on the device.
        filters: whether any row that samples has a top-k, top-p or min-p.
        joins: whether any of them has both a top-k and a top-p, which is then of the probability of those k.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    seed: jax.Array
    min_tokens: jax.Array
    stop_ids: jax.Array
    draws: jax.Array
    filters: jax.Array
    joins: jax.Array


_ROWS: Axes = (BATCH,)
SAMPLING_AXES: dict[str, Axes] = {
    "temperature": _ROWS,
    "top_k": _ROWS,
    "top_p": _ROWS,
    "min_p": _ROWS,
    "seed": _ROWS,
    "min_tokens": _ROWS,
    "stop_ids": (BATCH, None),
    "draws": (),
    "filters": (),
    "joins": (),
}


class Sampled(NamedTuple):
    """What was chosen.

    Attributes:
        tokens: ``[B]`` int32; -1 in a row where no token was allowed.
        logprobs: ``[B]`` float32, the model's log-probability of each; 0 where nobody asked.
        top_ids: ``[B, N]`` int32, the likeliest tokens by the model, in falling order.
        top_logprobs: ``[B, N]`` float32.
    """

    tokens: jax.Array
    logprobs: jax.Array
    top_ids: jax.Array
    top_logprobs: jax.Array


def sampling_arrays(
    params: Sequence[SamplingParams], eos_ids: Collection[int], *, most_stops: int | None = None
) -> dict[str, np.ndarray]:
    """The fields of ``SamplingArrays`` for a batch, as numpy arrays.

    Args:
        params: one for each row.
        eos_ids: the model's end tokens.
        most_stops: columns for stop tokens; by default the smallest power of two, from 4 on, that holds them.

    Raises:
        TaskError: a row with ``min_tokens`` has more stop tokens than ``most_stops``.
    """
    stops = [sorted(stop_tokens(p, eos_ids)) if p.min_tokens else [] for p in params]
    most = max(map(len, stops), default=0)
    width = 4
    while width < most and most_stops is None:
        width *= 2
    width = most_stops or width
    if most > width:
        raise TaskError(f"a request with min_tokens has {most} end and stop tokens; the program has room for {width}")
    stop_ids = np.full((len(params), width), -1, np.int32)
    for row, tokens in zip(stop_ids, stops, strict=True):
        row[: len(tokens)] = tokens
    return {
        "temperature": np.array([0.0 if p.greedy else p.temperature for p in params], np.float32),
        "top_k": np.array([min(p.top_k, 2**31 - 1) for p in params], np.int32),
        "top_p": np.array([p.top_p for p in params], np.float32),
        "min_p": np.array([p.min_p for p in params], np.float32),
        "seed": np.array([_seed(p) for p in params], np.uint32),
        "min_tokens": np.array([p.min_tokens for p in params], np.int32),
        "stop_ids": stop_ids,
        **sampling_flags(params),
    }


def sampling_flags(params: Sequence[SamplingParams]) -> dict[str, np.ndarray]:
    """The flags of ``SamplingArrays`` for the rows that a step has."""
    drawing = [p for p in params if not p.greedy]
    return {
        "draws": np.array(bool(drawing)),
        "filters": np.array(any(p.top_k or p.top_p < 1 or p.min_p for p in drawing)),
        "joins": np.array(any(p.top_k and p.top_p < 1 for p in drawing)),
    }


def _seed(params: SamplingParams) -> int:
    return secrets.randbits(32) if params.seed is None else params.seed & 0xFFFFFFFF


def sample(logits: jax.Array, sampling: SamplingArrays, steps: jax.Array) -> jax.Array:
    """Choose one token for each row.

    Args:
        logits: ``[B, V]`` float32.
        sampling: the rows' parameters.
        steps: ``[B]`` int32, how many tokens each row has generated before.

    Returns:
        ``[B]`` int32 token ids.
    """
    return _choose(logits, sampling, steps)[0]


def sample_by_rules(
    logits: jax.Array,
    sampling: SamplingArrays,
    steps: jax.Array,
    rules: TokenRules,
    state: TokenState,
    mask: jax.Array,
    *,
    num_top: int,
) -> Sampled:
    """Choose one token for each row where rules about single tokens hold, and score it.

    The caller counts the chosen tokens in the state of all slots: ``state.count(rows, sampled.tokens)``.

    Args:
        logits: ``[B, V]`` float32.
        sampling: the rows' parameters.
        steps: ``[B]`` int32, how many tokens each row has generated before.
        rules: the rows' rules.
        state: the rows' tokens so far.
        mask: ``[B, ceil(V / 32)]`` uint32, a bit for each token that may be chosen; not looked at where
            ``rules.masks`` is false.
        num_top: how many of the likeliest tokens to return.
    """
    logits = constrain(logits, BATCH, VOCAB)
    tokens, largest = _choose(apply_rules(logits, rules, state, mask), sampling, steps)
    tokens = jnp.where(largest > -jnp.inf, tokens, -1)
    scores = jax.lax.cond(
        rules.scores,
        lambda logits, tokens: score_tokens(logits, tokens, num_top),
        lambda *_: no_scores(logits.shape[0], num_top),
        logits,
        tokens,
    )
    return Sampled(tokens, *scores)


def _choose(logits: jax.Array, sampling: SamplingArrays, steps: jax.Array) -> Chosen:
    logits = constrain(_forbid_ends(logits, sampling, steps), BATCH, VOCAB)
    # A function of its own for every trace: JAX keeps the traces of named branches, and with them another mesh.
    # Branches return a few numbers a row: XLA on CPU copies what they return, and logits are large.
    chosen: Chosen = jax.lax.cond(
        sampling.draws, lambda *args: _draw(*args), lambda x, *_: likeliest(x), logits, sampling, steps
    )
    return chosen


def _forbid_ends(logits: jax.Array, sampling: SamplingArrays, steps: jax.Array) -> jax.Array:
    """``logits`` with end tokens at minus infinity in the rows that are still too short."""

    def forbid(shard: VocabShard, logits: jax.Array, ends: jax.Array) -> jax.Array:
        rows = jnp.arange(logits.shape[0])[:, None]
        return logits.at[rows, shard.local(ends, logits.shape[1])].set(-jnp.inf, mode="drop")

    early = (steps < sampling.min_tokens)[:, None]
    left: jax.Array = over_vocabulary(forbid, [logits], jnp.where(early, sampling.stop_ids, -1), returns_wide=True)
    return left


def _draw(logits: jax.Array, sampling: SamplingArrays, steps: jax.Array) -> Chosen:
    greedy = sampling.temperature == 0
    scaled = logits / jnp.where(greedy, 1.0, sampling.temperature)[:, None]

    # The largest of logits plus Gumbel noise is distributed as their softmax (Gumbel 1954).
    drawn = scaled + constrain(gumbel(sampling.seed, steps, logits.shape[1]), BATCH, VOCAB)
    noisy = jnp.where(greedy[:, None], logits, drawn)
    chosen: Chosen = jax.lax.cond(
        sampling.filters,
        lambda *args: _filtered(*args),
        lambda _, noisy, *__: likeliest(noisy),
        *(scaled, noisy, sampling, greedy),
    )
    return chosen


def _filtered(scaled: jax.Array, noisy: jax.Array, sampling: SamplingArrays, greedy: jax.Array) -> Chosen:
    """The likeliest by ``noisy`` of the min-p, of those the top-k, of those the top-p tokens."""
    floor = min_p_threshold(scaled, jnp.where(greedy, 0.0, sampling.min_p))
    top_k, top_p = jnp.where(greedy, 0, sampling.top_k), jnp.where(greedy, 1.0, sampling.top_p)
    both = jnp.where(top_p < 1, top_k, 0)
    kth = jax.lax.cond(
        sampling.joins,
        lambda *args: top_k_threshold(*args),
        lambda _, k: jnp.full(k.shape, -jnp.inf, jnp.float32),
        *(scaled, both),
    )
    return first_kept(scaled, noisy, jnp.maximum(floor, kth), jnp.where(top_p < 1, 0, top_k), top_p)


__all__ = [
    "SAMPLING_AXES",
    "Sampled",
    "SamplingArrays",
    "SamplingParams",
    "sample",
    "sample_by_rules",
    "sampling_arrays",
    "sampling_flags",
    "stop_tokens",
]
