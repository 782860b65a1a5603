"""Query, key and value projections as one tensor or as three.

Fused tensors hold the rows of the queries, then those of the keys, then those of the values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from spmd_infer.checkpoints.boxes import Box, as_slices, box_shape
from spmd_infer.checkpoints.derived import Derived, DerivedReader, same
from spmd_infer.checkpoints.reader import Reader, TensorInfo
from spmd_infer.errors import CheckpointError

# (query, key, value) and the fused name, as the families of checkpoints call them.
_NAMINGS = (
    (("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    (("query", "key", "value"), "query_key_value"),
    (("attn_q", "attn_k", "attn_v"), "attn_qkv"),
)
Array = npt.NDArray[Any]


def fuse_qkv(base: Reader) -> DerivedReader:
    """A checkpoint whose three projections of each layer are one tensor.

    Raises:
        CheckpointError: no tensors are three such projections.
    """
    tensors: dict[str, Derived] = {}
    fused = 0
    for name in base.tensors:
        match = _match(name, {parts[0]: (parts, joined) for parts, joined in _NAMINGS})
        siblings = [name] if match is None else [f"{match[0]}{part}{match[2]}" for part in match[1][0]]
        if match is not None and all(sibling in base.tensors for sibling in siblings):
            parts = [base.tensors[sibling] for sibling in siblings]
            joined = f"{match[0]}{match[1][1]}{match[2]}"
            tensors[joined] = _joined(base, parts, joined)
            fused += 1
        elif not _is_member(name, base):
            tensors[name] = same(base, name)
    if not fused:
        raise CheckpointError(
            f"{base.path}: no three tensors are the query, key and value projection of one layer; looked for "
            f"{', '.join('/'.join(parts) for parts, _ in _NAMINGS)}"
        )
    return DerivedReader(base, tensors)


def split_qkv(base: Reader) -> DerivedReader:
    """A checkpoint whose fused projections are three tensors each; the configuration says how many heads each has.

    Raises:
        CheckpointError: no tensor is a fused projection, or its rows are not those of the configuration's heads.
    """
    heads = base.config.get("num_attention_heads")
    kv_heads = base.config.get("num_key_value_heads") or heads
    tensors: dict[str, Derived] = {}
    split = 0
    for name, info in base.tensors.items():
        match = _match(name, {joined: (parts, joined) for parts, joined in _NAMINGS})
        if match is None:
            tensors[name] = same(base, name)
            continue
        if not isinstance(heads, int) or not isinstance(kv_heads, int) or heads < 1 or kv_heads < 1:
            raise CheckpointError(f"{base.path}: its configuration does not say how many heads {name!r} is made of")
        unit, rest = divmod(info.shape[0] if info.shape else 0, heads + 2 * kv_heads)
        if rest or not unit:
            raise CheckpointError(f"{info}: its rows are not those of {heads} query and 2 × {kv_heads} key heads")
        begin = 0
        for part, count in zip(match[1][0], (heads, kv_heads, kv_heads), strict=True):
            own, rows = f"{match[0]}{part}{match[2]}", count * unit
            result = _described(info, own, (rows, *info.shape[1:]))
            tensors[own] = Derived(result, partial(_rows, base, name, begin))
            begin += rows
        split += 1
    if not split:
        raise CheckpointError(
            f"{base.path}: no tensor is a fused projection; looked for {', '.join(joined for _, joined in _NAMINGS)}"
        )
    return DerivedReader(base, tensors)


def fused_axes(axes: Mapping[str, tuple[str | None, ...]]) -> dict[str, tuple[str | None, ...]]:
    """Logical axes with those of the fused tensors added: the queries'."""
    result = dict(axes)
    for name, named in axes.items():
        match = _match(name, {parts[0]: (parts, joined) for parts, joined in _NAMINGS})
        if match is not None:
            result[f"{match[0]}{match[1][1]}{match[2]}"] = named
    return result


def _match(
    name: str, known: Mapping[str, tuple[tuple[str, str, str], str]]
) -> tuple[str, tuple[tuple[str, str, str], str], str] | None:
    """What stands before and after one of the names, as a whole word between dots."""
    found = re.fullmatch(r"(.*\.|)([^.]+)(\.(?:weight|bias))", name)
    if found is None or found.group(2) not in known:
        return None
    return found.group(1), known[found.group(2)], found.group(3)


def _is_member(name: str, base: Reader) -> bool:
    """Whether a tensor is a key or value projection that a fused tensor takes in."""
    for parts, _ in _NAMINGS:
        for part in parts[1:]:
            match = _match(name, {part: (parts, "")})
            if match is not None:
                return all(f"{match[0]}{sibling}{match[2]}" in base.tensors for sibling in parts)
    return False


def _described(info: TensorInfo, name: str, shape: tuple[int, ...]) -> TensorInfo:
    count = int(np.prod(shape, dtype=np.int64))
    return replace(info, name=name, shape=shape, nbytes=info.nbytes * count // max(1, info.size))


def _joined(base: Reader, parts: list[TensorInfo], name: str) -> Derived:
    rows = [part.shape[0] for part in parts]
    first = parts[0]
    if any(part.shape[1:] != first.shape[1:] or part.dtype != first.dtype for part in parts):
        raise CheckpointError(f"{base.path}: {', '.join(map(str, parts))} do not fit together")
    info = replace(first, name=name, shape=(sum(rows), *first.shape[1:]), nbytes=sum(part.nbytes for part in parts))

    def read(box: Box) -> Array:
        out = np.empty(box_shape(box), first.dtype)
        (start, stop), begin = box[0], 0
        for part in parts:
            low, high = max(start, begin), min(stop, begin + part.shape[0])
            if low < high:
                wanted = ((low - begin, high - begin), *box[1:])
                out[low - start : high - start] = base.read(part.name, as_slices(wanted))
            begin += part.shape[0]
        return out

    return Derived(info, read)


def _rows(base: Reader, name: str, begin: int, box: Box) -> Array:
    (start, stop), *rest = box
    return base.read(name, as_slices(((start + begin, stop + begin), *rest)))
