"""One checkpoint written by several processes of the command line: each its share, whatever becomes of one of them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from spmd_infer.checkpoints import open_checkpoint, verify
from spmd_infer.checkpoints.native_reader import NativeReader
from spmd_infer.checkpoints.shares import Share
from spmd_infer.conversion import prepare
from spmd_infer.errors import CheckpointError
from spmd_infer.mesh import MeshSpec

COMMAND = [str(Path(sys.executable).parent / "spmd-infer"), "reshard"]


def started(source: Path, target: Path, index: int, count: int = 2) -> subprocess.Popen[str]:
    environment = os.environ | {"SPMD_INFER_PROCESS_ID": str(index), "SPMD_INFER_NUM_PROCESSES": str(count)}
    arguments = [str(source), str(target), "--mesh", "data=1,model=4", "--hosts", "2"]
    return subprocess.Popen(
        [*COMMAND, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def made(path: Path, tensors: int, rows: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    values = {f"t{i:02d}.weight": rng.normal(size=(rows, 512)).astype(np.float32) for i in range(tensors)}
    save_file(values, path)
    return values


def same(target: Path, values: dict[str, np.ndarray]) -> None:
    reader = open_checkpoint(target)
    assert set(reader.tensors) == set(values)
    assert all(reader.read(name).tobytes() == value.tobytes() for name, value in values.items())
    assert verify(reader) == []


@given(st.lists(st.integers(0, 1000), max_size=30), st.integers(1, 9))
def test_every_tensor_belongs_to_one_process(sizes: list[int], count: int) -> None:
    named = {f"t{i}": nbytes for i, nbytes in enumerate(sizes)}
    shares = [Share(index, count).names(named) for index in range(count)]
    assert sorted(name for share in shares for name in share) == sorted(named)
    total = sum(sizes)
    for share in shares:  # off by at most the tensors at its two ends
        assert sum(named[name] for name in share) <= total / count + 2 * max(sizes, default=0)


def test_a_process_that_cannot_be() -> None:
    with pytest.raises(CheckpointError, match="process 2 of 2: expected one from 0 to 1"):
        Share(2, 2)


@pytest.mark.cluster
@pytest.mark.slow
def test_two_processes_write_one_checkpoint(tmp_path: Path) -> None:
    values = made(tmp_path / "source.safetensors", 9, 256)
    running = [started(tmp_path / "source.safetensors", tmp_path / "target", index) for index in (1, 0)]
    said = [process.communicate(timeout=240)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    same(tmp_path / "target", values)
    reader = open_checkpoint(tmp_path / "target")
    assert isinstance(reader, NativeReader)
    names = [stored.name for stored in reader.manifest.data]
    assert sorted(name.partition("/")[2] for name in names) == [
        f"host-000{host}-part-000{part}-0000.bin" for host in range(2) for part in range(2)
    ]
    sizes = [
        sum(stored.nbytes for stored in reader.manifest.data if f"part-000{part}" in stored.name) for part in (0, 1)
    ]
    assert max(sizes) < 1.5 * min(sizes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.safetensors", "target"]
    assert sorted(path.name for path in (tmp_path / "target").iterdir() if not path.name.startswith(".share")) == [
        "data", "manifest.json", "manifest.json.sha256",
    ]  # fmt: skip


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_is_killed_is_started_again(tmp_path: Path, lost: int) -> None:
    values = made(tmp_path / "source.safetensors", 24, 4096)
    source, target = tmp_path / "source.safetensors", tmp_path / "target"
    running = {index: started(source, target, index) for index in (0, 1)}
    journal = tmp_path / ".target.partial" / f"journal-{lost:05d}.jsonl"
    end = time.monotonic() + 120
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 1) and time.monotonic() < end:
        time.sleep(0.005)
    running[lost].send_signal(signal.SIGKILL)
    running[lost].communicate(timeout=60)
    assert not target.exists()
    again = started(source, target, lost)
    said = [process.communicate(timeout=240)[1] for process in (again, running[1 - lost])]
    assert again.returncode == 0, said
    if lost == 0:  # the other had nothing to wait for
        assert running[1].returncode == 0, said
    same(target, values)


def test_a_process_that_never_comes_is_named(tmp_path: Path) -> None:
    made(tmp_path / "source.safetensors", 4, 64)
    work = prepare(open_checkpoint(tmp_path / "source.safetensors"), mesh=MeshSpec.parse("data=1,model=2"))
    with pytest.raises(CheckpointError, match="2 of 3 processes are neither done nor at work: 1, 2; start them"):
        work.run(tmp_path / "target", "reshard", share=Share(0, 3, patience=0.3))
    assert not (tmp_path / "target").exists()
    work.run(tmp_path / "target", "reshard", share=Share(1, 3, patience=0.3))
    work.run(tmp_path / "target", "reshard", share=Share(2, 3, patience=0.3))
    work.run(tmp_path / "target", "reshard", share=Share(0, 3, patience=0.3))
    assert verify(open_checkpoint(tmp_path / "target")) == []
    with pytest.raises(CheckpointError, match="process 0 of 2 has not begun within 0 s"):
        work.run(tmp_path / "other", "reshard", share=Share(1, 2, patience=0.3))
