"""Several members of one architecture as a single model: their parameters stacked, their results combined on device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spmd_infer.aggregate import Aggregate, Concat
from spmd_infer.axes import ENSEMBLE
from spmd_infer.errors import ModelError
from spmd_infer.functional import ModelFunction, Params


def ensemble(members: Sequence[ModelFunction], aggregate: Aggregate | Callable[[Any], Any]) -> ModelFunction:
    """One model out of several of the same architecture.

    Args:
        members: the models; the first one's code runs all of them.
        aggregate: how results ``[members, batch, ...]`` become ``[batch, ...]``; a callable is traced.

    Returns:
        A model whose parameters have a leading axis ``ensemble``, split over the mesh axis ``member``.

    Raises:
        ModelError: there are no members, or their parameters differ in name, shape or dtype.
    """
    if not members:
        raise ModelError("an ensemble needs at least one member")
    first = members[0]
    for number, member in enumerate(members[1:], start=1):
        for path in first.params.keys() | member.params.keys():
            ours, theirs = _describe(first.params.get(path)), _describe(member.params.get(path))
            if ours != theirs:
                raise ModelError(
                    f"member {number} of the ensemble: parameter {path!r} is {theirs}, member 0 has {ours}"
                )
    params: Params = {path: np.stack([np.asarray(m.params[path]) for m in members]) for path in first.params}
    axes = {path: (ENSEMBLE, *first.axes.get(path, (None,) * (value.ndim - 1))) for path, value in params.items()}

    def call(stacked: Params, batch: Any) -> Any:
        results = jax.vmap(first, in_axes=(0, None))(stacked, batch)
        return jax.tree.map(lambda x: _combine(x, aggregate, len(members)), results)

    return replace(first, name=f"{len(members)}x{first.name}", params=params, axes=axes, rebuild=_same, call=call)


def _same(params: Mapping[str, Any]) -> Mapping[str, Any]:
    return params


def _combine(x: jax.Array, aggregate: Aggregate | Callable[[Any], Any], members: int) -> Any:
    if not isinstance(aggregate, Aggregate):
        return aggregate(x)
    if isinstance(aggregate, Concat):
        return jnp.moveaxis(x, 0, 1)  # [B, members, ...]: rows stay the leading axis
    return aggregate.finish(aggregate.reduce(x, jnp.asarray(aggregate.weights(members))))


def _describe(value: Any) -> str:
    return "missing" if value is None else f"{np.dtype(value.dtype).name}{list(value.shape)}"
