"""Functions of a model, compiled for its mesh: what tasks are built from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from spmd_infer.functional import Params
from spmd_infer.placement import Placement
from spmd_infer.programs import Program, Programs


class ModelProgram:
    """A function of the model, run on its mesh, compiled once for each combination of shapes.

    Args:
        programs: the model, where it is, and its programs.
        name: names ``fn`` among the functions of this model.
        fn: ``fn(model, *args)``, traced with the rebuilt model.
        donate: positions in ``args`` whose memory may be reused.
        out_axes: logical axes of the results, a pytree prefix with tuples for leaves; None lets XLA choose.
        phase: the phase whose rules it follows; None for the plan's own.
    """

    def __init__(
        self,
        programs: Programs,
        name: str,
        fn: Callable[..., Any],
        *,
        donate: tuple[int, ...],
        out_axes: Any,
        phase: str | None,
    ) -> None:
        self._programs, self._name, self._fn = programs, name, fn
        self._donate, self._out_axes, self._phase = donate, out_axes, phase

    def __call__(self, *args: Any) -> Any:
        """Dispatch it; compiles first where it must."""
        return self._program(args)(self._programs.placement.params, *args)

    def compile(self, *args: Any) -> Any:
        """Compile it without running it.

        Args:
            args: as for a call; arrays on the devices may be given as ``jax.ShapeDtypeStruct`` with their sharding.

        Returns:
            The results as ``jax.ShapeDtypeStruct``, to compile what takes them.
        """
        results = self._program(args).compiled.out_info
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), results)

    def _program(self, args: tuple[Any, ...]) -> Program:
        leaves, treedef = jax.tree_util.tree_flatten(args)
        key = (self._name, treedef, *[(leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)) for leaf in leaves])
        program = self._programs.find(key, self._phase)
        if program is not None:
            return program
        placement = self._programs.placement
        whole = NamedSharding(placement.mesh, PartitionSpec())
        return self._programs.get(
            key,
            self._run,
            (placement.params, *args),
            name=self._name,
            in_shardings=(
                jax.tree.map(lambda weight: weight.sharding, placement.params),
                *jax.tree.map(lambda leaf: getattr(leaf, "sharding", None) or whole, args),
            ),
            donate=tuple(position + 1 for position in self._donate),
            phase=self._phase,
        )

    def _run(self, values: Params, *args: Any) -> Any:
        placement = self._programs.placement
        result = self._fn(placement.model.rebuild(values), *args)
        return result if self._out_axes is None else _constrained(placement, result, self._out_axes, self._phase)


def _constrained(placement: Placement, result: Any, out_axes: Any, phase: str | None) -> Any:
    def lay(axes: Any, x: jax.Array) -> Any:
        return jax.lax.with_sharding_constraint(x, placement.sharding(axes, x.shape, phase))

    return jax.tree.map(
        lambda axes, part: jax.tree.map(lambda x: lay(axes, x), part), out_axes, result, is_leaf=is_axes
    )


def is_axes(node: Any) -> bool:
    """Whether a node of a tree of axes is a leaf: a tuple of names."""
    return isinstance(node, tuple) and all(entry is None or isinstance(entry, str) for entry in node)
