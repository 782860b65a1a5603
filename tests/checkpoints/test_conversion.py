"""Converting and resharding: the same numbers by way of every format, mesh and change that can be undone."""

import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from spmd_infer import Engine
from spmd_infer.axes import AxisRules
from spmd_infer.checkpoints import Reader, open_checkpoint, verify
from spmd_infer.checkpoints.boxes import elements, tiling_problem
from spmd_infer.checkpoints.comparing import compare
from spmd_infer.checkpoints.copying import Quantisation
from spmd_infer.checkpoints.manifest import ModelEntry
from spmd_infer.checkpoints.mesh_boxes import MeshLayout
from spmd_infer.checkpoints.native_reader import NativeReader
from spmd_infer.checkpoints.native_store import store
from spmd_infer.checkpoints.safetensors_reader import INDEX_NAME
from spmd_infer.checkpoints.safetensors_writer import store_hugging_face
from spmd_infer.conversion import Changes, prepare
from spmd_infer.errors import CheckpointError, MeshError
from spmd_infer.mesh import MeshSpec

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
}


def llama_tensors(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)

    def made(*shape: int) -> np.ndarray:
        return (rng.normal(size=shape) * 0.05).astype(dtype)

    tensors = {
        "model.embed_tokens.weight": made(128, 64),
        "lm_head.weight": made(128, 64),
        "model.norm.weight": made(64),
    }
    for layer in range(4):
        start = f"model.layers.{layer}."
        for name, rows in (("q_proj", 64), ("k_proj", 32), ("v_proj", 32), ("o_proj", 64)):
            tensors[f"{start}self_attn.{name}.weight"] = made(rows, 64)
        for name, shape in (("gate_proj", (96, 64)), ("up_proj", (96, 64)), ("down_proj", (64, 96))):
            tensors[f"{start}mlp.{name}.weight"] = made(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{start}{name}.weight"] = made(64)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = made(8)
    return tensors


def folder_of(path: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    (path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return path


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "llama", llama_tensors())


def moved(source: Path, target: Path, mesh: str | None = None, hosts: int = 1, **options: Any) -> Path:
    changes = options.pop("changes", None)
    spec = MeshSpec.parse(mesh) if mesh else None
    prepare(open_checkpoint(source), changes, mesh=spec, hosts=hosts, **options).run(target, "convert")
    return target


def same(a: Path | Reader, b: Path | Reader) -> None:
    left, right = (each if isinstance(each, Reader) else open_checkpoint(each) for each in (a, b))
    assert compare(left, right) == []


def test_resharding_2x4_to_8x1_to_1x8_and_back_to_a_folder_is_bit_identical(llama: Path, tmp_path: Path) -> None:
    path = llama
    for number, (mesh, hosts) in enumerate(
        (("data=2,model=4", 2), ("data=8,model=1", 4), ("data=1,model=8", 8), ("stage=2,model=2", 2), ("model=4", 1))
    ):
        path = moved(path, tmp_path / str(number), mesh, hosts)
        reader = open_checkpoint(path)
        assert isinstance(reader, NativeReader)
        assert (reader.manifest.mesh, reader.manifest.hosts) == (mesh, hosts)
        assert verify(reader) == []
    back = moved(path, tmp_path / "back", to="huggingface")
    same(llama, back)
    assert (back / "tokenizer_config.json").read_bytes() == (llama / "tokenizer_config.json").read_bytes()
    assert json.loads((back / "config.json").read_text()) == CONFIG | {"dtype": "float32"}


@pytest.mark.parametrize("to", ["native", "huggingface"])
def test_columns_put_together_again_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    values = np.random.default_rng(5).integers(0, 255, (2048, 12288)).astype(np.uint8).view(np.float16)
    save_file({"w": values}, tmp_path / "w.safetensors")
    layout = MeshLayout(MeshSpec.parse("model=4"), 1, AxisRules())
    by_columns, whole = tmp_path / "columns", tmp_path / "whole"
    source = open_checkpoint(tmp_path / "w.safetensors")
    store(source, by_columns, model=ModelEntry(), axes={"w": ("embed", "mlp")}, layout=layout)
    reader = open_checkpoint(by_columns)
    assert isinstance(reader, NativeReader)
    assert all(chunk.stop[1] - chunk.start[1] == 1536 for chunk in reader.manifest.arrays["w"].chunks)
    read, genuine = [], os.preadv

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        read.append((str(Path(f"/proc/self/fd/{descriptor}").readlink()), len(buffers[0])))
        return genuine(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    if to == "native":
        store(reader, whole, model=ModelEntry())
    else:
        store_hugging_face(reader, whole)
    assert sum(count for name, count in read if name.startswith(str(by_columns / "data"))) == values.nbytes
    same(source, whole)


def test_each_hosts_pieces_lie_in_its_own_files(llama: Path, tmp_path: Path) -> None:
    reader = open_checkpoint(moved(llama, tmp_path / "out", "data=1,model=4", hosts=4))
    assert isinstance(reader, NativeReader)
    assert [stored.name for stored in reader.manifest.data] == [f"data/host-{h:04d}-0000.bin" for h in range(4)]
    up = reader.manifest.arrays["layers.0.mlp.up_proj.weight"]
    assert [chunk.start for chunk in sorted(up.chunks, key=lambda c: c.file)] == [(0, 0), (24, 0), (48, 0), (72, 0)]
    # Two key heads do not divide over four devices: they stay whole, as the engine keeps them.
    assert len(reader.manifest.arrays["layers.0.self_attn.k_proj.weight"].chunks) == 1


def test_stages_hold_the_layers_of_their_own(llama: Path, tmp_path: Path) -> None:
    reader = open_checkpoint(moved(llama, tmp_path / "out", "stage=2,model=1", hosts=2))
    assert isinstance(reader, NativeReader)
    homes = {
        name: {reader.manifest.data[chunk.file].name[5:14] for chunk in entry.chunks}
        for name, entry in reader.manifest.arrays.items()
        if name.startswith("layers.")
    }
    for name, files in homes.items():
        assert files == {"host-0000" if int(name.split(".")[1]) < 2 else "host-0001"}, name


@pytest.mark.parametrize("mesh", ["model=8", "data=2,model=4", "data=8", "stage=4,model=2", "data=2,expert=2,model=2"])
def test_boxes_of_every_mesh_tile_the_tensor(mesh: str) -> None:
    layout = MeshLayout(MeshSpec.parse(mesh), 2, AxisRules(), layers=4)
    for axes in (("mlp", "embed"), ("embed", "heads"), (None, None), None):
        held = layout.boxes("layers.1.weight", (256, 512), 4, axes)
        assert tiling_problem((256, 512), [box for box, _ in held]) is None
        assert sum(elements(box) for box, _ in held) == 256 * 512


def test_a_mesh_that_hosts_do_not_divide_is_refused(llama: Path) -> None:
    with pytest.raises(MeshError, match="8 devices of mesh data=2,model=4 cannot be spread evenly over 3 hosts"):
        prepare(open_checkpoint(llama), mesh=MeshSpec.parse("data=2,model=4"), hosts=3)


def test_an_engine_reads_what_was_resharded_for_another_mesh(llama: Path, tmp_path: Path) -> None:
    path = moved(llama, tmp_path / "out", "data=1,model=8", hosts=8)
    first, second = Engine.load(llama, mesh="data=1,model=2"), Engine.load(path, mesh="data=2,model=4")
    for name, weight in first.params.items():
        assert np.asarray(second.params[name]).tobytes() == np.asarray(weight).tobytes(), name


def test_projections_fused_and_split_again(llama: Path, tmp_path: Path) -> None:
    fused = moved(llama, tmp_path / "fused", "data=1,model=4", changes=Changes(qkv="fuse"))
    tensors = open_checkpoint(fused).tensors
    assert tensors["layers.0.self_attn.qkv_proj.weight"].shape == (128, 64)
    assert not any("q_proj" in name for name in tensors)
    split = moved(fused, tmp_path / "split", to="huggingface", changes=Changes(qkv="split"))
    same(llama, split)
    with pytest.raises(CheckpointError, match="no tensor is a fused projection"):
        prepare(open_checkpoint(llama), Changes(qkv="split"))


def test_a_users_fused_folder_becomes_one_that_the_engine_loads(llama: Path, tmp_path: Path) -> None:
    tensors = llama_tensors()
    for layer in range(4):
        start = f"model.layers.{layer}.self_attn."
        tensors[start + "qkv_proj.weight"] = np.concatenate(
            [tensors.pop(f"{start}{part}_proj.weight") for part in ("q", "k", "v")]
        )
    fused = folder_of(tmp_path / "fused", tensors)
    split = moved(fused, tmp_path / "split", changes=Changes(qkv="split"))
    assert Engine.load(split, mesh="data=1,model=2").family is not None
    same(llama, moved(split, tmp_path / "back", to="huggingface"))


def test_dtypes_on_the_way(llama: Path, tmp_path: Path) -> None:
    half = moved(llama, tmp_path / "half", to="huggingface", changes=Changes(dtype="bfloat16"))
    original = open_checkpoint(llama)
    for name, info in open_checkpoint(half).tensors.items():
        assert info.dtype == ml_dtypes.bfloat16, name
        expected = original.read(name).astype(ml_dtypes.bfloat16)
        assert open_checkpoint(half).read(name).tobytes() == expected.tobytes()
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"


# Half a step: of the largest value of a row (int4: of a group) over 127 or 7; of e4m3, whose step is an eighth of a
# number's power of two, a sixteenth of the value itself.
ERRORS = {"int8": 0.5 / 127, "int4": 0.5 / 7, "fp8": 1 / 16}


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_quantised_weights_read_as_floats_within_half_a_step(kind: str, llama: Path, tmp_path: Path) -> None:
    path = moved(llama, tmp_path / "small", "data=1,model=2", changes=Changes(quantisation=Quantisation(kind, 32)))
    reader, original = open_checkpoint(path), prepare(open_checkpoint(llama)).reader
    assert verify(reader) == []
    quantised = [name for name, info in reader.tensors.items() if info.stored_as == kind]
    assert len(quantised) == 4 * 7 + 1
    for name in quantised:
        wanted, found = original.read(name), reader.read(name)
        assert found.dtype == wanted.dtype
        assert reader.tensors[name].nbytes < wanted.nbytes / 2
        bound = np.abs(wanted).max(axis=1, keepdims=True) * (ERRORS[kind] + 1e-6)
        assert (np.abs(found - wanted) <= bound).all(), name
        piece = (slice(3, 21), slice(5, 43))
        assert reader.read(name, piece).tobytes() == np.ascontiguousarray(found[piece]).tobytes()
    engine = Engine.load(path, mesh="data=1,model=2")
    assert engine.dtype == np.float32


def test_quantised_weights_cannot_be_said_in_a_folder(llama: Path) -> None:
    with pytest.raises(CheckpointError, match="whole, unquantised tensors"):
        prepare(open_checkpoint(llama), Changes(quantisation=Quantisation("int8")), to="huggingface")
    with pytest.raises(CheckpointError, match="cannot quantise to 'int3'"):
        Quantisation("int3")


def adapter(
    path: Path, *, tensors: dict[str, np.ndarray] | None = None, **config: Any
) -> tuple[Path, dict[str, np.ndarray]]:
    rng = np.random.default_rng(8)
    start = "base_model.model.model.layers.1."
    made = tensors or {
        f"{start}self_attn.q_proj.lora_A.weight": rng.normal(size=(4, 64)).astype(np.float32),
        f"{start}self_attn.q_proj.lora_B.weight": rng.normal(size=(64, 4)).astype(np.float32),
        f"{start}mlp.down_proj.lora_A.weight": rng.normal(size=(4, 96)).astype(np.float32),
        f"{start}mlp.down_proj.lora_B.weight": rng.normal(size=(64, 4)).astype(np.float32),
    }
    path.mkdir()
    save_file(made, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8} | config))
    return path, made


def test_an_adapter_is_merged(llama: Path, tmp_path: Path) -> None:
    path, made = adapter(tmp_path / "lora")
    merged = moved(llama, tmp_path / "merged", "data=1,model=4", changes=Changes(lora=path))
    tensors, reader = llama_tensors(), open_checkpoint(merged)
    for part in ("self_attn.q_proj", "mlp.down_proj"):
        a, b = (made[f"base_model.model.model.layers.1.{part}.lora_{end}.weight"] for end in "AB")
        wanted = tensors[f"model.layers.1.{part}.weight"].astype(np.float64) + 2.0 * b.astype(np.float64) @ a
        # Sums of four products of numbers near one, in float32.
        np.testing.assert_allclose(reader.read(f"layers.1.{part}.weight"), wanted, atol=1e-5)
    differing = compare(prepare(open_checkpoint(llama)).reader, reader)
    assert sorted(each.name for each in differing) == [
        "layers.1.mlp.down_proj.weight",
        "layers.1.self_attn.q_proj.weight",
    ]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "adapters with DoRA are not implemented"),
        ({"fan_in_fan_out": True}, "weights stored"),
        ({"peft_type": "IA3"}, "is a IA3 adapter, expected LORA"),
        ({"r": 8}, "has rank 4, but adapter_config.json says 8"),
    ],
)
def test_adapters_that_are_refused(config: dict[str, Any], message: str, llama: Path, tmp_path: Path) -> None:
    path, _ = adapter(tmp_path / "lora", **config)
    with pytest.raises(CheckpointError, match=message):
        prepare(open_checkpoint(llama), Changes(lora=path))


def test_an_adapter_for_another_model_is_refused(llama: Path, tmp_path: Path) -> None:
    other = {
        "base_model.model.h.0.attn.lora_A.weight": np.ones((4, 64), np.float32),
        "base_model.model.h.0.attn.lora_B.weight": np.ones((64, 4), np.float32),
    }
    path, _ = adapter(tmp_path / "lora", tensors=other)
    with pytest.raises(CheckpointError, match=r"no tensor 'h\.0\.attn\.weight'"):
        prepare(open_checkpoint(llama), Changes(lora=path))


def test_heads_tied_and_untied(tmp_path: Path) -> None:
    tensors = llama_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    loose = folder_of(tmp_path / "loose", tensors)
    tied = moved(loose, tmp_path / "tied", to="huggingface", changes=Changes(head="tie"))
    assert "lm_head.weight" not in open_checkpoint(tied).tensors
    assert json.loads((tied / "config.json").read_text())["tie_word_embeddings"] is True
    native = moved(tied, tmp_path / "native", changes=Changes(head="untie"))
    same(loose, moved(native, tmp_path / "back", to="huggingface"))


def test_heads_that_differ_cannot_be_tied(llama: Path) -> None:
    with pytest.raises(CheckpointError, match="differ from row 0 on; they cannot be tied"):
        prepare(open_checkpoint(llama), Changes(head="tie"))


def test_a_checkpoint_of_no_family_keeps_its_names(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    tensors = {"a.weight": rng.normal(size=(512, 128)).astype(np.float32), "b": np.arange(5)}
    save_file(tensors, tmp_path / "own.safetensors")
    path = moved(tmp_path / "own.safetensors", tmp_path / "out", "data=1,model=4", hosts=2)
    reader = open_checkpoint(path)
    assert isinstance(reader, NativeReader)
    same(tmp_path / "own.safetensors", reader)
    assert len(reader.manifest.arrays["a.weight"].chunks) == 4
    assert "no model family here answers to" in prepare(open_checkpoint(tmp_path / "own.safetensors")).note
    with pytest.raises(CheckpointError, match="cannot be written as a Hugging Face folder"):
        prepare(reader, to="huggingface")


def test_large_folders_are_written_as_several_files(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spmd_infer.checkpoints.safetensors_writer.SHARD_BYTES", 100_000)
    out = moved(llama, tmp_path / "out", to="huggingface")
    assert (out / INDEX_NAME).is_file()
    assert len(list(out.glob("*.safetensors"))) > 3
    same(llama, out)


def test_gguf_to_native_to_a_folder(smollm2: Path, tmp_path: Path) -> None:
    native = moved(smollm2, tmp_path / "native", "data=2,model=4", hosts=2, changes=Changes(dtype="bfloat16"))
    folder = moved(native, tmp_path / "folder", to="huggingface")
    engine = Engine.load(native, mesh="data=1,model=2")
    again = Engine.load(folder, mesh="data=1,model=1")
    for name, weight in engine.params.items():
        assert np.asarray(again.params[name]).tobytes() == np.asarray(weight).tobytes(), name
    from spmd_infer.generation.tokenizer import Tokenizer

    assert Tokenizer.from_reader(open_checkpoint(native)).encode("The capital") == Tokenizer.from_reader(
        open_checkpoint(smollm2)
    ).encode("The capital")


def test_a_prediction_holds(llama: Path, tmp_path: Path) -> None:
    made = prepare(open_checkpoint(llama), Changes(dtype="bfloat16"))
    plan = made.plan
    seen: list[int] = []
    made.run(tmp_path / "out", "convert", advance=seen.append)
    written = sum(file.stat().st_size for file in (tmp_path / "out" / "data").iterdir())
    assert plan.write_bytes == written
    assert sum(seen) == plan.read_bytes
