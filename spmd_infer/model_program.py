"""Functions of a model, compiled for its mesh: what tasks are built from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from spmd_infer.functional import Params
from spmd_infer.placement import Placement
from spmd_infer.programs import Programs


def model_program(
    programs: Programs,
    name: str,
    fn: Callable[..., Any],
    donate: tuple[int, ...],
    out_axes: Any,
    phase: str | None,
) -> Callable[..., Any]:
    """``g(*args)`` that runs ``fn(model, *args)`` on the mesh, compiled once for each combination of shapes.

    Args:
        programs: the model, where it is, and its programs.
        name: names ``fn`` among the functions of this model.
        fn: the function, traced with the rebuilt model.
        donate: positions in ``args`` whose memory may be reused.
        out_axes: logical axes of the results, a pytree prefix with tuples for leaves; None lets XLA choose.
        phase: the phase whose rules it follows; None for the plan's own.
    """
    placement = programs.placement

    def run(values: Params, *args: Any) -> Any:
        result = fn(placement.model.rebuild(values), *args)
        return result if out_axes is None else _constrained(placement, result, out_axes, phase)

    def call(*args: Any) -> Any:
        leaves, treedef = jax.tree_util.tree_flatten(args)
        key = (name, treedef, *[(leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)) for leaf in leaves])
        program = programs.find(key, phase)
        if program is None:
            whole = NamedSharding(placement.mesh, PartitionSpec())
            program = programs.get(
                key,
                run,
                (placement.params, *args),
                name=name,
                in_shardings=(
                    jax.tree.map(lambda weight: weight.sharding, placement.params),
                    *jax.tree.map(lambda leaf: getattr(leaf, "sharding", whole), args),
                ),
                donate=tuple(position + 1 for position in donate),
                phase=phase,
            )
        return program.compiled(placement.params, *args)

    return call


def placed_by(placement: Placement, tree: Any, axes: Any, phase: str | None = None) -> Any:
    """A pytree of arrays moved to where a phase wants them; ``axes`` is a pytree prefix with tuples for leaves."""
    return jax.tree.map(
        lambda names, part: jax.tree.map(lambda x: jax.device_put(x, placement.sharding(names, x.shape, phase)), part),
        axes,
        tree,
        is_leaf=_is_axes,
    )


def _constrained(placement: Placement, result: Any, out_axes: Any, phase: str | None) -> Any:
    def lay(axes: Any, x: jax.Array) -> Any:
        return jax.lax.with_sharding_constraint(x, placement.sharding(axes, x.shape, phase))

    return jax.tree.map(
        lambda axes, part: jax.tree.map(lambda x: lay(axes, x), part), out_axes, result, is_leaf=_is_axes
    )


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple) and all(entry is None or isinstance(entry, str) for entry in node)
