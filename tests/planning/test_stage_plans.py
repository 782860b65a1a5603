"""Plans with stages: when they are chosen, what they say, and that they are what an engine then does."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import spmd_infer as si
from spmd_infer.axes import AxisRules
from spmd_infer.errors import DoesNotFitError, ModelError
from spmd_infer.functional import model_function
from spmd_infer.models.bert import Bert
from spmd_infer.models.bert import Config as BertConfig
from spmd_infer.models.bert import input_spec as bert_inputs
from spmd_infer.models.llama import Config, Llama, input_spec
from spmd_infer.models.pipeline import bubble_share
from spmd_infer.planning.audit import collectives
from spmd_infer.planning.hardware import Cluster, found_cluster, parse_cluster
from spmd_infer.planning.page import page
from spmd_infer.planning.search import make_plan
from spmd_infer.planning.workload import Workload
from spmd_infer.staging import layer_count, without_layers

CONFIG = Config(
    vocab_size=64, embed_dim=32, mlp_dim=64, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=8, context_len=64
)
ROWS, LENGTH = 16, 8
IDS = {"input_ids": np.random.default_rng(0).integers(0, 64, (ROWS, LENGTH)).astype(np.int32)}
TRAFFIC = Workload(rows=ROWS, sizes={"seq": LENGTH})
DEEP = BertConfig(vocab_size=30001, embed_dim=3072, mlp_dim=12289, num_layers=24, num_heads=3, max_positions=512)


def over_a_slow_network(memory: float = 80e9) -> Cluster:
    """Two hosts of four devices, between which messages are dear."""
    cluster = parse_cluster("8xH100", hosts=2)
    return replace(cluster, device=replace(cluster.device, network=1e9, memory_bytes=int(memory)))


def deep_plan(cluster: Cluster, rows: int) -> si.MeshPlan:
    model = model_function(nnx.eval_shape(lambda: Bert(DEEP, rngs=nnx.Rngs(0))))
    model = model.with_params({p: jax.ShapeDtypeStruct(v.shape, jnp.bfloat16) for p, v in model.params.items()})
    return make_plan(
        model,
        cluster,
        inputs=bert_inputs(DEEP),
        workload=Workload(rows=rows, sizes={"seq": 128}),
        units=dict(DEEP.axis_units()),
    )


def test_stages_are_chosen_where_nothing_else_fits() -> None:
    # Three heads do not divide over 2, 4 or 8 devices, and whole copies do not fit: only the layers can be split.
    plan = deep_plan(over_a_slow_network(memory=4.5e9), rows=64)
    assert plan.mesh.shape["stage"] > 1
    assert plan.chosen.pipeline is not None
    copies = [c for c in plan.candidates if c.pipeline is None and c.layout == AxisRules().name]
    assert len(copies) == 4
    assert all("does not fit" in c.rejected for c in copies)


def test_copies_are_simpler_where_they_fit() -> None:
    plan = deep_plan(over_a_slow_network(), rows=64)
    assert "stage" not in plan.mesh.shape
    staged = [c for c in plan.candidates if c.pipeline is not None]
    assert {c.mesh.shape["stage"] for c in staged} == {2, 4, 8}
    assert all(c.rejected for c in staged)


def test_bubble_and_microbatches_are_said() -> None:
    model = nnx.eval_shape(lambda: Llama(CONFIG, rngs=nnx.Rngs(0)))
    plan = si.plan(model, devices=8, mesh="stage=4,data=2", inputs=input_spec(CONFIG), batch=ROWS, length=LENGTH)
    assert plan.chosen.pipeline is not None
    count = plan.chosen.pipeline.microbatches
    bubble = bubble_share(4, count)
    assert plan.chosen.pipeline.bubble == bubble
    chosen = json.loads(json.dumps(plan.to_dict()))["candidates"][0]
    assert chosen["pipeline"] == {
        "stages": 4,
        "layers_per_stage": 1,
        "microbatches": count,
        "ticks": count + 3,
        "bubble_share": bubble,
    }
    assert f"idle {bubble:.0%}" in plan.explain()
    assert f"a batch passes in {count} micro-batches" in plan.explain()
    assert f"{bubble:.0%} of the time" in page(plan)


@pytest.mark.parametrize("mesh", ["stage=2", "stage=2,data=2,model=2", "stage=4,model=2"])
def test_the_engine_does_what_the_plan_says(mesh: str) -> None:
    engine = si.Engine(
        Llama(CONFIG, rngs=nnx.Rngs(0)), mesh=mesh, inputs=input_spec(CONFIG), buckets=[ROWS], workload=TRAFFIC
    )
    engine.infer(IDS)
    (program,) = engine.programs
    found = collectives(program.compiled)
    pipeline = engine.plan.chosen.pipeline
    assert pipeline is not None
    # The program's loop has each collective of a tick once.
    layers = 2 * pipeline.depth if engine.mesh.shape.get("model", 1) > 1 else 0
    words = [f"{2 * pipeline.ticks} collective-permute over stage"]
    words = [f"{layers * pipeline.microbatches + 1} all-reduce over model", *words] if layers else words
    assert engine.plan.chosen.collectives == ", ".join(words)
    kinds = [collective.kind for collective in found]
    assert kinds.count("collective-permute") == 2
    assert kinds.count("all-reduce") == (layers + 1 if layers else 0)
    assert set(engine.memory().weights.values()) == {engine.plan.chosen.memory.weights}


def test_a_plan_with_stages_is_taken_as_it_is() -> None:
    module = Llama(CONFIG, rngs=nnx.Rngs(0))
    plan = si.plan(module, devices=8, mesh="stage=2,model=4", inputs=input_spec(CONFIG), batch=ROWS, length=LENGTH)
    expected = si.Engine(module, mesh="data=1", inputs=input_spec(CONFIG), buckets=[ROWS]).infer(IDS)
    engine = si.Engine(module, mesh=plan, inputs=input_spec(CONFIG), buckets=[ROWS])
    assert engine.plan.candidates == plan.candidates
    assert dict(engine.mesh.shape) == {"stage": 2, "model": 4}
    assert np.abs(engine.infer(IDS) - expected).max() <= 1e-4 * np.abs(expected).max()


def test_generation_is_planned_without_stages_unless_they_are_given() -> None:
    plan = si.plan("llama-3.1-8b", devices="8xH100", batch=4)
    assert all(candidate.pipeline is None for candidate in plan.candidates)
    given = si.plan("llama-3.1-8b", devices="8xH100", batch=16, mesh="stage=8")
    assert [phase.name for phase in given.chosen.phases] == ["prefill", "decode"]
    assert given.chosen.pipeline is not None
    assert given.chosen.pipeline.microbatches == 8
    whole = si.plan("llama-3.1-8b", devices="1xH100", batch=16)
    assert given.chosen.memory.cache == pytest.approx(whole.chosen.memory.cache / 8)


def test_stages_that_do_not_divide_the_layers() -> None:
    model = nnx.eval_shape(lambda: Llama(CONFIG, rngs=nnx.Rngs(0)))
    uneven = si.plan(model, devices=6, mesh="stage=3,data=2", inputs=input_spec(CONFIG), batch=ROWS, length=LENGTH)
    even = si.plan(model, devices=4, mesh="stage=2,data=2", inputs=input_spec(CONFIG), batch=ROWS, length=LENGTH)
    assert uneven.chosen.memory.weights == even.chosen.memory.weights  # two layers in the fullest stage
    assert "pipeline of 3 stages, 1 or 2 layers each" in uneven.explain()
    with pytest.raises(ModelError, match=r"4 layers of Llama cannot be shared out over 8 stages: .* use 2 to 4 stages"):
        si.plan(model, devices=8, mesh="stage=8", inputs=input_spec(CONFIG))
    assert layer_count(model_function(model)) == 4
    assert layer_count(model_function(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))) == 0
    with pytest.raises(ModelError, match="does not say which"):
        without_layers(model_function(nnx.Linear(2, 2, rngs=nnx.Rngs(0))))


def test_a_plan_for_larger_devices_is_refused_with_numbers() -> None:
    params = {"w": jax.ShapeDtypeStruct((1 << 23, 1 << 17), jnp.bfloat16)}
    cluster = parse_cluster("1xH100")
    huge = replace(cluster, device=replace(cluster.device, memory_bytes=10**13))
    plan = si.plan(lambda p, x: x @ p["w"], params, devices=huge)
    with pytest.raises(DoesNotFitError, match=r"made for 1 h100 device.* 2,199,023,255,552 bytes a device"):
        si.Engine(lambda p, x: x @ p["w"], params, mesh=plan)


def test_a_plan_for_other_devices_says_so() -> None:
    module = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    plan = si.plan(module, devices="8xH100", example=np.ones((8, 8), np.float32))
    engine = si.Engine(module, mesh=plan)
    assert any("running on 8 simulated cpu devices" in note for note in engine.plan.notes)
    own = make_plan(model_function(module), found_cluster(jax.devices()), rules=AxisRules())
    assert si.Engine(module, mesh=own).plan is own
