"""Products of unsigned with signed bytes.

x86 processors with VNNI and without AMX multiply them two to three times faster than signed ones: the instruction takes
one operand of each kind, and XLA's library has kernels for just that: 2.2 ms in place of 5.7 for 512 rows of
576 × 1,536 (4.4 in bfloat16).

JAX widens operands of different dtypes to int32 before it multiplies on a CPU, so the product is a primitive of its own
here, lowered to the same operation without the widening.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

_OFFSET = 128
"""What makes an int8 number a byte without a sign."""

_SUMMING_ROWS = 2
"""Rows of ones that sum a weight's columns: a product by a single row would not reach the library."""

_FEWEST_ROWS = 16
"""Below this many rows both kinds take as long, and a product of its own for the columns' sums a third more: 0.14 ms in
place of 0.10 for 4 rows of 576 × 1,536. With one more row for them fewer rows gain too: 0.12 ms in place of 0.18 for
one, which as signed bytes would have to be repeated."""


@cache
def prefers_unsigned(described_in: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this machine's processor multiplies bytes of both kinds faster than signed ones."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    try:
        described = described_in.read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    flags = next((line.split() for line in described.splitlines() if line.startswith("flags")), [])
    return "avx512_vnni" in flags and "amx_int8" not in flags


def suits_unsigned(rows: int, weight: jax.Array, *, rows_together: bool) -> bool:
    """Whether a product of some rows by ``weight [out, in]`` is faster with unsigned bytes on this machine's CPU.

    One with a single output is no product of matrices to the library.

    Args:
        rows: how many rows a device has.
        weight: the other operand.
        rows_together: as in ``signed_by_unsigned``.
    """
    return (rows_together or rows >= _FEWEST_ROWS) and weight.shape[0] > 1 and prefers_unsigned()


def signed_by_unsigned(numbers: jax.Array, weight: jax.Array, *, rows_together: bool) -> jax.Array:
    """``numbers @ weight.T`` of int8 in exact int32 sums, computed with ``numbers`` as unsigned bytes.

    Args:
        numbers: ``[..., in]`` int8.
        weight: ``[out, in]`` int8.
        rows_together: whether all rows are on one device. The row of ones that sums the weight's columns is then one
            more row of theirs, so that the weight is read once: up to a quarter less time for few rows.

    Returns:
        ``[..., out]`` int32, as a product of signed bytes gives it: what the offset of 128 adds is taken off again.
    """
    unsigned = jax.lax.bitcast_convert_type(numbers, jnp.uint8) ^ jnp.uint8(_OFFSET)
    if rows_together:
        rows = unsigned.reshape(-1, weight.shape[1])
        sums = _product(jnp.concatenate((rows, jnp.ones_like(rows[:1]))), weight)
        return (sums[:-1] - _OFFSET * sums[-1]).reshape(*numbers.shape[:-1], weight.shape[0])
    ones = jnp.ones((_SUMMING_ROWS, weight.shape[1]), jnp.uint8)
    return _product(unsigned, weight) - _OFFSET * _product(ones, weight)[0]


def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    sums: jax.Array = _unsigned_product.bind(
        x, weight, dimension_numbers=(((x.ndim - 1,), (weight.ndim - 1,)), ((), ()))
    )
    return sums


_unsigned_product = Primitive("unsigned_product")


def _shape(x: Any, weight: Any, *, dimension_numbers: Any) -> jax.core.ShapedArray:
    del dimension_numbers
    return jax.core.ShapedArray((*x.shape[:-1], weight.shape[0]), jnp.dtype(jnp.int32))


def _widened(x: jax.Array, weight: jax.Array, *, dimension_numbers: Any) -> jax.Array:
    return jax.lax.dot_general(x, weight, dimension_numbers, preferred_element_type=jnp.int32)


def _lowered(ctx: Any, x: Any, weight: Any, *, dimension_numbers: Any) -> list[Any]:
    ((left,), (right,)), _ = dimension_numbers
    (out,) = ctx.avals_out
    numbers = stablehlo.DotDimensionNumbers.get(
        lhs_batching_dimensions=[],
        rhs_batching_dimensions=[],
        lhs_contracting_dimensions=[left],
        rhs_contracting_dimensions=[right],
    )
    sums = ir.RankedTensorType.get(out.shape, ir.IntegerType.get_signless(32))
    return [stablehlo.dot_general(sums, x, weight, numbers)]


def _batched(args: tuple[jax.Array, ...], dims: tuple[int | None, ...], **params: Any) -> tuple[jax.Array, int]:
    return jax.vmap(lambda x, weight: _widened(x, weight, **params), in_axes=dims)(*args), 0


_unsigned_product.def_abstract_eval(_shape)
_unsigned_product.def_impl(jax.jit(_unsigned_product.bind, static_argnames="dimension_numbers"))
mlir.register_lowering(_unsigned_product, mlir.lower_fun(_widened, multiple_results=False))
mlir.register_lowering(_unsigned_product, _lowered, platform="cpu")
batching.primitive_batchers[_unsigned_product] = _batched
