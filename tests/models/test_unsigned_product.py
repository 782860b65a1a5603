"""Products of bytes of both kinds: exact, by the library that has kernels for them, and only where they pay."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spmd_infer.axes import AxisRules, axis_scope
from spmd_infer.mesh import MeshSpec
from spmd_infer.models import dense as dense_module
from spmd_infer.models import unsigned_product
from spmd_infer.models.dense import dense, quantise_weight
from spmd_infer.models.unsigned_product import prefers_unsigned, signed_by_unsigned, suits_unsigned

RNG = np.random.default_rng(0)
TOGETHER = pytest.mark.parametrize("together", [True, False])
MATRICES = [((16,), 64, 2), ((3, 7), 96, 33), ((2, 16), 576, 192), ((64,), 8, 40)]


def bytes_of(*shape: int) -> np.ndarray:
    return RNG.integers(-128, 128, shape).astype(np.int8)


@TOGETHER
@pytest.mark.parametrize(("rows", "width", "out"), MATRICES)
def test_sums_are_those_of_signed_bytes(rows: tuple[int, ...], width: int, out: int, together: bool) -> None:
    numbers, weight = bytes_of(*rows, width), bytes_of(out, width)
    sums = jax.jit(partial(signed_by_unsigned, rows_together=together))(numbers, weight)
    assert sums.dtype == jnp.int32
    np.testing.assert_array_equal(sums, numbers.astype(np.int64) @ weight.astype(np.int64).T)


@TOGETHER
def test_extremes_stay_exact(together: bool) -> None:
    multiplied = jax.jit(partial(signed_by_unsigned, rows_together=together))
    numbers, weight = np.full((16, 4096), -128, np.int8), np.full((8, 4096), -128, np.int8)
    np.testing.assert_array_equal(multiplied(numbers, weight), np.full((16, 8), 128 * 128 * 4096))
    np.testing.assert_array_equal(multiplied(-1 - numbers, weight), np.full((16, 8), -127 * 128 * 4096))


@TOGETHER
def test_outside_jit_and_under_vmap(together: bool) -> None:
    multiplied = partial(signed_by_unsigned, rows_together=together)
    numbers, weight = bytes_of(3, 16, 64), bytes_of(3, 24, 64)
    expected = np.einsum("mrk,mok->mro", numbers.astype(np.int64), weight.astype(np.int64))
    np.testing.assert_array_equal(multiplied(jnp.asarray(numbers[0]), jnp.asarray(weight[0])), expected[0])
    np.testing.assert_array_equal(jax.vmap(multiplied)(numbers, weight), expected)


@TOGETHER
def test_no_operand_is_widened(together: bool) -> None:
    multiplied = partial(signed_by_unsigned, rows_together=together)
    lowered, rows = jax.jit(multiplied).lower(bytes_of(32, 64), bytes_of(48, 64)), 33 if together else 32
    assert f"(tensor<{rows}x64xui8>, tensor<48x64xi8>) -> tensor<{rows}x48xi32>" in lowered.as_text()
    assert f"s32[{rows},64]" not in lowered.compile().as_text()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu avx512f avx512_vnni", True),
        ("fpu avx512f avx512_vnni amx_tile amx_int8", False),
        ("fpu avx2", False),
    ],
)
def test_the_processor_decides(flags: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described = tmp_path / "cpuinfo"
    described.write_text(f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: {flags}\n")
    monkeypatch.setattr(unsigned_product.platform, "machine", lambda: "x86_64")
    assert prefers_unsigned.__wrapped__(described) is expected
    assert not prefers_unsigned.__wrapped__(tmp_path / "nothing")
    monkeypatch.setattr(unsigned_product.platform, "machine", lambda: "aarch64")
    assert not prefers_unsigned.__wrapped__(described)


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("mesh_shape", ["data=1", "data=4", "data=2,model=4"])
def test_dense_gives_the_same_bits_either_way(mesh_shape: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unsigned_product, "prefers_unsigned", lambda: True)
    mesh = MeshSpec.parse(mesh_shape).build()
    x = RNG.standard_normal((rows, 128)).astype(np.float32)
    numbers, scale = quantise_weight(jnp.asarray(RNG.standard_normal((24, 128)), jnp.float32), "int8")

    def scoped(*args: jax.Array) -> jax.Array:
        with axis_scope(AxisRules(), mesh):
            return dense(*args)

    lowered = jax.jit(scoped).lower(x, numbers, scale).as_text()
    # Where weights are split the columns' sums would be one more all-reduce; a single row pays on one device only.
    assert ("ui8" in lowered) == (mesh_shape == "data=1" or (mesh_shape == "data=4" and rows > 1))
    assert "ui8" not in jax.jit(dense).lower(x, numbers, scale).as_text()  # outside an engine, as for a plan
    np.testing.assert_array_equal(jax.jit(scoped)(x, numbers, scale), jax.jit(dense)(x, numbers, scale))


def test_few_rows_or_one_output_stay_signed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unsigned_product, "prefers_unsigned", lambda: True)
    assert suits_unsigned(16, jnp.ones((2, 8), jnp.int8), rows_together=False)
    assert not suits_unsigned(15, jnp.ones((2, 8), jnp.int8), rows_together=False)
    assert suits_unsigned(1, jnp.ones((2, 8), jnp.int8), rows_together=True)
    assert not suits_unsigned(16, jnp.ones((1, 8), jnp.int8), rows_together=True)
    assert dense_module.suits_unsigned is suits_unsigned
