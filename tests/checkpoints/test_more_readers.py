"""Readers of NumPy archives, Flax's msgpack, Orbax's trees and CTranslate2, on what the formats' libraries wrote."""

import io
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx, serialization
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from spmd_infer.checkpoints import Reader, open_checkpoint
from spmd_infer.checkpoints.boxes import as_slices
from spmd_infer.conversion import prepare
from spmd_infer.errors import CheckpointError
from spmd_infer.mesh import MeshSpec

RNG = np.random.default_rng(9)
TREE: dict[str, Any] = {
    "dense": {"kernel": RNG.normal(size=(24, 16)).astype(np.float32), "bias": np.arange(16, dtype=np.float32)},
    "half": RNG.normal(size=(4, 3, 2)).astype(ml_dtypes.bfloat16),
    "ids": np.arange(12, dtype=np.int32).reshape(3, 4),
    "scalar": np.float32(2.5).reshape(()),
}
FLAT = {
    "dense.kernel": TREE["dense"]["kernel"],
    "dense.bias": TREE["dense"]["bias"],
    **{k: TREE[k] for k in ("half", "ids", "scalar")},
}
PLAIN = {name: value for name, value in FLAT.items() if value.dtype != ml_dtypes.bfloat16}


def holds(reader: Reader, wanted: dict[str, np.ndarray]) -> None:
    assert isinstance(reader, Reader)
    assert set(reader.tensors) == set(wanted)
    for name, value in wanted.items():
        info = reader.tensors[name]
        assert (info.shape, info.dtype, info.nbytes) == (value.shape, value.dtype, value.nbytes), name
        assert reader.read(name).tobytes() == value.tobytes()
        box = tuple((size // 3, size - size // 4) for size in value.shape)
        part = reader.read(name, as_slices(box))
        assert part.tobytes() == np.ascontiguousarray(value[as_slices(box)]).tobytes()
        assert part.flags.c_contiguous


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(save: Any, tmp_path: Path) -> None:
    save(tmp_path / "x.npz", **PLAIN, turned=np.asfortranarray(TREE["dense"]["kernel"]))
    reader = open_checkpoint(tmp_path / "x.npz")
    assert reader.stored == "npz"
    holds(reader, PLAIN | {"turned": TREE["dense"]["kernel"]})


def test_npz_with_objects_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.array([{"a": 1}], dtype=object))
    with pytest.raises(CheckpointError, match="dtype object, expected native numbers"):
        open_checkpoint(tmp_path / "x.npz")


def test_npz_that_claims_more_than_it_has(tmp_path: Path) -> None:
    inner = io.BytesIO()
    np.lib.format.write_array_header_1_0(inner, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)})
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("a.npy", inner.getvalue() + bytes(16))
    with pytest.raises(CheckpointError, match="should have 4398046511104 bytes behind its header, but has 16"):
        open_checkpoint(tmp_path / "x.npz")


def test_msgpack(tmp_path: Path) -> None:
    (tmp_path / "model.msgpack").write_bytes(serialization.msgpack_serialize(TREE))
    reader = open_checkpoint(tmp_path / "model.msgpack")
    assert reader.stored == "msgpack"
    holds(reader, FLAT)


def test_msgpack_of_a_flax_state_with_other_values(tmp_path: Path) -> None:
    tree = {"step": 7, "name": "x" * 300, "rate": 0.1, "list": [np.ones(2, np.float32), None, True], "big": -(1 << 40)}
    (tmp_path / "m.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    holds(open_checkpoint(tmp_path / "m.msgpack"), {"list.0": np.ones(2, np.float32)})


def test_msgpack_arrays_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 100)
    (tmp_path / "m.msgpack").write_bytes(serialization.msgpack_serialize(TREE))
    holds(open_checkpoint(tmp_path / "m.msgpack"), FLAT)


def test_orbax_version_1(tmp_path: Path) -> None:
    from orbax.checkpoint import v1 as ocp

    mesh = MeshSpec.parse("data=2,model=4").build()
    tree = jax.tree.map(lambda value: jax.device_put(value, NamedSharding(mesh, PartitionSpec())), TREE)
    tree["dense"]["kernel"] = jax.device_put(
        TREE["dense"]["kernel"], NamedSharding(mesh, PartitionSpec("data", "model"))
    )
    ocp.save(tmp_path / "v1", tree)
    reader = open_checkpoint(tmp_path / "v1")
    assert reader.stored == "orbax"
    holds(reader, FLAT)


def test_orbax_version_0(tmp_path: Path) -> None:
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "v0", jax.tree.map(jax.numpy.asarray, TREE))
    holds(open_checkpoint(tmp_path / "v0"), FLAT)


def test_orbax_of_an_nnx_state_becomes_a_native_checkpoint(tmp_path: Path) -> None:
    from orbax.checkpoint import v1 as ocp

    state = nnx.state(nnx.Linear(64, 256, rngs=nnx.Rngs(0)))
    ocp.save(tmp_path / "orbax", nnx.to_pure_dict(state))
    reader = open_checkpoint(tmp_path / "orbax")
    prepare(reader, mesh=MeshSpec.parse("data=1,model=4")).run(tmp_path / "native", "convert")
    native = open_checkpoint(tmp_path / "native")
    assert set(native.tensors) == {"kernel", "bias"}
    assert native.read("kernel").tobytes() == np.asarray(state["kernel"][...]).tobytes()


def test_orbax_folders_that_are_damaged(tmp_path: Path) -> None:
    from orbax.checkpoint import v1 as ocp

    ocp.save(tmp_path / "v1", {"a": jax.numpy.ones(4)})
    (tmp_path / "v1" / "state" / "manifest.ocdbt").write_bytes(b"no manifest")
    with pytest.raises(CheckpointError, match="tensor 'a' cannot be opened"):
        open_checkpoint(tmp_path / "v1")
    (tmp_path / "v1" / "state" / "_METADATA").write_text(json.dumps({"tree_metadata": {"('x',)": 3}}))
    with pytest.raises(CheckpointError, match="without keys or value"):
        open_checkpoint(tmp_path / "v1")


def ctranslate2(variables: dict[str, np.ndarray], aliases: dict[str, str]) -> bytes:
    """A model.bin of version 6, as CTranslate2's converter lays it out."""
    kinds = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4, "bfloat16": 5}

    def text(value: str) -> bytes:
        raw = value.encode() + b"\0"
        return struct.pack("<H", len(raw)) + raw

    out = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, value in variables.items():
        out += text(name) + struct.pack("<B", value.ndim) + struct.pack(f"<{value.ndim}I", *value.shape)
        out += struct.pack("<BI", kinds[value.dtype.name], value.nbytes) + value.tobytes()
    out += struct.pack("<I", len(aliases))
    return out + b"".join(text(alias) + text(name) for alias, name in aliases.items())


CT2 = {"decoder/w": TREE["dense"]["kernel"], "half": TREE["half"], "q": np.arange(6, dtype=np.int8)}


def test_ctranslate2(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(ctranslate2(CT2, {"decoder/projection": "decoder/w"}))
    reader = open_checkpoint(tmp_path / "model.bin")
    assert (reader.stored, reader.architecture) == ("ctranslate2", "WhisperSpec")
    assert reader.metadata == {"version": 6, "revision": 3, "aliases": {"decoder/projection": "decoder/w"}}
    holds(reader, CT2 | {"decoder/projection": CT2["decoder/w"]})


def test_whisper_tiny_as_it_is_distributed(whisper_tiny: Path) -> None:
    reader = open_checkpoint(whisper_tiny / "model.bin")
    assert (reader.architecture, reader.metadata["version"], reader.metadata["revision"]) == ("WhisperSpec", 6, 3)
    assert reader.tensors["decoder/embeddings/weight"].shape == (51864, 384)
    assert reader.tensors["decoder/embeddings/weight"].dtype == np.float16
    assert reader.metadata["aliases"]["decoder/projection/weight"] == "decoder/embeddings/weight"
    fused = reader.read("encoder/layer_0/self_attention/linear_0/weight")
    assert fused.shape == (3 * 384, 384)
    assert np.isfinite(fused).all()
    assert 0.01 < float(np.std(fused.astype(np.float32))) < 0.2


SOUND: dict[str, bytes] = {
    "x.msgpack": serialization.msgpack_serialize(TREE),
    "model.bin": ctranslate2(CT2, {"b": "half"}),
}


def _npz() -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, **PLAIN)
    return out.getvalue()


SOUND["x.npz"] = _npz()


@pytest.mark.parametrize("name", SOUND)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 1 << 16), content=st.binary(max_size=12), cut=st.integers(0, 64))
def test_damaged_files_are_refused_or_read_without_a_crash(
    name: str, at: int, content: bytes, cut: int, tmp_path: Path
) -> None:
    sound = SOUND[name]
    at %= len(sound)
    (tmp_path / name).write_bytes(sound[:at] + content + sound[at + cut :])
    try:
        reader = open_checkpoint(tmp_path / name)
        total = sum(reader.read(tensor).nbytes for tensor in reader.tensors)
    except CheckpointError:
        return
    assert total <= 2 * sum(value.nbytes for value in (FLAT | CT2).values())


@pytest.mark.parametrize("name", SOUND)
def test_every_cut_is_refused(name: str, tmp_path: Path) -> None:
    sound = SOUND[name]
    for size in (*range(0, min(64, len(sound)), 3), *range(64, len(sound), 97)):
        (tmp_path / name).write_bytes(sound[:size])
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path / name)
