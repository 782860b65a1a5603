"""Checkpoints under faults: flipped bits, lost files, kills, full disks, missing rights. Rows 10 to 13, 21 and 22."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from spmd_infer import Engine
from spmd_infer.checkpoints import load_onto, open_checkpoint, save, verify
from spmd_infer.checkpoints.copying import SLACK_BYTES
from spmd_infer.checkpoints.manifest import DIGEST_NAME, MANIFEST_NAME, ModelEntry
from spmd_infer.checkpoints.native_reader import NativeReader, Verify
from spmd_infer.checkpoints.native_store import store
from spmd_infer.checkpoints.native_writer import DataWriter
from spmd_infer.checkpoints.safetensors_reader import SafetensorsReader
from spmd_infer.checkpoints.safetensors_writer import store_hugging_face
from spmd_infer.conversion import prepare
from spmd_infer.errors import CheckpointError
from spmd_infer.mesh import MeshSpec
from spmd_infer.tensors import Source

FLIPS = 100
KILLS = 20


def made(path: Path, *, tensors: int = 6, rows: int = 256, seed: int = 1) -> Path:
    """A checkpoint of no family, as one safetensors file."""
    rng = np.random.default_rng(seed)
    save_file({f"t{i}.weight": rng.normal(size=(rows, 512)).astype(np.float32) for i in range(tensors)}, path)
    return path


@pytest.fixture
def native(tmp_path: Path) -> Path:
    source = made(tmp_path / "source.safetensors")
    prepare(open_checkpoint(source), mesh=MeshSpec.parse("data=2,model=4"), hosts=2).run(tmp_path / "native", "reshard")
    return tmp_path / "native"


def read_all(path: Path) -> dict[str, bytes]:
    reader = open_checkpoint(path)
    return {name: reader.read(name).tobytes() for name in reader.tensors}


# Row 10: a flipped bit.


def test_every_one_of_100_flipped_bits_is_refused_and_named(native: Path) -> None:
    wanted = read_all(native)
    files = [path for path in sorted(native.rglob("*")) if path.is_file()]
    sizes = [path.stat().st_size for path in files]
    chance = random.Random(5)
    named_tensors = 0
    for trial in range(FLIPS):
        # Every file has its turn, large and small ones.
        place = files[trial % len(files)] if trial % 2 else chance.choices(files, sizes)[0]
        offset, bit = chance.randrange(place.stat().st_size), chance.randrange(8)
        _flip(place, offset, bit)
        try:
            with pytest.raises(CheckpointError) as refused:
                read_all(native)
            message = str(refused.value)
            assert place.name in message, (trial, place, message)
            if place.parent.name == "data":
                reader = open_checkpoint(native)
                assert isinstance(reader, NativeReader)
                name, chunk = _hit(reader, place, offset)
                assert f"tensor {name!r} is damaged: bytes {chunk[0]} to {chunk[1]}" in message
                (problem,) = verify(reader)
                assert (problem.tensor, problem.offset) == (name, chunk[0])
                assert problem.file == place
                named_tensors += 1
        finally:
            _flip(place, offset, bit)
    assert named_tensors >= FLIPS // 2
    assert read_all(native) == wanted


def test_a_flipped_bit_is_refused_before_the_engine_uses_it(minilm: Path, tmp_path: Path) -> None:
    prepare(open_checkpoint(minilm)).run(tmp_path / "native", "convert")
    data = next((tmp_path / "native" / "data").iterdir())
    for offset in (1, data.stat().st_size // 2):
        _flip(data, offset, 3)
        with pytest.raises(CheckpointError, match=r"host-0000-0000\.bin: tensor '.*' is damaged"):
            Engine.load(tmp_path / "native", mesh="data=1,model=2")
        _flip(data, offset, 3)


def _flip(path: Path, offset: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))


def _hit(reader: NativeReader, place: Path, offset: int) -> tuple[str, tuple[int, int]]:
    for name, entry in reader.manifest.arrays.items():
        for chunk in entry.chunks:
            if reader.files[chunk.file].path == place and chunk.offset <= offset < chunk.offset + chunk.nbytes:
                return name, (chunk.offset, chunk.offset + chunk.nbytes)
    raise AssertionError(f"byte {offset} of {place} belongs to no tensor")


# Row 11: truncated or missing files, refused before anything is put on a device.


@pytest.mark.parametrize("name", ["data/host-0000-0000.bin", MANIFEST_NAME, DIGEST_NAME])
@pytest.mark.parametrize("damage", ["missing", "truncated", "grown"])
def test_files_that_are_not_whole(name: str, damage: str, native: Path) -> None:
    path = native / name
    if damage == "missing":
        path.unlink()
    else:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size + (-1 if damage == "truncated" else 1))
    before = len(jax.live_arrays())
    begin = time.perf_counter()
    with pytest.raises(CheckpointError, match=path.name.split(".")[0]):
        open_checkpoint(native)
    assert time.perf_counter() - begin < 10
    assert len(jax.live_arrays()) == before


# Row 12: kill -9 at random moments.

SAVE = """
import sys, jax, numpy as np
from spmd_infer.checkpoints import save
def made(seed):
    return jax.numpy.asarray(np.random.default_rng(seed).normal(size=(512, 1024)).astype(np.float32))
params = {f"t{i}": made(i) for i in range(24)}
print("ready", flush=True)
sys.stdin.readline()
save(params, sys.argv[1])
"""
COPY = """
import sys
from pathlib import Path
from spmd_infer.checkpoints import open_checkpoint
from spmd_infer.conversion import prepare
from spmd_infer.mesh import MeshSpec
mesh = MeshSpec.parse("data=2,model=4") if sys.argv[3] == "reshard" else None
to = "huggingface" if sys.argv[3] == "huggingface" else "native"
made = prepare(open_checkpoint(sys.argv[1]), mesh=mesh, to=to)
print("ready", flush=True)
sys.stdin.readline()
made.run(Path(sys.argv[2]), sys.argv[3])
"""


def started(*command: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def seconds_of(*command: str) -> float:
    with started(*command) as process:
        begin = time.perf_counter()
        go(process)
        assert process.wait(120) == 0
        return time.perf_counter() - begin


def killed(moment: float, *command: str) -> bool:
    """Run a command and kill it that many seconds after it began its work; whether it was still at it."""
    with started(*command) as process:
        go(process)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        return process.wait(120) == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("what", ["save", "reshard", "huggingface"])
def test_a_kill_at_any_moment_leaves_no_half_written_target(what: str, tmp_path: Path, minilm: Path) -> None:
    target = tmp_path / "target"
    command = (SAVE, str(target)) if what == "save" else (COPY, str(minilm), str(target), what)
    usual = seconds_of(*command)
    wanted = read_all(target)
    shutil.rmtree(target)
    chance, hits, continued = random.Random(what), 0, 0
    for _ in range(KILLS // 3 + 1):
        if killed(chance.uniform(0.02, usual), *command):
            hits += 1
        if target.exists():  # whole, or it would not be there
            assert read_all(target) == wanted
            shutil.rmtree(target)
            continue
        journal = tmp_path / ".target.partial" / ("journal.jsonl" if what == "huggingface" else "journal-00000.jsonl")
        continued += journal.exists() and len(journal.read_bytes().splitlines()) > 1
        assert subprocess.run([sys.executable, "-c", *command], input="\n", text=True, timeout=120).returncode == 0
        assert read_all(target) == wanted
        assert [path.name for path in tmp_path.iterdir()] == ["target"]
        shutil.rmtree(target)
    assert hits >= 3
    print(f"{what}: {hits} kills while it worked, {continued} taken up from a journal")


def test_what_was_done_before_a_kill_is_not_done_again(tmp_path: Path) -> None:
    source, target = SafetensorsReader(made(tmp_path / "source.safetensors")), tmp_path / "target"
    with pytest.raises(KeyboardInterrupt):
        prepare(source).run(target, "convert", advance=_interrupt_after(3))
    assert not target.exists()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".target.partial" / "data").iterdir()}
    assert len(before) == 1
    reads: list[str] = []
    watched = prepare(source)
    original = source.stream
    source.stream = lambda name, box, scratch: (reads.append(name), original(name, box, scratch))[1]  # type: ignore[method-assign,func-returns-value]  # watched
    watched.run(target, "convert")
    assert set(reads) == {"t3.weight", "t4.weight", "t5.weight"}
    assert read_all(target) == read_all(tmp_path / "source.safetensors")


def test_other_work_does_not_go_on_from_a_journal(tmp_path: Path) -> None:
    first, second = made(tmp_path / "a.safetensors"), made(tmp_path / "b.safetensors", seed=2)
    with pytest.raises(KeyboardInterrupt):
        prepare(open_checkpoint(first)).run(tmp_path / "target", "convert", advance=_interrupt_after(3))
    prepare(open_checkpoint(second)).run(tmp_path / "target", "convert")
    assert read_all(tmp_path / "target") == read_all(second)


def test_a_journal_that_was_cut_off_counts_up_to_its_last_whole_line(tmp_path: Path) -> None:
    source = made(tmp_path / "source.safetensors")
    with pytest.raises(KeyboardInterrupt):
        prepare(open_checkpoint(source)).run(tmp_path / "target", "convert", advance=_interrupt_after(3))
    journal = tmp_path / ".target.partial" / "journal-00000.jsonl"
    with journal.open("r+b") as file:
        file.truncate(journal.stat().st_size - 40)
    prepare(open_checkpoint(source)).run(tmp_path / "target", "convert")
    assert read_all(tmp_path / "target") == read_all(source)


def _interrupt_after(count: int):  # type: ignore[no-untyped-def]  # a small closure
    left = [count]

    def advance(nbytes: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    return advance


# Row 13: disk full, no permission.


@pytest.fixture
def small_disk(tmp_path: Path):  # type: ignore[no-untyped-def]  # a generator fixture
    """A file system of 3 MiB, where this user may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"cannot mount a small file system: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_old_checkpoint_as_it_was(small_disk: Path, tmp_path: Path) -> None:
    target = small_disk / "saved"
    old = {"w": jax.numpy.arange(1024, dtype=np.float32)}
    save(old, target)
    large = {f"t{i}": jax.numpy.ones((512, 512), np.float32) * i for i in range(4)}
    with pytest.raises(CheckpointError, match="needs 4194304 bytes, but only"):
        save(large, target, overwrite=True)
    source = made(tmp_path / "source.safetensors", tensors=8)
    with pytest.raises(CheckpointError, match="needs 4194304 bytes, but only"):
        prepare(open_checkpoint(source)).run(target, "convert", overwrite=True)
    assert read_all(target) == {"w": np.asarray(old["w"]).tobytes()}


def test_a_disk_that_fills_up_while_writing(small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = small_disk / "saved"
    save({"w": jax.numpy.arange(1024, dtype=np.float32)}, target)
    wanted = read_all(target)
    for module in ("native_store", "saving", "safetensors_writer"):
        monkeypatch.setattr(f"spmd_infer.checkpoints.{module}.check_space", lambda target, needed: None)
    large = {f"t{i}": jax.numpy.ones((512, 512), np.float32) * i for i in range(4)}
    with pytest.raises(CheckpointError, match=r"save failed: .*No space left on device"):
        save(large, target, overwrite=True)
    assert [path.name for path in small_disk.iterdir()] == ["saved"]  # nothing of it takes room any more
    source = made(tmp_path / "source.safetensors", tensors=8)
    with pytest.raises(CheckpointError, match=r"convert failed: .*No space left on device.* is kept in .*partial"):
        prepare(open_checkpoint(source)).run(target, "convert", overwrite=True)
    assert read_all(target) == wanted
    # Room is made: the same command goes on from where it stopped.
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    prepare(open_checkpoint(source)).run(target, "convert", overwrite=True)
    assert read_all(target) == read_all(source)


def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir()
    save({"w": jax.numpy.ones(8)}, folder / "saved")
    program = (
        "import sys, jax\n"
        "from spmd_infer.checkpoints import save\n"
        "from spmd_infer.errors import CheckpointError\n"
        "try: save({'w': jax.numpy.zeros(8)}, sys.argv[1], overwrite=True)\n"
        "except CheckpointError as error: print(error)\n"
    )
    command = [sys.executable, "-c", program, str(folder / "saved")]
    if os.geteuid() == 0:  # root may write anywhere, unless it gives that up
        if shutil.which("setpriv") is None:
            pytest.skip("runs as root, and there is no setpriv to give up its rights")
        command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *command]
    folder.chmod(0o555)
    answer = subprocess.run(command, capture_output=True, text=True)
    folder.chmod(0o755)
    assert "Permission denied" in answer.stdout, answer.stderr
    assert read_all(folder / "saved") == {"w": np.ones(8, np.float32).tobytes()}


# Row 21: restoring on fewer devices; memory stays near the arrays.

RESTORE = """
import os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from spmd_infer.checkpoints import load_onto, open_checkpoint
from spmd_infer.mesh import MeshSpec
from spmd_infer.tensors import Source

def status(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))

reader = open_checkpoint(sys.argv[1])
mesh = MeshSpec.parse(sys.argv[2]).build()
jax.device_put(np.ones(8)).block_until_ready()
sharding = NamedSharding(mesh, PartitionSpec("model"))
abstract = {n: jax.ShapeDtypeStruct(i.shape, i.dtype, sharding=sharding) for n, i in reader.tensors.items()}
before = status("VmRSS")
loaded = load_onto(reader, {n: Source(n) for n in abstract}, abstract)
jax.block_until_ready(loaded)
print(status("VmHWM") - before - sum(a.nbytes for a in loaded.values()))
"""


def test_restoring_on_fewer_devices_takes_little_more_than_the_arrays(tmp_path: Path) -> None:
    made(tmp_path / "source.safetensors", tensors=8, rows=1 << 15)  # eight of 64 MiB
    source = open_checkpoint(tmp_path / "source.safetensors")
    prepare(source, mesh=MeshSpec.parse("data=1,model=8"), hosts=2).run(tmp_path / "native", "reshard")
    for mesh in ("data=1,model=2", "data=1,model=4", "data=1,model=1"):
        answer = subprocess.run(
            [sys.executable, "-c", RESTORE, str(tmp_path / "native"), mesh], capture_output=True, text=True, check=True
        )
        # The loader's budget of slices under way, and a chunk for each of its threads.
        assert int(answer.stdout) < SLACK_BYTES + (64 << 20), mesh


# Row 22: a dtype that was not asked for is not given.


def test_a_stored_dtype_is_not_changed_unless_asked(tmp_path: Path) -> None:
    save({"w": jax.numpy.arange(8, dtype=np.int32), "f": jax.numpy.ones(8, np.float32)}, tmp_path / "saved")
    reader = open_checkpoint(tmp_path / "saved")
    sharding = NamedSharding(MeshSpec.parse("data=1,model=1").build(), PartitionSpec())
    wrong = {"w": jax.ShapeDtypeStruct((8,), np.float32, sharding=sharding)}
    with pytest.raises(CheckpointError, match="int32 is not cast to float32"):
        load_onto(reader, {"w": Source("w")}, wrong)
    (problem,) = verify(reader, dtype="bfloat16")
    assert (problem.tensor, problem.kind) == ("f", "dtype")
    assert "expected bfloat16" in str(problem)


def test_an_engine_keeps_the_stored_dtype(minilm: Path, tmp_path: Path) -> None:
    from spmd_infer.conversion import Changes

    prepare(open_checkpoint(minilm), Changes(dtype="bfloat16")).run(tmp_path / "half", "convert")
    assert Engine.load(tmp_path / "half", mesh="data=1,model=1").dtype == jax.numpy.bfloat16
    assert Engine.load(tmp_path / "half", mesh="data=1,model=1", dtype="float32").dtype == np.float32


def test_values_that_are_not_finite_are_found(tmp_path: Path) -> None:
    values = np.ones((64, 64), np.float32)
    values[5, 7] = np.nan
    values[9, 1] = np.inf
    save({"w": jax.numpy.asarray(values)}, tmp_path / "saved")
    (problem,) = verify(open_checkpoint(tmp_path / "saved"))
    assert problem.kind == "values"
    assert "2 of 4096 values are not finite, the first at [5, 7]" in str(problem)


@pytest.mark.parametrize("to", ["native", "huggingface"])
def test_damage_while_storing_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    """A disk that does not keep what it was given."""
    source, target = made(tmp_path / "source.safetensors"), tmp_path / "target"
    genuine, left = os.pwrite, [3]

    def pwrite(descriptor: int, raw: memoryview, offset: int) -> int:
        left[0] -= 1
        content = bytearray(raw)
        content[len(content) // 3] ^= (left[0] == 0) << 5
        return genuine(descriptor, content, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(CheckpointError, match=r"tensor 't\d\.weight'.*was written: the disk or memory may be failing"):
        copied(source, target, to)
    assert left[0] <= 0
    assert not target.exists()
    copied(source, target, to)  # goes on: what was damaged did not count as done
    assert read_all(target) == read_all(source)


@pytest.mark.parametrize("level", ["full", "fast", "off"])
@pytest.mark.parametrize("to", ["native", "huggingface"])
def test_a_damaged_source_is_not_copied_with_its_digests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, level: Verify
) -> None:
    """Chunks keep their digests, so they are compared even by a reader that was told not to."""
    monkeypatch.setattr("spmd_infer.checkpoints.native_reader.FAST_SAMPLES", 0)
    source, target = tmp_path / "source", tmp_path / "target"
    copied(made(tmp_path / "source.safetensors"), source, "native")
    _flip(source / "data/host-0000-0000.bin", 4321, 2)
    reader = open_checkpoint(source, verify=level)
    with pytest.raises(CheckpointError, match=r"tensor 't0\.weight' is damaged: bytes 0 to \d+ .* have BLAKE3"):
        store(reader, target, model=ModelEntry()) if to == "native" else store_hugging_face(reader, target)
    assert not target.exists()


def test_values_that_are_not_those_of_their_chunk_are_refused(tmp_path: Path) -> None:
    values = np.arange(12.0, dtype=np.float32).reshape(3, 4)
    kept = DataWriter(tmp_path).begin("w", (3, 4), values.dtype, None, [(((0, 3), (0, 4)), 0)])
    kept.put(kept.bands[0], values)
    known = {chunk.box: chunk for chunk in kept.end().chunks}
    again = DataWriter(tmp_path).begin("w", (3, 4), values.dtype, None, [(((0, 3), (0, 4)), 0)], known=known)
    again.put(again.bands[0], values, known)
    with pytest.raises(CheckpointError, match=r"tensor 'w': its part .* the checkpoint that it comes from is damaged"):
        again.put(again.bands[0], values + 1, known)


@pytest.mark.parametrize("to", ["native", "huggingface"])
def test_what_a_run_before_left_is_compared_as_well(tmp_path: Path, to: str) -> None:
    source, target = made(tmp_path / "source.safetensors"), tmp_path / "target"
    with pytest.raises(KeyboardInterrupt):
        copied(source, target, to, advance=_interrupt_after(3))
    work = tmp_path / ".target.partial"
    _flip(work / ("data/host-0000-0000.bin" if to == "native" else "model.safetensors"), 4321, 2)
    with pytest.raises(
        CheckpointError, match=r"bytes \d+ to \d+ have BLAKE3.*a run before .* remove .*target\.partial"
    ):
        copied(source, target, to)
    shutil.rmtree(work)
    copied(source, target, to)
    assert read_all(target) == read_all(source)


@pytest.mark.parametrize("to", ["native", "huggingface"])
def test_what_is_written_does_not_stay_in_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    source = made(tmp_path / "source.safetensors")
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda descriptor, offset, nbytes, advice: given.append((offset, nbytes)))
    monkeypatch.setattr("spmd_infer.checkpoints.output_files.WINDOW_BYTES", 2 << 20)
    copied(source, tmp_path / "target", to)
    tensors = SafetensorsReader(source).tensors.values()
    places = set(given)
    assert sum(nbytes for _, nbytes in places) == sum(info.nbytes for info in tensors) > 2 << 20
    again = sum(nbytes for _, nbytes in given) - sum(nbytes for _, nbytes in places)
    assert again == sum(info.nbytes for info in tensors) - (2 << 20)


def copied(source: Path, target: Path, to: str, **options: Any) -> None:
    """Write a checkpoint in one of the formats, as tensors of no model."""
    reader = SafetensorsReader(source)
    if to == "native":
        store(reader, target, model=ModelEntry(), **options)
    else:
        store_hugging_face(reader, target, **options)


def test_manifest_is_json_that_others_can_read(native: Path) -> None:
    document = json.loads((native / MANIFEST_NAME).read_text())
    assert document["format"] == "spmd-infer checkpoint"
    assert all(len(entry["sha256"]) == 64 for entry in document["data"])
