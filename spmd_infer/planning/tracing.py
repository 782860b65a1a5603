"""Reading a model's work off its jaxpr. Nothing is compiled and no device is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var

from spmd_infer.axes import BATCH, marked_axes, recorded_constraints
from spmd_infer.functional import ModelFunction
from spmd_infer.planning.work import Labels, Product, Reduction, Relabel, Value, Work, given_up, merged, weight_label

_VIEWS = frozenset(
    {"reshape", "squeeze", "broadcast_in_dim", "convert_element_type", "copy", "stop_gradient", "iota", "name"}
)
_UPDATES = frozenset({"scatter", "dynamic_update_slice"})  # in place: what they update is not used again
_ALIASES = _VIEWS | _UPDATES
_SAME_VALUES = frozenset({"reshape", "squeeze", "convert_element_type", "copy", "transpose"})


def compute_dtype(dtype: Any) -> Any:
    """The dtype that a model with weights of this dtype computes in: bfloat16 for weights of one byte."""
    return np.dtype(jnp.bfloat16) if jnp.dtype(dtype).itemsize == 1 else dtype


def read_work(model: ModelFunction, batch: Any, batch_axes: Sequence[Labels]) -> Work:
    """Trace a model on abstract inputs and list its work.

    Args:
        model: the model.
        batch: a pytree of ``jax.ShapeDtypeStruct``.
        batch_axes: the logical axes of each of its leaves.
    """
    abstract = {path: jax.ShapeDtypeStruct(p.shape, compute_dtype(p.dtype)) for path, p in model.params.items()}
    with recorded_constraints():
        closed = jax.make_jaxpr(model)(abstract, batch)
    paths = sorted(abstract)  # the order in which JAX flattens a dict
    labels: list[Labels] = [
        model.axes.get(path) or tuple(weight_label(path, d) for d in range(len(abstract[path].shape))) for path in paths
    ]
    labels += list(batch_axes)
    reader = _Reader()
    dtypes = [model.params[path].dtype for path in paths]
    dtypes += [var.aval.dtype for var in closed.jaxpr.invars[len(paths) :]]
    values = [
        Value(tuple(var.aval.shape), dtype, tuple(names), weight=position < len(paths))
        for position, (var, dtype, names) in enumerate(zip(closed.jaxpr.invars, dtypes, labels, strict=True))
    ]
    outputs = reader.run(closed, values, times=1)
    reader.work.inputs = values[len(paths) :]
    reader.close(values, outputs)
    return reader.work


class _Reader:
    """Walks a jaxpr once, following calls into their bodies."""

    def __init__(self) -> None:
        self.work = Work()
        self._clock = 0
        self._born: dict[int, tuple[Value, int]] = {}
        self._used: dict[int, int] = {}
        self._source: dict[int, int] = {}
        self._views: list[Value] = []  # kept, so that no id is used twice

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
            self._clock += 1
            operands = [look(atom) for atom in equation.invars]
            for operand in operands:
                self._use(operand)
            results = self._apply(equation, operands, times)
            known.update(zip(equation.outvars, results, strict=True))
        return [look(atom) for atom in jaxpr.outvars]

    def close(self, inputs: Sequence[Value], outputs: Sequence[Value]) -> None:
        """Write down how long each value lived, and the results that are not inputs updated in place."""
        given = {id(value) for value in inputs}
        results = {self._source.get(id(value), id(value)) for value in outputs}
        self.work.outputs = [v for v in outputs if self._source.get(id(v), id(v)) not in given]
        self.work.products = merged(self.work.products)
        self.work.reductions = merged(self.work.reductions)
        self.work.relabels = merged(self.work.relabels)
        for identity, (value, first) in self._born.items():
            if identity not in results:
                self.work.lives.append((value, first, self._used.get(identity, first)))

    def _apply(self, equation: Any, operands: list[Value], times: int) -> list[Value]:
        name, params = equation.primitive.name, equation.params
        inner = _body(params)
        if inner is not None:
            return self._call(name, params, inner, equation, operands, times)
        outs = [(tuple(v.aval.shape), v.aval.dtype) for v in equation.outvars if hasattr(v.aval, "shape")]
        if len(outs) != len(equation.outvars):
            return [Value((), "float32", ()) for _ in equation.outvars]
        if name in _PRODUCTS:
            shape, dtype = outs[0]
            product = _PRODUCTS[name](params, operands, shape, dtype, times)
            self.work.products.append(product)
            return [self._birth(product.out)]
        results = []
        for shape, dtype in outs:
            weight = name in _SAME_VALUES and bool(operands) and operands[0].weight
            value = Value(shape, operands[0].dtype if weight else dtype, _labels(name, params, operands, shape), weight)
            self._note(name, params, operands, value, times)
            results.append(self._view(operands, value) if name in _ALIASES else self._birth(value))
        return results

    def _call(
        self, name: str, params: Mapping[str, Any], inner: Any, equation: Any, operands: list[Value], times: int
    ) -> list[Value]:
        body = inner.jaxpr if hasattr(inner, "jaxpr") else inner
        if name == "scan":
            skip = params["num_consts"] + params["num_carry"]
            sliced = [v if i < skip else Value(v.shape[1:], v.dtype, v.labels[1:]) for i, v in enumerate(operands)]
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
        return [
            r
            if r.shape == shape
            else self._birth(Value(shape, dtype, ((None,) * len(shape) + r.labels)[-len(shape) :] if shape else ()))
            for r, (shape, dtype) in zip(results, shapes, strict=True)
        ]

    def _note(self, name: str, params: Mapping[str, Any], operands: list[Value], out: Value, times: int) -> None:
        """Write down what may need communication although it is no product."""
        if name == "name" and marked_axes(params["name"]) is not None:
            self.work.relabels.append(Relabel(operands[0], out, times))
        elif name.startswith(("reduce_", "arg")) and "axes" in params and name != "reduce_precision":
            self.work.reductions.append(Reduction(operands[0], tuple(params["axes"]), out, times))
        else:
            self.work.relabels += given_up(operands, out, times)

    def _birth(self, value: Value) -> Value:
        self._born[id(value)] = (value, self._clock)
        return value

    def _view(self, operands: list[Value], view: Value) -> Value:
        """A view takes no memory, and keeps what it views alive: what uses the one uses the other."""
        self._views.append(view)
        if operands:
            self._source[id(view)] = self._source.get(id(operands[0]), id(operands[0]))
        return view

    def _use(self, value: Value) -> None:
        self._used[self._source.get(id(value), id(value))] = self._clock


def _body(params: Mapping[str, Any]) -> Any:
    """The jaxpr that an equation calls; of several branches the first."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr", "body_jaxpr"):
        if key in params:
            return params[key]
    branches = params.get("branches")
    return branches[0] if branches else None


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
        right_batch = left_batch
    return Product(flops, left, right, out, pairs, times, batch_right=tuple(right_batch))


def _conv(params: Mapping[str, Any], operands: list[Value], shape: tuple[int, ...], dtype: Any, times: int) -> Product:
    left, right = operands
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    labels: list[str | None] = [None] * len(shape)
    for position, (source, target) in enumerate(zip(numbers.lhs_spec, numbers.out_spec, strict=True)):
        labels[target] = left.labels[source] if position != 1 else right.labels[numbers.rhs_spec[0]]
    taps = prod(right.shape[d] for d in numbers.rhs_spec[1:])
    pairs = ((numbers.lhs_spec[1], numbers.rhs_spec[1]),) if groups == 1 else ()
    halos = []
    for dimension, window, stride, (before, _) in zip(
        numbers.lhs_spec[2:],
        (right.shape[d] for d in numbers.rhs_spec[2:]),
        params["window_strides"],
        params["padding"],
        strict=True,
    ):
        halos.append((dimension, before, max(0, window - stride - before)))
    out = Value(shape, dtype, tuple(labels))
    return Product(2.0 * prod(shape) * taps, left, right, out, pairs, times, halos=tuple(halos))


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


_PRODUCTS = {"dot_general": _dot, "conv_general_dilated": _conv, "gather": _gather}


def _labels(name: str, params: Mapping[str, Any], operands: list[Value], shape: tuple[int, ...]) -> Labels:
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
