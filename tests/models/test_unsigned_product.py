"""Products of bytes of both kinds: exact, by the library that has kernels for them, and only where they pay."""

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
MATRICES = [((16,), 64, 2), ((3, 7), 96, 33), ((2, 16), 576, 192), ((64,), 8, 40)]


def bytes_of(*shape: int) -> np.ndarray:
    return RNG.integers(-128, 128, shape).astype(np.int8)


@pytest.mark.parametrize(("rows", "width", "out"), MATRICES)
def test_sums_are_those_of_signed_bytes(rows: tuple[int, ...], width: int, out: int) -> None:
    numbers, weight = bytes_of(*rows, width), bytes_of(out, width)
    sums = jax.jit(signed_by_unsigned)(numbers, weight)
    assert sums.dtype == jnp.int32
    np.testing.assert_array_equal(sums, numbers.astype(np.int64) @ weight.astype(np.int64).T)


def test_extremes_stay_exact() -> None:
    numbers, weight = np.full((16, 4096), -128, np.int8), np.full((8, 4096), -128, np.int8)
    np.testing.assert_array_equal(jax.jit(signed_by_unsigned)(numbers, weight), np.full((16, 8), 128 * 128 * 4096))
    np.testing.assert_array_equal(
        jax.jit(signed_by_unsigned)(-1 - numbers, weight), np.full((16, 8), -127 * 128 * 4096)
    )


def test_outside_jit_and_under_vmap() -> None:
    numbers, weight = bytes_of(3, 16, 64), bytes_of(3, 24, 64)
    expected = np.einsum("mrk,mok->mro", numbers.astype(np.int64), weight.astype(np.int64))
    np.testing.assert_array_equal(signed_by_unsigned(jnp.asarray(numbers[0]), jnp.asarray(weight[0])), expected[0])
    np.testing.assert_array_equal(jax.vmap(signed_by_unsigned)(numbers, weight), expected)


def test_no_operand_is_widened() -> None:
    lowered = jax.jit(signed_by_unsigned).lower(bytes_of(32, 64), bytes_of(48, 64))
    assert "(tensor<32x64xui8>, tensor<48x64xi8>) -> tensor<32x48xi32>" in lowered.as_text()
    assert "s32[32,64]" not in lowered.compile().as_text()


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


@pytest.mark.parametrize("mesh_shape", ["data=1", "data=4", "data=2,model=4"])
def test_dense_gives_the_same_bits_either_way(mesh_shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unsigned_product, "prefers_unsigned", lambda: True)
    mesh = MeshSpec.parse(mesh_shape).build()
    x = RNG.standard_normal((64, 128)).astype(np.float32)
    numbers, scale = quantise_weight(jnp.asarray(RNG.standard_normal((24, 128)), jnp.float32), "int8")

    def scoped(*args: jax.Array) -> jax.Array:
        with axis_scope(AxisRules(), mesh):
            return dense(*args)

    lowered = jax.jit(scoped).lower(x, numbers, scale).as_text()
    assert ("ui8" in lowered) == (mesh_shape != "data=2,model=4")  # the columns' sums would be one more all-reduce
    assert "ui8" not in jax.jit(dense).lower(x, numbers, scale).as_text()  # outside an engine, as for a plan
    np.testing.assert_array_equal(jax.jit(scoped)(x, numbers, scale), jax.jit(dense)(x, numbers, scale))


def test_few_rows_or_one_output_stay_signed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unsigned_product, "prefers_unsigned", lambda: True)
    assert suits_unsigned(16, jnp.ones((2, 8), jnp.int8))
    assert not suits_unsigned(15, jnp.ones((2, 8), jnp.int8))
    assert not suits_unsigned(16, jnp.ones((1, 8), jnp.int8))
    assert dense_module.suits_unsigned is suits_unsigned
