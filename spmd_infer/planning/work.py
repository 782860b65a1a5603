"""What a model computes, read off its jaxpr: products, the weights in them, and the values alive between them.

Nothing is compiled and no device is needed. Each dimension of each value carries a label: the logical axis that it came
from (a weight's, an input's), or a name of its own for weights without axes. Labels travel through the operations, so
that for any mesh one can say which products are split, and which need a collective because a split dimension is summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from spmd_infer.planning.layout import nbytes

if TYPE_CHECKING:
    from spmd_infer.planning.flow import Flow

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
        halos: ``(left dimension, rows before, rows after)`` that a convolution's window reaches beyond each place.
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
    halos: tuple[tuple[int, int, int], ...] = ()

    @property
    def summed_left(self) -> set[int | None]:
        """Dimensions of the left operand that are summed over."""
        return {left for left, _ in self.summed_dimensions}


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


@dataclass
class Work:
    """One step of a model.

    Attributes:
        products: in the order of execution, equal ones as one with the sum of their times.
        reductions: likewise.
        relabels: likewise.
        flow: how values pass from one operation to the next; None where their memory is not asked for.
        inputs: the batch's arrays.
        outputs: the results, without those that are inputs updated in place.
    """

    products: list[Product] = field(default_factory=list)
    reductions: list[Reduction] = field(default_factory=list)
    relabels: list[Relabel] = field(default_factory=list)
    flow: Flow | None = None
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)

    @property
    def flops(self) -> float:
        """Floating-point operations of all products."""
        return sum(product.flops * product.times for product in self.products)


def weight_label(path: str, dimension: int) -> str:
    """The label of a dimension of a weight that names no axes."""
    return f"{path}#{dimension}"


def of_bare_weight(label: str | None) -> bool:
    """Whether a label is that of a weight that names no axes."""
    return label is not None and "#" in label


def given_up(operands: Sequence[Value], out: Value, times: int = 1) -> list[Relabel]:
    """What an operation that is no product costs where it cannot keep the labels of weights without axes.

    Their splits are the planner's to choose, so it must know the price: of two that meet in one sum only one can stay,
    a slice or a merged dimension loses its label, and a dimension that is cut up keeps it for fewer units.
    """
    found = []
    for operand in operands:
        labels, sizes = list(operand.labels), list(operand.shape)
        for dimension, label in enumerate(operand.labels):
            if not of_bare_weight(label) or operand.shape[dimension] == 1:
                continue
            if label in out.labels:
                sizes[dimension] = min(sizes[dimension], out.shape[out.labels.index(label)])
                continue
            beside = len(out.shape) == len(operand.shape) and out.shape[dimension] == operand.shape[dimension]
            labels[dimension] = out.labels[dimension] if beside else None
        after = replace(operand, shape=tuple(sizes), labels=tuple(labels))
        if after != operand:
            found.append(Relabel(operand, after, times))
    return found


def written(whole: Value, part: Value) -> Relabel:
    """A part that is written into a whole of another size, whose pieces lie elsewhere: it is completed first."""
    labels = tuple(
        label if size == of_whole else None
        for label, size, of_whole in zip(part.labels, part.shape, whole.shape, strict=True)
    )
    return Relabel(part, replace(part, labels=labels), into=whole)


_Repeated = TypeVar("_Repeated", Product, Reduction, Relabel)


def merged(items: Sequence[_Repeated]) -> list[_Repeated]:
    """Equal items as one with the sum of their times: the layers of a model repeat each other."""
    times: dict[_Repeated, int] = {}
    for item in items:
        key = replace(item, times=1)
        times[key] = times.get(key, 0) + item.times
    return [replace(item, times=count) for item, count in times.items()]


def deeper(two: Work, three: Work, num_layers: int) -> Work:
    """The work of a model of many equal layers, from that of the same model with two and with three of them.

    What a third layer adds, every further one adds too. Intermediate results live within a layer, so their peak is that
    of the shallow model.
    """

    def lists(name: str) -> list[Any]:
        before, after = _counted(getattr(two, name)), _counted(getattr(three, name))
        counts = {item: before.get(item, 0) + (after[item] - before.get(item, 0)) * (num_layers - 2) for item in after}
        if name in ("inputs", "outputs"):
            return [item for item, count in counts.items() for _ in range(count)]
        return [replace(item, times=count) for item, count in counts.items()]

    return Work(
        products=lists("products"),
        reductions=lists("reductions"),
        relabels=lists("relabels"),
        flow=two.flow,
        inputs=lists("inputs"),
        outputs=lists("outputs"),
    )


def _counted(items: Sequence[Any]) -> dict[Any, int]:
    counts: dict[Any, int] = {}
    for item in items:
        once = item if isinstance(item, Value) else replace(item, times=1)
        counts[once] = counts.get(once, 0) + getattr(item, "times", 1)
    return counts
