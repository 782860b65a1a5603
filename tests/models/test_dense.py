"""``dense`` against numpy in float64, for weights of every kind; its errors; its padding and its sharding."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from spmd_infer.checkpoints import quantise as stored
from spmd_infer.errors import ModelError
from spmd_infer.mesh import MeshSpec
from spmd_infer.models.dense import dense, dequantise, fitting_group, quantise_rows, quantise_weight, rotate

Array = npt.NDArray[Any]
SHAPES = [(1, 576, 192), (2, 64, 40), (3, 96, 33), (17, 1536, 64)]
GROUPS = {"int8": 0, "fp8": 0, "int4": 32}


def operands(rows: int, width: int, out: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(rows + width)
    x = rng.standard_normal((rows, width)).astype(np.float32)
    x[0] *= 50  # each row has a scale of its own
    return x, (rng.standard_normal((out, width)) * rng.uniform(0.01, 1, (out, 1))).astype(np.float32)


def off_by(found: Any, expected: Array) -> float:
    """The error over the expected values' size, in the Frobenius norm."""
    return float(np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(("rows", "width", "out"), SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-6), ("float16", 1e-6)])
def test_floats_are_summed_in_float32(rows: int, width: int, out: int, dtype: str, tolerance: float) -> None:
    x, weight = (jnp.asarray(values, dtype) for values in operands(rows, width, out))
    y = jax.jit(dense)(x, weight)
    assert y.dtype == jnp.float32
    # Products of 8- and 11-bit numbers are exact in float32; only its sums round.
    assert off_by(y, np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T) < tolerance


@pytest.mark.parametrize(("rows", "width", "out"), SHAPES)
def test_int8_is_exact_in_the_integers(rows: int, width: int, out: int) -> None:
    x, weight = operands(rows, width, out)
    numbers, scale = map(np.asarray, quantise_weight(jnp.asarray(weight), "int8"))
    rounded, row_scale = map(np.asarray, quantise_rows(jnp.asarray(x), "int8"))
    sums = rounded.astype(np.int64) @ numbers.astype(np.int64).T
    expected = sums * row_scale.astype(np.float64) * scale
    y = jax.jit(dense)(x, numbers, scale)
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=0)  # one conversion and two multiplications in float32
    # Of what is rounded to 8 bits, about 1 % is lost in either operand.
    assert off_by(y, x.astype(np.float64) @ weight.T.astype(np.float64)) < 0.015


@pytest.mark.parametrize(("rows", "width", "out"), SHAPES)
def test_float8(rows: int, width: int, out: int) -> None:
    x, weight = operands(rows, width, out)
    numbers, scale = quantise_weight(jnp.asarray(weight), "fp8")
    rounded, row_scale = quantise_rows(jnp.asarray(x), "fp8")
    expected = np.asarray(rounded, np.float64) @ np.asarray(numbers, np.float64).T
    expected = expected * np.asarray(row_scale) * np.asarray(scale)
    y = jax.jit(dense)(x, numbers, scale)
    assert off_by(y, expected) < 1e-6
    assert off_by(y, x.astype(np.float64) @ weight.T.astype(np.float64)) < 0.06  # three bits behind the point


@pytest.mark.parametrize(("rows", "width", "out"), SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_weights_keep_the_activations(rows: int, width: int, out: int, dtype: str) -> None:
    x, weight = operands(rows, width, out)
    numbers, scale = quantise_weight(jnp.asarray(weight), "int4", 32)
    assert numbers.shape == (out, width // 2)
    values = np.asarray(dequantise(numbers, scale), np.float64)
    y = jax.jit(dense)(jnp.asarray(x, dtype), numbers, scale)
    expected = np.asarray(jnp.asarray(x, dtype), np.float64) @ values.T
    assert off_by(y, expected) < 4e-3  # both operands are rounded to bfloat16
    assert off_by(y, x.astype(np.float64) @ weight.T.astype(np.float64)) < 0.12


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
def test_numbers_are_those_of_stored_checkpoints(kind: str) -> None:
    _, weight = operands(1, 576, 192)
    weight[3] = 0  # a row of zeros has a scale of 1
    numbers, scale = map(np.asarray, quantise_weight(jnp.asarray(weight), kind, GROUPS[kind]))
    values, scales = stored.quantise(kind, weight, GROUPS[kind])
    np.testing.assert_allclose(scale.reshape(scales.shape), scales, rtol=1e-6)
    # XLA may divide by multiplying with the inverse, which moves a value that lies half way between two numbers.
    differing = np.count_nonzero(numbers.view(np.uint8) != values.view(np.uint8))
    assert differing <= 1e-4 * values.size
    assert scale.reshape(192, -1)[3].max() == 1


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
def test_quantising_again_changes_nothing(kind: str) -> None:
    _, weight = operands(1, 96, 33)
    numbers, scale = quantise_weight(jnp.asarray(weight), kind, GROUPS[kind])
    again, scale_again = quantise_weight(dequantise(numbers, scale), kind, GROUPS[kind])
    np.testing.assert_array_equal(np.asarray(numbers).view(np.uint8), np.asarray(again).view(np.uint8))
    np.testing.assert_allclose(scale, scale_again, rtol=1e-6)


def test_rows_of_zeros_and_of_nan() -> None:
    _, weight = operands(1, 64, 8)
    numbers, scale = quantise_weight(jnp.asarray(weight), "int8")
    x = jnp.zeros((3, 64)).at[1, 5].set(jnp.nan).at[2, 0].set(1.0)
    y = np.asarray(jax.jit(dense)(x, numbers, scale))
    assert not y[0].any()
    assert np.isnan(y[1]).all()  # and is not hidden
    assert np.isfinite(y[2]).all()


@pytest.mark.parametrize("block", [4, 16, 64])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rotating_both_sides_changes_nothing(block: int, dtype: str) -> None:
    x, weight = operands(5, 192, 24)
    turned = rotate(jnp.asarray(x), block)
    np.testing.assert_allclose(rotate(turned, block), x, rtol=1e-5, atol=1e-4)  # its own inverse
    np.testing.assert_allclose(np.linalg.norm(turned, axis=1), np.linalg.norm(x, axis=1), rtol=1e-5)
    before = x.astype(np.float64) @ weight.T.astype(np.float64)
    assert off_by(turned @ rotate(jnp.asarray(weight), block).T, before) < 1e-5
    small = jnp.asarray(x, dtype)
    expected = np.asarray(rotate(small.astype(jnp.float32), block))
    np.testing.assert_allclose(rotate(small, block), expected, rtol=1e-5, atol=1e-4)  # no bit of the input is lost


def test_rotation_saves_what_one_large_column_costs() -> None:
    x, weight = operands(8, 512, 64)
    x[:, 7] *= 100
    exact = x.astype(np.float64) @ weight.T.astype(np.float64)

    def error(block: int) -> float:
        numbers, scale = quantise_weight(rotate(jnp.asarray(weight), block), "int8")
        return off_by(dense(rotate(jnp.asarray(x), block), numbers, scale), exact)

    assert error(64) < 0.5 * error(0)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "fp8", "int4"])
@pytest.mark.parametrize("axes", [("model", None), (None, "model")], ids=["out", "in"])
def test_split_weights_give_the_same(kind: str, axes: tuple[str | None, ...]) -> None:
    mesh = MeshSpec.parse("data=2,model=4").build()
    x, weight = operands(16, 256, 64)

    def put(values: Any, *spec: str | None) -> jax.Array:
        placed: jax.Array = jax.device_put(values, NamedSharding(mesh, PartitionSpec(*spec)))
        return placed

    arguments: tuple[Any, ...] = (
        (jnp.asarray(weight, kind),)
        if kind.endswith(("32", "16"))
        else quantise_weight(jnp.asarray(weight), kind, GROUPS[kind])
    )
    whole = jax.jit(dense)(x, *arguments)
    split = (put(arguments[0], *axes), *(put(scale, *axes[: scale.ndim]) for scale in arguments[1:]))
    y = jax.jit(dense)(put(x, "data", axes[1]), *split)
    if kind in ("int8", "fp8"):  # the whole row's scale, and exact sums of integers
        np.testing.assert_allclose(y, whole, rtol=1e-6 if kind == "int8" else 1e-4, atol=1e-4 if kind == "fp8" else 0)
    else:
        np.testing.assert_allclose(y, whole, rtol=1e-4, atol=1e-3)  # sums in another order


@pytest.mark.parametrize("rows", [(1,), (1, 1), (), (2, 1)])
def test_few_rows_of_any_rank(rows: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((*rows, 64)).astype(np.float32)
    numbers, scale = quantise_weight(jnp.asarray(rng.standard_normal((24, 64)), jnp.float32), "int8")
    y = jax.jit(dense)(x, numbers, scale)
    assert y.shape == (*rows, 24)
    alone = np.asarray(jax.jit(dense)(np.tile(x.reshape(-1, 64), (3, 1)), numbers, scale))
    np.testing.assert_array_equal(np.asarray(y).reshape(-1, 24), alone[: max(1, np.prod(rows, dtype=int))])


def _as(dtype: str, *shape: int) -> jax.Array:
    return jnp.ones(shape, dtype)


F32, INT8 = partial(_as, "float32"), partial(_as, "int8")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dense(F32(2, 8), F32(4, 6)), r"expected x of \[..., 6\]"),
        (lambda: dense(F32(2, 8), INT8(4, 8)), "numbers of dtype int8 need scales"),
        (lambda: dense(F32(2, 8), INT8(4, 8), F32(3)), r"scales of shape \[3\] do not fit"),
        (lambda: dense(F32(2, 8), INT8(4, 8), F32(4, 2)), r"scales of shape \[4, 2\] do not fit"),
        (
            lambda: dense(F32(2, 8), F32(4, 8), F32(4)),
            "weights with scales are int8, float8_e4m3fn, uint8, not float32",
        ),
        (lambda: dense(F32(2, 8), _as("uint8", 4, 4), F32(4, 3)), r"scales of shape \[4, 3\] do not fit"),
        (lambda: dense(F32(2, 8), _as("uint8", 4, 8), F32(4, 2)), r"expected x of \[..., 16\]"),
        (lambda: dense(F32(2, 8), F32(2, 4, 8)), r"a weight of \[out, in\]"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        call()


def test_groups_that_fit() -> None:
    assert fitting_group(1536, 64) == 64
    assert fitting_group(96, 64) == 48
    assert fitting_group(7, 64) == 0
    assert fitting_group(6, 32) == 6
