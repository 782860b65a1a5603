"""Prompt lookup on the device: what followed the last time that a text went as it goes now (Saxena 2023)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def lookup(history: jax.Array, known: jax.Array, *, count: int, longest: int, shortest: int) -> jax.Array:
    """Guess how texts go on, from themselves.

    The last ``longest`` tokens of each text are looked for earlier in it, then fewer of them, down to ``shortest``. Of
    several places the latest counts. Where fewer than ``count`` tokens follow it, the guess repeats them.

    Args:
        history: ``[B, L]`` int32, the tokens of each text.
        known: ``[B]`` int32, how many of them count.
        count: tokens to guess.
        longest: tokens that must agree, at most.
        shortest: at least.

    Returns:
        ``[B, count]`` int32; -1 in rows whose end has not come before.
    """
    length = history.shape[1]
    places = jnp.arange(length)
    agreeing = jnp.zeros(history.shape, jnp.int32)  # tokens up to each place that are as those up to the last
    so_far = places < known[:, None] - 1
    for back in range(longest):
        last = jnp.take_along_axis(history, jnp.maximum(known - 1 - back, 0)[:, None], axis=1)
        earlier = jnp.pad(history, ((0, 0), (back, 0)), constant_values=-1)[:, :length]
        so_far &= (earlier == last) & (places >= back)
        agreeing += so_far
    best = jnp.max(jnp.where(agreeing >= shortest, agreeing * length + places, -1), axis=1)  # [B]
    place = best % length
    period = jnp.maximum(known - 1 - place, 1)
    follow = place[:, None] + 1 + jnp.arange(count) % period[:, None]
    guess = jnp.take_along_axis(history, jnp.minimum(follow, length - 1), axis=1)
    return jnp.where(best[:, None] >= 0, guess, -1)
