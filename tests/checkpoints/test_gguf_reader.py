"""GGUF files against the gguf package, which also writes them."""

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from spmd_infer.checkpoints import open_checkpoint
from spmd_infer.checkpoints.gguf_reader import GgufReader
from spmd_infer.errors import CheckpointError

WRITABLE = [
    GGMLQuantizationType[name] for name in ("BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")
]
UNREADABLE = ("Q8_1", "Q8_K")


def readable() -> list[GGMLQuantizationType]:
    """Every block encoding that the installed gguf package dequantises."""
    kinds = []
    for kind, (_, block_bytes) in GGML_QUANT_SIZES.items():
        if kind.name.startswith(("F", "I8", "I16", "I32", "I64", "BF16")):
            continue
        try:
            dequantize(np.zeros((1, block_bytes), np.uint8), kind)
        except NotImplementedError:
            continue
        kinds.append(kind)
    return kinds


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tensor of every encoding; blocks of encodings that cannot be written are random bytes."""
    path = tmp_path_factory.mktemp("gguf") / "all.gguf"
    rng = np.random.default_rng(2)
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_embedding_length(512)
    writer.add_head_count(8)
    writer.add_key_value("llama.strings", ["ä", "", "b" * 300], GGUFValueType.ARRAY)
    writer.add_bool("llama.flag", True)
    writer.add_float64("llama.double", 0.25)
    for dtype in (np.float32, np.float16, np.float64, np.int8, np.int16, np.int32, np.int64):
        writer.add_tensor(np.dtype(dtype).name, (rng.normal(size=(3, 5)) * 9).astype(dtype))
    for kind in readable():
        block, block_bytes = GGML_QUANT_SIZES[kind]
        values = rng.normal(size=(7, 2 * max(block, 256))).astype(np.float32)
        packed = (
            quantize(values, kind)
            if kind in WRITABLE
            else rng.integers(0, 120, (7, values.shape[1] // block * block_bytes), dtype=np.uint8)
        )
        writer.add_tensor(kind.name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_every_encoding_equals_the_packages(file: Path) -> None:
    reader = open_checkpoint(file)
    reference = GGUFReader(file)
    assert [t.name for t in reference.tensors] == list(reader.tensors)
    assert len(readable()) >= 20
    for tensor in reference.tensors:
        info = reader.tensors[tensor.name]
        found = reader.read(tensor.name)
        assert info.shape == found.shape == tuple(reversed(tensor.shape.tolist()))
        assert info.dtype == found.dtype
        assert info.nbytes == tensor.n_bytes
        assert info.stored_as == tensor.tensor_type.name
        with np.errstate(all="ignore"):
            expected = tensor.data if tensor.data.dtype != np.uint8 else dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(found.astype(expected.dtype), expected, err_msg=tensor.name)


def test_fields_equal_the_packages(file: Path) -> None:
    reader = open_checkpoint(file)
    for name, field in GGUFReader(file).fields.items():
        if not name.startswith("GGUF."):
            assert reader.metadata[name] == field.contents(), name
    assert reader.architecture == "llama"


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_slices_equal_slices_of_the_whole(file: Path, data: st.DataObject) -> None:
    reader = open_checkpoint(file)
    name = data.draw(st.sampled_from(sorted(reader.tensors)))
    index = []
    for size in reader.tensors[name].shape:
        start = data.draw(st.integers(0, size))
        index.append(slice(start, data.draw(st.integers(start, size))))
    np.testing.assert_array_equal(reader.read(name, tuple(index)), reader.read(name)[tuple(index)])


def write(path: Path, fields: dict[str, object], tensors: dict[str, np.ndarray], architecture: str = "llama") -> Path:
    writer = GGUFWriter(path, architecture)
    for name, value in fields.items():
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        else:
            writer.add_array(name, value)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


LLAMA = {
    "llama.block_count": 2,
    "llama.context_length": 128,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 2.0**-17,
    "llama.rope.freq_base": 500000.0,
    "llama.rope.dimension_count": 16,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}
EMBEDDING = {"token_embd.weight": np.zeros((11, 64), np.float32)}


def test_configuration_in_hugging_face_terms(tmp_path: Path) -> None:
    config = open_checkpoint(write(tmp_path / "m.gguf", LLAMA, EMBEDDING)).config
    assert config == {
        "model_type": "llama",
        "architectures": ["llama"],
        "num_hidden_layers": 2,
        "max_position_embeddings": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 2.0**-17,
        "rope_theta": 500000.0,
        "vocab_size": 11,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
    }


def test_configuration_of_other_llamas(tmp_path: Path) -> None:
    tensors = EMBEDDING | {
        "output.weight": np.zeros((11, 64), np.float32),
        "blk.0.attn_q.bias": np.zeros(64, np.float32),
        "rope_freqs.weight": np.array([1, 1, 2, 8], np.float32),
    }
    fields = LLAMA | {"llama.attention.key_length": 32, "llama.attention.head_count_kv": [2, 2]}
    config = open_checkpoint(write(tmp_path / "a.gguf", fields, tensors)).config
    assert config["tie_word_embeddings"] is False
    assert config["attention_bias"] is True
    assert config["head_dim"] == 32
    assert config["partial_rotary_factor"] == 0.5
    assert config["num_key_value_heads"] == 2
    assert config["rope_scaling"] == {"rope_type": "frequency_factors", "factors": [1, 1, 2, 8]}
    yarn = LLAMA | {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 32,
    }
    config = open_checkpoint(write(tmp_path / "b.gguf", yarn, EMBEDDING)).config
    assert config["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def test_encodings_that_cannot_be_dequantised_are_named(tmp_path: Path) -> None:
    for name in UNREADABLE:
        kind = GGMLQuantizationType[name]
        block, block_bytes = GGML_QUANT_SIZES[kind]
        path = tmp_path / f"{name}.gguf"
        writer = GGUFWriter(path, "llama")
        writer.add_tensor("w", np.zeros((2, block_bytes), np.uint8), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        reader = open_checkpoint(path)
        assert reader.tensors["w"].shape == (2, block)
        with pytest.raises(CheckpointError, match=f"{name}.gguf: tensor 'w' is stored as {name}"):
            reader.read("w")


def test_parts_of_a_split_file_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "p.gguf", LLAMA | {"split.count": 3, "split.no": 1}, EMBEDDING)
    with pytest.raises(CheckpointError, match=r"part 1 \(counted from 0\) of 3; join the parts first"):
        open_checkpoint(path)


def test_version_2_is_read_and_big_endian_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "v.gguf", LLAMA, EMBEDDING)
    content = bytearray(path.read_bytes())
    content[4:8] = struct.pack("<I", 2)
    path.write_bytes(content)
    assert open_checkpoint(path).config["hidden_size"] == 64
    content[4:8] = struct.pack(">I", 3)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="big-endian"):
        open_checkpoint(path)


@pytest.mark.parametrize(("name", "kind"), [("Q8_0", "int8"), ("Q4_0", "int4"), ("Q4_1", "uint4")])
def test_numbers_and_scales_stand_for_exactly_what_is_dequantised(file: Path, name: str, kind: str) -> None:
    reader = GgufReader(file)
    found = reader.read_quantised(name)
    assert found is not None
    assert (found.kind, found.values.shape, found.scales.shape) == (kind, (7, 512), (7, 16))
    assert (found.offsets is not None) == (name == "Q4_1")
    assert found.floats().tobytes() == reader.read(name).tobytes()
    part = reader.read_quantised(name, (slice(2, 5), slice(64, 160)))
    assert part is not None
    assert part.floats().tobytes() == reader.read(name, (slice(2, 5), slice(64, 160))).tobytes()
    if kind != "int8":
        low, high = (part.packed() & 15).astype(np.int8), (part.packed() >> 4).astype(np.int8)
        added = 8 if kind == "int4" else 0
        np.testing.assert_array_equal(np.stack([low, high], -1).reshape(3, 96) - added, part.values)
        assert len(np.unique(part.values)) > 8  # not all the same, which would prove nothing
    with pytest.raises(CheckpointError, match="columns 16 to 64 do not lie between groups of 32"):
        reader.read_quantised(name, (slice(None), slice(16, 64)))


def test_other_types_are_not_kept_quantised(file: Path) -> None:
    reader = GgufReader(file)
    assert reader.read_quantised("float32") is None
    assert reader.read_quantised("Q6_K") is None
    with pytest.raises(CheckpointError, match="no tensor 'none'"):
        reader.read_quantised("none")
