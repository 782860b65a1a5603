"""Pipelines: results as without stages, weights only on their stage, nothing but permutes over stages."""

from collections import Counter
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from spmd_infer.axes import AxisRules, axis_scope
from spmd_infer.engine import Engine
from spmd_infer.errors import BatchError, ModelError
from spmd_infer.functional import model_function
from spmd_infer.mesh import MeshSpec
from spmd_infer.models.bert import Bert
from spmd_infer.models.bert import Config as BertConfig
from spmd_infer.models.cnn import Config as CNNConfig
from spmd_infer.models.cnn import SmallCNN
from spmd_infer.models.llama import Config, Llama
from spmd_infer.models.pipeline import Stages, bubble_share, microbatch_count
from spmd_infer.planning.audit import Collective, collectives
from spmd_infer.planning.layouts import find_layout
from spmd_infer.staging import pipelined
from tests.references.llama_variants import token_ids, write_checkpoint

# float32 sums in another order, relative to the largest value.
TOLERANCE = 1e-4
LAYERS, ROWS, LENGTH = 4, 16, 12
MESHES = ("stage=4,data=2", "stage=2,data=2,model=2", "stage=2,model=4", "stage=4")
BERT = BertConfig(vocab_size=60, embed_dim=24, mlp_dim=40, num_layers=LAYERS, num_heads=4, max_positions=32)
LLAMA = Config(
    vocab_size=64, embed_dim=16, mlp_dim=32, num_layers=6, num_heads=4, num_kv_heads=2, head_dim=4, context_len=64
)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@cache
def checkpoint() -> tuple[TemporaryDirectory[str], np.ndarray]:
    folder = TemporaryDirectory()
    write_checkpoint(Path(folder.name), "gqa", num_hidden_layers=LAYERS)
    return folder, Engine.load(folder.name, mesh="data=1").infer({"input_ids": token_ids(ROWS, LENGTH)})


def audited(engine: Engine) -> list[Collective]:
    (program,) = engine.programs
    return collectives(program.compiled)


@pytest.mark.parametrize("mesh_name", MESHES)
def test_llama_from_a_checkpoint(mesh_name: str) -> None:
    folder, expected = checkpoint()
    engine = Engine.load(folder.name, mesh=mesh_name, buckets=[ROWS])
    assert relative_error(engine.infer({"input_ids": token_ids(ROWS, LENGTH)}), expected) <= TOLERANCE
    shape = dict(engine.mesh.shape)
    used = audited(engine)
    over_stages = [each for each in used if "stage" in each.axes(engine.mesh)]
    # Once in the loop over ticks: activations go on to the next stage, and others make room behind them.
    rows = ROWS // microbatch_count(ROWS, shape["stage"], shape.get("data", 1)) // shape.get("data", 1)
    width = engine.config.embed_dim
    assert Counter((each.kind, each.axes(engine.mesh), each.nbytes) for each in over_stages) == {
        ("collective-permute", ("stage",), rows * LENGTH * width * 4): 2,
    }
    others = Counter((each.kind, each.axes(engine.mesh)) for each in used if each not in over_stages)
    # The embedding once, attention and feed-forward of each of a stage's own layers.
    summed = {("all-reduce", ("model",)): 1 + 2 * LAYERS // shape["stage"]} if shape.get("model", 1) > 1 else {}
    assert others == summed


@pytest.mark.parametrize("mesh_name", MESHES[:2])
def test_bert_with_padding_and_uneven_batches(mesh_name: str) -> None:
    module = Bert(BERT, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 60, (21, 9)).astype(np.int32)
    mask = (np.arange(9) < rng.integers(1, 10, (21, 1))).astype(np.int32)
    batch = {"input_ids": ids, "attention_mask": mask}
    expected = Engine(module, mesh="data=1", example=batch).infer(batch)["last_hidden_state"]
    engine = Engine(module, mesh=mesh_name, example=batch, buckets=[16])
    found = engine.infer(batch)["last_hidden_state"]
    assert relative_error(found, expected) <= TOLERANCE
    used = Counter((each.kind, each.nbytes) for each in audited(engine) if "stage" in each.axes(engine.mesh))
    assert used.pop(("all-gather", 16 * 9 * 4 // engine.mesh.shape["data"])) == 1  # segments, once
    assert {kind for kind, _ in used} == {"collective-permute"}


@pytest.mark.parametrize(
    ("mesh_name", "layout"), [("stage=2,seq=2", "ring"), ("stage=2,data=2,model=2", "2d"), ("stage=2,seq=2", "1d")]
)
def test_with_other_layouts_inside_a_stage(mesh_name: str, layout: str) -> None:
    folder, expected = checkpoint()
    engine = Engine.load(folder.name, mesh=mesh_name, rules=find_layout(layout), buckets=[ROWS])
    assert relative_error(engine.infer({"input_ids": token_ids(ROWS, LENGTH)}), expected) <= TOLERANCE
    kinds = {(each.kind, each.axes(engine.mesh)) for each in audited(engine)}
    assert {kind for kind, axes in kinds if "stage" in axes} == {"collective-permute"}
    inside = {"ring": ("collective-permute", ("seq",)), "2d": ("all-reduce", ("data",)), "1d": ("all-gather", ("seq",))}
    assert inside[layout] in kinds


def test_weights_lie_on_their_stage_only() -> None:
    folder, _ = checkpoint()
    engine = Engine.load(folder.name, mesh="stage=2,model=4")
    plain = Engine.load(folder.name, mesh="data=1")
    assert engine.family is not None
    assert engine.config is not None
    stacks = pipelined(model_function(engine.family.abstract(engine.config)), 2).sources
    assert len(stacks) == LAYERS // 2 * 9
    for path, sources in stacks.items():
        stack = engine.params[path]
        assert stack.shape == (2, *plain.params[sources[0]].shape)
        for shard in stack.addressable_shards:
            at = np.argwhere(engine.mesh.devices == shard.device)[0]
            stage = int(at[list(engine.mesh.axis_names).index("stage")])
            assert shard.index[0] == slice(stage, stage + 1)
            whole = np.asarray(plain.params[sources[stage]])
            np.testing.assert_array_equal(np.asarray(shard.data)[0], whole[shard.index[1:]])
    layers = sum(v.nbytes for p, v in plain.params.items() if p.startswith("layers."))
    split = sum(engine.params[p].addressable_shards[0].data.nbytes for p in stacks if "layernorm" not in p)
    norms = sum(v.nbytes for p, v in plain.params.items() if p.startswith("layers.") and "layernorm" in p)
    assert split * 8 == layers - norms
    assert any("idles" in note and "2 stages" in note for note in engine.plan.notes)


def test_saved_from_stages_and_loaded_anywhere(tmp_path: Path) -> None:
    folder, expected = checkpoint()
    Engine.load(folder.name, mesh="stage=2,model=2").save(tmp_path / "saved")
    for mesh in ("data=2", "stage=4"):
        found = Engine.load(tmp_path / "saved", mesh=mesh).infer({"input_ids": token_ids(ROWS, LENGTH)})
        assert relative_error(found, expected) <= TOLERANCE


@pytest.mark.parametrize("microbatches", [2, 8, 24])
def test_any_number_of_microbatches(microbatches: int) -> None:
    module = Llama(LLAMA, rngs=nnx.Rngs(1))
    ids = np.random.default_rng(1).integers(0, 64, (24, 5)).astype(np.int32)
    model = pipelined(model_function(module), 2, microbatches=microbatches)
    engine = Engine(model, mesh="stage=2", example=ids, buckets=[24])
    expected = Engine(module, mesh="data=1", example=ids).infer(ids)
    assert relative_error(engine.infer(ids), expected) <= TOLERANCE


@pytest.mark.parametrize(("mesh_name", "counts"), [("stage=4,data=2", [2, 2, 1, 1]), ("stage=4,model=2", [2, 2, 1, 1])])
def test_stages_that_do_not_divide_the_layers(mesh_name: str, counts: list[int]) -> None:
    module = Llama(LLAMA, rngs=nnx.Rngs(1))
    ids = np.random.default_rng(1).integers(0, 64, (16, 5)).astype(np.int32)
    expected = Engine(module, mesh="data=1", example=ids).infer(ids)
    engine = Engine(module, mesh=mesh_name, example=ids, buckets=[16])
    assert relative_error(engine.infer(ids), expected) <= TOLERANCE
    stack = engine.params["layers.layers.1.mlp.up_proj.weight"]
    assert stack.shape[0] == 4
    assert [bool(np.asarray(row).any()) for row in stack] == [count == 2 for count in counts]
    sources = pipelined(model_function(module), 4).sources["layers.layers.1.mlp.up_proj.weight"]
    assert sources == ("layers.1.mlp.up_proj.weight", "layers.3.mlp.up_proj.weight", None, None)


@pytest.mark.parametrize("stages", [3, 4])
def test_without_an_engine_layers_run_in_order(stages: int) -> None:
    module = Llama(LLAMA, rngs=nnx.Rngs(1))
    plain = model_function(module)
    model = pipelined(plain, stages)
    assert model.params["layers.layers.1.mlp.up_proj.weight"].shape == (stages, 32, 16)

    def stack(path: str) -> jax.Array:
        own = [None if source is None else plain.params[source] for source in model.sources[path]]
        return jnp.stack([jnp.zeros_like(own[0]) if weight is None else weight for weight in own])

    params = {path: stack(path) if path in model.sources else plain.params[path] for path in model.params}
    ids = jnp.arange(10).reshape(2, 5)
    np.testing.assert_allclose(model(params, ids), plain(plain.params, ids), rtol=1e-5)


@given(own=st.integers(1, 64), stages=st.integers(1, 8), parts=st.integers(1, 8))
def test_micro_batches_divide_rows_and_stages(own: int, stages: int, parts: int) -> None:
    rows = own * stages * parts
    count = microbatch_count(rows, stages, parts)
    assert rows % (count * parts) == 0
    assert count % stages == 0
    assert stages <= count <= 4 * stages
    assert bubble_share(stages, count) <= (stages - 1) / (2 * stages - 1)


def test_bubble_is_that_of_gpipe() -> None:
    assert bubble_share(4, 4) == pytest.approx(3 / 7)
    assert bubble_share(4, 16) == pytest.approx(3 / 19)
    assert bubble_share(1, 5) == 0
    model = pipelined(model_function(nnx.eval_shape(lambda: Llama(LLAMA, rngs=nnx.Rngs(0)))), 3)
    assert model.bubble(24, 2) == pytest.approx(2 / 14)


def test_what_cannot_be_spread_is_refused() -> None:
    abstract = model_function(nnx.eval_shape(lambda: Llama(LLAMA, rngs=nnx.Rngs(0))))
    with pytest.raises(ModelError, match=r"6 layers of Llama .* over 7 stages: .* use 2 to 6 stages"):
        pipelined(abstract, 7)
    cnn = model_function(nnx.eval_shape(lambda: SmallCNN(CNNConfig(), rngs=nnx.Rngs(0))))
    with pytest.raises(ModelError, match="SmallCNN cannot be spread over 2 stages"):
        pipelined(cnn, 2)
    odd = dict(abstract.params)
    odd["layers.3.mlp.up_proj.weight"] = jax.ShapeDtypeStruct((32, 16), jnp.bfloat16)
    with pytest.raises(ModelError, match=r"layers 0 and 3 .*'mlp.up_proj.weight' is float32\[32, 16\] in one and bf"):
        pipelined(abstract.with_params(odd), 2)


def test_mismatches_inside_a_mesh_are_refused() -> None:
    stack = Stages([nnx.Linear(4, 4, rngs=nnx.Rngs(0))], 2, microbatches=3)
    mesh = MeshSpec.parse("stage=2").build()

    def through(layers: Any, x: jax.Array) -> jax.Array:
        return x

    with axis_scope(AxisRules(), mesh), pytest.raises(BatchError, match="8 rows in 3 micro-batches over 2 stages"):
        stack(through, jnp.ones((8, 4)))
    with (
        axis_scope(AxisRules(), MeshSpec.parse("stage=4").build()),
        pytest.raises(ModelError, match="2 stages on a mesh"),
    ):
        stack(through, jnp.ones((8, 4)))


@pytest.mark.slow
@pytest.mark.parametrize("mesh_name", ["stage=2,model=3", "stage=5", "stage=3,data=2"])
def test_smollm2(smollm2: Path, mesh_name: str) -> None:
    ids = np.random.default_rng(0).integers(0, 49152, (30, 8)).astype(np.int32)
    expected = Engine.load(smollm2, mesh="data=1", dtype="float32", buckets=[30]).infer({"input_ids": ids})
    engine = Engine.load(smollm2, mesh=mesh_name, dtype="float32", buckets=[30])
    assert relative_error(engine.infer({"input_ids": ids}), expected) <= TOLERANCE
    assert {each.kind for each in audited(engine) if "stage" in each.axes(engine.mesh)} == {"collective-permute"}
