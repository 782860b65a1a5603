"""What plans reason about: values with labelled dimensions, and what is done with them that may need communication.

Each dimension of each value carries a label: the logical axis that it came from (a weight's, an input's), or a name of
its own for weights without axes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from spmd_infer.axes import Reaches
from spmd_infer.planning.layout import nbytes

Labels = tuple[str | None, ...]


@dataclass(frozen=True)
class Value:
    """An intermediate result.

    Attributes:
        shape: its shape.
        dtype: its dtype.
        labels: the label of each dimension.
        weight: whether it is a weight, or a view of one.
    """

    shape: tuple[int, ...]
    dtype: Any
    labels: Labels
    weight: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the whole value."""
        return nbytes(self.shape, self.dtype)


@dataclass(frozen=True)
class Product:
    """A matrix product, convolution or table look-up.

    Attributes:
        flops: floating-point operations, a multiply-add as two.
        left: the first operand.
        right: the second operand; the table of a look-up.
        out: the result.
        summed_dimensions: ``(left dimension, right dimension)`` of each pair that is summed over; a look-up sums over
            the table's rows, which the index has no dimension for.
        times: how often it runs in one step.
        lookup: whether it reads only some rows of its right operand.
        batch_left: dimensions of the left operand that are not summed, and the same as one of the right.
        batch_right: those of the right operand.
    """

    flops: float
    left: Value
    right: Value
    out: Value
    summed_dimensions: tuple[tuple[int | None, int], ...]
    times: int = 1
    lookup: bool = False
    batch_left: tuple[int, ...] = ()
    batch_right: tuple[int, ...] = ()

    @property
    def summed_left(self) -> set[int | None]:
        """Dimensions of the left operand that are summed over."""
        return {left for left, _ in self.summed_dimensions}

    @property
    def turned(self) -> Product:
        """The same product of two operands with their sides exchanged; a look-up has none to exchange."""
        if self.lookup:
            return self
        return replace(
            self,
            left=self.right,
            right=self.left,
            summed_dimensions=tuple((right, left) for left, right in self.summed_dimensions if left is not None),
            batch_left=self.batch_right,
            batch_right=self.batch_left,
        )


@dataclass(frozen=True)
class Reduction:
    """A sum, maximum or the like over dimensions of one value.

    Attributes:
        value: what is reduced.
        dimensions: the dimensions that disappear.
        out: the result.
        times: how often it runs in one step.
    """

    value: Value
    dimensions: tuple[int, ...]
    out: Value
    times: int = 1


@dataclass(frozen=True)
class Relabel:
    """A constraint in the model: the same value, whose dimensions follow other rules from here on.

    Attributes:
        before: the value as it was computed.
        after: the value as it is wanted.
        times: how often it happens in one step.
        into: what it is written into, if it is an update of something that stays: of a cache by a whole prompt.
    """

    before: Value
    after: Value
    times: int = 1
    into: Value | None = None


@dataclass(frozen=True)
class Window:
    """The operand of an operation over windows, such as a convolution: its parts need the edges of their neighbours.

    Attributes:
        value: the operand.
        reaches: how far windows reach along each of its dimensions that has some.
        times: how often it happens in one step.
    """

    value: Value
    reaches: Reaches
    times: int = 1


def weight_label(path: str, dimension: int) -> str:
    """The label of a dimension of a weight that names no axes."""
    return f"{path}#{dimension}"


def of_bare_weight(label: str | None) -> bool:
    """Whether a label is that of a weight that names no axes."""
    return label is not None and "#" in label
