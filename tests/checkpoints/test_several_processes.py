"""Jobs of several processes save and restore one checkpoint, each its own part; real processes over loopback."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from spmd_infer.checkpoints import open_checkpoint, verify
from spmd_infer.checkpoints.native_reader import NativeReader
from spmd_infer.checkpoints.target_folder import locked

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

JOB = """
import json, os, sys
rank, processes, port, devices = map(int, sys.argv[1:5])
what, path, out = sys.argv[5:8]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", processes, rank)
import hashlib
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from spmd_infer.checkpoints import load_onto, open_checkpoint, save
from spmd_infer.errors import CheckpointError
from spmd_infer.mesh import MeshSpec
from spmd_infer.tensors import Source

mesh = MeshSpec.parse("data=2,model=4").build()
rng = np.random.default_rng(11)
wanted = {
    "wide": rng.normal(size=(64, 256)).astype(np.float32),
    "split": rng.normal(size=(32, 64)).astype(np.float16),
    "both": rng.integers(0, 99, (16, 32)).astype(np.int32),
    "whole": rng.normal(size=(40,)).astype(np.float32),
}
specs = {"wide": ("model",), "split": (None, "model"), "both": ("data", "model"), "whole": ()}
shardings = {name: NamedSharding(mesh, PartitionSpec(*spec)) for name, spec in specs.items()}

def placed():
    return {
        name: jax.make_array_from_callback(value.shape, shardings[name], lambda index, value=value: value[index])
        for name, value in wanted.items()
    }

result = {"rank": rank}
if what == "save":
    try:
        save(placed(), path, axes={"wide": ("mlp", "embed")})
    except CheckpointError as error:
        result["error"] = str(error)
else:
    reader = open_checkpoint(path)
    reads = []
    plain = reader._verified_bytes
    reader._verified_bytes = lambda name, chunk, raw: (reads.append(chunk.nbytes), plain(name, chunk, raw))[1]
    abstract = {
        name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=shardings[name]) for name, value in wanted.items()
    }
    loaded = load_onto(reader, {name: Source(name) for name in wanted}, abstract)
    result["equal"] = all(
        np.asarray(shard.data).tobytes() == np.ascontiguousarray(wanted[name][shard.index]).tobytes()
        for name, array in loaded.items() for shard in array.addressable_shards
    )
    result["read"] = sum(reads)
with open(f"{out}-{rank}.json", "w") as file:
    json.dump(result, file)
jax.distributed.shutdown()
"""


def job(processes: int, devices: int, what: str, path: Path, tmp_path: Path) -> list[dict[str, object]]:
    """Run a job; returns what each process has to say."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / f"{what}-{processes}"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("XLA_", "JAX_"))}
    environment["PYTHONPATH"] = str(Path.cwd())
    running = [
        subprocess.Popen(
            [sys.executable, "-c", JOB, *map(str, (rank, processes, port, devices, what, path, out))],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    said = [process.communicate(timeout=240)[1] for process in running]
    assert [process.returncode for process in running] == [0] * processes, said
    return [json.loads(Path(f"{out}-{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.parametrize(("writers", "readers"), [((4, 2), (2, 4)), ((2, 4), (4, 2))], ids=["4x2 to 2x4", "2x4 to 4x2"])
def test_one_job_writes_and_another_reads(writers: tuple[int, int], readers: tuple[int, int], tmp_path: Path) -> None:
    job(*writers, "save", tmp_path / "saved", tmp_path)
    reader = open_checkpoint(tmp_path / "saved")
    assert isinstance(reader, NativeReader)
    assert verify(reader) == []
    assert (reader.manifest.mesh, reader.manifest.hosts) == ("data=2,model=4", writers[0])
    # Every process whose devices hold a slice that no process before it does has written a file of its own.
    assert len(reader.manifest.data) == writers[0]
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "data", "manifest.json", "manifest.json.sha256",
    ]  # fmt: skip
    total = sum(stored.nbytes for stored in reader.manifest.data)
    assert total == 64 * 256 * 4 + 32 * 64 * 2 + 16 * 32 * 4 + 40 * 4  # each slice once
    results = job(*readers, "read", tmp_path / "saved", tmp_path)
    assert all(result["equal"] for result in results)
    if readers[0] == 4:  # two of four columns of the mesh each: half of the split tensors
        for result in results:
            assert isinstance(result["read"], int)
            assert result["read"] < 0.6 * total


def test_when_one_process_cannot_save_all_of_them_say_so(tmp_path: Path) -> None:
    with locked(tmp_path / "saved", "convert"):
        results = job(4, 2, "save", tmp_path / "saved", tmp_path)
    for result in results:
        assert "process 0: " in str(result["error"])
        assert "is being written by convert, process" in str(result["error"])
    assert not (tmp_path / "saved").exists()
