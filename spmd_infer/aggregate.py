"""How many results become one: over the rows of a batch, or over the members of an ensemble.

A reduction runs where the results are: each device reduces its own rows, XLA adds the collective, and only the small
``partial`` comes to the host, where the partials of several micro-batches are merged. Padding rows have weight 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from spmd_infer.errors import BatchError


class Partial(dict[str, Any]):
    """What a reduction knows of some rows: arrays by name."""


jax.tree_util.register_pytree_node(
    Partial,
    lambda partial: (tuple(partial[key] for key in sorted(partial)), tuple(sorted(partial))),
    lambda keys, values: Partial(zip(keys, values, strict=True)),
)


class Aggregate(ABC):
    """A reduction over the leading axis of every output."""

    def weights(self, rows: int) -> npt.NDArray[np.float32]:
        """The weight of each of ``rows`` rows (or members)."""
        return np.ones(rows, np.float32)

    @abstractmethod
    def reduce(self, x: jax.Array, weights: jax.Array) -> Partial:
        """Reduce ``x [N, ...]`` with ``weights [N]``, on the device. Rows of weight 0 must not count."""

    @abstractmethod
    def merge(self, first: Partial, second: Partial) -> Partial:
        """The partial of two sets of rows from the partial of each."""

    @abstractmethod
    def finish(self, partial: Partial) -> Any:
        """The result, from the partial of all rows."""


class Concat(Aggregate):
    """Keep every row: what ``infer`` does by default."""

    def reduce(self, x: jax.Array, weights: jax.Array) -> Partial:
        """The rows themselves."""
        return Partial({"rows": x})

    def merge(self, first: Partial, second: Partial) -> Partial:
        """Rows of both."""
        return Partial({"rows": np.concatenate([first["rows"], second["rows"]])})

    def finish(self, partial: Partial) -> Any:
        """All rows."""
        return partial["rows"]


class Mean(Aggregate):
    """Mean over the rows, accumulated in float32."""

    def reduce(self, x: jax.Array, weights: jax.Array) -> Partial:
        """Weighted sum and sum of weights."""
        wide = x.astype(jnp.float32)
        shaped = weights.reshape((-1,) + (1,) * (x.ndim - 1))
        # `where` and not a product alone: a NaN in a row of weight 0 must not count.
        total = jnp.sum(jnp.where(shaped != 0, wide * shaped, 0), axis=0)
        return Partial({"total": total, "weight": jnp.sum(weights)})

    def merge(self, first: Partial, second: Partial) -> Partial:
        """Sums add."""
        return Partial({key: first[key] + second[key] for key in first})

    def finish(self, partial: Partial) -> Any:
        """Sum over weight."""
        return partial["total"] / partial["weight"]


@dataclass(frozen=True, eq=False)
class WeightedMean(Mean):
    """Mean over the rows (or members), each with its own weight.

    Attributes:
        values: one weight for each row; finite, not negative, not all 0.
    """

    values: Sequence[float] | npt.NDArray[Any]

    def __post_init__(self) -> None:
        array = np.asarray(self.values, np.float32)
        if array.ndim != 1 or not np.all(np.isfinite(array)) or np.any(array < 0) or not np.any(array > 0):
            raise BatchError(
                f"weights must be a list of finite numbers, none negative and not all 0; got shape {array.shape}, "
                f"minimum {array.min() if array.size else 'none'}"
            )
        object.__setattr__(self, "values", array)

    def weights(self, rows: int) -> npt.NDArray[np.float32]:
        """The given weights.

        Raises:
            BatchError: there is not one for each row.
        """
        values: npt.NDArray[np.float32] = np.asarray(self.values, np.float32)
        if len(values) != rows:
            raise BatchError(f"WeightedMean has {len(values)} weights for {rows} rows; give one for each")
        return values


class MajorityVote(Aggregate):
    """The class that most rows (or members) vote for; the lowest of those that tie.

    Each row votes with its highest score along the last axis, so outputs are scores ``[..., classes]`` and the result
    is a class index ``[...]``.
    """

    def reduce(self, x: jax.Array, weights: jax.Array) -> Partial:
        """Weighted votes by class."""
        if x.ndim < 2:
            raise BatchError(f"MajorityVote needs scores [rows, ..., classes]; the output has {x.ndim} dimension(s)")
        votes = jax.nn.one_hot(jnp.argmax(x, axis=-1), x.shape[-1], dtype=jnp.float32)
        return Partial({"votes": jnp.tensordot(weights, votes, axes=1)})

    def merge(self, first: Partial, second: Partial) -> Partial:
        """Votes add."""
        return Partial({"votes": first["votes"] + second["votes"]})

    def finish(self, partial: Partial) -> Any:
        """The class with most votes."""
        return partial["votes"].argmax(axis=-1)


@dataclass(frozen=True)
class _Extreme(Aggregate):
    largest: bool

    def reduce(self, x: jax.Array, weights: jax.Array) -> Partial:
        """The extreme of the rows that count."""
        counted = weights.reshape((-1,) + (1,) * (x.ndim - 1)) != 0
        if self.largest:
            value = jnp.max(x, axis=0, where=counted, initial=_lowest(x.dtype))
        else:
            value = jnp.min(x, axis=0, where=counted, initial=_highest(x.dtype))
        # NaN is followed apart: an all-reduce of maxima may lose it (seen on CPU).
        return Partial({"value": value, "nan": jnp.any(jnp.isnan(x) & counted, axis=0)})

    def merge(self, first: Partial, second: Partial) -> Partial:
        """The extreme of both."""
        choose = np.maximum if self.largest else np.minimum
        return Partial({"value": choose(first["value"], second["value"]), "nan": first["nan"] | second["nan"]})

    def finish(self, partial: Partial) -> Any:
        """The extreme, or NaN."""
        value, nan = partial["value"], partial["nan"]
        if not jnp.issubdtype(value.dtype, jnp.floating):
            return value
        return (jnp.where if isinstance(value, jax.Array) else np.where)(nan, value.dtype.type(np.nan), value)


def _lowest(dtype: Any) -> Any:
    return -np.inf if jnp.issubdtype(dtype, jnp.floating) else np.iinfo(dtype).min


def _highest(dtype: Any) -> Any:
    return np.inf if jnp.issubdtype(dtype, jnp.floating) else np.iinfo(dtype).max


class Max(_Extreme):
    """The largest value over the rows, element by element; NaN where any row has it."""

    def __init__(self) -> None:
        super().__init__(largest=True)


class Min(_Extreme):
    """The smallest value over the rows, element by element; NaN where any row has it."""

    def __init__(self) -> None:
        super().__init__(largest=False)


def _joined(*parts: Any) -> Any:
    """One array; on the devices where the parts are."""
    return (jnp if isinstance(parts[0], jax.Array) else np).concatenate(parts)


def together(pieces: list[Any], reduce: Aggregate | None) -> Any:
    """One result from those of the micro-batches of one batch: their rows in order, or their partials merged."""
    if reduce is None:
        return pieces[0] if len(pieces) == 1 else jax.tree.map(_joined, *pieces)

    def finish(*parts: Partial) -> Any:
        total = parts[0]
        for part in parts[1:]:
            total = reduce.merge(total, part)
        return reduce.finish(total)

    return jax.tree.map(finish, *pieces, is_leaf=lambda node: isinstance(node, Partial))
