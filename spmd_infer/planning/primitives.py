"""What single operations of a jaxpr mean to a planner: products, and how labels travel through everything else."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from math import prod
from typing import Any

from spmd_infer.axes import BATCH, Reaches, marked_axes
from spmd_infer.planning.values import Labels, Product, Value


def _dot(params: Mapping[str, Any], operands: list[Value], shape: tuple[int, ...], dtype: Any, times: int) -> Product:
    left, right = operands
    (left_sum, right_sum), (left_batch, right_batch) = params["dimension_numbers"]
    labels = tuple(left.labels[a] or right.labels[b] for a, b in zip(left_batch, right_batch, strict=True))
    labels += tuple(label for d, label in enumerate(left.labels) if d not in left_sum and d not in left_batch)
    labels += tuple(label for d, label in enumerate(right.labels) if d not in right_sum and d not in right_batch)
    pairs = tuple(zip(left_sum, right_sum, strict=True))
    flops = 2.0 * prod(shape) * prod(left.shape[a] for a in left_sum)
    out = Value(shape, dtype, labels)
    if left.weight and not right.weight:  # the weight is always the right operand
        left, right, pairs = right, left, tuple((b, a) for a, b in pairs)
        left_batch, right_batch = right_batch, left_batch
    return Product(flops, left, right, out, pairs, times, batch_left=tuple(left_batch), batch_right=tuple(right_batch))


def _conv(params: Mapping[str, Any], operands: list[Value], shape: tuple[int, ...], dtype: Any, times: int) -> Product:
    left, right = operands
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    labels: list[str | None] = [None] * len(shape)
    for position, (source, target) in enumerate(zip(numbers.lhs_spec, numbers.out_spec, strict=True)):
        labels[target] = left.labels[source] if position != 1 else right.labels[numbers.rhs_spec[0]]
    taps = prod(right.shape[d] for d in numbers.rhs_spec[1:])
    pairs = ((numbers.lhs_spec[1], numbers.rhs_spec[1]),) if groups == 1 else ()
    out = Value(shape, dtype, tuple(labels))
    return Product(2.0 * prod(shape) * taps, left, right, out, pairs, times)


def reaches_of(params: Mapping[str, Any], weight: Value) -> Reaches:
    """How far a convolution's windows reach along the dimensions of its images; empty where they are single places."""
    numbers = params["dimension_numbers"]
    sizes = [weight.shape[d] for d in numbers.rhs_spec[2:]]
    found = [
        (dimension, before, max(0, size - stride - before), stride)
        for dimension, size, stride, (before, _) in zip(
            numbers.lhs_spec[2:], sizes, params["window_strides"], params["padding"], strict=True
        )
    ]
    return tuple(found) if any(size > 1 for size in sizes) or any(stride > 1 for *_, stride in found) else ()


def _gather(
    params: Mapping[str, Any], operands: list[Value], shape: tuple[int, ...], dtype: Any, times: int
) -> Product:
    table, index = operands[0], operands[1]
    numbers = params["dimension_numbers"]
    kept = [d for d in range(len(table.shape)) if d not in numbers.collapsed_slice_dims]
    labels: list[str | None] = [None] * len(shape)
    for position, dimension in zip(numbers.offset_dims, kept, strict=False):
        if shape[position] == table.shape[dimension]:
            labels[position] = table.labels[dimension]
    rest = [d for d in range(len(shape)) if d not in numbers.offset_dims]
    for position, label in zip(rest, index.labels, strict=False):
        labels[position] = label
    pairs = tuple((None, d) for d in numbers.collapsed_slice_dims)
    return Product(0.0, index, table, Value(shape, dtype, tuple(labels)), pairs, times, lookup=True)


PRODUCTS = {"dot_general": _dot, "conv_general_dilated": _conv, "gather": _gather}


def labels_of(name: str, params: Mapping[str, Any], operands: list[Value], shape: tuple[int, ...]) -> Labels:
    """Labels of an operation's result; None for dimensions of unknown origin."""
    rank = len(shape)
    if not operands:
        return (None,) * rank
    first = operands[0]
    if name == "name":
        return marked_axes(params["name"]) or first.labels
    if name == "transpose":
        return tuple(first.labels[d] for d in params["permutation"])
    if name == "broadcast_in_dim":
        labels: list[str | None] = [None] * rank
        for source, target in enumerate(params["broadcast_dimensions"]):
            if first.shape[source] == shape[target]:
                labels[target] = first.labels[source]
        return tuple(labels)
    if name == "reshape":
        return _reshaped(first, shape)
    if name == "squeeze":
        return tuple(label for d, label in enumerate(first.labels) if d not in params["dimensions"])
    if name.startswith(("reduce_", "arg")) and "axes" in params:
        return tuple(label for d, label in enumerate(first.labels) if d not in params["axes"])
    joined: list[str | None] = [None] * rank
    for operand in operands:
        if len(operand.shape) == rank:
            for d in range(rank):
                # A dimension of another size (a slice, a concatenation) keeps its label only if it is not the batch.
                if joined[d] is None and (operand.shape[d] == shape[d] or operand.labels[d] != BATCH):
                    joined[d] = operand.labels[d] if operand.shape[d] == shape[d] else None
    return tuple(joined)


def _reshaped(value: Value, shape: tuple[int, ...]) -> Labels:
    """Labels through a reshape: merged dimensions take the first one's label, and splitting gives it to the first."""
    labels: list[str | None] = [None] * len(shape)
    i = j = 0
    while i < len(value.shape) and j < len(shape):
        start_i, start_j, have, want = i, j, value.shape[i], shape[j]
        while have != want:
            if have < want:
                i += 1
                if i == len(value.shape):
                    return tuple(labels)
                have *= value.shape[i]
            else:
                j += 1
                if j == len(shape):
                    return tuple(labels)
                want *= shape[j]
        source = next((d for d in range(start_i, i + 1) if value.shape[d] != 1), start_i)
        target = next((d for d in range(start_j, j + 1) if shape[d] != 1), start_j)
        labels[target] = value.labels[source]
        i, j = i + 1, j + 1
    return tuple(labels)


def must_be_copied(params: Mapping[str, Any], operand: Value, product: Product, side: int) -> bool:
    """Whether XLA rearranges an operand of a matrix product before.

    A product takes batch dimensions first, and then those that it sums and those that it keeps, each lot side by side
    and in one order.

    Args:
        params: of the equation.
        operand: the operand.
        product: the product.
        side: 0 for the left operand, 1 for the right.
    """
    if product.lookup or "window_strides" in params:
        return False
    summed = [pair[side] for pair in product.summed_dimensions]
    batch = product.batch_right if side else product.batch_left
    rest = [d for d in range(len(operand.shape)) if d not in batch and operand.shape[d] != 1]
    lots = [d in summed for d in rest]
    parts = sum(a != b for a, b in pairwise(lots))
    first = [d for d in batch if operand.shape[d] != 1]
    leads = all(b < d for b in first for d in rest) and first == sorted(first)
    ordered = [d for d in summed if d is not None and operand.shape[d] != 1]
    return not leads or parts > 1 or ordered != sorted(ordered)


def is_flattened(params: Mapping[str, Any], product: Product, side: int) -> bool:
    """Whether XLA reads an operand of a matrix product as a matrix (of each batch) although it has more dimensions."""
    if product.lookup or "window_strides" in params:
        return False
    operand = product.right if side else product.left
    summed = {pair[side] for pair in product.summed_dimensions}
    batch = product.batch_right if side else product.batch_left
    return len(summed) > 1 or len(operand.shape) - len(summed) - len(batch) > 1
