"""A model of any kind as a pure function of its parameters, with the logical axes of each parameter.

NNX modules, Linen modules with variables and plain functions all become a ``ModelFunction``; nothing after this file
asks which one it was.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
from flax import linen, nnx
from jax.tree_util import keystr

from spmd_infer.errors import ModelError
from spmd_infer.tensors import Axes

Params = dict[str, Any]
"""Arrays (or ``jax.ShapeDtypeStruct``) by parameter path, such as ``"layers.0.mlp.up_proj.weight"``."""


@dataclass(frozen=True, eq=False)
class ModelFunction:
    """A model without hidden state.

    Attributes:
        kind: what it was made from.
        name: what to call it in messages.
        params: its parameters by path, concrete or abstract.
        axes: logical axes by path, for the parameters that have any.
        rebuild: from parameters by path to the callable model.
        call: ``call(model, batch)`` runs a rebuilt model on one batch.
    """

    kind: Literal["nnx", "linen", "function"]
    name: str
    params: Params
    axes: Mapping[str, Axes]
    rebuild: Callable[[Params], Any]
    call: Callable[[Any, Any], Any]

    def __call__(self, params: Params, batch: Any) -> Any:
        """Outputs of the model with ``params`` on ``batch``."""
        return self.call(self.rebuild(params), batch)

    def with_params(self, params: Params) -> ModelFunction:
        """The same model with other parameters (abstract ones, say) under the same paths."""
        return replace(self, params=params)

    def abstract(self) -> ModelFunction:
        """The same model holding no arrays, only their shapes and dtypes."""
        return self.with_params({path: jax.ShapeDtypeStruct(p.shape, p.dtype) for path, p in self.params.items()})


def model_function(model: Any, params: Any = None, *, call_kwargs: Mapping[str, Any] | None = None) -> ModelFunction:
    """Take a model apart.

    Args:
        model: an NNX module; a Linen module; or a function ``fn(params, batch)``.
        params: Linen variables (``{"params": …}``) or the function's parameters, any pytree of arrays. For an NNX
            module None, or parameters that replace its own: an ``nnx.State`` or arrays by path.
        call_kwargs: fixed keyword arguments of a module's ``__call__``, such as ``{"train": False}``.

    Returns:
        The model as a pure function. A batch that is a dict becomes keyword arguments where the module's ``__call__``
        takes arguments of those names, a tuple becomes positional arguments, anything else is the one argument.

    Raises:
        ModelError: the model is of none of these kinds, or the parameters do not belong to it.
    """
    kwargs = dict(call_kwargs or {})
    if isinstance(model, nnx.Module):
        return _from_nnx(model, params, kwargs)
    if isinstance(model, linen.Module):
        return _from_linen(model, params, kwargs)
    if callable(model):
        return _from_function(model, params, kwargs)
    raise ModelError(
        f"cannot run a {type(model).__name__}: expected a flax.nnx.Module, a flax.linen.Module with its variables, "
        "or a function fn(params, batch)"
    )


def _from_nnx(model: nnx.Module, params: Any, kwargs: dict[str, Any]) -> ModelFunction:
    copied = nnx.merge(*nnx.split(model))  # shares the arrays; the caller's module keeps its own mode
    copied.eval()  # dropout off, batch norm on its running statistics
    graph, state = nnx.split(copied)
    flat = nnx.to_flat_state(state)
    paths = [".".join(map(str, path)) for path, _ in flat]
    variables = [variable for _, variable in flat]
    own = {path: variable.get_value() for path, variable in zip(paths, variables, strict=True)}
    if params is not None:
        given = params
        if isinstance(params, nnx.State):
            given = {".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(params)}
        own = _matching(given, own, type(model).__name__)
    axes: dict[str, Axes] = {}
    for path, variable in zip(paths, variables, strict=True):
        metadata = variable.get_metadata()
        named = metadata.get("axes") or metadata.get("out_sharding") or metadata.get("sharding_names")
        if named:
            axes[path] = tuple(named)
    keys = [path for path, _ in flat]
    # The arrays are in ``own``; kept here too, they would outlive the engine's copies of them.
    variables = [variable.replace(None) for variable in variables]

    def rebuild(values: Params) -> nnx.Module:
        leaves = [
            (key, variable.replace(values[path])) for key, path, variable in zip(keys, paths, variables, strict=True)
        ]
        merged: nnx.Module = nnx.merge(graph, nnx.from_flat_state(leaves))
        return merged

    return ModelFunction("nnx", type(model).__name__, own, axes, rebuild, _caller(type(model).__call__, kwargs))


def _from_linen(model: linen.Module, variables: Any, kwargs: dict[str, Any]) -> ModelFunction:
    name = type(model).__name__
    if not isinstance(variables, Mapping) or not variables:
        raise ModelError(
            f"Linen module {name} needs its variables, a dict such as model.init(key, batch) returns; "
            f"got {type(variables).__name__}"
        )
    boxed = jax.tree_util.tree_flatten_with_path(variables, is_leaf=_is_boxed)[0]
    axes = {keystr(path, simple=True, separator="."): tuple(leaf.names) for path, leaf in boxed if _is_boxed(leaf)}
    plain = linen.meta.unbox(variables)
    flat, rebuild_tree = _flatten(plain)

    def call(values: Any, batch: Any) -> Any:
        return bound(lambda *args, **named: model.apply(values, *args, **named), batch)

    bound = _caller(type(model).__call__, kwargs)
    return ModelFunction("linen", name, flat, axes, rebuild_tree, call)


def _from_function(fn: Callable[..., Any], params: Any, kwargs: dict[str, Any]) -> ModelFunction:
    name = getattr(fn, "__name__", type(fn).__name__)
    flat, rebuild_tree = _flatten(params)
    return ModelFunction("function", name, flat, {}, rebuild_tree, lambda tree, batch: fn(tree, batch, **kwargs))


def _caller(method: Callable[..., Any], kwargs: dict[str, Any]) -> Callable[[Any, Any], Any]:
    """How a batch becomes the arguments of a module's ``__call__``."""
    parameters = inspect.signature(method).parameters
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())

    def call(model: Callable[..., Any], batch: Any) -> Any:
        if isinstance(batch, dict) and (anything or all(key in parameters for key in batch)):
            return model(**batch, **kwargs)
        if isinstance(batch, tuple):
            return model(*batch, **kwargs)
        return model(batch, **kwargs)

    return call


def _is_boxed(leaf: Any) -> bool:
    return isinstance(leaf, linen.meta.AxisMetadata)


def _flatten(tree: Any) -> tuple[Params, Callable[[Params], Any]]:
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    paths = [keystr(path, simple=True, separator=".") or "params" for path, _ in leaves]
    for path, leaf in zip(paths, (leaf for _, leaf in leaves), strict=True):
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise ModelError(f"parameter {path!r} is a {type(leaf).__name__}; expected an array")

    def rebuild(values: Params) -> Any:
        return jax.tree_util.tree_unflatten(treedef, [values[path] for path in paths])

    return {path: leaf for path, (_, leaf) in zip(paths, leaves, strict=True)}, rebuild


def _matching(given: Mapping[str, Any], own: Params, name: str) -> Params:
    missing, extra = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    if missing or extra:
        raise ModelError(
            f"parameters do not belong to {name}: {len(missing)} missing {missing[:3]}, "
            f"{len(extra)} unknown {extra[:3]}"
        )
    for path, value in given.items():
        if tuple(value.shape) != tuple(own[path].shape):
            raise ModelError(
                f"parameter {path!r} of {name}: expected shape {tuple(own[path].shape)}, got {tuple(value.shape)}"
            )
    return {path: given[path] for path in own}
