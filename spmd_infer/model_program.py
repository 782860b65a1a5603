"""Functions of a model, compiled for its mesh: what tasks are built from."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from spmd_infer.axes import axis_scope
from spmd_infer.functional import Params
from spmd_infer.packed_arguments import Packing
from spmd_infer.placement import Placement
from spmd_infer.programs import Program, Programs
from spmd_infer.transfer import put

_only_compiling: ContextVar[bool] = ContextVar("only_compiling", default=False)


class ModelProgram:
    """A function of the model, run on its mesh, compiled once for each combination of shapes.

    Arrays of the host go to every device, all of them in one explicit transfer.

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
        self._packings: dict[Hashable, Packing] = {}
        self._given: dict[Any, Hashable] = {}

    def __call__(self, *args: Any) -> Any:
        """Dispatch it; compiles first where it must. See ``compiling_only`` for when it is not run at all."""
        leaves, treedef = jax.tree_util.tree_flatten(args)
        program, packing = self._program(leaves, treedef, args)
        if _only_compiling.get():
            return shapes_of(program.compiled.out_info)
        placement = self._programs.placement
        placed = [leaf for leaf in leaves if hasattr(leaf, "sharding")]
        if packing.shapes:
            packed = packing.pack([leaf for leaf in leaves if not hasattr(leaf, "sharding")])
            placed.append(put(packed, _whole(placement)))
        return program(placement.params, *placed)

    def _program(self, leaves: list[Any], treedef: Any, args: tuple[Any, ...]) -> tuple[Program, Packing]:
        key = (self._name, treedef, *[(leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)) for leaf in leaves])
        if not leaves:
            key = (*key, self._results(treedef, args))
        packing = self._packings.get(key)
        if packing is None:
            packing = Packing.of([leaf for leaf in leaves if not hasattr(leaf, "sharding")])
            self._packings[key] = packing
        program = self._programs.find(key, self._phase)
        if program is None:
            program = self._compiled(key, leaves, treedef, args, packing)
        return program, packing

    def _results(self, treedef: Any, args: tuple[Any, ...]) -> Hashable:
        """Shapes and dtypes of the results: they tell apart functions of one name that take no arrays.

        Such a function gives what it closes over, and nothing else of it shows in a key.
        """
        if treedef not in self._given:
            placement = self._programs.placement

            def run(values: Params) -> Any:
                with axis_scope(placement.rules(self._phase), placement.mesh):
                    return self._fn(placement.model.rebuild(values), *args)

            results, structure = jax.tree_util.tree_flatten(jax.eval_shape(run, placement.params))
            self._given[treedef] = (structure, *[(result.shape, result.dtype) for result in results])
        return self._given[treedef]

    def _compiled(
        self, key: Hashable, leaves: list[Any], treedef: Any, args: tuple[Any, ...], packing: Packing
    ) -> Program:
        """The program: it takes the weights, then the arrays that are on the devices, then all others as one."""
        placement, on_host = self._programs.placement, [not hasattr(leaf, "sharding") for leaf in leaves]

        def run(values: Params, *placed: Any) -> Any:
            host: Iterator[jax.Array] = iter([])
            if packing.shapes:
                # On every device as they come: left to itself XLA cuts up the vector, and sends the pieces around.
                host = iter(jax.lax.with_sharding_constraint(packing.unpack(placed[-1]), _whole(placement)))
            devices = iter(placed)
            whole = treedef.unflatten([next(host if own else devices) for own in on_host])
            result = self._fn(placement.model.rebuild(values), *whole)
            return result if self._out_axes is None else _constrained(placement, result, self._out_axes, self._phase)

        donated = [position in self._donate for position, arg in enumerate(args) for _ in jax.tree.leaves(arg)]
        shown = [leaf for leaf, own in zip(leaves, on_host, strict=True) if not own]
        given_up = [gone for gone, own in zip(donated, on_host, strict=True) if not own]
        shardings = [leaf.sharding for leaf in shown]
        if packing.shapes:
            shown.append(jax.ShapeDtypeStruct((packing.num_words,), np.uint32))
            shardings.append(_whole(placement))
        weights = jax.tree.map(lambda weight: weight.sharding, placement.params)
        return self._programs.get(
            key,
            run,
            (placement.params, *shown),
            name=self._name,
            in_shardings=(weights, *shardings),
            donate=tuple(place + 1 for place, gone in enumerate(given_up) if gone),
            phase=self._phase,
        )


def _whole(placement: Placement) -> NamedSharding:
    return NamedSharding(placement.mesh, PartitionSpec())


@contextmanager
def compiling_only() -> Iterator[None]:
    """Calls of programs in this thread compile them and do not run them.

    Arrays on the devices may be given as ``shapes_of`` them, and results come as such: so code that dispatches one
    program after the other compiles them all without a device doing anything.
    """
    token = _only_compiling.set(True)
    try:
        yield
    finally:
        _only_compiling.reset(token)


def shapes_of(tree: Any) -> Any:
    """Arrays on the devices as ``jax.ShapeDtypeStruct``, each with its sharding."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _constrained(placement: Placement, result: Any, out_axes: Any, phase: str | None) -> Any:
    def lay(axes: Any, x: jax.Array) -> Any:
        return jax.lax.with_sharding_constraint(x, placement.sharding(axes, x.shape, phase))

    return jax.tree.map(
        lambda axes, part: jax.tree.map(lambda x: lay(axes, x), part), out_axes, result, is_leaf=is_axes
    )


def is_axes(node: Any) -> bool:
    """Whether a node of a tree of axes is a leaf: a tuple of names."""
    return isinstance(node, tuple) and all(entry is None or isinstance(entry, str) for entry in node)
