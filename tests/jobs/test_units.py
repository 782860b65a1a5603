"""Every row is in one unit, every unit is one rank's, and ranks get near-equal cost."""

from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from spmd_infer.jobs.rows import Row
from spmd_infer.jobs.units import MOST_ROWS, MOST_UNITS, WorkPlan, deal, plan_units
from spmd_infer.packing import imbalance_of


class Costs:
    """A source whose rows are their own cost, at places ten apart."""

    format = "costs"

    def __init__(self, costs: list[int]) -> None:
        self.costs = costs

    def scan(self) -> Iterator[tuple[int, Row]]:
        for index, cost in enumerate(self.costs):
            yield 10 * index, Row(index, cost)

    def read(self, first: int, count: int, place: int) -> list[Row]:
        return [Row(index, self.costs[index]) for index in range(first, first + count)]

    def fingerprint(self) -> str:
        return str(self.costs)


def plan(costs: list[int], least: int, most: int) -> WorkPlan:
    return plan_units(Costs(costs), lambda rows: [row.value for row in rows], "tokens", least=least, most=most)


@given(
    costs=st.lists(st.integers(0, 500), max_size=300),
    least=st.integers(1, 300),
    more=st.integers(0, 3000),
    ranks=st.integers(1, 9),
)
def test_every_row_is_in_one_unit_of_one_rank(costs: list[int], least: int, more: int, ranks: int) -> None:
    found = plan(costs, least, least + more)
    assert [row for unit in found.units for row in range(unit.first, unit.first + unit.count)] == list(
        range(len(costs))
    )
    assert (found.rows, found.cost) == (len(costs), sum(costs))
    for index, unit in enumerate(found.units):
        assert (unit.index, unit.place) == (index, 10 * unit.first)
        assert unit.cost == sum(costs[unit.first : unit.first + unit.count])
        assert 1 <= unit.count <= MOST_ROWS
        assert unit.cost <= least + more or unit.count == 1
    dealt = deal(found.units, ranks)
    assert len(dealt) == ranks
    assert sorted(unit.index for hand in dealt for unit in hand) == list(range(len(found.units)))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1 or not found.units or len(found.units) < ranks


def test_ranks_get_equal_cost_not_equal_rows() -> None:
    costs = [1] * 3000 + [100] * 1000  # the second half of the work is in a quarter of the rows
    found = plan(costs, 1000, 1000)
    dealt = deal(found.units, 4)
    assert imbalance_of([sum(unit.cost for unit in hand) for hand in dealt]) < 1.02
    rows = [sum(unit.count for unit in hand) for hand in dealt]
    assert imbalance_of(rows) > imbalance_of([sum(unit.cost for unit in hand) for hand in dealt])


def test_units_depend_on_the_rows_alone_and_are_few() -> None:
    costs = [7, 11, 3] * 10_000
    found = plan(costs, 10, 10**9)
    assert MOST_UNITS * 0.9 <= len(found.units) <= MOST_UNITS * 1.1
    assert found == plan(costs, 10, 10**9)
