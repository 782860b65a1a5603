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
from spmd_infer.generation.logprobs import no_scores, score_tokens
from spmd_infer.generation.sampling_params import SamplingParams, stop_tokens
from spmd_infer.generation.thresholds import filter_thresholds, min_p_threshold
from spmd_infer.generation.token_rules import TokenRules, apply_rules
from spmd_infer.generation.token_state import TokenState
from spmd_infer.tensors import Axes


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingArrays:
    """The parameters of a batch, or of all slots, as arrays. Rows are taken and put by ``slot_rows``.

    Attributes:
        temperature: ``[B]`` float32.
        top_k: ``[B]`` int32.
        top_p: ``[B]`` float32.
        min_p: ``[B]`` float32.
        seed: ``[B]`` uint32.
        min_tokens: ``[B]`` int32.
        stop_ids: ``[B, X]`` int32, the end and stop tokens of each row with ``min_tokens``, filled up with -1.
        draws: whether any row samples; where none does, the work is skipped on the device.
        filters: whether any row has a top-k, top-p or min-p.
        forbids: whether any row has ``min_tokens``.
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
    forbids: jax.Array


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
    "forbids": (),
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
        "forbids": np.array(any(p.min_tokens for p in params)),
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


def _choose(logits: jax.Array, sampling: SamplingArrays, steps: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The tokens ``[B]``, and the numbers ``[B]`` that were the largest of their rows."""
    # Functions of their own for every trace: JAX keeps the traces of named branches, and with them another mesh.
    logits = jax.lax.cond(sampling.forbids, lambda *args: _forbid_ends(*args), lambda x, *_: x, logits, sampling, steps)
    logits = constrain(logits, BATCH, VOCAB)
    chosen: tuple[jax.Array, jax.Array] = jax.lax.cond(
        sampling.draws, lambda *args: _draw(*args), lambda x, *_: _likeliest(x), logits, sampling, steps
    )
    return chosen


def _likeliest(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first token of the largest logit in each row, ``[B]``, and that logit.

    A maximum, then the first place where it stands: XLA on CPU runs these several times faster than ``argmax``, and a
    vocabulary that is split over devices exchanges two numbers a row instead of all logits.
    """
    vocab = logits.shape[-1]
    largest = jnp.max(logits, axis=-1, keepdims=True)
    places = jnp.where(logits == largest, jnp.arange(vocab, dtype=jnp.int32), vocab - 1)
    return jnp.min(places, axis=-1), largest[:, 0]


def _forbid_ends(logits: jax.Array, sampling: SamplingArrays, steps: jax.Array) -> jax.Array:
    """``logits`` with end tokens at minus infinity in the rows that are still too short."""
    early = (steps < sampling.min_tokens)[:, None]
    tokens = jnp.arange(logits.shape[-1])
    for column in range(sampling.stop_ids.shape[1]):
        ends = sampling.stop_ids[:, column, None] == tokens
        logits = jnp.where(early & ends, -jnp.inf, logits)
    return logits


def _draw(logits: jax.Array, sampling: SamplingArrays, steps: jax.Array) -> tuple[jax.Array, jax.Array]:
    greedy = sampling.temperature == 0
    scaled = logits / jnp.where(greedy, 1.0, sampling.temperature)[:, None]
    scaled = jax.lax.cond(sampling.filters, lambda *args: _filter(*args), lambda x, *_: x, scaled, sampling, greedy)

    def noise(seed: jax.Array, step: jax.Array) -> jax.Array:
        # Each token's number comes from its place in the whole vocabulary, on whatever device that is made.
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
        return jax.random.gumbel(key, logits.shape[1:], jnp.float32)

    # The largest of logits plus Gumbel noise is distributed as their softmax (Gumbel 1954).
    drawn = scaled + constrain(jax.vmap(noise)(sampling.seed, steps), BATCH, VOCAB)
    return _likeliest(jnp.where(greedy[:, None], logits, drawn))


def _filter(logits: jax.Array, sampling: SamplingArrays, greedy: jax.Array) -> jax.Array:
    """``logits [B, V]`` with all but the min-p, of those the top-k, of those the top-p tokens at minus infinity."""
    min_p = jnp.where(greedy, 0.0, sampling.min_p)
    top_k, top_p = jnp.where(greedy, 0, sampling.top_k), jnp.where(greedy, 1.0, sampling.top_p)
    logits = jnp.where(logits >= min_p_threshold(logits, min_p)[:, None], logits, -jnp.inf)
    return jnp.where(logits >= filter_thresholds(logits, top_k, top_p)[:, None], logits, -jnp.inf)


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
