"""Convolutions over split images and channels against whole ones, with one small message in each direction."""

from collections import Counter

import jax
import numpy as np
import pytest
from flax import nnx

from spmd_infer.axes import BATCH, CHANNELS, EMBED, HEIGHT, MLP, WIDTH, AxisRules, axis_scope, constrain
from spmd_infer.mesh import MeshSpec
from spmd_infer.models.convolution import Conv, DepthwiseConv
from spmd_infer.planning.audit import collectives

# float32 sums of up to 200 products in another order; values are around 1.
TOLERANCE = 1e-5
LAYOUTS = {
    "columns": AxisRules(),
    "rows": AxisRules().replace(height="seq", width=None),
    "blocks": AxisRules().replace(height="data", batch=None),
    "summed channels": AxisRules().replace(embed="model", channels=None),
}


def on_mesh(
    conv: Conv | DepthwiseConv, rules: AxisRules, where: str, x: np.ndarray, ends: tuple[str | None, str | None]
) -> tuple[np.ndarray, Counter[tuple[str, str]]]:
    mesh = MeshSpec.parse(where).build()

    def traced(x: jax.Array) -> jax.Array:
        with axis_scope(rules, mesh):
            y = conv(constrain(x, BATCH, HEIGHT, WIDTH, ends[0]))
            return constrain(y, BATCH, HEIGHT, WIDTH, ends[1])

    compiled = jax.jit(traced).lower(x).compile()
    found = Counter((each.kind, ",".join(each.axes(mesh))) for each in collectives(compiled))
    return np.asarray(compiled(x)), found


def images(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, height, width, 8)).astype(np.float32)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("window", "stride"), [(3, 1), (5, 2), (1, 2)])
def test_plain(window: int, stride: int, name: str) -> None:
    conv = Conv(8, 16, window, stride=stride, axes=(None, None, EMBED, CHANNELS), rngs=nnx.Rngs(0))
    x = images(16, 24)
    found, used = on_mesh(conv, LAYOUTS[name], "data=2,seq=2,model=2", x, (EMBED, CHANNELS))
    np.testing.assert_allclose(found, conv(x), atol=TOLERANCE)
    assert not any(kind == "all-gather" and "seq" in axes for kind, axes in used)
    if name == "columns":
        sides = sum(size > 0 for size in ((window - stride) // 2, (window - stride) - (window - stride) // 2))
        assert used["collective-permute", "seq"] == (0 if window == 1 else sides)


@pytest.mark.parametrize(("window", "stride"), [(5, 2)])
@pytest.mark.parametrize("name", ["columns", "blocks"])
def test_depthwise(name: str, window: int, stride: int) -> None:
    conv = DepthwiseConv(8, window, stride=stride, axis=MLP, rngs=nnx.Rngs(0))
    x = images(16, 24)
    found, used = on_mesh(conv, LAYOUTS[name], "data=2,seq=2,model=2", x, (MLP, MLP))
    np.testing.assert_allclose(found, conv(x), atol=TOLERANCE)
    assert {kind for kind, _ in used} <= {"collective-permute"}


def test_uneven_parts_are_brought_together_once() -> None:
    x = np.random.default_rng(0).normal(size=(2, 28, 28, 8)).astype(np.float32)
    conv = DepthwiseConv(8, 5, stride=2, axis=MLP, rngs=nnx.Rngs(0))  # parts of 7 columns give no whole number of 14
    found, used = on_mesh(conv, LAYOUTS["columns"], "seq=4,model=2", x, (MLP, MLP))
    np.testing.assert_allclose(found, conv(x), atol=TOLERANCE)
    assert used == {("all-gather", "seq"): 1}


@pytest.mark.parametrize(("height", "width"), [(5, 7), (2, 4)])
@pytest.mark.parametrize("stride", [1, 2])
def test_parts_too_small_or_uneven(stride: int, height: int, width: int) -> None:
    x = images(height, width)
    for conv, ends in (
        (Conv(8, 16, 5, stride=stride, axes=(None, None, EMBED, CHANNELS), rngs=nnx.Rngs(0)), (EMBED, CHANNELS)),
        (DepthwiseConv(8, 5, stride=stride, axis=MLP, rngs=nnx.Rngs(0)), (MLP, MLP)),
    ):
        found, _ = on_mesh(conv, AxisRules(), "seq=4,model=2", x, ends)
        np.testing.assert_allclose(found, conv(x), atol=TOLERANCE)
