"""Rows of arrays through ``engine.infer``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import numpy.typing as npt

from spmd_infer.errors import BatchError
from spmd_infer.jobs.files import LONE
from spmd_infer.jobs.row_task import RowTask
from spmd_infer.jobs.rows import Answer, Row

if TYPE_CHECKING:
    from spmd_infer.engine import Engine

Arrays = dict[str, npt.NDArray[Any]]


class InferRows(RowTask):
    """Arrays in, arrays out: a row's inputs by name, from files of arrays or as nested lists of JSON."""

    counts = "numbers"
    sizes = (1 << 20, 1 << 24)
    sizes_elsewhere = (1 << 24, 1 << 28)

    def costs(self, rows: Sequence[Row]) -> list[int]:
        """Numbers in the inputs."""
        found = []
        for row in rows:
            try:
                found.append(0 if row.problem else sum(array.size for array in _arrays(row).values()))
            except BatchError:
                found.append(0)
        return found

    def run(self, engine: Engine, rows: Sequence[Row]) -> list[Answer]:
        """Answer rows that can be read; neighbours of the same shapes are run together."""
        named = [self._named(engine, row) for row in rows]
        answers: list[Answer] = []
        for batch in _alike(named):
            columns = flatten(engine.infer(batch))
            count = len(next(iter(batch.values())))
            answers += [{name: _storable(column[row]) for name, column in columns.items()} for row in range(count)]
        return answers

    def _named(self, engine: Engine, row: Row) -> Arrays:
        arrays = _arrays(row)
        if LONE not in arrays:
            return arrays
        return {only_input(engine, f"row {row.index}"): arrays[LONE]}


def flatten(tree: Any) -> Arrays:
    """The arrays of a result by the path that leads to them; ``output`` where the result is one array."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator=".") or "output": np.asarray(leaf) for path, leaf in leaves
    }


def only_input(engine: Engine, what: str) -> str:
    """The name of the one input that a zoo model needs.

    Args:
        engine: the model.
        what: names what holds one array without a name.

    Raises:
        BatchError: it needs several.
    """
    assert engine.family is not None
    assert engine.config is not None
    inputs = engine.family.input_spec(engine.config)
    needed = [name for name, spec in inputs.items() if spec.required]
    if len(needed) != 1:
        raise BatchError(
            f"{what} holds one array, but the model needs {len(needed)} inputs: {', '.join(needed)}; "
            "give a .npz file with an array of each name"
        )
    return needed[0]


def _arrays(row: Row) -> Arrays:
    if not isinstance(row.value, Mapping):
        raise BatchError(f"row {row.index} is a {type(row.value).__name__}, expected inputs by name")
    found: Arrays = {}
    for name, value in row.value.items():
        if name == "id" and isinstance(value, str | int):
            continue
        try:
            found[name] = np.asarray(value)
        except ValueError as error:
            raise BatchError(f"row {row.index}, input {name!r} is ragged: {error}") from error
    return found


def _alike(rows: Sequence[Arrays]) -> Iterator[Arrays]:
    """Neighbours of the same names, shapes and dtypes, stacked."""

    def kind(arrays: Arrays) -> list[tuple[str, tuple[int, ...], str]]:
        return sorted((name, array.shape, array.dtype.str) for name, array in arrays.items())

    for _, group in groupby(rows, key=kind):
        members = list(group)
        yield {name: np.stack([arrays[name] for arrays in members]) for name in members[0]}


def _storable(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """As float32 what neither JSON nor Arrow knows, such as bfloat16."""
    return array.astype(np.float32) if array.dtype.kind == "V" or array.dtype.name == "bfloat16" else array
