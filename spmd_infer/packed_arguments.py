"""Many small arrays of the host as one, so that a step sends one message to the devices and not a dozen.

Each is a run of 32-bit words of a vector; a program takes the vector apart again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Packing:
    """Where in the vector each array lies.

    Attributes:
        shapes: of the arrays.
        dtypes: of the arrays on the devices, of 1, 2 or 4 bytes an element.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[np.dtype[Any], ...]

    @classmethod
    def of(cls, arrays: Sequence[Any]) -> Packing:
        """For arrays like these; 64-bit numbers become 32-bit ones, as everywhere in JAX."""
        return cls(
            tuple(x.shape for x in arrays), tuple(np.dtype(jax.dtypes.canonicalize_dtype(x.dtype)) for x in arrays)
        )

    @property
    def num_words(self) -> int:
        """Length of the vector."""
        return sum(self._words)

    def pack(self, arrays: Sequence[Any]) -> Words:
        """The vector."""
        packed = np.zeros(self.num_words, np.uint32)
        octets = packed.view(np.uint8)
        for array, dtype, start in zip(arrays, self.dtypes, self._starts, strict=True):
            own = np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8)
            octets[4 * start : 4 * start + len(own)] = own
        return packed

    def unpack(self, words: jax.Array) -> list[jax.Array]:
        """The arrays; for tracing."""
        return [
            _taken(words[start : start + count], shape, dtype)
            for shape, dtype, start, count in zip(self.shapes, self.dtypes, self._starts, self._words, strict=True)
        ]

    @cached_property
    def _words(self) -> list[int]:
        return [-(-prod(shape) * dtype.itemsize // 4) for shape, dtype in zip(self.shapes, self.dtypes, strict=True)]

    @cached_property
    def _starts(self) -> list[int]:
        return list(accumulate(self._words, initial=0))[:-1]


def _taken(words: jax.Array, shape: tuple[int, ...], dtype: np.dtype[Any]) -> jax.Array:
    stored = np.dtype(np.uint8) if dtype == np.bool_ else dtype
    flat: jax.Array = jax.lax.bitcast_convert_type(words, stored).reshape(-1)[: prod(shape)]
    if dtype == np.bool_:
        flat = flat != 0
    return jnp.reshape(flat, shape)
