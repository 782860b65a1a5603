"""What a model takes and gives: checking a batch against it, and saying what was expected when it does not match."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import jax
import numpy as np
from jax.tree_util import keystr

from spmd_infer.axes import BATCH
from spmd_infer.errors import BatchError
from spmd_infer.tensors import InputSpec

_KINDS = {"b": "bool", "i": "int", "u": "int", "f": "float", "V": "float", "c": "complex"}


@dataclass(frozen=True)
class CheckedBatch:
    """A batch that matches the signature.

    Attributes:
        leaves: its arrays, in the order of ``treedef``, in the dtypes that the model expects.
        treedef: its structure.
        specs: the spec of each leaf.
        rows: the number of rows, the size of every batch dimension.
    """

    leaves: list[Any]
    treedef: jax.tree_util.PyTreeDef
    specs: list[InputSpec]
    rows: int


class Signature:
    """The inputs of a model: a pytree of ``InputSpec``."""

    def __init__(self, inputs: Any) -> None:
        self.inputs = inputs
        leaves, self._treedef = jax.tree_util.tree_flatten(inputs)
        if not leaves:
            raise BatchError("the model's inputs are described by an empty tree; give at least one InputSpec")
        if not any(BATCH in spec.shape for spec in leaves):
            raise BatchError(f"none of the inputs has a 'batch' dimension: {', '.join(map(str, leaves))}")
        self._specs: dict[Any, list[InputSpec]] = {self._treedef: leaves}

    @classmethod
    def from_example(cls, batch: Any) -> Signature:
        """Take the first dimension of every array as the batch, and all other dimensions as fixed."""

        def spec(path: Any, leaf: Any) -> InputSpec:
            array = _as_array(leaf, _place(path))
            dtype = jax.dtypes.canonicalize_dtype(array.dtype)
            if array.ndim == 0:
                return InputSpec((), dtype)
            return InputSpec((BATCH, *array.shape[1:]), dtype)

        batch = arrays_from_lists(batch)
        if not jax.tree_util.tree_leaves(batch):
            raise BatchError(f"the batch is empty: {type(batch).__name__} without arrays")
        return cls(jax.tree_util.tree_map_with_path(spec, batch))

    def __str__(self) -> str:
        leaves, _ = jax.tree_util.tree_flatten_with_path(self.inputs)
        return ", ".join(f"{_place(path)}: {spec}{'' if spec.required else ' (optional)'}" for path, spec in leaves)

    def check(self, batch: Any) -> CheckedBatch:
        """Match a batch with the signature.

        Raises:
            BatchError: keys, structure, rank, dtype or a size are not what the model takes; rows differ between inputs,
                or there are none. The message says what was expected and what came.
        """
        leaves, treedef = jax.tree_util.tree_flatten(batch)
        specs = self._specs.get(treedef)
        if specs is None:
            batch = arrays_from_lists(batch)
            leaves, treedef = jax.tree_util.tree_flatten(batch)
            specs = self._specs.get(treedef) or self._match_structure(batch, treedef)
        checked: list[Any] = []
        sizes: dict[str, int] = {}
        for position, (leaf, spec) in enumerate(zip(leaves, specs, strict=True)):
            if not isinstance(leaf, np.ndarray | jax.Array):
                leaf = _as_array(leaf, self._name(batch, position))
            if leaf.dtype != spec.dtype:
                leaf = self._cast(leaf, spec, self._name(batch, position))
            if leaf.shape != spec.shape:
                self._check_shape(leaf, spec, sizes, batch, position)
            checked.append(leaf)
        rows = sizes[BATCH]
        if rows == 0:
            raise BatchError(f"the batch has 0 rows; the model takes {self}")
        return CheckedBatch(checked, treedef, specs, rows)

    def blank_batches(self, rows: int, sizes: Mapping[str, int | Sequence[int]]) -> list[Any]:
        """Batches of zeros with the required inputs, one for each combination of the given sizes.

        Raises:
            BatchError: a varying dimension besides the batch has no size.
        """
        wanted = self.inputs
        if isinstance(wanted, Mapping):
            wanted = {key: spec for key, spec in wanted.items() if _required(spec)}
        leaves, treedef = jax.tree_util.tree_flatten(wanted)
        names = sorted({d for spec in leaves for d in spec.shape if isinstance(d, str) and d != BATCH})
        unknown = [name for name in names if name not in sizes]
        if unknown:
            raise BatchError(
                f"warm-up needs sizes for {unknown}: warmup({{{unknown[0]!r}: 128}}); the model takes {self}"
            )
        choices = [np.atleast_1d(np.asarray(sizes[name])).tolist() for name in names]
        batches = []
        for chosen in product(*choices):
            size = {BATCH: rows, **dict(zip(names, chosen, strict=True))}
            zeros = [
                np.zeros([size[d] if isinstance(d, str) else d for d in spec.shape], spec.dtype) for spec in leaves
            ]
            batches.append(jax.tree_util.tree_unflatten(treedef, zeros))
        return batches

    def _match_structure(self, batch: Any, treedef: jax.tree_util.PyTreeDef) -> list[InputSpec]:
        if not jax.tree_util.tree_leaves(batch):
            raise BatchError(f"the batch is empty; the model takes {self}")
        if isinstance(self.inputs, Mapping) and isinstance(batch, Mapping):
            missing = [key for key, spec in self.inputs.items() if key not in batch and _required(spec)]
            unknown = [key for key in batch if key not in self.inputs]
            if missing or unknown:
                parts = [f"missing {missing}"] if missing else []
                parts += [f"unknown {unknown}"] if unknown else []
                raise BatchError(f"wrong keys in the batch: {', '.join(parts)}; the model takes {self}")
            chosen = {key: self.inputs[key] for key in batch}
            leaves, expected = jax.tree_util.tree_flatten(chosen)
            specs: list[InputSpec] = list(leaves)
            if expected == treedef:
                self._specs[treedef] = specs
                return specs
        raise BatchError(f"the batch has structure {treedef}, expected {self._treedef}; the model takes {self}")

    def _name(self, batch: Any, position: int) -> str:
        return _place(jax.tree_util.tree_flatten_with_path(batch)[0][position][0])

    def _cast(self, leaf: Any, spec: InputSpec, name: str) -> Any:
        """Narrow to the expected dtype of the same kind; anything else is a mistake worth naming."""
        have, want = np.dtype(leaf.dtype), np.dtype(spec.dtype)
        if have.kind not in _KINDS or _KINDS[have.kind] != _KINDS[want.kind]:
            raise BatchError(f"input {name}: expected dtype {want.name}, got {have.name}; the model takes {self}")
        if want.kind in "iu" and leaf.size:
            low, high = int(leaf.min()), int(leaf.max())
            bounds = np.iinfo(want)
            if low < bounds.min or high > bounds.max:
                raise BatchError(
                    f"input {name}: values {low} to {high} of dtype {have.name} do not fit {want.name} "
                    f"({bounds.min} to {bounds.max})"
                )
        return leaf.astype(want)

    def _check_shape(self, leaf: Any, spec: InputSpec, sizes: dict[str, int], batch: Any, position: int) -> None:
        def wrong(why: str) -> BatchError:
            name = self._name(batch, position)
            return BatchError(f"input {name}: expected {spec}, got {leaf.dtype.name}{list(leaf.shape)}: {why}")

        if leaf.ndim != len(spec.shape):
            raise wrong(f"{leaf.ndim} dimensions where {len(spec.shape)} were expected")
        for dimension, (have, want) in enumerate(zip(leaf.shape, spec.shape, strict=True)):
            if isinstance(want, str):
                if sizes.setdefault(want, have) != have:
                    raise wrong(f"{want!r} is {have} here but {sizes[want]} in an earlier input")
                if have == 0 and want != BATCH:
                    raise wrong(f"{want!r} is 0")
            elif have != want:
                raise wrong(
                    f"dimension {dimension} is {have}, not {want}"
                    + ("; name it in inputs=InputSpec(…) if it varies" if dimension else "")
                )


def arrays_from_lists(batch: Any) -> Any:
    """The batch with each (nested) list of plain numbers made into one array.

    Raises:
        BatchError: the rows of such a list have different lengths.
    """

    def numbers(node: Any) -> bool:
        return isinstance(node, list) and all(
            isinstance(leaf, int | float | bool) for leaf in jax.tree_util.tree_leaves(node)
        )

    return jax.tree_util.tree_map_with_path(lambda path, leaf: _as_array(leaf, _place(path)), batch, is_leaf=numbers)


def _required(spec: Any) -> bool:
    return any(leaf.required for leaf in jax.tree_util.tree_leaves(spec))


def _place(path: Any) -> str:
    return repr(keystr(path, simple=True, separator=".") or "batch")


def _as_array(leaf: Any, name: str) -> Any:
    if isinstance(leaf, np.ndarray | jax.Array):
        array: Any = leaf
    else:
        try:
            array = np.asarray(leaf)
        except ValueError as error:
            raise BatchError(f"input {name} is ragged: {error}") from error
    if array.dtype.kind not in _KINDS:
        raise BatchError(f"input {name} has dtype {array.dtype}; expected an array of numbers")
    return array
