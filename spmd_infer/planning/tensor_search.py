"""Which dimension of each un-annotated weight to split: a search that starts from the default rule and only improves.

The default rule takes the largest dimension that divides, whatever the weight is for. Of two products that follow one
another it may split both along their inputs, which costs two all-reduces where one would do (Megatron splits the first
along its outputs). The search tries one weight after the other on every dimension and keeps what the cost model calls
faster, until nothing is (coordinate descent). The same weight of every layer moves together at first, then odd and even
layers, then each by itself, as far as the budget goes. The budget counts the work of the estimates, not seconds, so
that all processes of a job find the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle

from jax.sharding import PartitionSpec

from spmd_infer.planning.cost import MeshCost
from spmd_infer.planning.layer_groups import Grouping, by_layer, by_parity, by_path, renamed
from spmd_infer.planning.layout import SMALL_BYTES, WeightLayout, spec_parts
from spmd_infer.planning.split_options import spare_axes, split_options
from spmd_infer.planning.work import Work

BUDGET = 200_000
"""Products, reductions and relabelled values that one search may estimate in all: a few seconds on one core."""

MOST_SINGLE = 48
"""With more weights than this, they are only moved layer by layer, not each by itself."""

LEAST_GAIN = 2e-3
"""A change must save this part of a step: estimates are no finer, and ties keep the default rule."""

Estimate = Callable[[Sequence[WeightLayout], Sequence[Work]], Sequence[MeshCost]]
"""The cost of each phase's work with the weights laid out so."""


@dataclass(frozen=True)
class Change:
    """Weights of one kind that the search laid out otherwise than the default rule.

    Attributes:
        pattern: their paths, ``*`` for the layer's number.
        count: how many they are.
        shape: of each.
        before: how the default rule splits each.
        after: how the search does.
    """

    pattern: str
    count: int
    shape: tuple[int, ...]
    before: PartitionSpec
    after: PartitionSpec


@dataclass(frozen=True)
class TensorSearch:
    """What a search over un-annotated weights came to.

    Attributes:
        changes: the kinds of weights that it moved, the largest first; empty where the default rule stays.
        seconds: of a step (all phases): ``(default rule, found)``.
        memory: bytes on the fullest device, likewise.
        collectives: how many there are in a step, likewise.
        evaluations: layouts that were estimated.
        finished: whether the budget lasted until no change helped.
    """

    changes: tuple[Change, ...]
    seconds: tuple[float, float]
    memory: tuple[int, int]
    collectives: tuple[int, int]
    evaluations: int
    finished: bool


def search_tensors(
    layouts: Sequence[WeightLayout],
    works: Sequence[tuple[Work, int]],
    estimate: Estimate,
    mesh_shape: Mapping[str, int],
    available: int,
) -> tuple[list[WeightLayout], TensorSearch]:
    """Improve the layouts of weights that name no axes.

    What comes out takes no more memory on a device than the default rule and no more time; only where the default rule
    needs more memory than there is, a slower layout that needs less is taken.

    Args:
        layouts: every weight, as ``weight_layouts`` lays it.
        works: the work of each phase, and how often it runs.
        estimate: the cost of such works with given layouts.
        mesh_shape: size of each mesh axis.
        available: bytes of a device that plans may use.
    """
    descent = _Descent(layouts, works, estimate, mesh_shape, available)
    base = descent.best
    groupings = [by_layer, by_parity, *([by_path] if sum(map(_searched, layouts)) <= MOST_SINGLE else [])]
    if spare_axes(mesh_shape, wide=base.excess > 0):
        for grouping in groupings:
            descent.run(grouping)
    found = descent.best
    return [_said(layout, mesh_shape) for layout in descent.layouts], TensorSearch(
        changes=_changes(layouts, descent.layouts),
        seconds=(base.seconds, found.seconds),
        memory=(base.memory, found.memory),
        collectives=(base.collectives, found.collectives),
        evaluations=descent.evaluations,
        finished=descent.finished,
    )


@dataclass(frozen=True)
class _Standing:
    """How good a layout is: bytes beyond what there is, then seconds."""

    excess: int
    seconds: float
    memory: int
    collectives: int

    def beats(self, other: _Standing, limit: int) -> bool:
        """Whether it is better by more than estimates are good for, within ``limit`` bytes on a device."""
        if self.excess != other.excess:
            return self.excess < other.excess
        return self.memory <= limit and self.seconds < other.seconds * (1 - LEAST_GAIN)


class _Descent:
    """Coordinate descent over groups of weights, within one budget."""

    def __init__(
        self,
        layouts: Sequence[WeightLayout],
        works: Sequence[tuple[Work, int]],
        estimate: Estimate,
        mesh_shape: Mapping[str, int],
        available: int,
    ) -> None:
        self._estimate, self._mesh, self._available = estimate, mesh_shape, available
        self._works = [work for work, _ in works]
        self._times = [times for _, times in works]
        self.evaluations, self._spent, self.finished = 0, 0, True
        self.layouts = list(layouts)
        self.best = self._standing(layouts, self._works)
        self._limit = self.best.memory

    def run(self, grouping: Grouping) -> None:
        """Improve one group of weights after the other until none can be improved, or the budget is spent.

        First one weight stands for its group, and the group's layers become one whose work is done several times. What
        is faster so is estimated for the model as it is, memory too, and kept if it is better there.
        """
        groups = _grouped(self.layouts, grouping)
        rest = [layout for layout in self.layouts if not _searched(layout)]
        names = {layout.path: key for key, members in groups.items() for layout in members}
        works = [renamed(work, names) for work in self._works]
        now = {key: replace(members[0], path=key) for key, members in groups.items()}

        def hoped(chosen: Mapping[str, WeightLayout]) -> _Standing:
            weights = sum(layout.device_bytes for layout in rest)
            weights += sum(len(groups[key]) * layout.device_bytes for key, layout in chosen.items())
            return self._standing([*rest, *chosen.values()], works, weights)

        quick = hoped(now)
        order = sorted(groups, key=lambda key: (-len(groups[key]) * now[key].nbytes, key))
        options = {key: split_options(now[key], self._mesh, wide=self.best.excess > 0) for key in order}
        since = 0  # groups looked at since the last change
        for key in cycle(order):
            if since == len(order):
                return
            since += 1
            for option in options[key]:
                if self._spent > BUDGET:
                    self.finished = False
                    return
                if option == now[key].spec:
                    continue
                tried = {**now, key: _laid(now[key], option, self._mesh)}
                estimated = hoped(tried)
                short = self.best.excess > 0
                if not (estimated.memory < quick.memory if short else estimated.beats(quick, estimated.memory)):
                    continue
                layouts = _applied(self.layouts, groups, tried)
                standing = self._standing(layouts, self._works)
                if standing.beats(self.best, self._limit):
                    self.layouts, self.best, now, quick, since = layouts, standing, tried, estimated, 0

    def _standing(
        self, layouts: Sequence[WeightLayout], works: Sequence[Work], weights: int | None = None
    ) -> _Standing:
        """Estimate; ``weights`` are the bytes of all weights on a device where ``layouts`` stand for several each."""
        costs = self._estimate(layouts, works)
        self.evaluations += 1
        self._spent += sum(len(w.products) + len(w.reductions) + len(w.relabels) for w in works)
        memory = max(cost.memory.total - cost.memory.weights for cost in costs)
        memory += costs[0].memory.weights if weights is None else weights
        timed = zip(self._times, costs, strict=True)
        return _Standing(
            excess=max(0, memory - self._available),
            seconds=sum(times * cost.time.total for times, cost in timed if cost.time is not None),
            memory=memory,
            collectives=sum(traffic.count for cost in costs for traffic in cost.collectives.values()),
        )


def bare(layouts: Iterable[WeightLayout]) -> bool:
    """Whether there is a weight that a search could move."""
    return any(map(_searched, layouts))


def _searched(layout: WeightLayout) -> bool:
    return layout.axes is None and layout.nbytes >= SMALL_BYTES


def _laid(layout: WeightLayout, spec: PartitionSpec, mesh: Mapping[str, int]) -> WeightLayout:
    parts = spec_parts(spec, mesh)
    return replace(layout, spec=spec, parts=parts, whole="" if parts > 1 else layout.whole)


def _said(layout: WeightLayout, mesh: Mapping[str, int]) -> WeightLayout:
    """A large weight that stays whole says why."""
    axes = spare_axes(mesh, wide=False)
    if not axes or layout.parts > 1 or layout.whole or not _searched(layout):
        return layout
    return replace(layout, whole=f"faster whole than split over {', '.join(f'{axis}={mesh[axis]}' for axis in axes)}")


def _applied(
    layouts: Sequence[WeightLayout], groups: Mapping[str, list[WeightLayout]], chosen: Mapping[str, WeightLayout]
) -> list[WeightLayout]:
    """Every weight laid out as its group is."""
    found = {
        layout.path: replace(layout, spec=chosen[key].spec, parts=chosen[key].parts, whole=chosen[key].whole)
        for key, members in groups.items()
        for layout in members
    }
    return [found.get(layout.path, layout) for layout in layouts]


def _grouped(layouts: Sequence[WeightLayout], grouping: Grouping) -> dict[str, list[WeightLayout]]:
    """Weights that move together: of one kind, shape and dtype, and laid out alike so far."""
    searched = [layout for layout in layouts if _searched(layout)]
    kinds = grouping([layout.path for layout in searched])
    groups: dict[str, list[WeightLayout]] = {}
    for layout in searched:
        key = f"{kinds[layout.path]} {layout.dtype}{list(layout.shape)} {layout.spec}"
        groups.setdefault(key, []).append(layout)
    return groups


def _changes(before: Sequence[WeightLayout], after: Sequence[WeightLayout]) -> tuple[Change, ...]:
    """What moved, by kind, those of most bytes first."""
    moved = [(old, new) for old, new in zip(before, after, strict=True) if old.spec != new.spec]
    patterns = by_layer([old.path for old, _ in moved])
    kinds: dict[tuple[object, ...], list[WeightLayout]] = {}
    for old, new in moved:
        kinds.setdefault((patterns[old.path], old.shape, old.spec, new.spec), []).append(old)
    found = [
        (
            sum(layout.nbytes for layout in same),
            Change(
                patterns[same[0].path] if len(same) > 1 else same[0].path,
                len(same),
                same[0].shape,
                same[0].spec,
                next(new.spec for old, new in moved if old is same[0]),
            ),
        )
        for same in kinds.values()
    ]
    return tuple(change for _, change in sorted(found, key=lambda pair: -pair[0]))
