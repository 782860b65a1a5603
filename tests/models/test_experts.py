"""Experts: equal to a loop over them for every routing and mesh, at the collectives that the layout implies."""

from collections import Counter
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from spmd_infer.axes import AxisRules, axis_scope
from spmd_infer.engine import Engine
from spmd_infer.errors import ModelError
from spmd_infer.functional import model_function
from spmd_infer.mesh import MeshSpec
from spmd_infer.models.experts import Experts, ExpertSizes, _in_blocks, _ragged, imbalance
from spmd_infer.planning.audit import collectives
from spmd_infer.planning.parallel_costs import ExpertWork, expert_messages

SIZES = ExpertSizes(embed_dim=16, mlp_dim=24, num_experts=8, experts_per_token=2)
MESHES = ("expert=8", "data=2,expert=4", "expert=2,model=4", "data=2,expert=2,model=2")
ROWS = {"replicated": AxisRules(), "split": AxisRules().replace(batch=("data", "expert"))}
BATCH, LENGTH = 8, 5
# float32 sums of at most 24 products and 2 experts in another order; relative to the largest output.
TOLERANCE = 1e-5


def random_weights(seed: int, bias: np.ndarray) -> dict[str, np.ndarray]:
    """Weights whose router adds ``bias [E]`` to the scores of tokens that have 1 in their first place."""
    rng = np.random.default_rng(seed)
    e, f, d = SIZES.num_experts, SIZES.mlp_dim, SIZES.embed_dim
    shapes = {"router": (e, d), "gate_proj": (e, f, d), "up_proj": (e, f, d), "down_proj": (e, d, f)}
    weights = {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    weights["router"][:, 0] = bias
    return weights


def tokens(seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(BATCH, LENGTH, SIZES.embed_dim)).astype(np.float32)
    x[..., 0] = 1
    return x


def in_a_loop(weights: dict[str, np.ndarray], x: np.ndarray, per_token: int) -> tuple[np.ndarray, np.ndarray]:
    """The outputs, and how many tokens each expert got; float64."""
    rows = x.reshape(-1, x.shape[-1]).astype(np.float64)
    scores = rows @ weights["router"].astype(np.float64).T
    out, counts = np.zeros_like(rows), np.zeros(SIZES.num_experts, int)
    for row, score, target in zip(rows, scores, out, strict=True):
        chosen = np.argsort(-score)[:per_token]
        share = np.exp(score[chosen] - score[chosen].max())
        for expert, part in zip(chosen, share / share.sum(), strict=True):
            gate, up = weights["gate_proj"][expert] @ row, weights["up_proj"][expert] @ row
            target += part * (weights["down_proj"][expert] @ (gate / (1 + np.exp(-gate)) * up))
            counts[expert] += 1
    return out.reshape(x.shape), counts


@cache
def compiled(mesh_name: str, rows: str, per_token: int) -> Any:
    sizes = ExpertSizes(SIZES.embed_dim, SIZES.mlp_dim, SIZES.num_experts, per_token)
    function = model_function(Experts(sizes, rngs=nnx.Rngs(0)))
    mesh = MeshSpec.parse(mesh_name).build()

    @jax.jit
    def run(params: Any, x: jax.Array) -> jax.Array:
        with axis_scope(ROWS[rows], mesh):
            return function(params, x)

    return run


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("mesh_name", MESHES)
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 1000),
    bias=st.one_of(
        st.just([0.0] * 8),  # nearly uniform
        st.lists(st.floats(-4, 4), min_size=8, max_size=8),  # skewed
        st.integers(0, 7).map(lambda one: [50.0 * (e == one) for e in range(8)]),  # one expert gets every token
        st.integers(0, 3).map(lambda two: [50.0 * (e // 2 == two) for e in range(8)]),  # one device gets all of them
    ),
    per_token=st.sampled_from([1, 2]),
)
def test_equal_to_a_loop_over_experts(mesh_name: str, rows: str, seed: int, bias: list[float], per_token: int) -> None:
    weights, x = random_weights(seed, np.array(bias)), tokens(seed)
    expected, _ = in_a_loop(weights, x, per_token)
    found = np.asarray(compiled(mesh_name, rows, per_token)(weights, x))
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("mesh_name", MESHES)
def test_through_the_engine_at_the_collectives_of_the_layout(mesh_name: str, rows: str) -> None:
    weights, x = random_weights(1, np.linspace(-1, 1, 8)), tokens(2)
    engine = Engine(
        Experts(SIZES, rngs=nnx.Rngs(0)), weights, mesh=mesh_name, rules=ROWS[rows], example=x, buckets=[BATCH]
    )
    expected, _ = in_a_loop(weights, x, SIZES.experts_per_token)
    assert np.abs(engine.infer(x) - expected).max() <= TOLERANCE * np.abs(expected).max()
    for name in ("gate_proj", "up_proj", "down_proj"):
        local = engine.params[name].addressable_shards[0].data
        parts = dict(engine.mesh.shape)
        assert local.size * parts["expert"] * parts.get("model", 1) == weights[name].size
    (program,) = engine.programs
    found = Counter((each.kind, each.axes(engine.mesh), each.nbytes) for each in collectives(program.compiled))
    implied = expert_messages(engine.plan.mesh, ROWS[rows], ExpertWork(BATCH * LENGTH, BATCH, 16, 24, 8, 2))
    assert found == Counter((m.kind, m.axes, m.nbytes) for m in implied)


@pytest.mark.parametrize("counts", [[5, 0, 9, 2], [0, 0, 0, 0], [40, 0, 0, 0], [0, 0, 0, 40], [10, 10, 10, 10]])
def test_both_grouped_products_are_one(counts: list[int]) -> None:
    rng, rows = np.random.default_rng(0), 40
    x, source = jnp.asarray(rng.normal(size=(12, 6)), jnp.float32), jnp.asarray(rng.integers(0, 12, rows))
    gate, up = jnp.asarray(rng.normal(size=(2, 4, 10, 6)), jnp.float32)
    down = jnp.asarray(rng.normal(size=(4, 6, 10)), jnp.float32)
    share = jnp.asarray(rng.uniform(size=rows), jnp.float32)
    args = x, source, share, jnp.asarray(counts), gate, up, down
    ends = np.cumsum(counts)
    expert = np.searchsorted(ends, np.arange(rows), side="right")
    expected = np.zeros((12, 6))
    for row in range(ends[-1]):
        g, u, d = (np.asarray(w[expert[row]], np.float64) for w in (gate, up, down))
        h = g @ np.asarray(x[source[row]])
        expected[source[row]] += share[row] * (d @ (h / (1 + np.exp(-h)) * (u @ np.asarray(x[source[row]]))))
    for product in (_in_blocks, _ragged):
        found = product(4, *args) if product is _in_blocks else product(*args)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)  # sums of products of about 10


def test_tokens_are_counted() -> None:
    weights, x = random_weights(3, np.array([50.0, 0, 0, 0, 0, 0, 0, 0])), tokens(4)
    model = model_function(Experts(SIZES, rngs=nnx.Rngs(0))).rebuild(weights)
    counts = np.asarray(model.tokens_per_expert(jnp.asarray(x)))
    np.testing.assert_array_equal(counts, in_a_loop(weights, x, 2)[1])
    assert counts.sum() == 2 * BATCH * LENGTH
    assert counts[0] == BATCH * LENGTH
    assert float(imbalance(jnp.array([4, 4, 4, 4]))) == 1
    assert float(imbalance(jnp.array([8, 0, 0, 0]))) == 4
    assert float(imbalance(jnp.array([8, 0, 4, 4]), 2)) == 1


def test_bfloat16_follows_float32() -> None:
    weights, x = random_weights(5, np.zeros(8)), tokens(6)
    half = {name: jnp.asarray(w, jnp.bfloat16) for name, w in weights.items()}
    expected, _ = in_a_loop({name: np.asarray(w, np.float32) for name, w in half.items()}, x, 8)
    found = compiled("data=2,expert=4", "split", 8)(half, jnp.asarray(x, jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    # Every expert is chosen, so no choice can flip; three roundings of 2^-8 to a product.
    assert np.abs(np.asarray(found, np.float32) - expected).max() <= 0.03 * np.abs(expected).max()


def test_sizes_that_are_refused() -> None:
    with pytest.raises(ModelError, match="3 experts a token, of 2"):
        ExpertSizes(8, 8, 2, 3)
