"""Reading a model's work off its jaxpr. Nothing is compiled and no device is needed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var

from spmd_infer.axes import Reaches, marked_axes, marked_window, recorded_constraints
from spmd_infer.functional import ModelFunction
from spmd_infer.planning.flow import FUSED_REDUCTION, Flow, Kind, Op, is_view, kind_of
from spmd_infer.planning.primitives import PRODUCTS, is_flattened, labels_of, must_be_copied, reaches_of
from spmd_infer.planning.values import Labels, Product, Reduction, Relabel, Value, Window, weight_label
from spmd_infer.planning.work import Work, given_up, merged, written

_SAME_VALUES = frozenset({"reshape", "squeeze", "convert_element_type", "copy", "transpose"})


def read_work(model: ModelFunction, batch: Any, batch_axes: Sequence[Labels]) -> Work:
    """Trace a model on abstract inputs and list its work.

    Args:
        model: the model.
        batch: a pytree of ``jax.ShapeDtypeStruct``.
        batch_axes: the logical axes of each of its leaves.
    """
    abstract = {path: jax.ShapeDtypeStruct(p.shape, p.dtype) for path, p in model.params.items()}
    with recorded_constraints():
        # A function of its own, as JAX would find an earlier trace of the model made under other circumstances.
        closed = jax.make_jaxpr(lambda *values: model(*values))(abstract, batch)
    paths = sorted(abstract)  # the order in which JAX flattens a dict
    labels: list[Labels] = [
        model.axes.get(path) or tuple(weight_label(path, d) for d in range(len(abstract[path].shape))) for path in paths
    ]
    labels += list(batch_axes)
    dtypes = [model.params[path].dtype for path in paths]
    dtypes += [var.aval.dtype for var in closed.jaxpr.invars[len(paths) :]]
    values = [
        Value(tuple(var.aval.shape), dtype, tuple(names), weight=position < len(paths))
        for position, (var, dtype, names) in enumerate(zip(closed.jaxpr.invars, dtypes, labels, strict=True))
    ]
    reader = _Reader(values)
    outputs = reader.run(closed, values, times=1)
    reader.work.inputs = values[len(paths) :]
    reader.close(outputs)
    return reader.work


class _Reader:
    """Walks a jaxpr once, following calls into their bodies."""

    def __init__(self, given: Sequence[Value]) -> None:
        self.work = Work()
        self._values: list[Value] = []
        self._numbers: dict[int, int] = {}  # of values and of views of them, by identity
        self._ops: list[Op] = []
        self._spread: set[int] = set()
        self._padded: dict[int, int] = {}
        self._kept: list[Value] = []  # so that no identity is used twice
        for value in given:
            self._number(value)
        self._given = frozenset(range(len(given)))

    def run(self, closed: ClosedJaxpr | Jaxpr, args: Sequence[Value], times: int) -> list[Value]:
        jaxpr = closed.jaxpr if hasattr(closed, "jaxpr") else closed
        known: dict[Var, Value] = dict(zip(jaxpr.invars, args, strict=True))

        def look(atom: Any) -> Value:
            if isinstance(atom, Literal) or atom not in known:
                aval = atom.aval
                shape = tuple(getattr(aval, "shape", ()))
                return Value(shape, getattr(aval, "dtype", "float32"), (None,) * len(shape))
            return known[atom]

        for equation in jaxpr.eqns:
            results = self._apply(equation, [look(atom) for atom in equation.invars], times)
            known.update(zip(equation.outvars, results, strict=True))
        return [look(atom) for atom in jaxpr.outvars]

    def close(self, outputs: Sequence[Value]) -> None:
        """Write down the flow, and the results that are not inputs updated in place."""
        made = [v for v in outputs if self._numbers.get(id(v)) not in self._given]
        self.work.outputs = made
        self.work.products = merged(self.work.products)
        self.work.reductions = merged(self.work.reductions)
        self.work.relabels = merged(self.work.relabels)
        self.work.windows = merged(self.work.windows)
        results = tuple(self._numbers[id(v)] for v in made if id(v) in self._numbers)
        self.work.flow = Flow(tuple(self._values), tuple(self._ops), self._given, results, self._padded)

    def _apply(self, equation: Any, operands: list[Value], times: int) -> list[Value]:
        name, params = equation.primitive.name, equation.params
        inner = _body(params)
        if inner is not None:
            return self._call(name, params, inner, equation, operands, times)
        outs = [(tuple(v.aval.shape), v.aval.dtype) for v in equation.outvars if hasattr(v.aval, "shape")]
        if len(outs) != len(equation.outvars):
            return [Value((), "float32", ()) for _ in equation.outvars]
        if name in PRODUCTS:
            shape, dtype = outs[0]
            if "window_strides" in params:
                reaches = reaches_of(params, operands[1])
                operands = [self._window(operands[0], reaches, times) if reaches else operands[0], operands[1]]
            product = PRODUCTS[name](params, operands, shape, dtype, times)
            self.work.products.append(product)
            self._product(product, params)
            return [product.out]
        marked = marked_window(params["name"]) if name == "name" else None
        if marked is not None:
            return [self._window(operands[0], marked, times)]
        results = []
        for shape, dtype in outs:
            weight = name in _SAME_VALUES and bool(operands) and operands[0].weight
            value = Value(
                shape, operands[0].dtype if weight else dtype, labels_of(name, params, operands, shape), weight
            )
            self._note(name, params, operands, value, times)
            results.append(value)
        self._flow(name, params, operands, results)
        return results

    def _call(
        self, name: str, params: Mapping[str, Any], inner: Any, equation: Any, operands: list[Value], times: int
    ) -> list[Value]:
        body = inner.jaxpr if hasattr(inner, "jaxpr") else inner
        if name == "scan":
            skip = params["num_consts"] + params["num_carry"]
            sliced = [v if i < skip else Value(v.shape[1:], v.dtype, v.labels[1:]) for i, v in enumerate(operands)]
            for whole, part in zip(operands[skip:], sliced[skip:], strict=True):
                self._op("call", (whole,), (part,))
            results = self.run(inner, sliced, times * int(params["length"]))
        elif name == "while":
            count = params["cond_nconsts"]
            results = self.run(inner, operands[count:], times)
        elif len(body.invars) == len(operands):
            results = self.run(inner, operands, times)
        else:
            results = self.run(inner, operands[len(operands) - len(body.invars) :], times)
        shapes = [(tuple(v.aval.shape), v.aval.dtype) for v in equation.outvars]
        # Results that only a loop's stacking reshaped get a new, unlabelled leading dimension.
        stacked = [
            r
            if r.shape == shape
            else Value(shape, dtype, ((None,) * len(shape) + r.labels)[-len(shape) :] if shape else ())
            for r, (shape, dtype) in zip(results, shapes, strict=True)
        ]
        for before, after in zip(results, stacked, strict=True):
            if after is not before:
                self._op("call", (before,), (after,))
        return stacked

    def _note(self, name: str, params: Mapping[str, Any], operands: list[Value], out: Value, times: int) -> None:
        """Write down what may need communication although it is no product."""
        if name == "name" and marked_axes(params["name"]) is not None:
            self.work.relabels.append(Relabel(operands[0], out, times))
        elif name == "dynamic_update_slice":
            self.work.relabels.append(replace(written(operands[0], operands[1]), times=times))
        elif name.startswith(("reduce_", "arg")) and "axes" in params and name != "reduce_precision":
            self.work.reductions.append(Reduction(operands[0], tuple(params["axes"]), out, times))
        else:
            self.work.relabels += given_up(operands, out, times)

    def _window(self, operand: Value, reaches: Reaches, times: int) -> Value:
        """The operand of an operation over windows, completed by what it needs of its neighbours."""
        self.work.windows.append(Window(operand, reaches, times))
        whole = replace(operand, weight=False)
        self._op("window", (operand,), (whole,), item=Window(operand, reaches))
        return whole

    def _product(self, product: Product, params: Mapping[str, Any]) -> None:
        """The flow of a product: operands whose dimensions lie in no order that it takes are copied first."""
        operands = [product.left, product.right]
        for side, operand in enumerate(operands):
            if must_be_copied(params, operand, product, side):
                operands[side] = self._copied(operand)
        flat = {id(v) for side, v in enumerate(operands) if is_flattened(params, product, side)}
        self._op("product", operands, (product.out,), item=replace(product, times=1), flat=flat)

    def _copied(self, operand: Value) -> Value:
        copy = replace(operand, weight=False)
        self._op("move", (operand,), (copy,), twice=True)
        return copy

    def _flow(self, name: str, params: Mapping[str, Any], operands: list[Value], results: list[Value]) -> None:
        """The flow of anything but a product."""
        if name == "name" and marked_axes(params["name"]) is not None:
            self._op("constraint", operands, results, item=Relabel(operands[0], results[0]))
        elif operands and len(results) == 1 and is_view(name, operands[0], results[0], params):
            self._kept.append(results[0])
            if id(operands[0]) in self._numbers:
                self._numbers[id(results[0])] = self._numbers[id(operands[0])]
        elif name.startswith(("reduce_", "arg")) and "axes" in params and name != "reduce_precision":
            rank, axes = len(operands[0].shape), params["axes"]
            small = all(operands[0].shape[d] <= FUSED_REDUCTION for d in axes)
            self._op("reduce", operands, results, fuses=small and rank - 1 in axes)
        elif kind_of(name) == "update" and self._numbers.get(id(operands[0])) in self._given:
            part = operands[1:2]
            if name == "dynamic_update_slice":
                item = written(operands[0], operands[1])
                self._op("constraint", part, (item.after,), item=item)
                part = [item.after]
            self._op("update", part, ())  # a donated input is written to where it is
            self._kept.append(results[0])
            self._numbers[id(results[0])] = self._numbers[id(operands[0])]
        else:
            kind = kind_of(name)
            whole = [v for v in operands if self._numbers.get(id(v), -1) not in self._spread and v.shape]
            read = sum(v.nbytes for v in operands)
            twice = kind != "costly" and (len(whole) <= 1 or read <= sum(v.nbytes for v in results))
            self._op(kind, operands, results, twice=twice)
            if name == "pad" and id(operands[0]) in self._numbers:
                self._padded[self._numbers[id(results[0])]] = self._numbers[id(operands[0])]
            if kind == "spread":
                self._spread.update(self._numbers[id(v)] for v in results)

    def _op(
        self,
        kind: Kind,
        operands: Sequence[Value],
        results: Sequence[Value],
        *,
        item: Product | Relabel | Window | None = None,
        twice: bool = False,
        fuses: bool = False,
        flat: Collection[int] = (),
    ) -> None:
        known = [(v, self._numbers[id(v)]) for v in operands if id(v) in self._numbers]
        inputs = tuple(number for _, number in known)
        reshaped = frozenset(number for v, number in known if v.shape != self._values[number].shape)
        flat_inputs = frozenset(number for v, number in known if id(v) in flat)
        outputs = tuple(map(self._number, results))
        self._ops.append(Op(kind, inputs, outputs, item, twice, fuses, reshaped, flat_inputs, bool(flat)))

    def _number(self, value: Value) -> int:
        self._kept.append(value)
        self._values.append(value)
        self._numbers[id(value)] = len(self._values) - 1
        return len(self._values) - 1


def _body(params: Mapping[str, Any]) -> Any:
    """The jaxpr that an equation calls; of several branches the first."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr", "body_jaxpr"):
        if key in params:
            return params[key]
    branches = params.get("branches")
    return branches[0] if branches else None
