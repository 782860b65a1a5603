"""The native store: what goes in comes out on any mesh, whole files or none, and every byte accounted for."""

import hashlib
import json
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import msgspec
import numpy as np
import pytest
from blake3 import blake3
from jax.sharding import NamedSharding, PartitionSpec

from spmd_infer import Engine
from spmd_infer.axes import AxisRules
from spmd_infer.checkpoints import load_onto, open_checkpoint, save, verify
from spmd_infer.checkpoints.manifest import CHUNK_BYTES, MANIFEST_NAME, ModelEntry
from spmd_infer.checkpoints.manifest_file import read_manifest, write_manifest
from spmd_infer.checkpoints.native_reader import FAST_SAMPLES, NativeReader
from spmd_infer.checkpoints.target_folder import locked
from spmd_infer.errors import CheckpointError
from spmd_infer.mesh import MeshSpec
from spmd_infer.tensors import Source

RNG = np.random.default_rng(7)
ARRAYS: dict[str, np.ndarray] = {
    "wide": RNG.normal(size=(64, 96)).astype(np.float32),
    "brain": RNG.normal(size=(16, 8)).astype(ml_dtypes.bfloat16),
    "fp8": RNG.normal(size=(8, 8)).astype(ml_dtypes.float8_e4m3fn),
    "conv": RNG.normal(size=(8, 3, 3, 16)).astype(np.float16),
    "flags": RNG.integers(0, 2, (8,)).astype(bool),
    "ids": np.arange(24, dtype=np.int32).reshape(8, 3),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 8), np.float32),
}
SPECS = {
    "wide": PartitionSpec("data", "model"),
    "brain": PartitionSpec("model"),
    "conv": PartitionSpec(None, None, None, "model"),
    "ids": PartitionSpec(("data", "model")),
}
MESHES = ("data=8,model=1", "data=2,model=4", "data=1,model=8", "data=2,model=2", "data=1,model=2", "data=1,model=1")


def placed(saved_on: str, arrays: Mapping[str, np.ndarray] = ARRAYS) -> dict[str, jax.Array]:
    mesh = MeshSpec.parse(saved_on).build()
    return {
        name: jax.device_put(value, NamedSharding(mesh, SPECS.get(name, PartitionSpec())))
        for name, value in arrays.items()
    }


def same_bits(found: Mapping[str, Any], wanted: Mapping[str, np.ndarray] = ARRAYS) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        got = np.asarray(found[name])
        assert (got.shape, got.dtype) == (value.shape, value.dtype), name
        assert got.tobytes() == value.tobytes(), name


def restored(path: Path, saved_on: str) -> dict[str, jax.Array]:
    reader = open_checkpoint(path)
    mesh = MeshSpec.parse(saved_on).build()
    abstract = {
        name: jax.ShapeDtypeStruct(
            info.shape, info.dtype, sharding=NamedSharding(mesh, SPECS.get(name, PartitionSpec()))
        )
        for name, info in reader.tensors.items()
    }
    return load_onto(reader, {name: Source(name) for name in abstract}, abstract)


@pytest.mark.parametrize("saved_on", MESHES)
def test_saved_on_one_mesh_restores_on_every_other(saved_on: str, tmp_path: Path) -> None:
    save(placed(saved_on), tmp_path / "saved", axes={"wide": ("mlp", "embed")})
    reader = open_checkpoint(tmp_path / "saved")
    assert isinstance(reader, NativeReader)
    assert reader.axes == {"wide": ("mlp", "embed")}
    assert verify(reader) == []
    for other in MESHES:
        same_bits(restored(tmp_path / "saved", other))


def test_restore_8_to_2_to_4_to_1_devices_is_bit_identical(tmp_path: Path) -> None:
    arrays, path = placed("data=2,model=4"), tmp_path / "start"
    save(arrays, path)
    for devices, saved_on in ((2, "data=1,model=2"), (4, "data=2,model=2"), (1, "data=1,model=1")):
        arrays = restored(path, saved_on)
        assert len(arrays["wide"].sharding.device_set) == devices
        path = tmp_path / f"on-{devices}"
        save(arrays, path)
    same_bits(restored(path, "data=2,model=4"))


def test_each_distinct_slice_is_stored_once(tmp_path: Path) -> None:
    save(placed("data=2,model=4"), tmp_path / "saved")
    manifest = read_manifest(tmp_path / "saved")
    assert sum(stored.nbytes for stored in manifest.data) == sum(value.nbytes for value in ARRAYS.values())
    assert len(manifest.arrays["wide"].chunks) == 8
    assert len(manifest.arrays["fp8"].chunks) == 1
    assert (manifest.mesh, manifest.hosts) == ("data=2,model=4", 1)


def test_slices_that_lie_across_chunks(tmp_path: Path) -> None:
    save(placed("data=2,model=4"), tmp_path / "saved")
    reader = open_checkpoint(tmp_path / "saved")
    for index in ((slice(5, 60), slice(1, 95)), (slice(0, 64), slice(20, 21)), (slice(33, 33),), None):
        got = reader.read("wide", index)
        assert got.tobytes() == np.ascontiguousarray(ARRAYS["wide"][index or ()]).tobytes()
        assert got.flags.c_contiguous


def test_large_tensors_are_cut_into_chunks_with_digests_of_their_own(tmp_path: Path) -> None:
    big = RNG.normal(size=(3, 5 << 20)).astype(np.float32)
    save(placed("data=1,model=1", {"big": big}), tmp_path / "saved")
    reader = open_checkpoint(tmp_path / "saved")
    assert isinstance(reader, NativeReader)
    chunks = reader.manifest.arrays["big"].chunks
    assert [chunk.nbytes for chunk in chunks] == [10 << 20] * 6  # each row of 20 MiB in halves
    assert CHUNK_BYTES >= 10 << 20
    raw = (tmp_path / "saved" / reader.manifest.data[0].name).read_bytes()
    for chunk in chunks:
        assert hashlib.sha256(raw[chunk.offset : chunk.offset + chunk.nbytes]).hexdigest() == chunk.sha256
        assert blake3(raw[chunk.offset : chunk.offset + chunk.nbytes]).hexdigest() == chunk.blake3
    assert reader.read("big", (slice(1, 2), slice(7, 9))).tobytes() == big[1:2, 7:9].tobytes()


def test_the_digest_beside_the_manifest_is_one_that_sha256sum_checks(tmp_path: Path) -> None:
    save(placed("data=1,model=1"), tmp_path / "saved")
    checked = subprocess.run(
        ["sha256sum", "-c", "manifest.json.sha256"], cwd=tmp_path / "saved", capture_output=True, text=True
    )
    assert checked.stdout == "manifest.json: OK\n"


def test_an_existing_target_is_refused_unless_it_may_be_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "saved"
    save(placed("data=1,model=1"), target)
    other = {name: value[::-1].copy() if value.ndim else value for name, value in ARRAYS.items()}
    with pytest.raises(CheckpointError, match="exists; choose another name"):
        save(placed("data=1,model=1", other), target)
    same_bits(restored(target, "data=1,model=1"))
    save(placed("data=1,model=1", other), target, overwrite=True)
    same_bits(restored(target, "data=1,model=1"), other)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_second_saver_is_refused_and_told_who_holds_the_lock(tmp_path: Path) -> None:
    messages: list[str] = []

    def second() -> None:
        try:
            save(placed("data=1,model=1"), tmp_path / "saved")
        except CheckpointError as error:
            messages.append(str(error))

    with locked(tmp_path / "saved", "reshard"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(messages) == 1
    assert "is being written by reshard, process" in messages[0]
    second()
    assert len(messages) == 1
    assert (tmp_path / "saved" / MANIFEST_NAME).is_file()


def test_what_a_replacement_that_was_killed_left_is_put_back(tmp_path: Path) -> None:
    target = tmp_path / "saved"
    save(placed("data=1,model=1"), target)
    target.rename(tmp_path / ".saved.replaced")  # killed between its two renames
    with pytest.raises(CheckpointError, match="exists"):
        save(placed("data=1,model=1"), target)
    same_bits(restored(target, "data=1,model=1"))


def test_fast_verification_says_that_it_is_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(placed("data=1,model=1"), tmp_path / "saved")
    open_checkpoint(tmp_path / "saved", verify="fast")
    assert "verify=fast checked the sizes of 1 files and 7 of 7 chunks" in caplog.text
    open_checkpoint(tmp_path / "saved", verify="off")
    assert "verify=off checks sizes alone" in caplog.text
    with pytest.raises(CheckpointError, match="verify='never'; expected 'full', 'fast', 'off'"):
        open_checkpoint(tmp_path / "saved", verify="never")  # type: ignore[arg-type]  # what is refused


def test_what_each_level_of_verification_notices(tmp_path: Path) -> None:
    save({f"t{i}": jnp.full((1 << 18,), i, np.float32) for i in range(3 * FAST_SAMPLES)}, tmp_path / "saved")
    data = tmp_path / "saved" / "data" / "host-0000-0000.bin"
    raw = bytearray(data.read_bytes())
    for place in range(0, len(raw), 1 << 20):  # a byte of every chunk
        raw[place] ^= 1
    data.write_bytes(raw)
    with pytest.raises(CheckpointError, match="is damaged"):
        open_checkpoint(tmp_path / "saved").read("t0")
    with pytest.raises(CheckpointError, match="is damaged"):
        open_checkpoint(tmp_path / "saved", verify="fast")
    assert open_checkpoint(tmp_path / "saved", verify="off").read("t0")[0] != 0
    data.write_bytes(bytes(raw[:-1]))
    with pytest.raises(CheckpointError, match="is truncated"):
        open_checkpoint(tmp_path / "saved", verify="off")


def test_a_checkpoint_without_blake3_is_checked_by_its_sha_256(tmp_path: Path) -> None:
    """As every one is that was written before there was any."""
    save(placed("data=1,model=1"), tmp_path / "saved")
    manifest = read_manifest(tmp_path / "saved")
    older = {
        name: msgspec.structs.replace(
            entry, chunks=tuple(msgspec.structs.replace(chunk, blake3="") for chunk in entry.chunks)
        )
        for name, entry in manifest.arrays.items()
    }
    write_manifest(msgspec.structs.replace(manifest, arrays=older), tmp_path / "saved")
    same_bits(restored(tmp_path / "saved", "data=2,model=4"))
    data = tmp_path / "saved" / manifest.data[0].name
    raw = bytearray(data.read_bytes())
    raw[9] ^= 4
    data.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"is damaged: bytes 0 to .* have SHA-256"):
        restored(tmp_path / "saved", "data=1,model=1")


def test_the_manifest_says_where_it_came_from(tmp_path: Path) -> None:
    save(placed("data=1,model=1"), tmp_path / "saved", model=ModelEntry(config={"hidden_size": 8}))
    document = json.loads((tmp_path / "saved" / MANIFEST_NAME).read_text())
    assert document["libraries"]["jax"] == jax.__version__
    assert document["model"]["config"] == {"hidden_size": 8}
    assert document["arrays"]["brain"]["dtype"] == "bfloat16"


def test_only_arrays_are_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'a' is a float; expected a jax\.Array"):
        save({"a": 1.0}, tmp_path / "saved")  # type: ignore[dict-item]
    with pytest.raises(CheckpointError, match=r"expected a jax\.Array of numbers"):
        save({"key": jax.random.key(0)}, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("saved_on", ["data=2,model=4", "data=1,model=2"])
def test_an_engine_saved_and_loaded_answers_the_same(saved_on: str, minilm: Path, tmp_path: Path) -> None:
    first = Engine.load(minilm, mesh=saved_on)
    first.save(tmp_path / "saved")
    second = Engine.load(tmp_path / "saved", mesh="data=4,model=2")
    assert first.family is not None
    assert second.family is first.family
    assert second.config == first.config
    for path, weight in first.params.items():
        assert np.asarray(second.params[path]).tobytes() == np.asarray(weight).tobytes(), path
    texts = ["A boat on the lake.", "Tax returns are due in April."]
    # The same weights on another mesh: sums are ordered differently, in float32.
    np.testing.assert_allclose(second.embed(texts), first.embed(texts), atol=1e-5)


def test_a_model_without_configuration_keeps_its_sizes(efficientnet: Path, tmp_path: Path) -> None:
    first = Engine.load(efficientnet, mesh="data=1,model=1")
    first.save(tmp_path / "saved")
    second = Engine.load(tmp_path / "saved", mesh="data=1,model=2", rules=AxisRules(), verify="fast")
    assert second.config == first.config


def test_a_users_own_model_is_saved_as_tensors(tmp_path: Path) -> None:
    params = {"w": np.ones((8, 4), np.float32)}
    engine = Engine(lambda p, x: x @ p["w"], params, mesh="data=2,model=4", example=np.ones((2, 8), np.float32))
    engine.save(tmp_path / "saved")
    reader = open_checkpoint(tmp_path / "saved")
    assert reader.read("w").tobytes() == params["w"].tobytes()
