"""What products, reductions and constraints communicate when their operands are split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from spmd_infer.planning.splits import Splits
from spmd_infer.planning.values import Product, Reduction, Relabel, Window


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
    the result's rows cannot split the weight too: the weight is gathered first, one mesh axis after the other, its last
    dimension first; keys and values that are split like the queries go around a ring instead, whichever side of the
    product they are on. An operand that is split where the other one is whole is gathered.
    """
    if not (product.lookup or product.left.weight or product.right.weight):
        turned = product.turned
        product = turned if _goes_around(turned, splits) else product
    left, right, out = splits.of(product.left), splits.of(product.right), splits.axes(product.out)
    reduced: list[str] = []
    gathered: list[str] = []
    fetched: list[str] = []
    rows = _axes_of_rows(product, splits)
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
    if product.lookup and product.right.weight:
        # Its rows' width is wanted whole, although no row of the result is split over the same axes: as of positions.
        shared = shared | {axis for d, axes in enumerate(right) if d not in paired for axis in axes if axis not in out}
    last_first = [axis for axes in reversed(right) for axis in axes]
    order = sorted({*gathered, *shared}, key=last_first.index) if product.right.weight else [*gathered, *sorted(shared)]
    for axis in dict.fromkeys(order):
        if product.right.weight or product.lookup:
            size *= splits.parts([axis])
            yield Message("all-gather", (axis,), size, product.times, weight=product.right.weight)
        else:
            yield Message("collective-permute", (axis,), size, product.times * (splits.parts([axis]) - 1))
    size = splits.device_bytes(product.left)
    for axis in dict.fromkeys(fetched):
        size *= splits.parts([axis])
        yield Message("all-gather", (axis,), size, product.times)
    summed = tuple(axis for axis in dict.fromkeys(reduced) if axis not in out)
    if summed:
        yield Message("all-reduce", summed, splits.device_bytes(product.out), product.times)


def _goes_around(product: Product, splits: Splits) -> bool:
    """Whether the right operand is split, along what is summed, over an axis that splits rows of the left one too."""
    rows, right = _axes_of_rows(product, splits), splits.of(product.right)
    return any(axis in rows for _, summed in product.summed_dimensions for axis in right[summed])


def _axes_of_rows(product: Product, splits: Splits) -> set[str]:
    """The mesh axes of the left operand's dimensions that are not summed."""
    summed = product.summed_left
    return {axis for position, axes in enumerate(splits.of(product.left)) if position not in summed for axis in axes}


def _of_split_lookup(
    product: Product, splits: Splits, rows: set[str], width: set[str], summed: tuple[str, ...], found: int
) -> Iterator[Message]:
    """A look-up in a table whose width is split over axes that split the rows too, and which is larger than the result.

    Every device looks up its part of the width for all rows, of which ``found`` bytes come together, one mesh axis
    after the other, the innermost first; then parts of the width are exchanged for rows. Where the table's own rows are
    split over axes that split the result's (``summed``), it is gathered along those if that is no more than what is
    found, and what is found is summed over them otherwise.
    """
    size = splits.device_bytes(product.right)
    others = rows - width
    if summed and size * splits.parts(summed) > found:
        others -= set(summed)
        yield Message("all-reduce", summed, found, product.times)
    else:
        for axis in summed:
            size *= splits.parts([axis])
            yield Message("all-gather", (axis,), size, product.times, weight=True)
    order = sorted(others, key=splits.order, reverse=True)
    for position, axis in enumerate(order):
        yield Message("all-gather", (axis,), found // splits.parts(order[position + 1 :]), product.times)
    size = splits.device_bytes(product.out) if others else found
    yield Message("all-to-all", tuple(sorted(width)), size, product.times)


@dataclass(frozen=True)
class Completion:
    """What a device needs of an operand over whose parts windows reach.

    Attributes:
        gathered: ``(mesh axis, bytes then)`` along which it is brought together, because its parts are uneven or
            smaller than what windows reach.
        edges: ``(mesh axis, bytes of each edge)`` of the dimensions whose parts are completed by their neighbours'
            edges, one dimension after the other: later edges run along the earlier ones too.
        shape: of the completed operand on the device.
        completed: the dimensions that have the edges of their neighbours.
    """

    gathered: tuple[tuple[str, int], ...]
    edges: tuple[tuple[str, tuple[int, ...]], ...]
    shape: tuple[int, ...]
    completed: frozenset[int]


def completion(window: Window, splits: Splits) -> Completion:
    """How the operand of an operation over windows is completed, as ``spmd_infer.models.halo`` does it."""
    value, found = window.value, splits.of(window.value)
    shape = [size // splits.parts(axes) for size, axes in zip(value.shape, found, strict=True)]
    size = splits.device_bytes(value)
    gathered: list[tuple[str, int]] = []
    beside = []
    for dimension, before, after, stride in window.reaches:
        axes = found[dimension]
        part = shape[dimension]
        if not axes:
            continue
        if len(axes) == 1 and part % stride == 0 and max(before, after) <= part:
            beside.append((dimension, axes[0], tuple(reach for reach in (before, after) if reach)))
            continue
        for axis in axes:
            size *= splits.parts([axis])
            gathered.append((axis, size))
        shape[dimension] = value.shape[dimension]
    edges = []
    for dimension, axis, reaches in beside:
        row = size // shape[dimension]
        edges.append((axis, tuple(row * reach for reach in reaches)))
        shape[dimension] += sum(reaches)
        size += row * sum(reaches)
    completed = frozenset(dimension for dimension, _, reaches in beside if reaches)
    return Completion(tuple(gathered), tuple(edges), tuple(shape), completed)


def of_window(window: Window, splits: Splits) -> Iterator[Message]:
    """Edges from the neighbours, one collective-permute in each direction; or all-gathers."""
    found = completion(window, splits)
    for axis, size in found.gathered:
        yield Message("all-gather", (axis,), size, window.times)
    for axis, sizes in found.edges:
        yield from (Message("collective-permute", (axis,), size, window.times) for size in sizes)


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
