"""Work on logits where they lie: each device on its part of the vocabulary, told where that part begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from spmd_infer.axes import BATCH, VOCAB, current_scope


@dataclass(frozen=True)
class VocabShard:
    """One device's part of the vocabulary.

    Attributes:
        axes: the mesh axes that the vocabulary is split over; none where it is whole.
        parts: into how many parts it is split.
    """

    axes: tuple[str, ...] = ()
    parts: int = 1

    def first(self, here: int) -> jax.Array:
        """The token id of the first of ``here`` logits."""
        if not self.axes:
            return jnp.zeros((), jnp.int32)
        index: jax.Array = jax.lax.axis_index(self.axes) * here
        return index

    def local(self, ids: jax.Array, here: int) -> jax.Array:
        """Places of token ids among this part's ``here`` logits; ``here`` for ids that lie elsewhere or nowhere."""
        places = ids - self.first(here)
        inside = (ids >= 0) & (places >= 0) & (places < here)
        return jnp.where(inside, places, here)

    def sum(self, values: jax.Array) -> jax.Array:
        """Sum over all parts."""
        total: jax.Array = jax.lax.psum(values, self.axes) if self.axes else values
        return total

    def max(self, values: jax.Array) -> jax.Array:
        """Maximum over all parts."""
        return jax.lax.pmax(values, self.axes) if self.axes else values

    def gather(self, values: jax.Array) -> jax.Array:
        """``[B, X]`` of each part side by side, ``[B, parts * X]``."""
        return jax.lax.all_gather(values, self.axes, axis=1, tiled=True) if self.axes else values


def over_vocabulary(
    function: Callable[..., Any], wide: Sequence[jax.Array], *rows: Any, returns_wide: bool = False
) -> Any:
    """Call ``function(shard, *wide, *rows)`` on each device's part of the vocabulary.

    By hand, so that no message is larger than the function says, and so that rows on different devices need not take
    the same way through it. What it returns must be equal on all devices that share a row.

    Args:
        function: takes a ``VocabShard``, its part of the wide arrays, and its rows of the others.
        wide: arrays ``[B, V]``.
        *rows: trees of arrays ``[B, ...]``; scalars in them are the same for all rows.
        returns_wide: the result is ``[B, V]``, instead of a tree of ``[B, ...]``.
    """
    scope = current_scope()
    if scope is None:
        return function(VocabShard(), *wide, *rows)
    rules, mesh = scope[0].of_activations, scope[1]
    shape = dict(mesh.shape)
    batch, vocab = wide[0].shape
    words = rules.split(VOCAB, vocab, shape)
    shard = VocabShard(words, prod(shape[axis] for axis in words))
    by_row = PartitionSpec(rules.split(BATCH, batch, shape) or None)
    across = PartitionSpec(*by_row, words or None)
    row_specs = jax.tree.map(lambda leaf: by_row if jnp.ndim(leaf) else PartitionSpec(), rows)
    # JAX cannot see that what an all-gather returns is equal everywhere: hence check_vma=False.
    return jax.shard_map(
        lambda *args: function(shard, *args),
        mesh=mesh,
        in_specs=(*[across] * len(wide), *row_specs),
        out_specs=across if returns_wide else by_row,
        check_vma=False,
    )(*wide, *rows)


__all__ = ["VocabShard", "over_vocabulary"]
