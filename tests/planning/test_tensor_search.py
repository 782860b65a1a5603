"""The search over weights that name no axes: what it finds, that it only improves, and what it says."""

import json
from collections.abc import Callable
from itertools import pairwise
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import spmd_infer as si
from benchmarks.tensor_search import MLP, Transformer
from spmd_infer.axes import axis_tuple
from spmd_infer.planning.audit import collectives
from spmd_infer.planning.layer_groups import by_layer, by_parity
from spmd_infer.planning.layout import SMALL_BYTES
from spmd_infer.planning.page import page

# float32 sums in another order, relative to the largest value.
TOLERANCE = 1e-5
RNG = np.random.default_rng(0)


class LinenMLP(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(2):
            x = x + linen.Dense(x.shape[-1])(linen.relu(linen.Dense(x.shape[-1])(x)))
        return x


X = RNG.normal(size=(16, 256)).astype(np.float32)
IDS = RNG.integers(0, 512, (16, 12)).astype(np.int32)


def transformer(depth: int = 2) -> Transformer:
    return Transformer(width=256, depth=depth, vocab=512)


def linen_mlp() -> tuple[Any, Any]:
    return LinenMLP(), LinenMLP().init(jax.random.key(0), X)


CASES: dict[str, tuple[Callable[[], tuple[Any, Any]], Any, tuple[int, int]]] = {
    # Collectives of the default rule, and at most: one for two products, two for a block and one for the embedding.
    "square": (lambda: (MLP(256, 4), None), X, (4, 2)),
    "linen": (linen_mlp, X, (4, 2)),
    "transformer": (lambda: (transformer(), None), IDS, (11, 5)),
}


def engine(name: str, mesh: str, *, searched: bool = True) -> si.Engine:
    make, batch, _ = CASES[name]
    options = {"example": batch, "workload": si.Workload(rows=len(batch))} if searched else {}
    return si.Engine(*make(), mesh=mesh, buckets=[len(batch)], **options)


@pytest.mark.parametrize("mesh", ["data=1,model=8", "data=2,model=4"])
@pytest.mark.parametrize("name", list(CASES))
def test_pairs_products_as_megatron_does(name: str, mesh: str) -> None:
    batch, (default, most) = CASES[name][1:]
    expected = engine(name, "data=1").infer(batch)
    before, after = engine(name, mesh, searched=False), engine(name, mesh)
    for each in (before, after):
        assert np.abs(each.infer(batch) - expected).max() <= TOLERANCE * np.abs(expected).max()
    counts = [len(collectives(each.programs[0].compiled)) for each in (before, after)]
    assert before.plan.tensors is None  # nothing was known of the batch when the weights were laid out
    search = after.plan.tensors
    assert search is not None
    assert search.collectives[0] == default
    assert counts[1] == search.collectives[1] <= most < counts[0]
    assert search.seconds[1] < search.seconds[0]
    assert search.memory[1] <= search.memory[0]
    assert set(after.memory().weights.values()) == {after.plan.chosen.memory.weights}


def test_the_layers_of_a_deep_model_move_together() -> None:
    model = nnx.eval_shape(lambda: transformer(40))
    plan = si.plan(model, devices=8, mesh="data=2,model=4", example=IDS, batch=16)
    assert plan.tensors is not None
    assert {(change.pattern, change.count) for change in plan.tensors.changes} >= {
        ("blocks.*.query.kernel", 40),
        ("blocks.*.key.kernel", 40),
        ("blocks.*.value.kernel", 40),
    }
    assert plan.tensors.finished
    assert plan.tensors.evaluations < 100
    assert plan.tensors.collectives[0] == 40 * 5 + 1
    assert plan.tensors.collectives[1] <= 40 * 2 + 1


def test_groups_of_paths() -> None:
    paths = ["block_0.dense_0.w", "block_1.dense_0.w", "block_2.dense_0.w", "block_0.dense_1.w", "block_1.dense_1.w"]
    assert by_layer(paths)["block_2.dense_0.w"] == "block_*.dense_0.w"
    assert by_layer(["head.w"]) == {"head.w": "head.w"}
    assert len(set(by_parity(paths).values())) == 4


def test_the_plan_says_what_the_search_changed() -> None:
    plan = si.plan(transformer(), devices=8, mesh="data=1,model=8", example=IDS, batch=16)
    text, data = plan.explain(), json.loads(json.dumps(plan.to_dict()))["tensor_search"]
    line = "blocks.*.query.kernel x2 (256 x 256): model along dimension 0 -> model along dimension 1"
    assert line in text
    assert plan.tensors is not None
    found = plan.tensors.collectives[1]
    assert f"11 -> {found} collectives" in text
    assert line in page(plan).replace("&gt;", ">")
    assert data["collectives"] == {"default_rule": 11, "found": found}
    assert {"weights": "blocks.*.key.kernel", "count": 2, "shape": [256, 256]}.items() <= data["changes"][0].items()
    same = si.plan(nnx.Linear(256, 512, rngs=nnx.Rngs(0)), devices=8, mesh="data=1,model=8", example=X)
    assert "nothing that was tried is faster" in same.explain()


def test_rows_are_split_over_weights_only_where_memory_is_short() -> None:
    params = {"w": jax.ShapeDtypeStruct((1 << 17, 1 << 16), jnp.bfloat16)}
    plan = si.plan(
        lambda p, x: x @ p["w"], params, devices="8xL4", mesh="data=8,model=1", example=np.zeros((8, 1 << 17), np.int8)
    )
    assert plan.weights[0].parts == 1  # 17 GB fit
    params = {"w": jax.ShapeDtypeStruct((1 << 17, 1 << 17), jnp.bfloat16)}
    plan = si.plan(
        lambda p, x: x @ p["w"], params, devices="8xL4", mesh="data=4,model=2", example=np.zeros((8, 1 << 17), np.int8)
    )
    assert plan.weights[0].parts == 2


def test_an_axis_for_something_else_serves_weights_without_axes() -> None:
    expected = engine("square", "data=1").infer(X)
    found = engine("square", "data=2,expert=4")
    assert max(layout.parts for layout in found.plan.weights) == 4
    assert all(layout.whole for layout in found.plan.weights if layout.parts == 1 and layout.nbytes >= SMALL_BYTES)
    assert np.abs(found.infer(X) - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_resharding_to_another_split_of_the_same_mesh_compiles_again() -> None:
    each = engine("square", "data=1,model=8", searched=False)
    before = each.infer(X)
    default = [layout.spec for layout in each.plan.weights]
    each.reshard("data=1,model=8")  # the first batch has shown what the model takes
    assert [layout.spec for layout in each.plan.weights] != default
    np.testing.assert_allclose(each.infer(X), before, rtol=0, atol=TOLERANCE * np.abs(before).max())
    assert each.compiles == 2


SIZES = st.sampled_from([1, 2, 3, 7, 8, 30, 64, 127, 128, 192, 256, 509])


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(SIZES, min_size=2, max_size=5),
    mesh=st.sampled_from(["data=1,model=8", "data=2,model=4", "data=4,model=3", "model=5", "data=2,expert=2,model=2"]),
    rows=st.integers(1, 17),
    wide=st.booleans(),
)
def test_any_shapes_give_valid_specs_and_nothing_large_is_whole_unsaid(
    sizes: list[int], mesh: str, rows: int, wide: bool
) -> None:
    if wide:
        sizes = [sizes[0], *(size * 16 for size in sizes[1:])]
    params = {f"layers.{i}.w": jax.ShapeDtypeStruct(pair, jnp.float32) for i, pair in enumerate(pairwise(sizes))}

    def chain(params: Any, x: jax.Array) -> jax.Array:
        for i in range(len(sizes) - 1):
            x = jnp.tanh(x @ params[f"layers.{i}.w"])
        return x

    spec = si.MeshSpec.parse(mesh)
    plan = si.plan(
        chain, params, devices=spec.size, mesh=mesh, batch=rows, inputs=si.InputSpec(("batch", sizes[0]), np.float32)
    )
    search = plan.tensors
    for layout in plan.weights:
        used = [axis for entry in layout.spec for axis in axis_tuple(entry)]
        assert len(used) == len(set(used))
        for size, entry in zip(layout.shape, layout.spec, strict=False):
            assert size % prod(spec.shape[axis] for axis in axis_tuple(entry)) == 0
        assert layout.parts == prod(spec.shape[axis] for axis in used)
        if layout.parts == 1 and layout.nbytes >= SMALL_BYTES:
            assert layout.whole
            assert any(layout.whole in note and "stay whole" in note for note in plan.notes)
    if search is not None:
        assert search.memory[1] <= search.memory[0]
        assert search.seconds[1] <= search.seconds[0]
        assert plan.chosen.time is not None
        assert plan.chosen.time.total == pytest.approx(search.seconds[1])
        assert plan.chosen.memory.total == search.memory[1]
