"""Attention over split positions against attention over whole rows, and the messages that it costs."""

from collections import Counter
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spmd_infer.axes import (
    ATTN_BATCH,
    ATTN_HEADS,
    ATTN_KV_HEADS,
    HEAD_DIM,
    KEY_SEQ,
    SEQ,
    AxisRules,
    axis_scope,
    constrain,
)
from spmd_infer.mesh import MeshSpec
from spmd_infer.models import ring_attention
from spmd_infer.models.attention import causal_attention, segment_attention
from spmd_infer.planning.audit import collectives
from spmd_infer.planning.layouts import LAYOUTS

ROWS, LENGTH, HEAD_DIM_SIZE = 4, 24, 6
# float32 sums over 24 positions in another order; values are around 1.
TOLERANCE = 2e-6
MESHES = ("seq=3", "seq=2,model=4", "data=2,seq=2,model=2")


def tensors(heads: int, kv_heads: int, length: int = LENGTH) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(heads)
    return tuple(
        rng.normal(size=(ROWS, length, count, HEAD_DIM_SIZE)).astype(np.float32)
        for count in (heads, kv_heads, kv_heads)
    )


def units(heads: int, kv_heads: int) -> dict[str, int]:
    """As a Llama states them, for the cases here: queries split with the key heads that they read."""
    return {ATTN_HEADS: heads, ATTN_KV_HEADS: kv_heads}


def on_mesh(
    layout: AxisRules, where: str, attend: Callable[..., jax.Array], *arrays: np.ndarray
) -> tuple[np.ndarray, Counter[tuple[str, str]]]:
    mesh = MeshSpec.parse(where).build()

    def traced(queries: jax.Array, keys: jax.Array, values: jax.Array, *rest: jax.Array) -> jax.Array:
        with axis_scope(layout, mesh):
            queries = constrain(queries, ATTN_BATCH, SEQ, ATTN_HEADS, HEAD_DIM)
            keys, values = (constrain(x, ATTN_BATCH, KEY_SEQ, ATTN_KV_HEADS, HEAD_DIM) for x in (keys, values))
            return constrain(attend(queries, keys, values, *rest), ATTN_BATCH, SEQ, ATTN_HEADS, HEAD_DIM)

    def placed(x: np.ndarray, *axes: str | None) -> jax.Array:
        spec = layout.of_activations.resolve(axes, x.shape, dict(mesh.shape)).spec
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))

    inputs = [placed(arrays[0], ATTN_BATCH, SEQ, ATTN_HEADS, HEAD_DIM)]
    inputs += [placed(x, ATTN_BATCH, SEQ, ATTN_KV_HEADS, HEAD_DIM) for x in arrays[1:3]]
    inputs += [placed(x, ATTN_BATCH, SEQ) for x in arrays[3:]]
    compiled = jax.jit(traced).lower(*inputs).compile()
    found = Counter((each.kind, ",".join(each.axes(mesh))) for each in collectives(compiled))
    return np.asarray(compiled(*inputs)), found


@pytest.mark.parametrize("where", MESHES)
@pytest.mark.parametrize("name", ["1d", "ring"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 4), (8, 1), (8, 2), (9, 3)], ids=["gqa", "mqa", "kv2", "odd"])
def test_causal(heads: int, kv_heads: int, name: str, where: str) -> None:
    layout = LAYOUTS[name].with_units(units(heads, kv_heads))
    arrays = tensors(heads, kv_heads)
    found, used = on_mesh(layout, where, causal_attention, *arrays)
    np.testing.assert_allclose(found, causal_attention(*arrays), atol=TOLERANCE)
    parts = MeshSpec.parse(where).shape["seq"]
    gathered = {("all-gather", "seq"): 2}  # keys and values
    assert used == ({("collective-permute", "seq"): parts - 1} if name == "ring" else gathered)


@pytest.mark.parametrize("where", MESHES)
@pytest.mark.parametrize("name", ["1d", "ring"])
def test_segments(name: str, where: str) -> None:
    # Three sentences of uneven lengths, cut by devices anywhere, one of a single token, and padding.
    segments = np.zeros((ROWS, LENGTH), np.int32)
    for row in range(ROWS):
        segments[row, : 7 + row], segments[row, 7 + row], segments[row, 8 + row : 20] = 1, 2, 3
    arrays = tensors(8, 8)
    layout = LAYOUTS[name].with_units(units(8, 8))
    found, used = on_mesh(layout, where, segment_attention, *arrays, segments)
    np.testing.assert_allclose(found, segment_attention(*arrays, jnp.asarray(segments)), atol=TOLERANCE)
    parts = MeshSpec.parse(where).shape["seq"]
    if name == "ring":
        assert used == {("collective-permute", "seq"): parts - 1, ("all-gather", "seq"): 1}  # segment ids
    else:
        assert used == {("all-gather", "seq"): 3}


@pytest.mark.parametrize("name", ["1d", "ring"])
def test_queries_in_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring_attention, "_WHOLE_BLOCK", 5)  # 13 positions a device: 3 blocks of 5, the last padded
    arrays = tensors(8, 4, length=26)
    found, used = on_mesh(LAYOUTS[name].with_units(units(8, 4)), "seq=2,model=2", causal_attention, *arrays)
    np.testing.assert_allclose(found, causal_attention(*arrays), atol=TOLERANCE)
    assert used == ({("collective-permute", "seq"): 1} if name == "ring" else {("all-gather", "seq"): 2})


def test_positions_that_do_not_divide_stay_whole() -> None:
    arrays = tensors(8, 4, length=21)
    found, used = on_mesh(LAYOUTS["ring"].with_units(units(8, 4)), "seq=2,model=4", causal_attention, *arrays)
    np.testing.assert_allclose(found, causal_attention(*arrays), atol=TOLERANCE)
    assert not used


def test_large_scores_do_not_overflow() -> None:
    queries, keys, values = tensors(8, 4)
    arrays = (queries * 1e3, keys * 1e3, values)
    found, _ = on_mesh(LAYOUTS["ring"].with_units(units(8, 4)), "seq=8", causal_attention, *arrays)
    np.testing.assert_allclose(found, causal_attention(*arrays), atol=TOLERANCE)


@pytest.mark.parametrize("name", ["1d", "ring"])
def test_bfloat16(name: str) -> None:
    arrays = tuple(jnp.asarray(x, jnp.bfloat16) for x in tensors(8, 4))
    found, _ = on_mesh(LAYOUTS[name].with_units(units(8, 4)), "seq=4,model=2", causal_attention, *arrays)
    assert found.dtype == jnp.bfloat16
    exact = partial(np.asarray, dtype=np.float32)
    # Both round the weights of the softmax and the results to 8 bits.
    np.testing.assert_allclose(exact(found), exact(causal_attention(*arrays)), atol=0.03)
