"""Rows cut into units: what one rank computes in one go and writes down at once. And whose they are.

A unit is a run of rows of about the same cost as every other, so its results stand together in the output. Which rows
form a unit is decided once, when the job begins, and depends neither on the number of processes nor on how often they
are killed: a unit that is computed again is computed from the same rows, and gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import msgspec
import numpy as np

from spmd_infer.jobs.rows import Row, Source
from spmd_infer.packing import balance

MOST_ROWS = 4096
"""In a unit, however little they cost."""

MOST_UNITS = 256
"""Smaller units than these many are made only where the largest allowed size asks for it."""

_SCAN_ROWS = 1024

CostOf = Callable[[Sequence[Row]], list[int]]


class Unit(msgspec.Struct, frozen=True, array_like=True):
    """Consecutive rows that are computed together.

    Attributes:
        index: the unit's number.
        first: its first row's number.
        count: how many rows.
        place: where the first one is in the input.
        cost: of all its rows.
    """

    index: int
    first: int
    count: int
    place: int
    cost: int


class WorkPlan(msgspec.Struct, frozen=True):
    """All units of a job.

    Attributes:
        counts: what the cost counts: ``"tokens"``.
        units: in the order of the input.
    """

    counts: str
    units: list[Unit]

    @property
    def rows(self) -> int:
        """Of all units."""
        return sum(unit.count for unit in self.units)

    @property
    def cost(self) -> int:
        """Of all units."""
        return sum(unit.cost for unit in self.units)


def plan_units(source: Source, cost_of: CostOf, counts: str, *, least: int, most: int) -> WorkPlan:
    """Cut a job's rows into units.

    Args:
        source: the rows; read once, and never all in memory.
        cost_of: what rows cost.
        counts: what that counts.
        least: cost that a unit should have at least, so that devices are well used.
        most: cost that it should not exceed, so that little is lost when a process dies, and it can stop soon. Between
            the two, units are made so large that there are ``MOST_UNITS`` of them.
    """
    costs: list[int] = []
    places: list[int] = []
    rows = source.scan()
    while part := list(islice(rows, _SCAN_ROWS)):
        costs += cost_of([row for _, row in part])
        places += [place for place, _ in part]
    target = min(most, max(least, -(-sum(costs) // MOST_UNITS)))
    return WorkPlan(counts, list(_cut(costs, places, target)))


def _cut(costs: list[int], places: list[int], target: int) -> Iterator[Unit]:
    first, cost, index = 0, 0, 0
    for row, own in enumerate(costs):
        if row > first and (cost + own > target or row - first == MOST_ROWS):
            yield Unit(index, first, row - first, places[first], cost)
            first, cost, index = row, 0, index + 1
        cost += own
    if first < len(costs):
        yield Unit(index, first, len(costs) - first, places[first], cost)


def deal(units: Sequence[Unit], ranks: int) -> list[list[Unit]]:
    """Each rank's units: near-equal cost for all, in the order of the input."""
    if not units:
        return [[] for _ in range(ranks)]
    order, _ = balance([unit.cost for unit in units], ranks)
    parts = np.reshape(order, (ranks, -1))
    return [[units[position] for position in sorted(part[part >= 0].tolist())] for part in parts]
