"""One matrix product for weights of every kind: ``x @ weight.T``, the weight ``[out, in]`` as checkpoints lay it.

What the product computes with follows from the weight's dtype:

* floats: operands in the weight's dtype, sums in float32. (A bfloat16 *result* is many times slower on CPU.)
* int8: each row of ``x`` is rounded to int8 by a scale of its own; the sums are exact integers (int32), so the result
  is the same however the summed dimension is split over devices, and whichever instructions add them up
  (``spmd_infer.models.unsigned_product``). The price of that is one more all-reduce, of the rows'
  largest values.
* float8 (e4m3): rows of ``x`` likewise become float8. GPUs that multiply float8 get the float8 operands as they are;
  elsewhere the same values are multiplied in bfloat16, which holds each of them exactly.
* uint8: two numbers of four bits in a byte, one scale for each group of neighbours; they are widened within the
  product, and ``x`` is multiplied in bfloat16.

Weights become int8, float8 and packed ones, with their scales, by ``quantise_weight``, in the numbers that
``spmd_infer.checkpoints.quantise`` stores. ``rotate`` first spreads what is large in single columns over a block of
them, so that rounding costs less (see ``spmd_infer.models.quantised``).
"""

from __future__ import annotations

from functools import cache
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from spmd_infer.axes import BATCH, SEQ, current_device, current_platform, current_scope
from spmd_infer.errors import ModelError
from spmd_infer.models.unsigned_product import signed_by_unsigned, suits_unsigned

INT8, FP8, INT4 = "int8", "fp8", "int4"
DTYPES = {INT8: jnp.dtype(jnp.int8), FP8: jnp.dtype(jnp.float8_e4m3fn), INT4: jnp.dtype(jnp.uint8)}
_LARGEST = {INT8: 127.0, FP8: 448.0, INT4: 7.0}

_SINGLE_ROW = 4
"""XLA on CPU multiplies a single row by int8 or bfloat16 weights in a scalar loop, 16 to 30 times slower than a few
rows at once; from two rows on more of them bring nothing."""


def dense(x: jax.Array, weight: jax.Array, scale: jax.Array | None = None) -> jax.Array:
    """``x @ weight.T`` in float32.

    Args:
        x: floats ``[..., in]``.
        weight: ``[out, in]`` floats, int8 or float8_e4m3fn; or uint8 ``[out, in / 2]``, two numbers in each.
        scale: what the weight's numbers are to be multiplied by, float32: ``[out]`` for int8 and float8,
            ``[out, in / group]`` for uint8; None for floats.

    Returns:
        Float32 ``[..., out]``.

    Raises:
        ModelError: weight, scale and ``x`` do not fit together.
    """
    kind = next((kind for kind, dtype in DTYPES.items() if weight.dtype == dtype), None)
    _check(x, weight, scale, kind)
    if scale is None:
        return _product(x.astype(weight.dtype), weight, jnp.float32)
    if kind == INT8:
        numbers, row_scale = quantise_rows(x, INT8)
        return _int8_product(numbers, weight).astype(jnp.float32) * row_scale * scale
    if kind == FP8:
        numbers, row_scale = quantise_rows(x, FP8)
        if not _multiplies_float8():
            numbers, weight = numbers.astype(jnp.bfloat16), weight.astype(jnp.bfloat16)
        return _product(numbers, weight, jnp.float32) * row_scale * scale
    return _packed_product(x, weight, scale)


def quantise_rows(x: jax.Array, kind: str) -> tuple[jax.Array, jax.Array]:
    """Each row of ``x [..., in]`` as small numbers, and the float32 scales ``[..., 1]`` that belong to them.

    Args:
        x: floats.
        kind: ``int8`` or ``fp8``.
    """
    values = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(values), axis=-1, keepdims=True)
    safe = jnp.where(largest == 0, 1.0, largest)
    scaled = values * (_LARGEST[kind] / safe)
    numbers = jnp.round(scaled) if kind == INT8 else jnp.clip(scaled, -_LARGEST[FP8], _LARGEST[FP8])
    return numbers.astype(DTYPES[kind]), safe * (1 / _LARGEST[kind])


def quantise_weight(weight: jax.Array, kind: str, group: int = 0) -> tuple[jax.Array, jax.Array]:
    """A weight as small numbers with scales.

    Args:
        weight: floats ``[out, in]``.
        kind: ``int8``, ``fp8`` or ``int4``.
        group: for ``int4``, how many neighbours share a scale; even, and a divisor of ``in``.

    Returns:
        Numbers and scales as ``dense`` takes them.
    """
    values = weight.astype(jnp.float32)
    if kind == INT4:
        values = values.reshape(values.shape[0], -1, group)  # [out, groups, group]
    largest = jnp.max(jnp.abs(values), axis=-1, keepdims=True)
    scale = jnp.where(largest == 0, 1.0, largest / _LARGEST[kind])
    scaled = values / scale
    if kind != INT4:
        return (jnp.round(scaled) if kind == INT8 else scaled).astype(DTYPES[kind]), scale[:, 0]
    halves = (jnp.round(scaled).astype(jnp.int8) + 8).astype(jnp.uint8).reshape(weight.shape[0], -1, 2)
    return halves[..., 0] | (halves[..., 1] << 4), scale[..., 0]


def dequantise(numbers: jax.Array, scale: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """The values ``[out, in]`` (or of some of their rows) that ``quantise_weight`` made numbers and scales of."""
    if numbers.dtype != DTYPES[INT4]:
        return (numbers.astype(jnp.float32) * scale[..., None]).astype(dtype)
    halves = jnp.stack(_unpacked(numbers), axis=-1)  # [..., in / 2, 2]
    values = halves.reshape(*scale.shape, -1).astype(jnp.float32) * scale[..., None]
    return values.reshape(*numbers.shape[:-1], -1).astype(dtype)


def rotate(x: jax.Array, block: int) -> jax.Array:
    """Multiply each block of neighbours along the last dimension by an orthogonal matrix that is its own inverse.

    Rotating both ``x`` and the weight leaves ``x @ weight.T`` as it was.

    Args:
        x: floats ``[..., width]``.
        block: 4, 16, 64, …: a power of 4 (so that the matrix is exact in any dtype) that divides the width; 0 for no
            rotation.

    Returns:
        Float32 ``[..., width]``.
    """
    if block == 0:
        return x
    blocks = x.reshape(*x.shape[:-1], -1, block)
    turned = jax.lax.dot_general(
        blocks,
        jnp.asarray(_hadamard(block), x.dtype),
        (((x.ndim,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    return turned.reshape(x.shape)


@cache
def _hadamard(size: int) -> npt.NDArray[Any]:
    """Sylvester's Hadamard matrix, scaled to be orthogonal; symmetric, and so its own inverse."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.float32(np.sqrt(size))


def fitting_group(width: int, group: int) -> int:
    """The largest even divisor of ``width`` that is at most ``group``; 0 where there is none."""
    return next((size for size in range(min(group, width), 1, -1) if width % size == 0 and size % 2 == 0), 0)


def _packed_product(x: jax.Array, weight: jax.Array, scale: jax.Array) -> jax.Array:
    """The product with packed numbers: even columns of ``x`` meet the low halves of the bytes, odd ones the high.

    So nothing is interleaved, and a split of the bytes over devices is a split of ``x``. Both operands are bfloat16:
    that costs 0.2 % where rounding to four bits has cost 10, and takes two thirds of the time.
    """
    halves, groups = weight.shape[-1], scale.shape[-1]
    pairs = x.reshape(*x.shape[:-1], halves, 2)
    total = jnp.zeros((), jnp.float32)
    for half, numbers in enumerate(_unpacked(weight)):
        grouped = numbers.reshape(-1, groups, halves // groups).astype(jnp.float32) * scale[..., None]
        values = grouped.reshape(weight.shape).astype(jnp.bfloat16)
        total = total + _product(pairs[..., half].astype(jnp.bfloat16), values, jnp.float32)
    return total


def _unpacked(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The low and the high halves of bytes, from -7 to 7."""
    return (packed & 15).astype(jnp.int8) - 8, (packed >> 4).astype(jnp.int8) - 8


def _int8_product(numbers: jax.Array, weight: jax.Array) -> jax.Array:
    """``numbers @ weight.T`` in exact int32 sums, by the instructions that this machine has for them.

    Where weights are split the sums of their columns would be one more all-reduce: there bytes stay signed.
    """
    scope = current_scope()
    if scope is not None and current_platform() == "cpu":
        rules, mesh = scope
        together, whole = mesh.size == 1, rules.leaves_weights_whole(dict(mesh.shape))
        if whole and suits_unsigned(_rows(numbers), weight, rows_together=together):
            return signed_by_unsigned(numbers, weight, rows_together=together)
    return _product(numbers, weight, jnp.int32)


def _product(x: jax.Array, weight: jax.Array, sums: jax.typing.DTypeLike) -> jax.Array:
    """``x @ weight.T`` summed in a wider dtype."""
    repeated = _repeats(x, weight)
    if repeated > 1:
        # Along a dimension of its own, so that rows split over devices stay where they are.
        x = jnp.broadcast_to(x[..., None, :], (*x.shape[:-1], repeated, x.shape[-1]))
    y = jax.lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=sums)
    return y[..., 0, :] if repeated > 1 else y


def _repeats(x: jax.Array, weight: jax.Array) -> int:
    """How often a single row is repeated: see ``_SINGLE_ROW``."""
    if weight.dtype == jnp.float32 or current_platform() != "cpu":
        return 1
    return _SINGLE_ROW if _rows(x) == 1 else 1


def _rows(x: jax.Array) -> int:
    """Rows of ``x [..., in]`` that one device holds."""
    rows = prod(x.shape[:-1])
    scope = current_scope()
    if scope is not None:
        rules, mesh = scope
        for logical, size in zip((BATCH, SEQ), x.shape[:-1], strict=False):
            rows //= prod(mesh.shape[axis] for axis in rules.of_activations.split(logical, size, dict(mesh.shape)))
    return rows


def _multiplies_float8() -> bool:
    """Whether the devices multiply float8 operands: NVIDIA's from Ada and Hopper on."""
    device = current_device()
    capability = str(getattr(device, "compute_capability", "0"))
    major, _, minor = capability.partition(".")
    return bool(device.platform == "gpu" and major.isdecimal() and (int(major), int(minor or 0)) >= (8, 9))


def _check(x: jax.Array, weight: jax.Array, scale: jax.Array | None, kind: str | None) -> None:
    """Refuse what cannot be multiplied."""
    shapes = f"x {x.dtype}{list(x.shape)}, weight {weight.dtype}{list(weight.shape)}"
    if scale is None:
        if not jnp.issubdtype(weight.dtype, jnp.floating):
            raise ModelError(f"{shapes}: numbers of dtype {weight.dtype} need scales")
        width = weight.shape[-1]
    else:
        if kind is None:
            known = ", ".join(map(str, DTYPES.values()))
            raise ModelError(f"{shapes}: weights with scales are {known}, not {weight.dtype}")
        out, *groups = scale.shape
        width = weight.shape[-1] * (2 if kind == INT4 else 1)
        fits = (len(groups) == 1 and groups[0] and width % (2 * groups[0]) == 0) if kind == INT4 else not groups
        if out != weight.shape[0] or not fits:
            raise ModelError(f"{shapes}: scales of shape {list(scale.shape)} do not fit them")
    if weight.ndim != 2 or x.shape[-1] != width:
        raise ModelError(f"{shapes}: expected x of [..., {width}] and a weight of [out, in]")
