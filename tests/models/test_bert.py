"""BERT: torch's numbers, packed rows like separate ones, and the same on every mesh at the price of its layout."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spmd_infer.engine import Engine
from spmd_infer.errors import BatchError, ModelError
from spmd_infer.generation.tokenizer import Tokenizer
from spmd_infer.models.bert import Bert, Config, input_spec, name_table
from spmd_infer.planning.audit import collectives, summary
from spmd_infer.planning.workload import Workload

FIXTURE = Path(__file__).parents[1] / "fixtures" / "bert_minilm.npz"
SMALL = Config(vocab_size=60, embed_dim=24, mlp_dim=40, num_layers=2, num_heads=4, max_positions=32)
# float32 sums in another order; values are around 1.
TOLERANCE = 1e-5
HF = {
    "architectures": ["BertModel"],
    "vocab_size": 60,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}


def random_bert(config: Config = SMALL) -> Bert:
    return Bert(config, rngs=nnx.Rngs(0))


def some_ids(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 60, (rows, length)).astype(np.int32)


def hidden(model: Bert, **inputs: np.ndarray) -> np.ndarray:
    return np.asarray(model(**{name: jnp.asarray(value) for name, value in inputs.items()})["last_hidden_state"])


def test_minilm_equals_torch(minilm: Path) -> None:
    saved, tokenizer = np.load(FIXTURE), Tokenizer.from_folder(minilm)
    engine = Engine.load(minilm, mesh="data=1")
    ids = tokenizer.encode_batch([str(sentence) for sentence in saved["sentences"]])
    batch = np.zeros((len(ids), max(map(len, ids))), np.int32)
    mask = np.zeros_like(batch)
    for row, tokens in enumerate(ids):
        batch[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
    result = engine.infer({"input_ids": batch, "attention_mask": mask})["last_hidden_state"]
    np.testing.assert_allclose(result[0, : len(ids[0])], saved["hidden"], atol=TOLERANCE)
    pooled = (result * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
    np.testing.assert_allclose(pooled, saved["embeddings"], atol=TOLERANCE)


def test_padding_changes_nothing() -> None:
    model, ids = random_bert(), some_ids(2, 9)
    padded = np.pad(ids, ((0, 0), (0, 5)), constant_values=7)
    mask = np.pad(np.ones_like(ids), ((0, 0), (0, 5)))
    np.testing.assert_allclose(
        hidden(model, input_ids=padded, attention_mask=mask)[:, :9], hidden(model, input_ids=ids), atol=TOLERANCE
    )
    changed = hidden(model, input_ids=padded)[:, :9]
    assert np.abs(changed - hidden(model, input_ids=ids)).max() > 100 * TOLERANCE  # without the mask it would


def test_packed_sentences_do_not_see_each_other() -> None:
    model = random_bert()
    lengths = [5, 1, 9]
    alone = [some_ids(1, length, seed=length) for length in lengths]
    positions = np.concatenate([np.arange(length) for length in lengths])[None]
    segments = np.concatenate([np.full(length, i + 1) for i, length in enumerate(lengths)])[None]
    row, positions, segments = (
        np.pad(values, ((0, 0), (0, 3))).astype(np.int32)
        for values in (np.concatenate(alone, axis=1), positions, segments)
    )
    packed = hidden(model, input_ids=row, position_ids=positions, segment_ids=segments)[0]
    separate = [hidden(model, input_ids=ids)[0] for ids in alone]
    np.testing.assert_allclose(packed[:15], np.concatenate(separate), atol=TOLERANCE)
    arrays = [jnp.asarray(values) for values in (row, positions, segments)]
    means = np.asarray(model.embed(*arrays, segments=5))[0]
    np.testing.assert_allclose(means[:3], [each.mean(0) for each in separate], atol=TOLERANCE)
    np.testing.assert_array_equal(means[3:], 0)
    firsts = np.asarray(model.embed(*arrays, segments=3, pooling="first"))[0]
    np.testing.assert_allclose(firsts, [each[0] for each in separate], atol=TOLERANCE)


def test_token_types_count() -> None:
    model, ids = random_bert(), some_ids(1, 6)
    zeros = hidden(model, input_ids=ids, token_type_ids=np.zeros_like(ids))
    np.testing.assert_array_equal(zeros, hidden(model, input_ids=ids))
    assert np.abs(hidden(model, input_ids=ids, token_type_ids=np.ones_like(ids)) - zeros).max() > 100 * TOLERANCE


@pytest.fixture(scope="module")
def whole(minilm: Path) -> np.ndarray:
    return infer_ids(Engine.load(minilm, mesh="data=1"))


def infer_ids(engine: Engine) -> np.ndarray:
    ids = np.random.default_rng(1).integers(1000, 20000, (16, 24))
    result: np.ndarray = engine.infer({"input_ids": ids})["last_hidden_state"]
    return result


def test_sharded_equals_whole(mesh_text: str, minilm: Path, whole: np.ndarray) -> None:
    engine = Engine.load(minilm, mesh=mesh_text)
    assert np.abs(infer_ids(engine) - whole).max() <= TOLERANCE * np.abs(whole).max()
    (program,) = engine.programs
    found = collectives(program.compiled)
    print(f"\n{mesh_text}: {summary(found, engine.mesh)}")
    counted = Counter((each.kind, each.axes(engine.mesh)) for each in found)
    model_parts = dict(engine.mesh.shape)["model"]
    # One sum after each projection whose input is split: attention and feed-forward, in 6 layers. 12 heads do not
    # divide over 8 devices, so there attention is whole and needs none.
    expected = {1: {}, 2: {("all-reduce", ("model",)): 12}, 4: {("all-reduce", ("model",)): 12}}
    assert counted == expected.get(model_parts, {("all-reduce", ("model",)): 6})
    # Each sum is over one data shard's activations in float32.
    rows = 16 // dict(engine.mesh.shape)["data"]
    assert {each.nbytes for each in found} <= {rows * 24 * 384 * 4}
    whys = {layout.whole for layout in engine.plan.weights if ".query." in layout.path}
    assert whys == ({"12 heads do not divide over model=8"} if model_parts == 8 else {""})


def test_any_batch_and_length_through_one_engine() -> None:
    traffic = Workload(sizes={"seq": 8})
    engine = Engine(random_bert(), mesh="data=2,model=2", inputs=input_spec(SMALL), workload=traffic)
    model = random_bert()
    for rows, length in ((1, 5), (3, 5), (9, 8)):
        ids = some_ids(rows, length, seed=rows)
        result = engine.infer({"input_ids": ids})["last_hidden_state"]
        np.testing.assert_allclose(result, hidden(model, input_ids=ids), atol=TOLERANCE)
    with pytest.raises(BatchError, match="input_ids"):
        engine.infer({"attention_mask": np.ones((1, 4), np.int32)})
    with pytest.raises(BatchError, match="rows of 33 tokens, but the model has 32 positions"):
        engine.infer({"input_ids": some_ids(1, 33)})


def test_config_from_hf() -> None:
    assert Config.from_hf(HF) == SMALL
    assert Config.from_hf(HF | {"hidden_act": "relu", "layer_norm_eps": 1e-6, "type_vocab_size": 1}) == replace(
        SMALL, activation="relu", norm_epsilon=1e-6, num_token_types=1
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "swish2"}, "activation 'swish2' is not known; known are gelu,"),
        ({"position_embedding_type": "relative_key"}, "'relative_key'; only 'absolute'"),
        ({"num_attention_heads": 5}, "5 attention heads do not divide the width 24"),
        ({"is_decoder": True}, "only encoders"),
        ({"hidden_size": None}, "whole numbers for hidden_size"),
    ],
)
def test_configurations_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Config.from_hf(HF | change)


def test_names_of_weights_in_each_format() -> None:
    own = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(random_bert()))}
    path = "encoder.layer.1.attention.self.query.bias"
    for config, stored, name in (
        (Config.from_hf(HF), "safetensors", path),
        (Config.from_hf(HF | {"architectures": ["BertForMaskedLM"]}), "safetensors", f"bert.{path}"),
        (Config.from_hf(HF | {"architectures": ["bert"]}), "gguf", "blk.1.attn_q.bias"),
    ):
        table = name_table(config, stored)
        assert table.keys() == own
        assert table[path].name == name
        assert len({source.name for source in table.values()}) == len(own)
