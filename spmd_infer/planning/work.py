"""What a model computes, read off its jaxpr: products, the weights in them, and the values alive between them.

Nothing is compiled and no device is needed. Each dimension of each value carries a label: the logical axis that it came
from (a weight's, an input's), or a name of its own for weights without axes. Labels travel through the operations, so
that for any mesh one can say which products are split, and which need a collective because a split dimension is summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from spmd_infer.planning.flow import Flow
from spmd_infer.planning.values import Product, Reduction, Relabel, Value, Window, of_bare_weight


@dataclass
class Work:
    """One step of a model.

    Attributes:
        products: in the order of execution, equal ones as one with the sum of their times.
        reductions: likewise.
        relabels: likewise.
        windows: likewise.
        flow: how values pass from one operation to the next; None where their memory is not asked for.
        inputs: the batch's arrays.
        outputs: the results, without those that are inputs updated in place.
    """

    products: list[Product] = field(default_factory=list)
    reductions: list[Reduction] = field(default_factory=list)
    relabels: list[Relabel] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    flow: Flow | None = None
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)

    @property
    def flops(self) -> float:
        """Floating-point operations of all products."""
        return sum(product.flops * product.times for product in self.products)


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


_Repeated = TypeVar("_Repeated", Product, Reduction, Relabel, Window)


def merged(items: Sequence[_Repeated]) -> list[_Repeated]:
    """Equal items as one with the sum of their times: the layers of a model repeat each other."""
    times: dict[_Repeated, int] = {}
    for item in items:
        key = replace(item, times=1)
        times[key] = times.get(key, 0) + item.times
    return [replace(item, times=count) for item, count in times.items()]


@dataclass(frozen=True)
class StagedWork:
    """A step's work in parts.

    Attributes:
        whole: of the model with its layers one by one.
        outside: without any layer.
        row_bytes: bytes of one row of the activations that travel through the layers.
    """

    whole: Work
    outside: Work
    row_bytes: int


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
        windows=lists("windows"),
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
