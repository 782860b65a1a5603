"""How the next token is chosen: the parameters of a request, and the choice itself on the device.

Every row of a batch has its own parameters. A row's random stream depends on its seed and on how many tokens it has
generated, and on nothing else: not on the other rows, the batch size or the mesh.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from spmd_infer.axes import BATCH, VOCAB, constrain
from spmd_infer.errors import TaskError
from spmd_infer.generation.thresholds import filter_thresholds
from spmd_infer.tensors import Axes

_MAX_SEED = 2**32 - 1


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is continued.

    Attributes:
        max_tokens: most tokens to generate.
        min_tokens: until so many tokens are generated, no end or stop token is chosen and no stop string ends the text.
        temperature: 0 takes the likeliest token; otherwise logits are divided by it before sampling.
        top_k: sample among the k likeliest tokens (and those as likely as the k-th); 0 for all.
        top_p: sample among the likeliest tokens that together reach this probability (Holtzman et al. 2020), after
            ``top_k``; 1 for all.
        seed: start of the random stream; None draws one.
        stop: strings that end the text; they are cut from it.
        stop_token_ids: tokens that end it, besides the model's own end tokens.
        ignore_eos: go on after the model's end tokens.

    Raises:
        TaskError: a value out of its range.
    """

    max_tokens: int = 64
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = field(default=False)

    def __post_init__(self) -> None:
        given: object = self.stop  # a lone string is taken for one stop string
        stop = (given,) if isinstance(given, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        _whole("max_tokens", self.max_tokens, 1)
        _whole("min_tokens", self.min_tokens, 0, self.max_tokens)
        _whole("top_k", self.top_k, 0)
        if self.seed is not None:
            _whole("seed", self.seed, 0, _MAX_SEED)
        for token in self.stop_token_ids:
            _whole("stop_token_ids", token, 0)
        if not _is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise TaskError(f"temperature must be a finite number of 0 or more, not {self.temperature!r}")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise TaskError(f"top_p must be above 0 and at most 1, not {self.top_p!r}")
        for text in stop:
            if not isinstance(text, str) or not text:
                raise TaskError(f"stop must be non-empty strings, not {text!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(name: str, value: object, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        bounds = f"of {low} or more" if high is None else f"from {low} to {high}"
        raise TaskError(f"{name} must be a whole number {bounds}, not {value!r}")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingArrays:
    """The parameters of a batch as arrays.

    Attributes:
        temperature: ``[B]`` float32.
        top_k: ``[B]`` int32.
        top_p: ``[B]`` float32.
        seed: ``[B]`` uint32.
        min_tokens: ``[B]`` int32.
        stop_ids: ``[B, X]`` int32, the end and stop tokens of each row, filled up with -1.
        draws: whether any row samples; where none does, the work is skipped on the device.
        filters: whether any row has a top-k or top-p.
        forbids: whether any row has ``min_tokens``.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
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
    "seed": _ROWS,
    "min_tokens": _ROWS,
    "stop_ids": (BATCH, None),
    "draws": (),
    "filters": (),
    "forbids": (),
}


def sampling_arrays(params: Sequence[SamplingParams], eos_ids: Collection[int]) -> dict[str, np.ndarray]:
    """The fields of ``SamplingArrays`` for a batch, as numpy arrays.

    Args:
        params: one for each row.
        eos_ids: the model's end tokens.
    """
    stops = [sorted(stop_tokens(p, eos_ids)) if p.min_tokens else [] for p in params]
    width = 4
    while width < max(map(len, stops), default=0):
        width *= 2
    stop_ids = np.full((len(params), width), -1, np.int32)
    for row, tokens in zip(stop_ids, stops, strict=True):
        row[: len(tokens)] = tokens
    drawing = [p for p in params if p.temperature > 0]
    return {
        "temperature": np.array([p.temperature for p in params], np.float32),
        "top_k": np.array([min(p.top_k, 2**31 - 1) for p in params], np.int32),
        "top_p": np.array([p.top_p for p in params], np.float32),
        "seed": np.array([secrets.randbits(32) if p.seed is None else p.seed for p in params], np.uint32),
        "min_tokens": np.array([p.min_tokens for p in params], np.int32),
        "stop_ids": stop_ids,
        "draws": np.array(bool(drawing)),
        "filters": np.array(any(p.top_k or p.top_p < 1 for p in drawing)),
        "forbids": np.array(any(p.min_tokens for p in params)),
    }


def stop_tokens(params: SamplingParams, eos_ids: Collection[int]) -> frozenset[int]:
    """The tokens that end a request."""
    return frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset(eos_ids))


def sample(logits: jax.Array, sampling: SamplingArrays, steps: jax.Array) -> jax.Array:
    """Choose one token for each row.

    Args:
        logits: ``[B, V]`` float32.
        sampling: the rows' parameters.
        steps: ``[B]`` int32, how many tokens each row has generated before.

    Returns:
        ``[B]`` int32 token ids.
    """
    logits = jax.lax.cond(sampling.forbids, _forbid_ends, lambda x, *_: x, logits, sampling, steps)
    logits = constrain(logits, BATCH, VOCAB)
    # A function of its own for every trace: JAX keeps the traces of named branches, and with them another mesh.
    tokens: jax.Array = jax.lax.cond(
        sampling.draws, lambda *args: _draw(*args), lambda x, *_: _likeliest(x), logits, sampling, steps
    )
    return tokens


def _likeliest(logits: jax.Array) -> jax.Array:
    """The first token of the largest logit in each row, ``[B]``.

    A maximum, then the first place where it stands: XLA on CPU runs these several times faster than ``argmax``, and a
    vocabulary that is split over devices exchanges two numbers a row instead of all logits.
    """
    vocab = logits.shape[-1]
    largest = jnp.max(logits, axis=-1, keepdims=True)
    places = jnp.where(logits == largest, jnp.arange(vocab, dtype=jnp.int32), vocab - 1)
    return jnp.min(places, axis=-1)


def _forbid_ends(logits: jax.Array, sampling: SamplingArrays, steps: jax.Array) -> jax.Array:
    """``logits`` with end tokens at minus infinity in the rows that are still too short."""
    early = (steps < sampling.min_tokens)[:, None]
    tokens = jnp.arange(logits.shape[-1])
    for column in range(sampling.stop_ids.shape[1]):
        ends = sampling.stop_ids[:, column, None] == tokens
        logits = jnp.where(early & ends, -jnp.inf, logits)
    return logits


def _draw(logits: jax.Array, sampling: SamplingArrays, steps: jax.Array) -> jax.Array:
    greedy = sampling.temperature == 0
    scaled = logits / jnp.where(greedy, 1.0, sampling.temperature)[:, None]
    top_k, top_p = jnp.where(greedy, 0, sampling.top_k), jnp.where(greedy, 1.0, sampling.top_p)
    scaled = jax.lax.cond(sampling.filters, lambda *args: _filter(*args), lambda x, *_: x, scaled, top_k, top_p)

    def noise(seed: jax.Array, step: jax.Array) -> jax.Array:
        # Each token's number comes from its place in the whole vocabulary, on whatever device that is made.
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
        return jax.random.gumbel(key, logits.shape[1:], jnp.float32)

    # The largest of logits plus Gumbel noise is distributed as their softmax (Gumbel 1954).
    drawn = scaled + constrain(jax.vmap(noise)(sampling.seed, steps), BATCH, VOCAB)
    return _likeliest(jnp.where(greedy[:, None], logits, drawn))


def _filter(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """``logits [B, V]`` with all but the top-k, then top-p, tokens at minus infinity."""
    return jnp.where(logits >= filter_thresholds(logits, top_k, top_p)[:, None], logits, -jnp.inf)


__all__ = ["SAMPLING_AXES", "SamplingArrays", "SamplingParams", "sample", "sampling_arrays", "stop_tokens"]
