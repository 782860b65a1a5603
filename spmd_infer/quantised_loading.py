"""Weights quantised on their way from a checkpoint to the devices, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import jax
from jax.sharding import Sharding

from spmd_infer.checkpoints import load_onto
from spmd_infer.models.dense import INT4
from spmd_infer.models.quantised import SCALE_END, WeightFormat
from spmd_infer.opening import OpenedModel


def load_weights(opened: OpenedModel, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Read a checkpoint's weights onto the devices, and quantise there those that are to be.

    A weight is quantised by the devices that hold it, as soon as they do, and its floats are let go of; scales are of
    whole rows, also where a row is spread over devices. So no more floats are held than those of one weight, and what
    the loader reads ahead.

    Args:
        opened: the checkpoint and its model.
        abstract: shape, dtype and sharding of each parameter, as ``load_onto`` takes them.

    Raises:
        CheckpointError: as for ``load_onto``.
    """
    if not opened.formats:
        return load_onto(opened.reader, {path: opened.table[path] for path in abstract}, abstract)
    stored = {path: _as_floats(opened, path, abstract[path]) for path in abstract if path in opened.table}

    def become(path: str, weight: jax.Array) -> dict[str, jax.Array]:
        weight_format = opened.formats.get(path)
        if weight_format is None:
            return {path: weight}
        targets = (abstract[path].sharding, abstract[path + SCALE_END].sharding)
        numbers, scale = jax.block_until_ready(_quantiser(weight_format, targets)(weight))
        return {path: numbers, path + SCALE_END: scale}

    table = {path: opened.table[path] for path in stored}
    loaded = load_onto(opened.reader, table, stored, become=become)
    return {path: loaded[path] for path in abstract}


def _as_floats(opened: OpenedModel, path: str, target: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """A parameter as it is read: floats in the checkpoint's dtype where it will be quantised."""
    weight_format = opened.formats.get(path)
    if weight_format is None:
        return target
    *lead, width = target.shape
    shape = (*lead, width * 2) if weight_format.kind == INT4 else target.shape
    info = opened.reader.tensors.get(opened.table[path].name)
    dtype = info.dtype if info is not None else opened.dtype  # the loader names it with all others that are missing
    return jax.ShapeDtypeStruct(shape, dtype, sharding=target.sharding)


@cache
def _quantiser(weight_format: WeightFormat, targets: tuple[Sharding, Sharding]) -> Callable[[jax.Array], Any]:
    compiled: Callable[[jax.Array], Any] = jax.jit(weight_format.quantise, out_shardings=targets)
    return compiled
