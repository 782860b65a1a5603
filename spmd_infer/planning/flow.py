"""A step as a flow of values from operation to operation, as far as memory is concerned: what XLA can fuse, and how.

The kinds follow XLA's instruction fusion (``xla/service/instruction_fusion.cc`` and its CPU variant): elementwise
operations and moves are computed inside whatever uses them; products, reductions and collectives read and write memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from spmd_infer.planning.values import Product, Relabel, Value, Window

Kind = Literal[
    "cheap", "costly", "move", "spread", "reduce", "product", "constraint", "window", "collective", "update", "call"
]
"""What an operation is to a compiler that fuses.

``cheap`` and ``costly`` are elementwise; costly ones are not computed twice. A ``move`` takes its numbers from other
places of its operand (slices, pads, transposes), ``spread`` repeats them. A ``constraint`` is nothing, or a collective;
a ``window`` likewise, or several.
An ``update`` writes into its first operand. Anything unknown is a ``call``.
"""

CHEAP = frozenset(
    [
        "abs",
        "add",
        "add_any",
        "and",
        "bitcast_convert_type",
        "ceil",
        "clamp",
        "convert_element_type",
        "copy",
        "eq",
        "floor",
        "ge",
        "gt",
        "integer_pow",
        "is_finite",
        "le",
        "lt",
        "max",
        "min",
        "mul",
        "ne",
        "neg",
        "not",
        "or",
        "real",
        "imag",
        "reduce_precision",
        "round",
        "select_n",
        "shift_left",
        "shift_right_arithmetic",
        "shift_right_logical",
        "sign",
        "square",
        "sub",
        "xor",
    ]
)
COSTLY = frozenset(
    [
        "acos",
        "asin",
        "atan",
        "atan2",
        "cbrt",
        "cos",
        "cosh",
        "div",
        "erf",
        "erf_inv",
        "erfc",
        "exp",
        "exp2",
        "expm1",
        "lgamma",
        "log",
        "log1p",
        "logistic",
        "nextafter",
        "pow",
        "rem",
        "rsqrt",
        "sin",
        "sinh",
        "sqrt",
        "tan",
        "tanh",
    ]
)
MOVES = frozenset(["concatenate", "dynamic_slice", "gather", "pad", "rev", "slice", "split", "transpose"])
SPREADS = frozenset(("broadcast_in_dim", "iota"))

FUSED_REDUCTION = 32
"""XLA on CPU cuts larger reductions in two, and computes their operand before. Sums over all but the last dimension are
done by a loop of their own too."""


@dataclass(frozen=True)
class Op:
    """One operation. Values are numbers in ``Flow.values``.

    Attributes:
        kind: what a compiler makes of it.
        inputs: what it reads; literals and views of nothing are left out.
        outputs: what it makes.
        item: the product, constraint or window that it is, of which one can tell what it communicates.
        twice: whether computing it in several places costs no more than reading its result there.
        fuses: of a reduction, whether its operand is computed inside it.
        reshaped: those of the inputs that it reads under another shape than they were made with.
        flat_inputs: of a matrix product, operands that it takes as matrices although they have more dimensions.
        flat_output: likewise whether its result is a matrix first.
    """

    kind: Kind
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    item: Product | Relabel | Window | None = None
    twice: bool = False
    fuses: bool = False
    reshaped: frozenset[int] = frozenset()
    flat_inputs: frozenset[int] = frozenset()
    flat_output: bool = False

    @property
    def fusible(self) -> bool:
        """Whether its result can be computed inside what uses it."""
        return self.kind in ("cheap", "costly", "move", "spread")

    @property
    def elementwise(self) -> bool:
        """Whether each number of the result depends on the number at the same place of each operand."""
        return self.kind in ("cheap", "costly")


@dataclass(frozen=True)
class Flow:
    """Operations in the order of the program.

    Attributes:
        values: what is passed on; views count as what they view.
        ops: the operations.
        given: numbers of values that the caller holds: weights and inputs.
        results: numbers of values that go to the caller and are not inputs updated in place.
        padded: what those values pad that are padded: split images have their borders in every part, or the edges of
            their neighbours instead.
    """

    values: tuple[Value, ...]
    ops: tuple[Op, ...]
    given: frozenset[int]
    results: tuple[int, ...]
    padded: Mapping[int, int] = field(default_factory=dict)

    def mapped(self, of_value: Callable[[Value], Value]) -> Flow:
        """The same flow of other values."""

        def item(old: Product | Relabel | Window | None) -> Product | Relabel | Window | None:
            if isinstance(old, Window):
                return replace(old, value=of_value(old.value))
            if isinstance(old, Product):
                return replace(old, left=of_value(old.left), right=of_value(old.right), out=of_value(old.out))
            return None if old is None else Relabel(of_value(old.before), of_value(old.after), old.times)

        ops = tuple(op if op.item is None else replace(op, item=item(op.item)) for op in self.ops)
        return replace(self, values=tuple(map(of_value, self.values)), ops=ops)


def is_view(name: str, operand: Value, result: Value, params: Mapping[str, Any]) -> bool:
    """Whether a result is its operand's memory read another way."""
    if operand.weight and result.weight:
        return name != "transpose"
    same = operand.nbytes == result.nbytes
    if name == "transpose":
        moved = [d for d in params["permutation"] if operand.shape[d] != 1]
        return moved == sorted(moved)
    if name in ("convert_element_type", "reduce_precision"):
        return name != "reduce_precision" and operand.dtype == result.dtype
    return same and name in ("reshape", "squeeze", "expand_dims", "broadcast_in_dim", "stop_gradient", "name", "copy")


def kind_of(name: str) -> Kind:
    """The kind of a primitive that is neither product, reduction nor constraint."""
    if name in CHEAP:
        return "cheap"
    if name in COSTLY:
        return "costly"
    if name in MOVES:
        return "move"
    if name in SPREADS:
        return "spread"
    return "update" if name in ("scatter", "dynamic_update_slice") else "call"
