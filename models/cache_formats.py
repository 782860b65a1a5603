"""How a cache holds keys and values: as floats, or as small numbers with a scale for each position and head.

Small numbers take a quarter of float32's memory (with 64 dimensions in a head: 27 %, scales included). They are made
when a position enters the cache and never changed. Where they are read, the scale of a key multiplies its score, and
that of a value its weight, so that the numbers themselves are only widened.

XLA on CPU widens a whole 16-bit or 8-bit float buffer to update one position of it, so such floats are held as integers
of their bits: float8 everywhere, bfloat16 on CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from spmd_infer.errors import ModelError

_LARGEST = {"int8": 127.0, "fp8": 448.0}
_HALF_OF_E4M3 = 256.0
"""A float8 (e4m3) whose bits are read as a float16's, sign apart from the rest, is so many times too small."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packed:
    """Keys or values as a cache holds them.

    Attributes:
        numbers: floats, int8, or the bits of floats.
        scales: float32, what each position and head is to be multiplied by: the shape of ``numbers`` without the
            dimension of a head's width; None where nothing is.
    """

    numbers: jax.Array
    scales: jax.Array | None = None


@dataclass(frozen=True)
class CacheFormat:
    """What a cache holds.

    Attributes:
        name: ``int8``, ``fp8``, or the dtype of floats.
        dtype: of the stored numbers.
    """

    name: str
    dtype: np.dtype[Any]

    @classmethod
    def of(cls, name: str, platform: str, compute: DTypeLike) -> CacheFormat:
        """The format of a name.

        Args:
            name: ``int8``, ``fp8``, ``float32``, ``bfloat16``, or ``auto``: what the model computes in, but float32 on
                a CPU whatever it is, which is fastest there.
            platform: of the devices.
            compute: what the model computes in.

        Raises:
            ModelError: it is none of these.
        """
        if name == "auto":
            name = "float32" if platform == "cpu" else np.dtype(compute).name
        elif name not in (*_LARGEST, "float32", "bfloat16"):
            raise ModelError(
                f"a cache cannot hold {name!r}; cache_dtype is auto, float32, bfloat16, int8 or fp8 (float8, e4m3)"
            )
        stored = {"int8": jnp.int8, "fp8": jnp.uint8}.get(name, name)
        if name == "bfloat16" and platform == "cpu":
            stored = jnp.uint16
        return cls(name, jnp.dtype(stored))

    @property
    def scaled(self) -> bool:
        """Whether there are scales."""
        return self.name in _LARGEST

    def position_bytes(self, head_dim: int) -> int:
        """Bytes of one key or value of one head."""
        return head_dim * self.dtype.itemsize + (4 if self.scaled else 0)

    def rounds(self, dtype: DTypeLike) -> bool:
        """Whether values of ``dtype`` lose something by being packed."""
        return self.dtype.itemsize < np.dtype(dtype).itemsize or self.scaled

    def pack(self, values: jax.Array) -> Packed:
        """Keys or values ``[..., H]`` as they are held, each head of each position by itself."""
        if not self.scaled:
            floats = values.astype(self.name)
            return Packed(jax.lax.bitcast_convert_type(floats, self.dtype) if floats.dtype != self.dtype else floats)
        values = values.astype(jnp.float32)
        largest = jnp.max(jnp.abs(values), axis=-1)
        scales = jnp.where(largest == 0, 1.0, largest) * (1 / _LARGEST[self.name])
        scaled = values / scales[..., None]
        if self.name == "int8":
            return Packed(jnp.round(scaled).astype(jnp.int8), scales)
        scaled = jnp.clip(scaled, -_LARGEST["fp8"], _LARGEST["fp8"])
        return Packed(jax.lax.bitcast_convert_type(scaled.astype(jnp.float8_e4m3fn), jnp.uint8), scales)

    def rounded(self, values: jax.Array, packed: Packed) -> jax.Array:
        """The values that the cache will give back for ``values``, whose packed form is given, in their dtype."""
        if not self.rounds(values.dtype):
            return values
        return restored(packed).astype(values.dtype)


def restored(packed: Packed) -> jax.Array:
    """The values ``[..., H]`` that ``pack`` made numbers and scales of, in float32."""
    floats = widened(packed.numbers, jnp.float32)
    return floats if packed.scales is None else floats * packed.scales[..., None]


def widened(numbers: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Stored numbers as floats, without their scales; each is exact in ``dtype`` (bfloat16 or wider)."""
    if numbers.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(numbers, jnp.bfloat16).astype(dtype)
    if numbers.dtype == jnp.uint8:
        if jnp.dtype(dtype) != jnp.float32:
            return jax.lax.bitcast_convert_type(numbers, jnp.float8_e4m3fn).astype(dtype)
        # Several times faster on CPU than its own conversion of float8, and a shift more elsewhere.
        wide = numbers.astype(jnp.uint16)
        bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
        return jax.lax.bitcast_convert_type(bits, jnp.float16).astype(dtype) * _HALF_OF_E4M3
    return numbers.astype(dtype)
