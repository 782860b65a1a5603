"""Damaged and hostile manifests: each a CheckpointError that says what is wrong, with nothing large allocated."""

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spmd_infer.checkpoints import open_checkpoint, save
from spmd_infer.checkpoints.copying import Quantisation
from spmd_infer.checkpoints.manifest import DIGEST_NAME, MANIFEST_NAME
from spmd_infer.conversion import Changes, prepare
from spmd_infer.errors import CheckpointError
from tests.checkpoints.malformed import memory_below

SLACK = 4 << 20  # what opening a sound checkpoint of this size takes, the decoder's own tables included
DATA = "data/host-0000-0000.bin"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "saved"
    save({"a": jax.numpy.arange(24.0).reshape(4, 6), "b": jax.numpy.arange(8)}, folder)
    return folder


def put(folder: Path, content: bytes) -> None:
    """A manifest with its digest: whoever could write the one could write the other."""
    (folder / MANIFEST_NAME).write_bytes(content)
    line = f"{hashlib.sha256(content).hexdigest()}  {MANIFEST_NAME}\n"
    (folder / DIGEST_NAME).write_text(line)


def read_all(folder: Path) -> dict[str, np.ndarray]:
    reader = open_checkpoint(folder)
    return {name: reader.read(name) for name in reader.tensors}


def refused(folder: Path, match: str = "") -> None:
    with memory_below(SLACK), pytest.raises(CheckpointError, match=match):
        read_all(folder)


def edit(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """An edit of the document: a path such as ``arrays.a.shape``."""

    def apply(document: dict[str, Any]) -> None:
        *steps, last = path.split(".")
        place: Any = document
        for step in steps:
            place = place[int(step)] if isinstance(place, list) else place[step]
        if isinstance(place, list):
            place[int(last)] = value
        else:
            place[last] = value

    return apply


def quantised(kind: str, values: str, scales: str) -> dict[str, Any]:
    entry = {"kind": kind, "shape": [4, 6], "dtype": "float32", "axes": None}
    return entry | {"values": values, "scales": scales}


EDITS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "another format": (edit("format", "zip"), "is 'zip' version 1"),
    "a later version": (edit("version", 2), "version 2; this program reads"),
    "version is text": (edit("version", "1"), "is not a manifest"),
    "arrays is a list": (edit("arrays", []), "is not a manifest"),
    "no data": (edit("data", []), "lies in data file 0 of 0"),
    "unknown dtype": (edit("arrays.a.dtype", "float31"), "has dtype 'float31'"),
    "object dtype": (edit("arrays.a.dtype", "O"), "has dtype 'O'"),
    "wider dtype": (edit("arrays.a.dtype", "float64"), "a chunk of 96 bytes"),
    "negative shape": (edit("arrays.a.shape", [-4, 6]), "no array of float32 can have"),
    "huge shape": (edit("arrays.a.shape", [1 << 40, 1 << 40]), "no array of float32 can have"),
    "larger shape": (edit("arrays.a.shape", [1 << 20, 6]), "has 24 of its 6291456 elements"),
    "smaller shape": (edit("arrays.a.shape", [3, 6]), "does not lie in shape"),
    "shape beyond 64 bits": (edit("arrays.a.shape", [1 << 70]), "is not a manifest|no array"),
    "too many axes": (edit("arrays.a.axes", ["embed", "mlp", "heads"]), "has axes"),
    "negative offset": (edit("arrays.a.chunks.0.1", -96), "at -96"),
    "offset past the end": (edit("arrays.a.chunks.0.1", 1 << 50), "expected|begins"),
    "overlapping chunks": (edit("arrays.b.chunks.0.1", 0), "begins at byte 0|expected"),
    "more bytes than the box": (edit("arrays.a.chunks.0.2", 97), "a chunk of 97 bytes"),
    "bytes beyond 64 bits": (edit("arrays.a.chunks.0.2", 1 << 70), "is not a manifest|a chunk of"),
    "another file": (edit("arrays.a.chunks.0.0", 7), "lies in data file 7 of 1"),
    "negative file": (edit("arrays.a.chunks.0.0", -1), "lies in data file -1 of 1"),
    "box outside": (edit("arrays.a.chunks.0.4", [5, 6]), "a chunk of|does not lie"),
    "box reversed": (edit("arrays.a.chunks.0.3", [4, 6]), "a chunk of|does not lie"),
    "box of another rank": (edit("arrays.a.chunks.0.3", [0]), "a chunk .* that is none"),
    "digest too short": (edit("arrays.a.chunks.0.5", "00"), "that is none"),
    "digest not hexadecimal": (edit("arrays.a.chunks.0.5", "g" * 64), "that is none"),
    "another digest": (edit("arrays.a.chunks.0.5", "0" * 64), "is not that of its chunks' digests"),
    "no chunks": (edit("arrays.a.chunks", []), "has 0 of its 24 elements"),
    "a file outside": (edit("data.0.name", "../saved/data/x.bin"), "not a plain path"),
    "an absolute file": (edit("data.0.name", "/etc/passwd"), "not a plain path"),
    "an empty file name": (edit("data.0.name", ""), "not a plain path"),
    "a NUL in a file name": (edit("data.0.name", "data/\0"), "not a plain path"),
    "a dot in a path": (edit("data.0.name", "data/./host-0000-0000.bin"), "not a plain path"),
    "a file that is not there": (edit("data.0.name", "data/other.bin"), "is missing"),
    "a folder for a file": (edit("data.0.name", "data"), "is missing"),
    "another size": (edit("data.0.nbytes", 1 << 40), "but tensors of"),
    "negative size": (edit("data.0.nbytes", -1), "-1 bytes"),
    "another file digest": (edit("data.0.sha256", "0" * 64), "is not that of its chunks' digests"),
    "a lost side file": (
        edit("files", [{"name": "tokenizer.json", "nbytes": 1, "sha256": "0" * 64}]),
        "tokenizer.json: is missing",
    ),
    "a side file outside": (
        edit("files", [{"name": "../../secret", "nbytes": 1, "sha256": "0" * 64}]),
        "not a plain path",
    ),
    "the same file twice": (
        edit("files", [{"name": DATA, "nbytes": 128, "sha256": "0" * 64}]),
        "not a plain path inside the folder, once",
    ),
    "quantised without parts": (
        edit("quantised", {"q": quantised("int8", "x", "y")}),
        "lacks its values",
    ),
    "quantised of unknown kind": (
        edit("quantised", {"q": quantised("int2", "a", "b")}),
        "is of unknown kind 'int2'",
    ),
    "quantised parts do not fit": (
        edit("quantised", {"q": quantised("int8", "a", "b")}),
        "has values float32",
    ),
    "quantised over itself": (
        edit("quantised", {"a": quantised("int8", "a", "b")}),
        "is both stored and quantised",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), EDITS.values(), ids=EDITS.keys())
def test_a_manifest_that_says_what_cannot_be(
    change: Callable[[dict[str, Any]], None], message: str, sound: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(sound, tmp_path / "saved")
    document = json.loads((folder / MANIFEST_NAME).read_bytes())
    change(document)
    put(folder, json.dumps(document).encode())
    refused(folder, message)


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"null", b"\xff\xfe", b"{" * 100_000, b'{"format":"spmd-infer checkpoint"', b"[" * 100_000],
    ids=["empty", "object", "list", "null", "not UTF-8", "open", "cut", "deep"],
)
def test_what_is_no_manifest(content: bytes, sound: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sound, tmp_path / "saved")
    put(folder, content)
    refused(folder, "is not a manifest")


def test_a_data_file_that_is_a_link_elsewhere(sound: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sound, tmp_path / "saved")
    shutil.move(folder / DATA, tmp_path / "elsewhere.bin")
    (folder / DATA).symlink_to(tmp_path / "elsewhere.bin")
    refused(folder, "outside its folder")


def test_a_digest_that_is_missing(sound: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sound, tmp_path / "saved")
    (folder / DIGEST_NAME).unlink()
    refused(folder, DIGEST_NAME)


def test_overlapping_boxes_are_refused(tmp_path: Path) -> None:
    from jax.sharding import NamedSharding, PartitionSpec

    from spmd_infer.mesh import MeshSpec

    mesh = MeshSpec.parse("data=2,model=2").build()
    array = jax.device_put(np.arange(64.0).reshape(8, 8), NamedSharding(mesh, PartitionSpec("data", "model")))
    save({"a": array}, tmp_path / "saved")
    document = json.loads((tmp_path / "saved" / MANIFEST_NAME).read_bytes())
    document["arrays"]["a"]["chunks"][1][3:5] = document["arrays"]["a"]["chunks"][0][3:5]
    put(tmp_path / "saved", json.dumps(document).encode())
    refused(tmp_path / "saved", "two pieces that overlap")


_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_anywhere_is_refused_or_changes_nothing_that_matters(
    data: st.DataObject, sound: Path, tmp_path: Path
) -> None:
    """One value of a sound manifest is replaced by an arbitrary one; what is read stays right, or nothing is read."""
    folder = tmp_path / "saved"
    if not folder.exists():
        shutil.copytree(sound, folder)
    document = json.loads((sound / MANIFEST_NAME).read_bytes())
    edited = copy.deepcopy(document)
    place: Any = edited
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if isinstance(place[key], dict | list) and place[key] and data.draw(st.integers(0, 3)):
            place = place[key]
            continue
        place[key] = data.draw(_values)
        break
    put(folder, json.dumps(edited).encode())
    wanted = {"a": np.arange(24.0, dtype=np.float32).reshape(4, 6), "b": np.arange(8, dtype=np.int32)}
    try:
        found = read_all(folder)
    except CheckpointError:
        return
    for name, value in found.items():
        assert value.nbytes == wanted[name].nbytes
        assert value.tobytes() == wanted[name].tobytes()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=300), cut=st.integers(0, 3000), at=st.integers(0, 3000))
def test_any_bytes_in_a_manifest_are_refused(content: bytes, cut: int, at: int, sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    if not folder.exists():
        shutil.copytree(sound, folder)
    whole = (sound / MANIFEST_NAME).read_bytes()
    at %= len(whole)
    broken = whole[:at] + content + whole[at + cut % len(whole) :]
    put(folder, broken)
    try:
        found = read_all(folder)
    except CheckpointError:
        return
    # Nothing but a name, the model's entry or a note may have changed: the digests hold the rest.
    assert {value.nbytes for value in found.values()} <= {96, 32}


def test_a_quantised_checkpoint_is_sound_and_its_parts_are_not_listed(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"w.weight": np.ones((64, 64), np.float32)}, tmp_path / "own.safetensors")
    made = prepare(open_checkpoint(tmp_path / "own.safetensors"), Changes(quantisation=Quantisation("int4")))
    made.run(tmp_path / "small", "convert")
    assert list(open_checkpoint(tmp_path / "small").tensors) == ["w.weight"]
