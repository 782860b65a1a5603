"""Members of an ensemble along a mesh axis, combined on the devices."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import spmd_infer as si
from spmd_infer.errors import ModelError
from spmd_infer.planning.audit import collectives

X = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
MEMBERS = [nnx.Linear(16, 6, rngs=nnx.Rngs(seed)) for seed in range(4)]
EACH = np.stack([np.asarray(member(X)) for member in MEMBERS])
# float32 sums of 16 products and 4 members in another order.
TOLERANCE = 1e-5


def ensemble(aggregate: object, mesh: str = "member=4,data=2") -> si.Engine:
    states = [nnx.state(member) for member in MEMBERS]
    return si.Engine.ensemble(MEMBERS[0], states, aggregate=aggregate, mesh=mesh, example=X)


@pytest.mark.parametrize("mesh", ["member=4,data=2", "member=2,model=2,data=2", "data=8", "member=1"])
@pytest.mark.parametrize(
    ("aggregate", "expected"),
    [
        (si.Mean(), EACH.mean(0)),
        (si.WeightedMean([1, 2, 3, 4]), np.average(EACH, axis=0, weights=[1, 2, 3, 4])),
        (si.Max(), EACH.max(0)),
        (si.Min(), EACH.min(0)),
        (si.Concat(), EACH.swapaxes(0, 1)),
        (lambda x: jnp.median(x, axis=0), np.median(EACH, axis=0)),
    ],
    ids=["mean", "weighted", "max", "min", "concat", "callable"],
)
def test_members_combined(mesh: str, aggregate: object, expected: np.ndarray) -> None:
    np.testing.assert_allclose(ensemble(aggregate, mesh).infer(X), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_vote() -> None:
    votes = EACH.argmax(-1)
    expected = [np.bincount(votes[:, row], minlength=6).argmax() for row in range(len(X))]
    np.testing.assert_array_equal(ensemble(si.MajorityVote()).infer(X), expected)


def test_each_device_holds_its_member_and_results_meet_over_the_member_axis() -> None:
    engine = ensemble(si.Mean())
    engine.infer(X)
    assert {shard.data.shape[0] for shard in engine.params["kernel"].addressable_shards} == {1}
    (program,) = engine.programs
    found = collectives(program.compiled)
    assert {(each.kind, each.axes(engine.mesh)) for each in found} == {("all-reduce", ("member",))}


def test_members_that_differ() -> None:
    odd = nnx.Linear(16, 7, rngs=nnx.Rngs(0))
    with pytest.raises(ModelError, match="expected shape"):
        si.Engine.ensemble(MEMBERS[0], [nnx.state(MEMBERS[0]), nnx.state(odd)], aggregate=si.Mean(), mesh="data=1")
    with pytest.raises(ModelError, match="at least one member"):
        si.Engine.ensemble(MEMBERS[0], [], aggregate=si.Mean())
