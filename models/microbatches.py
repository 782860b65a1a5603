"""One stage's side of a pipeline: which micro-batch it works on in each tick, what it hands on, what layers keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jax.tree_util import keystr

Tree = TypeVar("Tree")
Kept = dict[str, jax.Array]
"""What layers change in their caches, by place: ``[row_parts, micro-batches, k, ...]``.

Without ``k`` where it is 1: that dimension alone would cost a copy of the whole (jaxlib 0.10.2 on CPU).
"""

Work = Callable[[jax.Array, Sequence[jax.Array], Sequence[Any]], tuple[jax.Array, Sequence[Any]]]
"""``work(x, rows, caches)`` of a micro-batch: the activations after some layers, and their caches."""


@runtime_checkable
class KnowsBusy(Protocol):
    """A cache that knows which rows only fill up a batch: a micro-batch of such rows alone is not computed."""

    @property
    def busy(self) -> jax.Array | None:
        """``[n]`` bool, rows or groups of rows that are to be computed; None for all."""


_idle_stages_rest: ContextVar[bool] = ContextVar("spmd_infer_idle_stages_rest", default=True)


@contextmanager
def no_stage_rests() -> Iterator[None]:
    """While tracing: stages without a micro-batch work all the same, and what comes of it is dropped.

    For layers among which devices permute: XLA's collective-permute takes all devices of the program, and those of a
    stage that rests would be missing (jaxlib 0.10.2 on CPU then gives wrong numbers, silently). Other collectives know
    their groups.
    """
    token = _idle_stages_rest.set(False)
    try:
        yield
    finally:
        _idle_stages_rest.reset(token)


@dataclass(frozen=True)
class MicroBatches:
    """How a batch passes through the stages; used inside ``shard_map`` over their mesh axis.

    Rows are in the order ``[row_parts, stages, parts, k]``: split over data, then over the stages that hold them, then
    into micro-batches.

    Attributes:
        axis: the mesh axis.
        stages: how many stages there are.
        parts: micro-batches that each stage's own rows are cut into.
        row_parts: devices of one stage over which the rows of a micro-batch are split.
    """

    axis: str
    stages: int
    parts: int
    row_parts: int

    @property
    def count(self) -> int:
        """Micro-batches."""
        return self.stages * self.parts

    def passed(
        self, segments: Sequence[Segment], x: jax.Array, rows: Sequence[jax.Array]
    ) -> tuple[jax.Array, list[Kept]]:
        """Take part in all ticks.

        Args:
            segments: this stage's layers.
            x: this stage's own rows, ``[row_parts, parts * k, ...]``.
            rows: of all stages, ``[B, ...]``.

        Returns:
            The stage's own rows after all layers, and what changed in the caches of each segment, ``[n, ...]``.
        """
        stage = jax.lax.axis_index(self.axis)
        onward = [(here, (here + 1) % self.stages) for here in range(self.stages)]
        back = [(here, (here - 1) % self.stages) for here in range(self.stages)]
        waiting = x.reshape(self.row_parts, self.parts, x.shape[1] // self.parts, *x.shape[2:])  # [R, parts, k, ...]
        resting = _idle_stages_rest.get()
        for segment in segments:
            resting = segment.trace(waiting, rows) and resting
        busy = self._busy(segments)

        def tick(state: Any, moment: jax.Array) -> tuple[Any, None]:
            received, waiting, kept = state
            place = moment % self.parts
            first = jax.lax.dynamic_index_in_dim(waiting, place, 1, keepdims=False)
            x = jnp.where(stage == 0, first, received)
            number = jnp.clip(moment - stage, 0, self.count - 1)
            live = (number == moment - stage) & busy[number]
            after = []
            for segment, own in zip(segments, kept, strict=True):
                x, own = segment.run(live & (stage < segment.stages), x, own, rows, number, resting=resting)
                after.append(own)
            received = jax.lax.ppermute(x, self.axis, onward)
            moved = jnp.where(stage == self.stages - 1, x, jax.lax.ppermute(first, self.axis, back))
            return (received, jax.lax.dynamic_update_index_in_dim(waiting, moved, place, 1), after), None

        start = (jnp.zeros_like(waiting[:, 0]), waiting, [segment.start() for segment in segments])
        (_, results, kept), _ = jax.lax.scan(tick, start, jnp.arange(self.count + self.stages - 1))
        # The result of micro-batch m entered in tick m + S - 1.
        results = jnp.roll(results, -(self.stages - 1), axis=1).reshape(x.shape)
        return results, [segment.kept(own) for segment, own in zip(segments, kept, strict=True)]

    def by_part(self, a: jax.Array) -> jax.Array:
        """``a [n, ...]`` as ``[row_parts, micro-batches, n / both, ...]``."""
        return a.reshape(self.row_parts, self.count, a.shape[0] // (self.row_parts * self.count), *a.shape[1:])

    def part(self, a: jax.Array, number: jax.Array) -> jax.Array:
        """A micro-batch's part of ``a [n, ...]``."""
        return _flat(_at(self.by_part(a), number))

    def _busy(self, segments: Sequence[Segment]) -> jax.Array:
        """``[M]`` bool: micro-batches with a row that is not there only to fill up."""
        cache = segments[0].caches[0] if segments[0].caches else None
        if isinstance(cache, KnowsBusy) and cache.busy is not None:
            busy: jax.Array = self.by_part(cache.busy).any(axis=(0, 2))
            return busy
        return jnp.ones((self.count,), jnp.bool_)


class Segment:
    """Some neighbouring layers of a stage, and what they keep.

    Args:
        batches: how the batch passes.
        work: the layers.
        caches: theirs, each a pytree of ``[n, ...]``.
        stages: how many stages, from the first one, have these layers.
    """

    def __init__(self, batches: MicroBatches, work: Work, caches: Sequence[Any], stages: int) -> None:
        self._batches, self._work, self.caches, self.stages = batches, work, tuple(caches), stages
        self._traced: tuple[Any, set[str]] | None = None

    def trace(self, waiting: jax.Array, rows: Sequence[jax.Array]) -> bool:
        """See what the layers do to their caches; gives whether devices may leave them out one by one."""
        batches, changed = self._batches, set[str]()

        def probe(x: jax.Array, rows: Sequence[jax.Array], caches: Sequence[Any]) -> Any:
            before = _named(caches)
            done = tuple(self._work(x, rows, caches)[1])
            changed.update(name for name, leaf in _named(done).items() if before.get(name) is not leaf)
            return done

        def shape(a: jax.Array) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((a.shape[0] // batches.count, *a.shape[1:]), a.dtype)

        x = jax.ShapeDtypeStruct((batches.row_parts * waiting.shape[2], *waiting.shape[3:]), waiting.dtype)
        jaxpr, done = jax.make_jaxpr(probe, return_shape=True)(
            x, [shape(a) for a in rows], jax.tree.map(shape, self.caches)
        )
        self._traced = done, changed
        return " ppermute[" not in str(jaxpr)

    @property
    def _done(self) -> Any:
        """The caches of a micro-batch as the layers leave them, abstract."""
        assert self._traced is not None
        return self._traced[0]

    @cached_property
    def _changed(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        assert self._traced is not None
        return {name: leaf for name, leaf in _named(self._done).items() if name in self._traced[1]}

    def start(self) -> Kept:
        """What changes, as it is before the first tick."""
        known, batches = _named(self.caches), self._batches

        def begin(name: str, part: jax.ShapeDtypeStruct) -> jax.Array:
            shape = (batches.row_parts, batches.count, *_folded(part.shape, batches.row_parts))
            return known[name].reshape(shape) if name in known else jnp.zeros(shape, part.dtype)

        return {name: begin(name, part) for name, part in self._changed.items()}

    def kept(self, kept: Kept) -> Kept:
        """What changed, as ``[n, ...]``."""
        shapes, count = self._changed, self._batches.count
        return {name: a.reshape(shapes[name].shape[0] * count, *shapes[name].shape[1:]) for name, a in kept.items()}

    def run(
        self,
        live: jax.Array,
        x: jax.Array,
        kept: Kept,
        rows: Sequence[jax.Array],
        number: jax.Array,
        *,
        resting: bool,
    ) -> tuple[jax.Array, Kept]:
        """Pass a micro-batch ``x [row_parts, k, ...]`` through the layers, if it is ``live``."""

        def working(x: jax.Array, kept: Kept, number: jax.Array) -> tuple[jax.Array, Kept]:
            def own(name: str, a: jax.Array) -> jax.Array:
                return _at(kept[name], number).reshape(self._changed[name].shape) if name in kept else part(a)

            after, done = self._work(_flat(x), [part(a) for a in rows], _once(own, self.caches))
            new = {name: leaf for name, leaf in _named(tuple(done)).items() if name in kept}
            new = {name: leaf.reshape(_at(kept[name], number).shape) for name, leaf in new.items()}
            after = after.reshape(x.shape)
            if not resting:
                after = jnp.where(live, after, x)
                new = {name: jnp.where(live, leaf, _at(kept[name], number)) for name, leaf in new.items()}
            return after, {
                name: jax.lax.dynamic_update_index_in_dim(kept[name], leaf, number, 1) for name, leaf in new.items()
            }

        def part(a: jax.Array) -> jax.Array:
            return self._batches.part(a, number)

        if not resting:
            return working(x, kept, number)
        done: tuple[jax.Array, Kept] = jax.lax.cond(live, working, lambda x, kept, _: (x, kept), x, kept, number)
        return done

    def rebuilt(self, caches: Sequence[Any], changed: Kept) -> tuple[Any, ...]:
        """``caches`` with what changed put in; both may have further dimensions in front."""
        leaves = _named(tuple(caches)) | changed
        structure = jax.tree_util.tree_structure(self._done)
        found: tuple[Any, ...] = jax.tree_util.tree_unflatten(structure, [leaves[name] for name in _named(self._done)])
        return found


def _at(a: jax.Array, number: jax.Array) -> jax.Array:
    found: jax.Array = jax.lax.dynamic_index_in_dim(a, number, 1, keepdims=False)
    return found


def _folded(shape: tuple[int, ...], row_parts: int) -> tuple[int, ...]:
    """What of a micro-batch's shape ``[row_parts * k, ...]`` is behind its row parts: ``[k, ...]``; no k if it is 1."""
    rows = shape[0] // row_parts
    return shape[1:] if rows == 1 else (rows, *shape[1:])


def _flat(a: jax.Array) -> jax.Array:
    return a.reshape(a.shape[0] * a.shape[1], *a.shape[2:])


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by their place in a tree."""
    return {keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _once(fn: Callable[[str, jax.Array], jax.Array], tree: Tree) -> Tree:
    """``fn(name, leaf)`` of every leaf; of an array that is there several times only once."""
    known: dict[int, jax.Array] = {}

    def one(path: Any, leaf: jax.Array) -> jax.Array:
        if id(leaf) not in known:
            known[id(leaf)] = fn(keystr(path), leaf)
        return known[id(leaf)]

    mapped: Tree = jax.tree_util.tree_map_with_path(one, tree)
    return mapped
