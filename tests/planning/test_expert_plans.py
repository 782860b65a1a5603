"""Plans for models with blocks of experts: found in the model, costed, and laid out as the plan says."""

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import spmd_infer as si
from spmd_infer.functional import model_function
from spmd_infer.models.experts import Experts, ExpertSizes
from spmd_infer.models.layers import Linear
from spmd_infer.planning.audit import collectives
from spmd_infer.planning.cost import Traffic
from spmd_infer.planning.experts import without_experts

SIZES = ExpertSizes(embed_dim=64, mlp_dim=128, num_experts=8, experts_per_token=2)
ROWS, LENGTH = 16, 8
X = np.random.default_rng(0).normal(size=(ROWS, LENGTH, 64)).astype(np.float32)


class Mixture(nnx.Module):
    def __init__(self, sizes: ExpertSizes = SIZES, depth: int = 2) -> None:
        rngs = nnx.Rngs(0)
        self.blocks = nnx.List([Experts(sizes, rngs=rngs) for _ in range(depth)])
        self.head = Linear(sizes.embed_dim, 32, axes=("vocab", "embed"), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def test_blocks_are_found_wherever_they_hang() -> None:
    _, seen = without_experts(model_function(nnx.eval_shape(Mixture)))
    assert seen.sizes == [SIZES, SIZES]
    _, alone = without_experts(model_function(Experts(SIZES, rngs=nnx.Rngs(0))))
    assert alone.sizes == [SIZES]
    plain = model_function(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    assert without_experts(plain)[0] is plain


@pytest.mark.parametrize("mesh", ["data=2,expert=4", "data=1,expert=8", "data=2,expert=2,model=2"])
def test_messages_are_those_of_the_program(mesh: str) -> None:
    expected = si.Engine(Mixture(), mesh="data=1", example=X).infer(X)
    engine = si.Engine(Mixture(), mesh=mesh, example=X, buckets=[ROWS], workload=si.Workload(rows=ROWS))
    assert np.abs(engine.infer(X) - expected).max() <= 1e-5 * np.abs(expected).max()
    found: dict[tuple[str, tuple[str, ...]], Traffic] = {}
    for each in collectives(engine.programs[0].compiled):
        key = (each.kind, each.axes(engine.mesh))
        known = found.get(key, Traffic())
        found[key] = Traffic(known.count + 1, known.nbytes + each.nbytes)
    said = engine.plan.chosen.collectives
    assert said == ", ".join(f"{t.count} {kind} over {','.join(axes)}" for (kind, axes), t in sorted(found.items()))
    assert set(engine.memory().weights.values()) == {engine.plan.chosen.memory.weights}


def test_large_experts_are_spread_over_devices() -> None:
    sizes = ExpertSizes(embed_dim=4096, mlp_dim=14336, num_experts=8, experts_per_token=2)
    model = nnx.eval_shape(lambda: Mixture(sizes, depth=32))  # 180 GB in float32
    inputs = si.InputSpec(("batch", "seq", 4096), np.float32)
    plan = si.plan(model, devices="8xH100", inputs=inputs, batch=64, length=256)
    meshes = {str(candidate.mesh) for candidate in plan.candidates}
    assert {"data=4,expert=2,model=1", "data=1,expert=8,model=1", "data=2,expert=2,model=2"} <= meshes
    assert plan.chosen.memory.total < plan.available
    assert "1-D, rows over experts" in {candidate.layout for candidate in plan.candidates}


@given(count=st.sampled_from([2, 3, 4, 6, 8]), experts=st.integers(1, 12), rows=st.integers(1, 9))
def test_any_number_of_experts_gives_meshes_that_divide(count: int, experts: int, rows: int) -> None:
    sizes = ExpertSizes(embed_dim=8, mlp_dim=24, num_experts=experts, experts_per_token=1)
    plan = si.plan(
        nnx.eval_shape(lambda: Mixture(sizes, depth=1)),
        devices=count,
        batch=rows,
        inputs=si.InputSpec(("batch", 4, 8), np.float32),
    )
    for candidate in plan.candidates:
        assert experts % candidate.mesh.shape.get("expert", 1) == 0
        assert candidate.mesh.size == count
