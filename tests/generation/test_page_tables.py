"""Page tables kept change by change equal tables built anew from what every slot holds."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from spmd_infer.generation.page_tables import PageTables

SLOTS, PAGES, MOST = 5, 24, 6


Tables = tuple[np.ndarray, np.ndarray, np.ndarray, dict[int, set[int]]]


def rebuilt(held: dict[int, list[int]], num_pages: int) -> Tables:
    """Table, owner, index and shared pages of the slots' pages."""
    table = np.zeros((SLOTS + 1, MOST), np.int32)
    index = np.zeros(num_pages, np.int32)
    users: dict[int, set[int]] = {}
    for slot, pages in held.items():
        table[slot, : len(pages)] = pages
        for number, page in enumerate(pages):
            index[page] = number
            users.setdefault(page, set()).add(slot)
    owner = np.full(num_pages, SLOTS, np.int32)
    for page, slots in users.items():
        if len(slots) == 1:
            (owner[page],) = slots
    return table, owner, index, {page: slots for page, slots in users.items() if len(slots) > 1}


def check(tables: PageTables, held: dict[int, list[int]], num_pages: int = PAGES) -> None:
    table, owner, index, shared = rebuilt(held, num_pages)
    np.testing.assert_array_equal(tables.table, table)
    np.testing.assert_array_equal(tables.owner, owner)
    np.testing.assert_array_equal(tables.index, index)
    pages, owners = tables.shared_pages()
    assert {int(page): {int(s) for s in row if s < SLOTS} for page, row in zip(pages, owners, strict=True)} == shared


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_changes_add_up_to_a_rebuild(data: st.DataObject) -> None:
    tables, held = PageTables(SLOTS, PAGES, MOST), dict[int, list[int]]()
    seen = PageTables(SLOTS, PAGES, MOST)  # what a device has that is sent the changes
    for _ in range(data.draw(st.integers(1, 12))):
        slot = data.draw(st.integers(0, SLOTS - 1))
        used = {page for pages in held.values() for page in pages}
        free = [page for page in range(PAGES) if page not in used]
        if slot not in held:
            model = data.draw(st.sampled_from([None, *held]))
            prefix = [] if model is None else held[model][: data.draw(st.integers(0, len(held[model])))]
            count = data.draw(st.integers(0, min(MOST - len(prefix), len(free))))
            held[slot] = prefix + data.draw(st.permutations(free))[:count]
            tables.add(slot, 0, held[slot])
        elif data.draw(st.booleans()) and len(held[slot]) < MOST and free:
            tables.add(slot, len(held[slot]), free[:1])
            held[slot].append(free[0])
        else:
            tables.clear(slot, held.pop(slot))
        check(tables, held)
        changes = tables.take_changes()
        seen.table[changes.slots] = tables.table[changes.slots]
        seen.owner[changes.pages] = tables.owner[changes.pages]
        seen.index[changes.pages] = tables.index[changes.pages]
        np.testing.assert_array_equal(seen.table, tables.table)
        np.testing.assert_array_equal(seen.owner, tables.owner)
        np.testing.assert_array_equal(seen.index, tables.index)
    assert not tables.take_changes().slots


def test_shared_pages_are_listed_with_all_their_slots() -> None:
    tables = PageTables(SLOTS, PAGES, MOST)
    tables.add(0, 0, [4, 2, 7])
    tables.add(3, 0, [4, 2, 8])
    tables.add(1, 0, [4, 5])
    pages, owners = tables.shared_pages()
    assert pages.tolist() == [4, 2]
    assert owners.tolist() == [[0, 3, 1], [0, 3, SLOTS]]
    tables.clear(0, [4, 2, 7])
    pages, owners = tables.shared_pages()
    assert (pages.tolist(), owners.tolist()) == ([4], [[3, 1]])
    assert tables.owner[2] == 3
    assert tables.index[2] == 1


def test_moves_change_every_slot_that_uses_the_page() -> None:
    tables = PageTables(SLOTS, PAGES, MOST)
    tables.add(0, 0, [20, 2])
    tables.add(1, 0, [20, 23])
    tables.resize(8, [(20, 0), (23, 1)])
    check(tables, {0: [0, 2], 1: [0, 1]}, num_pages=8)
    assert len(tables.owner) == 8
    tables.resize(PAGES, [])
    check(tables, {0: [0, 2], 1: [0, 1]})
