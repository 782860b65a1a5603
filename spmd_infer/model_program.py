"""Functions of a model, compiled for its mesh: what tasks are built from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from spmd_infer.functional import ModelFunction, Params
from spmd_infer.programs import Programs


def model_program(
    programs: Programs,
    model: ModelFunction,
    params: Params,
    name: str,
    fn: Callable[..., Any],
    donate: tuple[int, ...],
    out_axes: Any,
) -> Callable[..., Any]:
    """``g(*args)`` that runs ``fn(model, *args)`` on the mesh, compiled once for each combination of shapes.

    Args:
        programs: where the compiled programs are kept.
        model: the model.
        params: its parameters, on the mesh.
        name: names ``fn`` among the functions of this model.
        fn: the function, traced with the rebuilt model.
        donate: positions in ``args`` whose memory may be reused.
        out_axes: logical axes of the results, a pytree prefix with tuples for leaves; None lets XLA choose.
    """
    whole = NamedSharding(programs.mesh, PartitionSpec())

    def run(values: Params, *args: Any) -> Any:
        result = fn(model.rebuild(values), *args)
        return result if out_axes is None else _constrained(programs, result, out_axes)

    def call(*args: Any) -> Any:
        leaves, treedef = jax.tree_util.tree_flatten(args)
        key = (name, treedef, *[(leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)) for leaf in leaves])
        program = programs.find(key)
        if program is None:
            program = programs.get(
                key,
                run,
                (params, *args),
                name=name,
                in_shardings=(
                    jax.tree.map(lambda weight: weight.sharding, params),
                    *jax.tree.map(lambda leaf: getattr(leaf, "sharding", whole), args),
                ),
                donate=tuple(position + 1 for position in donate),
            )
        return program.compiled(params, *args)

    return call


def _constrained(programs: Programs, result: Any, out_axes: Any) -> Any:
    def lay(axes: Any, x: jax.Array) -> Any:
        spec = programs.rules.of_activations.resolve(axes, x.shape, dict(programs.mesh.shape)).spec
        return jax.lax.with_sharding_constraint(x, NamedSharding(programs.mesh, spec))

    return jax.tree.map(
        lambda axes, part: jax.tree.map(lambda x: lay(axes, x), part), out_axes, result, is_leaf=_is_axes
    )


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple) and all(entry is None or isinstance(entry, str) for entry in node)
