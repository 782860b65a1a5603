"""Safetensors files and Hugging Face folders against what the official library wrote."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from spmd_infer.checkpoints import Reader, open_checkpoint
from spmd_infer.errors import CheckpointError

DTYPES = [
    np.float64,
    np.float32,
    np.float16,
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
    np.int64,
    np.int32,
    np.int16,
    np.int8,
    np.uint64,
    np.uint32,
    np.uint16,
    np.uint8,
    np.bool_,
    np.complex64,
]


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    made = {np.dtype(dtype).name: rng.uniform(0, 9, (6, 4)).astype(dtype) for dtype in DTYPES if dtype != np.bool_}
    return made | {
        "bool": rng.normal(size=(3,)) > 0,
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 7), np.float32),
        "deep": rng.normal(size=(3, 4, 5, 6)).astype(np.float32),
        "wide": rng.normal(size=(7, 3000)).astype(np.float32),
    }


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("safe") / "any.safetensors"
    save_file(tensors(), path, metadata={"format": "np"})
    return path


def test_every_dtype(file: Path) -> None:
    reader = open_checkpoint(file)
    assert isinstance(reader, Reader)
    assert (reader.stored, reader.folder, reader.config, reader.architecture) == ("safetensors", file.parent, {}, None)
    assert reader.metadata == {"format": "np"}
    expected = tensors()
    assert set(reader.tensors) == set(expected)
    for name, array in expected.items():
        info = reader.tensors[name]
        assert (info.shape, info.dtype, info.nbytes, info.file) == (array.shape, array.dtype, array.nbytes, file)
        assert reader.read(name).tobytes() == array.tobytes()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_slices_equal_slices_of_the_whole(file: Path, data: st.DataObject) -> None:
    reader = open_checkpoint(file)
    name = data.draw(st.sampled_from(sorted(reader.tensors)))
    index = []
    for size in reader.tensors[name].shape[: data.draw(st.integers(0, 4))]:
        start = data.draw(st.integers(0, size))
        index.append(slice(start, data.draw(st.integers(start, size))))
    assert reader.read(name, tuple(index)).tobytes() == tensors()[name][tuple(index)].tobytes()


def sharded(folder: Path) -> None:
    made = sorted(tensors().items())
    weight_map = {}
    for part, items in enumerate((made[:9], made[9:]), start=1):
        shard = f"model-0000{part}-of-00002.safetensors"
        save_file(dict(items), folder / shard)
        weight_map |= {name: shard for name, _ in items}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_folder_with_index_and_config(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    reader = open_checkpoint(tmp_path)
    assert reader.folder == tmp_path
    assert reader.config["hidden_size"] == 8
    assert reader.architecture == "llama"
    for name, array in tensors().items():
        assert reader.read(name).tobytes() == array.tobytes()
    assert {info.file.name for info in reader.tensors.values()} == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }


def test_architectures_come_before_model_type(tmp_path: Path) -> None:
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    assert open_checkpoint(tmp_path).architecture == "BertModel"
    assert open_checkpoint(tmp_path / "model.safetensors").architecture == "BertModel"


def test_hugging_face_cache_links_are_followed_into_their_own_blobs_only(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    blobs = repository / "blobs"
    blobs.mkdir()
    save_file({"a": np.arange(3, dtype=np.float32)}, blobs / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    np.testing.assert_array_equal(open_checkpoint(snapshot).read("a"), [0, 1, 2])
    # The blob itself has no suffix: it is known by its first bytes.
    np.testing.assert_array_equal(open_checkpoint(blobs / "0123").read("a"), [0, 1, 2])

    other = tmp_path / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    save_file({"a": np.ones(3, np.float32)}, other / "9")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(other / "9")
    with pytest.raises(CheckpointError, match="outside its folder"):
        open_checkpoint(snapshot)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ((slice(0, 2, 2),), "slice with step 1"),
        ((3,), "slice with step 1"),
        ((slice(None),) * 3, "3 slices was given for 2 dimensions"),
    ],
)
def test_indices_that_do_not_suit(file: Path, index: tuple[slice, ...], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(file).read("float32", index)


def test_an_unknown_tensor_gets_the_nearest_names(file: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor 'float31'.*nearest names: .*float32"):
        open_checkpoint(file).read("float31")
