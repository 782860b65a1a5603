"""What products, reductions and constraints communicate when their operands are split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from spmd_infer.planning.splits import Splits
from spmd_infer.planning.work import Product, Reduction, Relabel


@dataclass(frozen=True)
class Message:
    """One collective: its kind, mesh axes and the bytes of its result on a device; how often; whether of a weight."""

    kind: str
    axes: tuple[str, ...]
    nbytes: int
    times: int
    weight: bool = False


def of_product(product: Product, splits: Splits) -> Iterator[Message]:
    """The communication that a product needs.

    A summed dimension that is split leaves partial sums: an all-reduce of the result. A mesh axis that already splits
    the result's rows cannot split the weight too: the weight is gathered first, one mesh axis after the other; keys and
    values that are split like the queries go around a ring instead. An operand that is split where the other one is
    whole is gathered. A convolution over a split dimension fetches the rows that its window needs from its neighbours.
    """
    left, right, out = splits.of(product.left), splits.of(product.right), splits.axes(product.out)
    reduced: list[str] = []
    gathered: list[str] = []
    fetched: list[str] = []
    rows = {axis for position, axes in enumerate(left) for axis in axes if position not in product.summed_left}
    for a, b in product.summed_dimensions:
        ours = left[a] if a is not None else ()
        gathered += [axis for axis in right[b] if axis in rows]
        reduced += [axis for axis in right[b] if axis not in rows]
        fetched += [axis for axis in ours if axis not in right[b] and not product.lookup]
    paired = {b for _, b in product.summed_dimensions} | set(product.batch_right)
    shared = rows & {axis for position, axes in enumerate(right) if position not in paired for axis in axes}
    size = splits.device_bytes(product.right)
    if product.lookup and not product.right.weight:
        shared = set()  # each row looks up its own
    if product.lookup and product.right.weight and shared:
        found = splits.device_bytes(product.out) * splits.parts(rows) // splits.parts(shared)
        if size * splits.parts([*gathered, *shared]) > found:
            yield from _of_split_lookup(product, splits, rows, shared, tuple(dict.fromkeys(gathered)), found)
            return
    for axis in dict.fromkeys([*gathered, *sorted(shared)]):
        if product.right.weight or product.lookup:
            size *= splits.parts([axis])
            yield Message("all-gather", (axis,), size, product.times, weight=product.right.weight)
        else:
            yield Message("collective-permute", (axis,), size, product.times * (splits.parts([axis]) - 1))
    for dimension, before, after in product.halos:
        for axis in left[dimension]:
            row = splits.device_bytes(product.left) * splits.parts(left[dimension]) // product.left.shape[dimension]
            for reach in (before, after):
                if reach:
                    yield Message("collective-permute", (axis,), row * reach, product.times)
    size = splits.device_bytes(product.left)
    for axis in dict.fromkeys(fetched):
        size *= splits.parts([axis])
        yield Message("all-gather", (axis,), size, product.times)
    summed = tuple(axis for axis in dict.fromkeys(reduced) if axis not in out)
    if summed:
        yield Message("all-reduce", summed, splits.device_bytes(product.out), product.times)


def _of_split_lookup(
    product: Product, splits: Splits, rows: set[str], width: set[str], summed: tuple[str, ...], found: int
) -> Iterator[Message]:
    """A look-up in a table whose width is split over axes that split the rows too, and which is larger than the result.

    Every device looks up its part of the width for all rows, of which ``found`` bytes come together; then parts of the
    width are exchanged for rows.
    """
    others = tuple(sorted(rows - width - set(summed)))
    if summed:
        yield Message("all-reduce", summed, found, product.times)
    if others:
        yield Message("all-gather", others, found, product.times)
    size = splits.device_bytes(product.out) if others else found
    yield Message("all-to-all", tuple(sorted(width)), size, product.times)


def of_reduction(reduction: Reduction, splits: Splits) -> Iterator[Message]:
    """A reduction over a split dimension: each device reduces its part, then an all-reduce of the result."""
    split = splits.of(reduction.value)
    axes = tuple(axis for dimension in reduction.dimensions for axis in split[dimension])
    if axes:
        yield Message("all-reduce", axes, splits.device_bytes(reduction.out), reduction.times)


def of_relabel(relabel: Relabel, splits: Splits) -> Iterator[Message]:
    """A constraint that moves a mesh axis from one dimension to another (all-to-all) or drops it (all-gather)."""
    if relabel.into is not None:
        shared = splits.shared_heads(relabel.before)
        if shared:
            # Every device computes only the key heads that its query heads read; the cache wants all of them.
            yield Message("all-gather", shared, splits.device_bytes(relabel.after), relabel.times)
    before, after = splits.of(relabel.before), splits.of(relabel.after)
    wanted = splits.axes(relabel.after)
    size = splits.device_bytes(relabel.before)
    for ours, theirs in zip(before, after, strict=True):
        for axis in ours:
            if axis in theirs:
                continue
            if axis in wanted:
                yield Message("all-to-all", (axis,), size, relabel.times)
            else:
                size *= splits.parts([axis])
                yield Message("all-gather", (axis,), size, relabel.times)
