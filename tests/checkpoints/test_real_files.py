"""The demo weights: every tensor loaded onto meshes equals what the formats' own libraries read."""

from pathlib import Path

import jax
import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from spmd_infer.checkpoints import Reader, load_onto, open_checkpoint
from spmd_infer.tensors import Source

pytestmark = pytest.mark.demo


def load_all(reader: Reader, sizes: tuple[int, int]) -> dict[str, jax.Array]:
    """Every tensor, its last dimension that divides split over ``model``, and one before over ``data``."""
    devices = jax.devices()[: sizes[0] * sizes[1]]
    mesh = jax.make_mesh(sizes, ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices)
    abstract = {}
    for name, info in reader.tensors.items():
        spec: list[str | None] = [None] * len(info.shape)
        free = list(range(len(info.shape)))
        for axis, parts in zip(("model", "data"), reversed(sizes), strict=True):
            fit = [d for d in free if info.shape[d] % parts == 0]
            if fit:
                spec[fit[-1]] = axis
                free.remove(fit[-1])
        dtype = jax.dtypes.canonicalize_dtype(info.dtype)
        abstract[name] = jax.ShapeDtypeStruct(info.shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
    return load_onto(reader, {name: Source(name) for name in reader.tensors}, abstract)


@pytest.mark.parametrize("sizes", [(1, 1), (8, 1), (2, 4)])
def test_smollm2(smollm2: Path, sizes: tuple[int, int]) -> None:
    reader = open_checkpoint(smollm2)
    loaded = load_all(reader, sizes)
    kinds = set()
    for tensor in GGUFReader(smollm2).tensors:
        if tensor.name.startswith("blk.") and not tensor.name.startswith(("blk.0.", "blk.29.")):
            continue  # the layers between differ only in their numbers
        kinds.add(tensor.tensor_type.name)
        np.testing.assert_array_equal(
            np.asarray(loaded[tensor.name]), dequantize(tensor.data, tensor.tensor_type), err_msg=tensor.name
        )
    assert kinds == {"F32", "Q4_1", "Q8_0"}


def test_smollm2_configuration(smollm2: Path) -> None:
    reader = open_checkpoint(smollm2)
    assert (reader.stored, reader.architecture, len(reader.tensors)) == ("gguf", "llama", 272)
    config = {key: reader.config[key] for key in sorted(reader.config)}
    assert config.pop("rms_norm_eps") == pytest.approx(1e-5)
    assert config == {
        "architectures": ["llama"],
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 64,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pad_token_id": 2,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "unk_token_id": 0,
        "vocab_size": 49152,
    }
    for name, field in GGUFReader(smollm2).fields.items():
        if not name.startswith("GGUF."):
            assert reader.metadata[name] == field.contents(), name


@pytest.mark.parametrize("sizes", [(1, 1), (8, 1), (2, 4)])
def test_minilm(minilm: Path, sizes: tuple[int, int]) -> None:
    reader = open_checkpoint(minilm)
    assert reader.architecture == "BertModel"
    assert reader.config["num_hidden_layers"] == 6
    expected = load_file(minilm / "model.safetensors")
    loaded = load_all(reader, sizes)
    assert set(loaded) == set(expected)
    for name, array in loaded.items():
        np.testing.assert_array_equal(np.asarray(array), expected[name], err_msg=name)


def test_efficientnet(efficientnet: Path) -> None:
    reader = open_checkpoint(efficientnet)
    assert reader.stored == "pth"
    assert reader.architecture is None
    assert len(reader.tensors) == 296
    assert {info.dtype for info in reader.tensors.values()} == {np.dtype(np.float32), np.dtype(np.int64)}
    one, many = load_all(reader, (1, 1)), load_all(reader, (2, 4))
    for name, array in one.items():
        np.testing.assert_array_equal(np.asarray(array), reader.read(name), err_msg=name)
        np.testing.assert_array_equal(np.asarray(many[name]), np.asarray(array), err_msg=name)
    # Values that PyTorch reads: tests/parity/test_checkpoints.py compares all of them.
    assert reader.tensors["_conv_stem.weight"].shape == (32, 3, 3, 3)
