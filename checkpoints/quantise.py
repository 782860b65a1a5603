"""Weights as small numbers with scales, so that a checkpoint takes a half to an eighth of its bytes.

``int8``: one scale for each index of the leading dimensions (each output channel of an ``[out, in]`` weight); numbers
from -127 to 127. ``fp8``: the same with float8 (e4m3). ``int4``: one scale for each group of neighbours along the last
dimension; two numbers from -7 to 7 in a byte, each stored with 8 added, the first in the low half.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from spmd_infer.checkpoints.boxes import Box, box_shape

if TYPE_CHECKING:
    from spmd_infer.checkpoints.manifest import ArrayEntry, QuantisedEntry

KINDS = ("int8", "fp8", "int4")
DEFAULT_GROUP = 64
VALUES_END, SCALES_END = ".quantised", ".scales"

_STORED = {"int8": "int8", "fp8": "float8_e4m3fn", "int4": "uint8"}
_LARGEST = {"int8": 127.0, "fp8": 448.0, "int4": 7.0}

Array = npt.NDArray[Any]


def worth_quantising(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> bool:
    """Whether a tensor is one of those that quantisation is for: a matrix of floats that multiplies activations.

    Embeddings, which are looked up and often tied to the output, norms, biases and small matrices keep their dtype.
    """
    floats = dtype.kind == "f" or dtype == ml_dtypes.bfloat16
    if not floats or len(shape) != 2 or min(shape) < 32:
        return False
    return name.endswith(".weight") and "embed" not in name


def stored_shapes(kind: str, shape: tuple[int, ...], group: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the two arrays that a quantised tensor of ``shape`` is stored as."""
    if kind == "int4":
        return (*shape[:-1], shape[-1] // 2), (*shape[:-1], shape[-1] // group)
    return shape, (*shape[:-1], 1)


def stored_dtype(kind: str) -> str:
    """Name of the dtype of the small numbers."""
    return _STORED[kind]


def fitting_group(kind: str, width: int, group: int) -> int:
    """The group size for rows of ``width`` numbers: the largest even divisor of it up to ``group``; 0 where none is."""
    if kind != "int4":
        return 0
    return next((size for size in range(min(group, width), 1, -1) if width % size == 0 and size % 2 == 0), 0)


def stored_problem(entry: QuantisedEntry, values: ArrayEntry, scales: ArrayEntry) -> str | None:
    """Why a manifest's quantised tensor cannot be; None where it can."""
    if entry.kind not in KINDS:
        return f"is of unknown kind {entry.kind!r}; known are {', '.join(KINDS)}"
    if not entry.shape:
        return "has no dimensions"
    width, group = entry.shape[-1], entry.group
    if entry.kind == "int4" and (group < 2 or group % 2 or width % group):
        return f"has groups of {group} in rows of {width}"
    wanted = stored_shapes(entry.kind, entry.shape, group)
    if (values.shape, scales.shape) != wanted or values.dtype != stored_dtype(entry.kind) or scales.dtype != "float32":
        return (
            f"of shape {list(entry.shape)} has values {values.dtype}{list(values.shape)} and scales "
            f"{scales.dtype}{list(scales.shape)}"
        )
    return None


def quantise(kind: str, tensor: Array, group: int = 0) -> tuple[Array, Array]:
    """A tensor as small numbers and float32 scales.

    Args:
        kind: one of ``KINDS``.
        tensor: floats ``[..., width]``.
        group: for ``int4``, an even divisor of the width.

    Returns:
        Values and scales, shaped as ``stored_shapes`` says.
    """
    values = np.asarray(tensor, np.float32)
    if kind == "int4":
        values = values.reshape(*values.shape[:-1], values.shape[-1] // group, group)
    scales = np.abs(values).max(axis=-1, keepdims=True) / np.float32(_LARGEST[kind])
    safe = np.where(scales > 0, scales, np.float32(1))
    scaled = values / safe
    if kind == "fp8":
        return scaled.astype(ml_dtypes.float8_e4m3fn), safe
    rounded = np.rint(scaled, out=scaled).astype(np.int8)
    if kind == "int8":
        return rounded, safe
    flat = (rounded + np.int8(8)).astype(np.uint8).reshape(*tensor.shape)
    return flat[..., ::2] | (flat[..., 1::2] << 4), safe[..., 0]


def stored_boxes(kind: str, box: Box, group: int) -> tuple[Box, Box]:
    """Which boxes of values and scales a box of the tensor needs."""
    start, stop = box[-1]
    if kind == "int4":
        first, last = start // group, -(-stop // group)
        return (*box[:-1], (first * group // 2, last * group // 2)), (*box[:-1], (first, last))
    return box, (*box[:-1], (0, 1))


def dequantise(kind: str, values: Array, scales: Array, box: Box, group: int, out: Array) -> None:
    """The tensor's values in a box, from what ``stored_boxes`` names.

    Args:
        kind: one of ``KINDS``.
        values: the stored small numbers.
        scales: their scales.
        box: which box of the tensor.
        group: numbers that share a scale, for ``int4``.
        out: where they are written, of the box's shape.
    """
    if kind != "int4":
        np.multiply(values.astype(np.float32), scales, out=out, casting="unsafe")
        return
    lead = box_shape(box)[:-1]
    numbers = np.empty((*values.shape, 2), np.int8)
    numbers[..., 0] = (values & 15).astype(np.int8) - 8
    numbers[..., 1] = (values >> 4).astype(np.int8) - 8
    grouped = numbers.reshape(*lead, -1, group).astype(np.float32) * scales[..., None]
    start, stop = box[-1]
    skip = start - start // group * group
    np.copyto(out, grouped.reshape(*lead, -1)[..., skip : skip + stop - start], casting="unsafe")
