"""Boxes and the pieces they are cut into."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from spmd_infer.checkpoints.boxes import box_shape, elements, part, pieces, run_of, tiling_problem, whole

SHAPES = st.lists(st.integers(0, 6), max_size=3).map(tuple)


@st.composite
def shapes_with_boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    shape = draw(st.lists(st.integers(1, 6), max_size=4).map(tuple))
    box = []
    for size in shape:
        start = draw(st.integers(0, size - 1))
        box.append((start, draw(st.integers(start + 1, size))))
    return shape, tuple(box)


@settings(deadline=None)  # comparing all pieces with each other takes its time
@given(SHAPES, st.integers(1, 200))
def test_pieces_tile_a_box_in_order_and_lie_in_one_run_each(shape: tuple[int, ...], most: int) -> None:
    found = list(pieces(whole(shape), 2, most))
    assert tiling_problem(shape, found) is None
    assert all(elements(piece) * 2 <= max(most, 2) for piece in found)
    firsts = [run_of(shape, piece) for piece in found]
    assert None not in firsts
    assert firsts == sorted(firsts)  # type: ignore[type-var]  # none of them is None


@given(shapes_with_boxes())
def test_a_run_begins_where_the_box_does(given_box: tuple[tuple[int, ...], tuple[tuple[int, int], ...]]) -> None:
    shape, box = given_box
    numbers = np.arange(int(np.prod(shape))).reshape(shape)
    inside = part(numbers, box)
    assert inside.shape == box_shape(box)
    together = bool((np.diff(inside.reshape(-1)) == 1).all())
    assert run_of(shape, box) == (inside.reshape(-1)[0] if together else None)


def test_halves_and_quarters_are_cut_where_the_whole_is() -> None:
    row = 8192  # bytes
    all_of_it = {piece[0] for piece in pieces(((0, 14336), (0, row)), 1, 16 << 20)}
    for parts in (2, 4, 8):
        size = 14336 // parts
        for number in range(parts):
            box = ((number * size, (number + 1) * size), (0, row))
            assert {piece[0] for piece in pieces(box, 1, 16 << 20)} <= all_of_it
