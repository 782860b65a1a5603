"""Batches of any size through programs of a few sizes: buckets, padding, micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from spmd_infer.errors import BatchError

DEFAULT_LARGEST = 64


@dataclass(frozen=True)
class Buckets:
    """The batch sizes that programs are compiled for.

    Attributes:
        sizes: ascending; each a multiple of ``parts``.
        parts: into how many parts the batch dimension is split on the mesh.
    """

    sizes: tuple[int, ...]
    parts: int

    @classmethod
    def default(cls, parts: int, largest: int = DEFAULT_LARGEST) -> Buckets:
        """``parts``, doubled until ``largest`` is reached: at most one program for each doubling."""
        sizes = [parts]
        while sizes[-1] < largest:
            sizes.append(sizes[-1] * 2)
        return cls(tuple(sizes), parts)

    @classmethod
    def of(cls, sizes: Sequence[int], parts: int) -> Buckets:
        """The given sizes, each raised to the next multiple of ``parts``.

        Raises:
            BatchError: there are none, or one is not positive.
        """
        if not sizes or min(sizes) < 1:
            raise BatchError(f"buckets are batch sizes of 1 or more; got {list(sizes)}")
        return cls(tuple(sorted({-(-size // parts) * parts for size in sizes})), parts)

    def split(self, rows: int) -> list[tuple[int, int, int]]:
        """Cut a batch into micro-batches.

        Returns:
            ``(start, stop, bucket)`` for each: rows ``start:stop``, padded to ``bucket`` rows. All but the last fill
            the largest bucket.
        """
        largest = self.sizes[-1]
        cuts = [(start, start + largest, largest) for start in range(0, rows - largest + 1, largest)]
        done = len(cuts) * largest
        if done < rows:
            cuts.append((done, rows, next(size for size in self.sizes if size >= rows - done)))
        return cuts


def pad_rows(leaf: Any, start: int, stop: int, bucket: int) -> Any:
    """Rows ``start:stop`` of an array, padded to ``bucket`` rows by repeating its last row.

    Repeating a real row keeps the padding inside the model's domain: no index out of range, no division by zero.
    """
    if start == 0 and stop == leaf.shape[0] == bucket:
        return leaf
    rows = leaf[start:stop]
    if stop - start == bucket:
        return rows
    widths = [(0, bucket - (stop - start))] + [(0, 0)] * (leaf.ndim - 1)
    if isinstance(leaf, jax.Array):
        return jax.numpy.pad(rows, widths, mode="edge")
    return np.pad(rows, widths, mode="edge")
