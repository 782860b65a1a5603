"""Equal work for every shard: packing texts into rows, and dealing rows to shards.

All shards of a program compute the same number of slots, so what is lost is padding. Texts of different lengths are
laid side by side in rows of one length, which a block-diagonal attention mask keeps apart. The heaviest goes first,
each to the row with the fewest tokens (longest processing time first, Graham 1969), which levels rows and shards alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace

import numpy as np
import numpy.typing as npt

from spmd_infer.errors import BatchError

Ints = npt.NDArray[np.int64]

ROW_LENS = (16, 32, 64, 128, 256, 512)
BATCH_TOKENS = 2048
# The row length at which attention costs as much as all the rest of a layer; longer rows cost more a slot.
ATTENTION_SPAN = 2048
# Texts of fewer tokens than this, on average, leave rows part empty; in return the pooled results stay small.
SHORTEST_MEAN = 4


@dataclass(frozen=True)
class Packing:
    """Where each text lies.

    Attributes:
        row_len: slots in a row.
        max_segments: the most texts in a row.
        rows: the row of each text, ``[texts]``.
        starts: its first slot, ``[texts]``.
        segments: its place among the texts of its row, from 0, ``[texts]``.
        batches: ``(first row, number of rows)`` of each batch; numbers of rows are multiples of ``parts``, and shard
            ``p`` computes the ``p``-th of equal, contiguous parts of each batch.
        shard_tokens: tokens that each shard computes over all batches, ``[parts]``.
    """

    row_len: int
    max_segments: int
    rows: Ints
    starts: Ints
    segments: Ints
    batches: tuple[tuple[int, int], ...]
    shard_tokens: Ints

    @property
    def num_rows(self) -> int:
        """Rows of all batches, empty ones included."""
        return sum(count for _, count in self.batches)

    @property
    def imbalance(self) -> float:
        """Tokens of the busiest shard over the mean of all; 1 is perfect."""
        return imbalance_of(self.shard_tokens)

    @property
    def fill(self) -> float:
        """Tokens over slots; what is missing to 1 is padding."""
        return float(self.shard_tokens.sum() / (self.num_rows * self.row_len))


def imbalance_of(loads: npt.ArrayLike) -> float:
    """The largest load over the mean; 1 where there is no load at all."""
    values = np.asarray(loads, dtype=np.float64)
    return float(values.max() / values.mean()) if values.any() else 1.0


def balance(costs: npt.ArrayLike, parts: int) -> tuple[Ints, float]:
    """Deal rows to parts: equally many to each, and near-equal costs.

    Never worse than dealing them in the given order. Takes O(n log n) time.

    Args:
        costs: the cost of each row, such as its tokens; not negative.
        parts: how many parts there are.

    Returns:
        The row at each position, where part ``p`` has the ``p``-th of ``parts`` equal, contiguous runs of positions; -1
        where a part is one row short. And the imbalance: the largest part's cost over the mean.

    Raises:
        BatchError: there are no rows or parts, or a cost is negative.
    """
    values = np.asarray(costs, dtype=np.float64)
    if values.ndim != 1 or not values.size or parts < 1 or not (values >= 0).all():
        raise BatchError(
            f"cannot deal {values.size} rows to {parts} parts: expected one cost of 0 or more for each row"
        )
    places = -(-values.size // parts)
    dealt: list[list[int]] = [[] for _ in range(parts)]
    loads = [(0.0, part) for part in range(parts)]
    for row in np.argsort(-values, kind="stable").tolist():
        load, part = loads[0]
        dealt[part].append(row)
        if len(dealt[part]) == places:
            heappop(loads)
        else:
            heapreplace(loads, (load + float(values[row]), part))
    order = np.array([row for part in dealt for row in (*part, *(-1,) * (places - len(part)))], dtype=np.int64)
    given = np.full(parts * places, -1, dtype=np.int64)
    given[: values.size] = np.arange(values.size)
    best = min((order, given), key=lambda positions: imbalance_of(_part_costs(values, positions, parts)))
    return best, imbalance_of(_part_costs(values, best, parts))


def _part_costs(costs: npt.NDArray[np.float64], order: Ints, parts: int) -> npt.NDArray[np.float64]:
    padded = np.append(costs, 0.0)  # position -1
    sums: npt.NDArray[np.float64] = padded[order].reshape(parts, -1).sum(axis=1)
    return sums


def pack(
    lengths: Sequence[int],
    *,
    parts: int = 1,
    row_lens: Sequence[int] = ROW_LENS,
    batch_tokens: int = BATCH_TOKENS,
) -> Packing:
    """Lay texts into rows of one length and rows into batches, with little padding and equal tokens for every shard.

    The row length is the one of ``row_lens`` that computes the least; where texts are few they are spread over all
    shards rather than heaped into full rows. Deterministic. Takes O(n log n) time.

    Args:
        lengths: tokens of each text.
        parts: how many shards a batch is split into.
        row_lens: lengths of a row to choose from; those shorter than the longest text are passed over.
        batch_tokens: slots of each shard in a full batch. Smaller batches have half as many rows, or a quarter, ….

    Raises:
        BatchError: there are no texts, one is empty, or one is longer than the longest row.
    """
    tokens = np.asarray(lengths, dtype=np.int64)
    if tokens.ndim != 1 or not tokens.size or parts < 1:
        raise BatchError(f"cannot pack {tokens.size} texts into rows of {parts} parts")
    if tokens.min() < 1 or tokens.max() > max(row_lens):
        text = int(np.argmin(tokens) if tokens.min() < 1 else np.argmax(tokens))
        raise BatchError(f"text {text} has {tokens[text]} tokens; rows take 1 to {max(row_lens)}")
    best: tuple[float, int, _Rows] | None = None
    fitting = sorted(size for size in set(row_lens) if size >= tokens.max())
    for row_len in sorted(fitting, key=lambda size: _least_cost(tokens, size, parts, batch_tokens)):
        if best is not None and best[0] <= _least_cost(tokens, row_len, parts, batch_tokens):
            break
        rows = _fill_rows(tokens, row_len, parts, batch_tokens)
        cost = _cost(rows.count, row_len)
        if best is None or cost < best[0]:
            best = (cost, row_len, rows)
    assert best is not None
    return _deal(tokens, best[2], best[1], parts, batch_tokens)


@dataclass(frozen=True)
class _Rows:
    """The row of each text, and how many rows there are."""

    of_text: Ints
    count: int


def _segments(row_len: int) -> int:
    return max(1, row_len // SHORTEST_MEAN)


def _cost(rows: int, row_len: int) -> float:
    return rows * row_len * (1 + row_len / ATTENTION_SPAN)


def _least_rows(tokens: Ints, row_len: int) -> int:
    return max(-(-int(tokens.sum()) // row_len), -(-tokens.size // _segments(row_len)))


def _least_cost(tokens: Ints, row_len: int, parts: int, batch_tokens: int) -> float:
    counts = _batch_counts(_least_rows(tokens, row_len), row_len, parts, batch_tokens)
    return _cost(sum(counts), row_len)


def _batch_counts(rows: int, row_len: int, parts: int, batch_tokens: int) -> list[int]:
    """Row counts of batches that hold ``rows``: full ones, then one or two smaller ones with the fewest spare rows."""
    full = max(1, batch_tokens // row_len)
    needed = -(-rows // parts)  # in each shard
    counts = [full] * (needed // full)
    rest = needed % full
    if rest:
        sizes = [full]
        while sizes[-1] > 1:
            sizes.append(sizes[-1] // 2)
        above = min(size for size in sizes if size >= rest)
        below = max((size for size in sizes if size <= rest), default=above)
        second = min(size for size in sizes if size >= rest - below) if below < rest else 0
        counts += [above] if above <= below + second else [below, second]
    return [count * parts for count in counts]


def _fill_rows(tokens: Ints, row_len: int, parts: int, batch_tokens: int) -> _Rows:
    """Each text to the row with the fewest tokens, in the least number of rows for which that works out."""
    naive = _in_order(tokens, row_len)
    order = np.argsort(-tokens, kind="stable")
    wanted = _least_rows(tokens, row_len)
    while True:
        count = sum(_batch_counts(wanted, row_len, parts, batch_tokens))
        if count >= naive.count:
            # As many rows as the naive order takes: spread over them where that works, else keep that order.
            filled = _level(tokens, order, row_len, count)
            return _Rows(filled if filled is not None else naive.of_text, count)
        filled = _level(tokens, order, row_len, count)
        if filled is not None:
            return _Rows(filled, count)
        wanted = max(count + 1, count + count // 64)


def _level(tokens: Ints, order: Ints, row_len: int, count: int) -> Ints | None:
    """The row of each text, the heaviest first to the emptiest; None where one does not fit."""
    limit = _segments(row_len)
    rows = np.empty(tokens.size, dtype=np.int64)
    held = [0] * count
    heap = [(0, row) for row in range(count)]
    heapify(heap)
    for text, length in zip(order.tolist(), tokens[order].tolist(), strict=True):
        if not heap:
            return None
        load, row = heap[0]
        if load + length > row_len:
            return None
        rows[text] = row
        held[row] += 1
        if held[row] == limit:
            heappop(heap)
        else:
            heapreplace(heap, (load + length, row))
    return rows


def _in_order(tokens: Ints, row_len: int) -> _Rows:
    """Texts side by side as they come, a new row whenever one does not fit."""
    limit = _segments(row_len)
    rows = np.empty(tokens.size, dtype=np.int64)
    row = load = held = 0
    for text, length in enumerate(tokens.tolist()):
        if load + length > row_len or held == limit:
            row, load, held = row + 1, 0, 0
        rows[text] = row
        load, held = load + length, held + 1
    return _Rows(rows, row + 1)


def _deal(tokens: Ints, rows: _Rows, row_len: int, parts: int, batch_tokens: int) -> Packing:
    """Give each shard rows of equal number and near-equal tokens, and lay the shards' rows into batches."""
    loads = np.bincount(rows.of_text, weights=tokens, minlength=rows.count)
    order, _ = balance(loads, parts)
    by_shard = order.reshape(parts, -1)
    counts = _batch_counts(rows.count, row_len, parts, batch_tokens)
    place = np.empty(rows.count, dtype=np.int64)
    batches, done, first = [], 0, 0
    for count in counts:
        share = count // parts
        place[by_shard[:, done : done + share].ravel()] = first + np.arange(count)
        batches.append((first, count))
        done, first = done + share, first + count
    final = place[rows.of_text]
    starts, segments = np.empty_like(tokens), np.empty_like(tokens)
    by_row = np.argsort(final, kind="stable")
    new_row = np.diff(final[by_row], prepend=-1) != 0
    ends = np.cumsum(tokens[by_row])
    begins, index = ends - tokens[by_row], np.arange(tokens.size)
    first_of_row = np.maximum.accumulate(np.where(new_row, index, 0))
    starts[by_row] = begins - begins[first_of_row]
    segments[by_row] = index - first_of_row
    shard_tokens = loads[by_shard].sum(axis=1).astype(np.int64)
    return Packing(row_len, _segments(row_len), final, starts, segments, tuple(batches), shard_tokens)
