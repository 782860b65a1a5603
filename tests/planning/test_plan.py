"""What the planner chooses, refuses and says."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import spmd_infer as si
from spmd_infer.errors import AxisError, DoesNotFitError, PlanError
from spmd_infer.functional import model_function
from spmd_infer.models.llama import Config, Llama
from spmd_infer.models.llama import input_spec as llama_inputs
from spmd_infer.planning.audit import collectives
from spmd_infer.planning.hardware import found_cluster, hardware_table, parse_cluster
from spmd_infer.planning.search import make_plan
from spmd_infer.planning.workload import Workload

LARGE = Config(
    vocab_size=128256,
    embed_dim=8192,
    mlp_dim=28672,
    num_layers=4,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    context_len=8192,
)

SMALL = Config(
    vocab_size=96, embed_dim=32, mlp_dim=64, num_layers=2, num_heads=8, num_kv_heads=8, head_dim=4, context_len=64
)


def plan_llama(config: Config, devices: str, rows: int, length: int, dtype: object = jnp.bfloat16) -> si.MeshPlan:
    model = model_function(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
    params = {path: jax.ShapeDtypeStruct(p.shape, dtype) for path, p in model.params.items()}
    return make_plan(
        model.with_params(params),
        parse_cluster(devices),
        inputs=llama_inputs(config),
        workload=Workload(rows=rows, sizes={"seq": length}),
        units=dict(config.axis_units()),
    )


def test_a_single_row_is_split_over_the_model_and_many_rows_over_the_data() -> None:
    assert plan_llama(LARGE, "8xH100", rows=1, length=1).mesh == si.MeshSpec.of(data=1, model=8)
    assert plan_llama(LARGE, "8xH100", rows=64, length=512).mesh.shape["data"] > 1


def test_memory_decides_when_whole_copies_do_not_fit() -> None:
    plan = plan_llama(replace(LARGE, num_layers=16), "8xL4", rows=64, length=128)
    assert plan.mesh.shape["model"] * plan.mesh.shape.get("stage", 1) > 1
    refused = {str(c.mesh): c.rejected for c in plan.candidates if c.rejected.startswith("does not fit")}
    assert "data=8,model=1" in refused


def test_refusal_names_bytes_and_what_would_fit() -> None:
    with pytest.raises(DoesNotFitError) as caught:
        plan_llama(LARGE, "1xRTX4090", rows=1, length=16, dtype=jnp.float32)
    error = caught.value
    assert error.available_bytes == int(24e9 * 0.9)
    assert error.needed_bytes > error.available_bytes
    assert f"{error.needed_bytes:,}" in str(error)
    assert "at least 2 devices" in str(error)


def test_a_given_mesh_that_does_not_fit_names_one_that_would() -> None:
    params = {"w": jax.ShapeDtypeStruct((1 << 17, 1 << 17), jnp.bfloat16)}
    with pytest.raises(DoesNotFitError, match="mesh data=1,model=8 would fit"):
        si.plan(lambda p, x: x @ p["w"], params, devices="8xL4", mesh="data=8,model=1")


def test_weights_in_memory_are_exact(mesh_text: str) -> None:
    model = Llama(SMALL, rngs=nnx.Rngs(0))
    engine = si.Engine(model, mesh=mesh_text, inputs=llama_inputs(SMALL), buckets=[8])
    assert set(engine.memory().weights.values()) == {engine.plan.chosen.memory.weights}


def test_collectives_foreseen_are_those_that_xla_inserts(mesh_text: str) -> None:
    model = Llama(SMALL, rngs=nnx.Rngs(0))
    engine = si.Engine(model, mesh=mesh_text, inputs=llama_inputs(SMALL), buckets=[8])
    engine.infer({"input_ids": np.ones((8, 16), np.int32)})
    found = collectives(engine.programs[0].compiled)
    words = f"{len(found)} all-reduce over model" if found else "none"
    assert engine.plan.chosen.collectives == words


def test_explanation_and_json_say_the_same() -> None:
    plan = si.plan(
        nnx.Linear(256, 512, rngs=nnx.Rngs(0)), devices=8, mesh="data=2,model=4", example=np.ones((4, 256), np.float32)
    )
    text, data = plan.explain(), json.loads(json.dumps(plan.to_dict()))
    for candidate in data["candidates"]:
        mesh = ",".join(f"{axis}={size}" for axis, size in candidate["mesh"].items())
        assert mesh in text
    assert data["mesh"] == {"data": 2, "model": 4}
    assert [c["rejected"] is None for c in data["candidates"]] == [True, False, False, False]
    assert "2 weights name no axes" in text
    assert "devices 3,7" in text  # the picture: who holds the last quarter of the kernel


def test_without_a_batch_only_weights_count() -> None:
    plan = si.plan(nnx.Linear(256, 512, rngs=nnx.Rngs(0)), devices=8)
    assert plan.mesh.shape == {"data": 8, "model": 1}
    assert "unknown" in plan.explain()
    assert plan.chosen.time is None


def test_a_model_that_cannot_be_traced_is_planned_from_its_weights() -> None:
    inputs = si.InputSpec(("batch", "n"), np.float32)  # the planner tries n=128
    plan = si.plan(lambda p, x: x @ p, jnp.ones((4, 2)), devices=2, inputs=inputs)
    assert "planned from the weights alone" in plan.notes[0]


def test_collisions_of_axes() -> None:
    class Odd(nnx.Module):
        def __init__(self) -> None:
            self.w = nnx.Param(jnp.ones((8, 8)), axes=("mlp", "heads"))

        def __call__(self, x: jax.Array) -> jax.Array:
            return x @ self.w

    example = np.ones((8, 8), np.float32)
    with pytest.raises(AxisError, match="'mlp' and 'heads'"):
        si.plan(Odd(), devices=8, mesh="data=4,model=2", example=example)
    plan = si.plan(Odd(), devices=8, example=example)
    assert plan.mesh.shape == {"data": 8, "model": 1}
    assert any("'mlp' and 'heads'" in candidate.rejected for candidate in plan.candidates)


@settings(max_examples=30, deadline=None)
@given(
    count=st.sampled_from([1, 2, 3, 5, 6, 8, 12]),
    width=st.sampled_from([7, 8, 30, 192]),
    rows=st.integers(1, 17),
    heads=st.integers(1, 12),
)
def test_any_sizes_give_a_plan_whose_specs_divide(count: int, width: int, rows: int, heads: int) -> None:
    class Net(nnx.Module):
        def __init__(self) -> None:
            self.up = nnx.Param(jnp.zeros((width, heads * 8)), axes=("embed", "heads"))
            self.bare = nnx.Param(jnp.zeros((heads * 8, width * 512)))

        def __call__(self, x: jax.Array) -> jax.Array:
            return x @ self.up @ self.bare

    rules = si.AxisRules().with_units({"heads": heads})
    plan = si.plan(
        nnx.eval_shape(Net), devices=count, batch=rows, inputs=si.InputSpec(("batch", width), np.float32), rules=rules
    )
    assert plan.mesh.size == count
    for layout in plan.weights:
        for size, axis in zip(layout.shape, layout.spec, strict=False):
            assert axis is None or size % plan.mesh.shape[axis] == 0
        if layout.path == "up" and layout.spec and layout.spec[1]:
            assert heads % plan.mesh.shape["model"] == 0


def test_hardware() -> None:
    assert str(parse_cluster("16xH100", hosts=2)) == "16 h100 devices on 2 hosts"
    assert parse_cluster("8").device.name == "cpu"
    assert found_cluster(jax.devices()).count == 8
    for device, names in hardware_table().values():
        assert device.flops["bfloat16"] > 0
        assert device.memory_bytes >= 16e9
        assert names
    for bad in ("16xABC", "x8", "0", "many"):
        with pytest.raises(PlanError, match="cannot read devices"):
            parse_cluster(bad)
    with pytest.raises(PlanError, match="evenly over 3 hosts"):
        parse_cluster("16xH100", hosts=3)


@pytest.mark.demo
def test_checkpoints_are_planned_without_reading_them(smollm2: Path) -> None:
    plan = si.plan(smollm2, devices="16xH100", hosts=2, batch=32, length=2000)
    assert plan.mesh.size == 16
    assert "9 heads do not divide over model=4" in si.plan(smollm2, devices=8, mesh="data=2,model=4").explain()
