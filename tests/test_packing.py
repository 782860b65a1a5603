"""Packing places every text once, within bounds, and no worse than the naive order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spmd_infer.errors import BatchError
from spmd_infer.packing import Packing, balance, imbalance_of, pack

LENGTHS = st.lists(st.integers(1, 128), min_size=1, max_size=120)
PARTS = st.sampled_from([1, 2, 3, 8])


def slots_in_order(lengths: list[int], row_len: int) -> int:
    """Slots that rows filled in the given order take."""
    rows, load, held = 1, 0, 0
    for length in lengths:
        if load + length > row_len or held == row_len // 4:
            rows, load, held = rows + 1, 0, 0
        load, held = load + length, held + 1
    return rows * row_len


def occupied(lengths: list[int], packing: Packing) -> np.ndarray:
    """How many texts claim each slot, ``[rows, row_len]``."""
    slots = np.zeros((packing.num_rows, packing.row_len), dtype=int)
    for length, row, start in zip(lengths, packing.rows, packing.starts, strict=True):
        assert 0 <= start <= packing.row_len - length
        slots[row, start : start + length] += 1
    return slots


@given(LENGTHS, PARTS, st.sampled_from([256, 1024]))
def test_every_text_lies_in_slots_of_its_own(lengths: list[int], parts: int, batch_tokens: int) -> None:
    packing = pack(lengths, parts=parts, batch_tokens=batch_tokens)
    slots = occupied(lengths, packing)
    assert slots.max() == 1
    assert slots.sum() == sum(lengths)
    for row in range(packing.num_rows):
        texts = np.flatnonzero(packing.rows == row)
        assert sorted(packing.segments[texts]) == list(range(len(texts)))
        assert len(texts) <= packing.max_segments
        assert not (np.diff(slots[row]) > 0).any()  # no gap before the padding


@given(LENGTHS, PARTS, st.sampled_from([256, 1024]))
def test_batches_split_over_the_shards(lengths: list[int], parts: int, batch_tokens: int) -> None:
    packing = pack(lengths, parts=parts, batch_tokens=batch_tokens)
    slots = occupied(lengths, packing)
    tokens, end = np.zeros(parts, dtype=int), 0
    for first, count in packing.batches:
        assert first == end
        assert count % parts == 0
        assert count * packing.row_len <= max(batch_tokens, packing.row_len) * parts
        end = first + count
        tokens += slots[first:end].reshape(parts, -1).sum(axis=1)
    assert end == packing.num_rows
    np.testing.assert_array_equal(tokens, packing.shard_tokens)
    assert packing.imbalance == imbalance_of(tokens)
    assert packing.fill == pytest.approx(sum(lengths) / slots.size)


@given(LENGTHS, PARTS)
def test_no_more_slots_than_in_the_given_order(lengths: list[int], parts: int) -> None:
    packing = pack(lengths, parts=parts, row_lens=(128,), batch_tokens=128)  # one row a shard: nothing rounded up
    naive = slots_in_order(lengths, 128)
    per_batch = 128 * parts
    assert packing.num_rows * 128 <= -(-naive // per_batch) * per_batch


@given(LENGTHS, PARTS)
def test_deterministic(lengths: list[int], parts: int) -> None:
    first, second = pack(lengths, parts=parts), pack(lengths, parts=parts)
    np.testing.assert_array_equal(first.rows, second.rows)
    np.testing.assert_array_equal(first.starts, second.starts)
    assert first.batches == second.batches


def test_few_texts_are_spread_over_the_shards() -> None:
    packing = pack([9, 12, 5, 7, 7, 7, 7, 7], parts=8)
    assert sorted(packing.rows) == list(range(8))  # one each
    assert packing.row_len == 16
    assert pack([9, 12, 5], parts=8).shard_tokens.tolist().count(0) == 5


def test_many_texts_are_level_and_dense() -> None:
    lengths = np.random.default_rng(0).integers(4, 60, size=3000)
    packing = pack(lengths.tolist(), parts=8)
    assert packing.imbalance <= 1.01
    assert packing.fill >= 0.95
    assert len({count for _, count in packing.batches}) <= 3  # few programs


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=60), PARTS)
def test_balance_deals_every_row_once_and_no_worse_than_in_order(costs: list[int], parts: int) -> None:
    order, imbalance = balance(costs, parts)
    places = -(-len(costs) // parts)
    assert order.shape == (parts * places,)
    assert sorted(order[order >= 0]) == list(range(len(costs)))
    padded = np.array([*costs, 0])
    assert imbalance == imbalance_of(padded[order].reshape(parts, places).sum(axis=1))
    in_order = np.zeros(parts * places)
    in_order[: len(costs)] = costs
    assert imbalance <= imbalance_of(in_order.reshape(parts, places).sum(axis=1))
    np.testing.assert_array_equal(order, balance(costs, parts)[0])


def test_balance_levels_sorted_costs() -> None:
    _, imbalance = balance(np.arange(1, 65), 8)
    assert imbalance == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([], "cannot pack 0 texts"),
        ([3, 0], "text 1 has 0 tokens; rows take 1 to 512"),
        ([3, 513], "text 1 has 513 tokens; rows take 1 to 512"),
    ],
)
def test_texts_that_cannot_be_packed(lengths: list[int], message: str) -> None:
    with pytest.raises(BatchError, match=message):
        pack(lengths)


def test_costs_that_cannot_be_dealt() -> None:
    with pytest.raises(BatchError, match="cannot deal 0 rows to 2 parts"):
        balance([], 2)
    with pytest.raises(BatchError, match="one cost of 0 or more"):
        balance([1, -1], 2)
