"""Costs of pipelines and experts: checked by hand, and messages as the compiled programs have them."""

from dataclasses import replace

import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from spmd_infer.axes import AxisRules
from spmd_infer.engine import Engine
from spmd_infer.errors import PlanError
from spmd_infer.functional import model_function
from spmd_infer.mesh import MeshSpec
from spmd_infer.models.llama import Config, Llama, input_spec
from spmd_infer.planning.audit import collectives
from spmd_infer.planning.cost import MeshCost, cost_of
from spmd_infer.planning.estimates import Memory, Pipeline, StepTime
from spmd_infer.planning.hardware import Cluster, parse_cluster
from spmd_infer.planning.layout import weight_layouts
from spmd_infer.planning.parallel_costs import (
    ExpertWork,
    PipelineCost,
    expert_cost,
    expert_messages,
    message_time,
    pipeline_cost,
)
from spmd_infer.planning.tracing import read_work
from spmd_infer.planning.workload import Workload
from spmd_infer.staging import for_stages

CONFIG = Config(
    vocab_size=64, embed_dim=32, mlp_dim=64, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=8, context_len=64
)
ROWS, LENGTH = 16, 8
H100 = parse_cluster("8xH100")
SPLIT = AxisRules().replace(batch=("data", "expert"))


def step(config: Config, mesh: MeshSpec, rules: AxisRules, cluster: Cluster) -> MeshCost:
    model = model_function(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
    work = read_work(model, *Workload(rows=ROWS, sizes={"seq": LENGTH}).batch(input_spec(config), ROWS))
    return cost_of(mesh, rules, weight_layouts(model, rules, mesh.shape), work, cluster)


def cost(mesh_name: str, microbatches: int, cluster: Cluster = H100) -> PipelineCost:
    mesh = MeshSpec.parse(mesh_name)
    model = model_function(nnx.eval_shape(lambda: Llama(CONFIG, rngs=nnx.Rngs(0))))
    _, rules = for_stages(model, AxisRules().with_units(CONFIG.axis_units()), mesh.shape)
    layers = sum(p.size * 4 for path, p in model.params.items() if path.startswith("layers."))
    whole, outside = (step(replace(CONFIG, num_layers=n), mesh, rules, cluster) for n in (CONFIG.num_layers, 0))
    layers //= mesh.shape.get("model", 1)
    shape = Pipeline(mesh.shape["stage"], CONFIG.num_layers, microbatches)
    return pipeline_cost(whole, outside, layers, LENGTH * CONFIG.embed_dim * 4, ROWS, shape, mesh, rules, cluster)


@pytest.mark.parametrize("mesh_name", ["stage=2", "stage=2,data=2", "stage=2,data=2,model=2", "stage=4"])
def test_permutes_are_those_of_the_program(mesh_name: str) -> None:
    ids = np.zeros((ROWS, LENGTH), np.int32)
    engine = Engine(Llama(CONFIG, rngs=nnx.Rngs(0)), mesh=mesh_name, example=ids, buckets=[ROWS])
    engine.infer(ids)
    (program,) = engine.programs
    found = sorted(c.nbytes for c in collectives(program.compiled) if c.kind == "collective-permute")
    stages = engine.mesh.shape["stage"]
    assert engine.plan.chosen.pipeline is not None
    count = engine.plan.chosen.pipeline.microbatches
    predicted = cost(mesh_name, count).permutes
    # Once in the program's loop: activations go on, and others make room. In a step once a tick.
    assert found == [predicted.nbytes] * 2
    assert predicted.times == 2 * (count + stages - 1)


def test_more_microbatches_idle_less_and_read_weights_more_often() -> None:
    few, many = cost("stage=4", 4), cost("stage=4", 16)
    assert few.bubble == pytest.approx(3 / 7)
    assert many.bubble == pytest.approx(3 / 19)
    assert many.time.compute < few.time.compute
    assert many.time.memory > few.time.memory
    assert many.permutes.nbytes * many.permutes.times < few.permutes.nbytes * few.permutes.times


def test_arithmetic_of_a_pipeline_by_hand() -> None:
    mesh, memory, rules = MeshSpec.of(stage=4), Memory(0, 0, 0, 0), AxisRules().replace(batch=("data", "stage"))
    whole, outside = MeshCost(memory, StepTime(8.0, 0.0, 0.0), {}), MeshCost(memory, StepTime(2.0, 0.0, 0.0), {})
    found = pipeline_cost(whole, outside, 0, 0, 12, Pipeline(4, 8, 12), mesh, rules, H100)
    # Six seconds of layers in 12 micro-batches, and three ticks of bubble.
    messages = message_time((found.permutes,), mesh, H100)
    assert found.time.total == pytest.approx(2 + 6 / 12 * 15 + messages)
    assert (found.permutes.nbytes, found.permutes.times) == (0, 30)
    # Of nine layers the first stage has three; it sets the pace, but not on simulated devices, which share a machine.
    uneven = pipeline_cost(whole, outside, 0, 0, 12, Pipeline(4, 9, 12), mesh, rules, H100)
    assert uneven.time.total == pytest.approx(2 + 6 / 12 * 15 * 12 / 9 + messages)
    simulated = parse_cluster("8xcpu")
    shared = pipeline_cost(whole, outside, 0, 0, 12, Pipeline(4, 9, 12), mesh, rules, simulated)
    assert shared.time.total == pytest.approx(2 + 6 + message_time((shared.permutes,), mesh, simulated))


def test_a_pipeline_needs_the_work() -> None:
    nothing = MeshCost(Memory(0, 0, 0, 0), None, {})
    with pytest.raises(PlanError, match="needs the work of a step"):
        pipeline_cost(nothing, nothing, 0, 0, 8, Pipeline(2, 4, 4), MeshSpec.of(stage=2), AxisRules(), H100)


WORK = ExpertWork(tokens=4096, rows=64, embed_dim=512, mlp_dim=1024, num_experts=8, experts_per_token=2, itemsize=2)


def test_messages_of_experts() -> None:
    mesh = MeshSpec.parse("data=2,expert=2,model=2")
    half = 4096 // 2 * 512 * 2
    replicated = expert_messages(mesh, AxisRules(), WORK)
    assert [(m.kind, m.axes, m.nbytes) for m in replicated] == [("all-reduce", ("expert", "model"), half)]
    split = expert_messages(mesh, SPLIT, WORK)
    assert [(m.kind, m.axes, m.nbytes) for m in split] == [
        ("all-gather", ("expert",), half),
        ("reduce-scatter", ("expert",), half // 2),
        ("all-reduce", ("model",), half // 2),
    ]
    assert expert_messages(MeshSpec.of(data=8), SPLIT, WORK) == ()


def test_arithmetic_of_experts_by_hand() -> None:
    mesh = MeshSpec.of(data=1, expert=8)
    found = expert_cost(mesh, SPLIT, WORK, H100, "bfloat16")
    device = H100.device
    flops = 2 * 3 * 512 * 1024 * 4096 * 2 / 8
    assert found.compute == pytest.approx(flops / (device.peak("bfloat16") * device.matmul_efficiency))
    assert found.collectives == message_time(expert_messages(mesh, SPLIT, WORK), mesh, H100)


def test_blocks_of_experts_reach_a_part_of_what_large_products_do() -> None:
    mesh, simulated = MeshSpec.of(data=1, expert=8), parse_cluster("8")
    rates = simulated.device.simulated
    halved = replace(
        simulated,
        device=replace(
            simulated.device,
            expert_efficiency=simulated.device.expert_efficiency / 2,
            simulated={n: replace(each, expert_efficiency=each.expert_efficiency / 2) for n, each in rates.items()},
        ),
    )
    slow, usual = (expert_cost(mesh, SPLIT, WORK, cluster, "float32") for cluster in (halved, simulated))
    assert slow.compute == pytest.approx(2 * usual.compute)
    assert (slow.memory, slow.collectives) == (usual.memory, usual.collectives)


@given(imbalance=st.floats(1, 8))
def test_the_busiest_device_sets_the_time_unless_the_machine_is_shared(imbalance: float) -> None:
    mesh = MeshSpec.of(data=1, expert=8)
    crowded = replace(WORK, imbalance=imbalance)
    even = expert_cost(mesh, SPLIT, WORK, H100, "bfloat16")
    assert expert_cost(mesh, SPLIT, crowded, H100, "bfloat16").compute == pytest.approx(imbalance * even.compute)
    shared = parse_cluster("8")
    assert expert_cost(mesh, SPLIT, crowded, shared, "float32") == expert_cost(mesh, SPLIT, WORK, shared, "float32")


def test_one_token_reads_only_its_experts() -> None:
    mesh = MeshSpec.of(data=1)
    one = expert_cost(mesh, SPLIT, replace(WORK, tokens=1, rows=1), H100, "bfloat16")
    weights = 3 * 512 * 1024 * 2 * 2  # two experts of eight
    assert one.memory * H100.device.bandwidth * H100.device.bandwidth_efficiency == pytest.approx(weights, rel=0.01)
