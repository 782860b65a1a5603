"""Checkpoints quantised at load: the same numbers on every mesh, the same results, little memory, words in the plan."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import spmd_infer as si
from spmd_infer.cli.options import print_json
from spmd_infer.engine import Engine
from spmd_infer.errors import CheckpointError, ModelError
from spmd_infer.functional import model_function
from spmd_infer.models.dense import dequantise, quantise_weight, rotate
from spmd_infer.models.llama import Config, Llama, name_table
from spmd_infer.plan_verification import verify_plan

CONFIG = Config(
    vocab_size=256,
    embed_dim=64,
    mlp_dim=128,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=16,
    context_len=64,
    tie_embeddings=True,
)
KINDS = ["int8", "fp8", "int4:16"]
# The largest error of the logits over their size, against float32: rounding to 8, 4 and 4 bits through two layers.
LOSS = {"int8": 0.02, "fp8": 0.08, "int4:16": 0.15}
IDS = np.random.default_rng(1).integers(0, 256, (4, 16)).astype(np.int32)


def hugging_face(folder: Path, config: Config) -> Path:
    model = model_function(Llama(config, rngs=nnx.Rngs(3)))
    table = name_table(config, "safetensors")
    save_file({table[p].name: np.asarray(v) for p, v in model.params.items()}, folder / "model.safetensors")
    known = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context_len,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
    }
    (folder / "config.json").write_bytes(msgspec.json.encode(known))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hugging_face(tmp_path_factory.mktemp("llama"), CONFIG)


def logits(engine: Engine) -> npt.NDArray[np.float32]:
    found: npt.NDArray[np.float32] = engine.infer({"input_ids": IDS})
    return found


def off_by(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_same_numbers_and_results_on_every_mesh(kind: str, checkpoint: Path) -> None:
    plain = Engine.load(checkpoint, mesh="data=1,model=1")
    one = Engine.load(checkpoint, mesh="data=1,model=1", quantize=kind)
    expected = logits(one)
    assert off_by(expected, logits(plain)) < LOSS[kind]
    for mesh in ("data=2,model=4", "data=1,model=2", "data=8,model=1"):
        split = Engine.load(checkpoint, mesh=mesh, quantize=kind)
        for path, weight in one.params.items():
            found = split.params[path]
            assert found.dtype == weight.dtype
            if path.endswith("_scale"):
                np.testing.assert_allclose(found, weight, rtol=1e-6, err_msg=path)
            else:
                different = np.asarray(found).view(np.uint8) != np.asarray(weight).view(np.uint8)
                assert different.mean() < 1e-3, path  # sums of a rotation in another order
        # The activations' own rounding may fall the other way where sums differ in the last bit.
        assert off_by(logits(split), expected) < 0.2 * LOSS[kind]
        split.reshard("data=1,model=1")
        assert off_by(logits(split), expected) < 0.2 * LOSS[kind]


def test_stages(checkpoint: Path) -> None:
    expected = logits(Engine.load(checkpoint, mesh="data=1", quantize="int8"))
    staged = Engine.load(checkpoint, mesh="stage=2,data=2,model=2", quantize="int8")
    assert off_by(logits(staged), expected) < 0.01


def test_numbers_are_of_whole_rows(checkpoint: Path) -> None:
    plain = Engine.load(checkpoint, mesh="data=1")
    split = Engine.load(checkpoint, mesh="data=1,model=8", quantize="int8")
    path = "layers.1.mlp.down_proj.weight"
    weight = plain.params[path]
    assert split.params[path].sharding.shard_shape((64, 128)) == (64, 16)  # the rows are split
    numbers, scale = quantise_weight(rotate(weight, 64), "int8")
    np.testing.assert_allclose(split.params[path + "_scale"], scale, rtol=1e-5)
    back = rotate(dequantise(numbers, scale), 64)
    assert off_by(np.asarray(back), np.asarray(weight)) < 0.01


@pytest.mark.parametrize(("kind", "parts"), [("int8", 4), ("fp8", 4), ("int4", 6)])
def test_bytes_and_words(kind: str, parts: int, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = Engine.load(checkpoint, mesh="data=1,model=2")
    small = Engine.load(checkpoint, mesh="data=1,model=2", quantize=kind)
    assert sum(v.nbytes for v in small.params.values()) < sum(v.nbytes for v in plain.params.values()) / parts * 1.15
    assert small.dtype == np.float32
    explained = small.plan.explain()
    said = "15 int8" if kind == "int8" else "15 fp8" if kind == "fp8" else "1 int8, 14 int4"
    assert f"quantised weights: {said} with float32 scales; the others float32" in explained
    planned = sum(layout.device_bytes for layout in small.plan.weights)
    held = {
        d: sum(s.data.nbytes for v in small.params.values() for s in v.addressable_shards if s.device == d)
        for d in small.mesh.devices.flat
    }
    assert set(held.values()) == {planned}
    print_json(small.plan.to_dict())
    assert said in capsys.readouterr().out


def test_untied_head_and_dtype(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path, replace(CONFIG, tie_embeddings=False))
    engine = Engine.load(folder, mesh="data=1,model=2", quantize="int8", dtype="bfloat16")
    assert engine.dtype == jax.numpy.bfloat16
    assert engine.params["lm_head.weight"].dtype == np.int8
    assert engine.params["embed_tokens.weight"].dtype == jax.numpy.bfloat16  # only looked up
    assert engine.params["norm.weight"].dtype == jax.numpy.bfloat16
    assert off_by(logits(engine), logits(Engine.load(folder, mesh="data=1"))) < 0.03


def test_generation_is_the_same_on_every_mesh(checkpoint: Path) -> None:
    one = Engine.load(checkpoint, mesh="data=1,model=1", quantize="int8")
    split = Engine.load(checkpoint, mesh="data=2,model=4", quantize="int8")
    assert np.argmax(logits(one), -1).tolist() == np.argmax(logits(split), -1).tolist()


def test_refusals(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="quantised to 'int3'"):
        Engine.load(checkpoint, quantize="int3")
    with pytest.raises(ModelError, match="even size of at least 2, not '7'"):
        Engine.load(checkpoint, quantize="int4:7")
    with pytest.raises(ModelError, match="'int8:32'"):
        Engine.load(checkpoint, quantize="int8:32")
    engine = Engine.load(checkpoint, mesh="data=1", quantize="int8")
    with pytest.raises(CheckpointError, match="made int8 while they were read"):
        engine.save(tmp_path / "saved")


def test_what_is_missing_is_named_before_anything_is_read(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path, CONFIG)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 of the model's 20 parameters[^\0]*layers.1.mlp.up_proj.weight"):
        Engine.load(folder, mesh="data=1", quantize="int8")


def test_the_plan_foresees_what_is_compiled(tmp_path: Path) -> None:
    # Blocks of 64 columns are turned together: each device holds whole ones.
    config = replace(CONFIG, embed_dim=256, mlp_dim=512, num_heads=4, head_dim=64)
    folder = str(hugging_face(tmp_path, config))
    plan = si.plan(folder, devices=8, mesh="data=2,model=4", dtype="int8", batch=8, length=32, output=32)
    found = verify_plan(plan, folder, dtype="int8", batch=8, length=32, output=32)
    assert all(line.explained for phase in found.phases for line in phase.traffic), found.explain()
    # Each layer sums two products, and takes the largest values of their rows; the table's rows are summed too.
    (decode,) = [phase for phase in found.phases if phase.phase == "decode"]
    assert decode.agrees, found.explain()
    assert [(line.kind, line.planned) for line in decode.traffic] == [("all-reduce", 4 * config.num_layers + 2)]
