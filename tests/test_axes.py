import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from spmd_infer.axes import AxisRules, axis_scope, constrain
from spmd_infer.errors import AxisError
from spmd_infer.mesh import MeshSpec

MESH = {"data": 2, "model": 4}


def test_default_rules_are_megatron() -> None:
    rules = AxisRules()
    assert rules.resolve(("mlp", "embed"), (64, 16), MESH).spec == PartitionSpec("model")
    assert rules.resolve(("embed", "mlp"), (16, 64), MESH).spec == PartitionSpec(None, "model")
    assert rules.resolve(("batch", "seq", "embed"), (8, 5, 16), MESH).spec == PartitionSpec("data")


def test_what_does_not_divide_stays_whole_and_is_told() -> None:
    resolved = AxisRules().resolve(("heads", "embed"), (9, 16), MESH)
    assert resolved.spec == PartitionSpec()
    assert resolved.replicated == (("heads", 9, "model", 4),)


def test_units_keep_a_fused_dimension_from_being_cut_inside_a_head() -> None:
    rules = AxisRules().with_units({"heads": 9})
    assert AxisRules().resolve(("heads", "embed"), (576, 16), MESH).spec == PartitionSpec("model")
    assert rules.resolve(("heads", "embed"), (576, 16), MESH).spec == PartitionSpec()


def test_collision_names_both_logical_axes() -> None:
    with pytest.raises(AxisError, match=r"'mlp' and 'heads' .* 'model'"):
        AxisRules().resolve(("mlp", "heads"), (8, 8), MESH)


def test_rank_and_rule_errors() -> None:
    with pytest.raises(AxisError, match="name 1 dimensions"):
        AxisRules().resolve(("mlp",), (8, 8), MESH)
    with pytest.raises(AxisError, match="no mesh axis of that name"):
        AxisRules({"mlp": "tensor"})


def test_a_mesh_axis_stands_for_itself() -> None:
    assert AxisRules().resolve(("model", None), (8, 8), MESH).spec == PartitionSpec("model")


@given(
    axes=st.lists(st.sampled_from(["batch", "mlp", "embed", "width", "unknown", None]), max_size=4, unique=True),
    sizes=st.lists(st.integers(1, 48), min_size=4, max_size=4),
    data=st.integers(1, 5),
    model=st.integers(1, 7),
)
def test_a_spec_always_divides(axes: list[str | None], sizes: list[int], data: int, model: int) -> None:
    mesh = {"data": data, "model": model, "seq": 3}
    shape = sizes[: len(axes)]
    spec = AxisRules().resolve(tuple(axes), shape, mesh).spec
    assert all(size % mesh[axis] == 0 for size, axis in zip(shape, spec, strict=False) if axis is not None)


def test_constrain_without_a_scope_changes_nothing() -> None:
    x = jnp.ones((2, 3))
    assert constrain(x, "batch", "embed") is x
    with pytest.raises(AxisError, match=r"3 axes .* shape \(2, 3\)"):
        constrain(x, "batch", "seq", "embed")


def test_constrain_lays_an_activation_out() -> None:
    mesh = MeshSpec.parse("data=2,model=4").build()

    @jax.jit
    def program(x: jax.Array) -> jax.Array:
        with axis_scope(AxisRules(), mesh):
            return constrain(x * 2, "batch", "mlp")

    y = program(np.ones((4, 8), np.float32))
    assert y.sharding.spec == PartitionSpec("data", "model")
    assert {shard.data.shape for shard in y.addressable_shards} == {(2, 2)}
