"""Weights onto devices: the right values on every mesh, each slice read once, in bounded host memory."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from spmd_infer.checkpoints import Index, Reader, load_onto, open_checkpoint, unused_tensors
from spmd_infer.checkpoints.boxes import Box, as_slices
from spmd_infer.checkpoints.file_bytes import aligned_empty
from spmd_infer.checkpoints.reader import TensorInfo
from spmd_infer.errors import CheckpointError
from spmd_infer.tensors import Source

RNG = np.random.default_rng(5)
TENSORS: dict[str, np.ndarray] = {
    "dense": RNG.normal(size=(16, 24)).astype(np.float32),
    "conv": RNG.normal(size=(8, 16, 3, 3)).astype(np.float32),
    "bias": RNG.normal(size=(24,)).astype(np.float32),
    "half": RNG.normal(size=(8, 8)).astype(np.float16),
    "brain": RNG.normal(size=(8, 8)).astype(ml_dtypes.bfloat16),
    "step": np.array(7, np.int32),
    "ids": np.arange(8, dtype=np.int64),
    "far": np.array([1 << 40], np.int64),
    "large": np.array([1e6, 1.0], np.float32),
    "fp8": RNG.normal(size=(8, 8)).astype(ml_dtypes.float8_e4m3fn),
    "fp8_scale_inv": np.ones((1,), np.float32),
    "position_ids": np.arange(4),
}


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    file = tmp_path_factory.mktemp("load") / "model.safetensors"
    save_file(TENSORS, file)
    return open_checkpoint(file)


class Watched:
    """A reader that keeps account of what is read through it."""

    def __init__(self, inner: Reader, change: Callable[[np.ndarray], np.ndarray] | None = None) -> None:
        self._inner = inner
        self._change = change
        self._lock = threading.Lock()
        self.reads: list[tuple[str, tuple[tuple[int, int], ...]]] = []
        self.under_way = 0
        self.most_under_way = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def read_into(self, name: str, box: Box, out: np.ndarray) -> None:
        np.copyto(out, self.read(name, as_slices(box)))

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        with self._lock:
            self.reads.append((name, tuple((s.start, s.stop) for s in index or ())))
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        array = self._inner.read(name, index)
        with self._lock:
            self.under_way -= 1
        return array if self._change is None else self._change(array)


def mesh_of(mesh_text: str) -> jax.sharding.Mesh:
    sizes = tuple(int(part.split("=")[1]) for part in mesh_text.split(","))
    count = sizes[0] * sizes[1]
    return jax.make_mesh(sizes, ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:count])


def wanted(mesh: jax.sharding.Mesh, shape: tuple[int, ...], dtype: Any, *spec: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))


def test_every_mesh_gives_the_same_weights(reader: Reader, mesh_text: str) -> None:
    mesh = mesh_of(mesh_text)
    table = {
        "rows": Source("dense"),
        "columns": Source("dense"),
        "block": Source("dense"),
        "turned": Source("dense", transpose=(1, 0)),
        "conv": Source("conv", transpose=(2, 3, 1, 0)),
        "whole": Source("bias"),
        "made": Source("dense", transform=lambda t: t.reshape(2, 8, 24).swapaxes(0, 1).reshape(16, 24) * 2),
        "made_turned": Source("dense", transpose=(1, 0), transform=lambda t: t[::-1]),
        "half": Source("half"),
        "brain": Source("brain"),
        "step": Source("step"),
    }
    abstract = {
        "rows": wanted(mesh, (16, 24), jnp.float32, "model"),
        "columns": wanted(mesh, (16, 24), jnp.float32, None, "model"),
        "block": wanted(mesh, (16, 24), jnp.bfloat16, "data", "model"),
        "turned": wanted(mesh, (24, 16), jnp.float32, "model", "data"),
        "conv": wanted(mesh, (3, 3, 16, 8), jnp.float32, None, None, "data", "model"),
        "whole": wanted(mesh, (24,), jnp.float32),
        "made": wanted(mesh, (16, 24), jnp.float32, ("data", "model")),
        "made_turned": wanted(mesh, (24, 16), jnp.float32, None, "model"),
        "half": wanted(mesh, (8, 8), jnp.float32, "data"),
        "brain": wanted(mesh, (8, 8), jnp.bfloat16, None, "data"),
        "step": wanted(mesh, (), jnp.int32),
    }
    loaded = load_onto(reader, table, abstract)
    dense = TENSORS["dense"]
    expected = {
        "rows": dense,
        "columns": dense,
        "block": dense.astype(ml_dtypes.bfloat16),
        "turned": dense.T,
        "conv": TENSORS["conv"].transpose(2, 3, 1, 0),
        "whole": TENSORS["bias"],
        "made": dense.reshape(2, 8, 24).swapaxes(0, 1).reshape(16, 24) * 2,
        "made_turned": dense.T[::-1],
        "half": TENSORS["half"].astype(np.float32),
        "brain": TENSORS["brain"],
        "step": TENSORS["step"],
    }
    assert list(loaded) == list(abstract)
    for path, array in loaded.items():
        assert array.sharding == abstract[path].sharding, path
        assert array.dtype == abstract[path].dtype, path
        np.testing.assert_array_equal(np.asarray(array), expected[path], err_msg=path)
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), expected[path][shard.index], err_msg=path)


def test_each_distinct_slice_is_read_once_and_no_more(reader: Reader) -> None:
    mesh = mesh_of("data=2,model=4")
    watched = Watched(reader)
    abstract = {
        "rows": wanted(mesh, (16, 24), jnp.float32, "model"),
        "turned": wanted(mesh, (24, 16), jnp.float32, "data"),
        "whole": wanted(mesh, (24,), jnp.float32),
    }
    load_onto(watched, {"rows": Source("dense"), "turned": Source("dense", (1, 0)), "whole": Source("bias")}, abstract)
    assert sorted(watched.reads) == sorted(
        [("dense", ((4 * i, 4 * i + 4), (0, 24))) for i in range(4)]
        + [("dense", ((0, 16), (12 * i, 12 * i + 12))) for i in range(2)]
        + [("bias", ((0, 24),))]
    )


def test_no_sharding_means_the_first_device(reader: Reader) -> None:
    array = load_onto(reader, {"b": Source("bias")}, {"b": jax.ShapeDtypeStruct((24,), jnp.float32)})["b"]
    assert array.devices() == {jax.devices()[0]}


def test_every_problem_is_listed_at_once(reader: Reader) -> None:
    shape = jax.ShapeDtypeStruct
    table = {
        "missing": Source("dents"),
        "shape": Source("dense"),
        "turned": Source("dense", transpose=(1, 0)),
        "rank": Source("bias", transpose=(1, 0)),
        "kind": Source("ids"),
        "scaled": Source("fp8"),
        "extra": Source("bias"),
        "fine": Source("bias"),
    }
    abstract = {
        "missing": shape((16, 24), jnp.float32),
        "shape": shape((16, 25), jnp.float32),
        "turned": shape((16, 24), jnp.float32),
        "rank": shape((24,), jnp.float32),
        "kind": shape((8,), jnp.float32),
        "scaled": shape((8, 8), jnp.float32),
        "unmapped": shape((3,), jnp.float32),
        "fine": shape((24,), jnp.float32),
    }
    watched = Watched(reader)
    with pytest.raises(CheckpointError) as caught:
        load_onto(watched, table, abstract)
    first, *lines = str(caught.value).splitlines()
    file = reader.path
    assert first == f"{file}: 8 of the model's 8 parameters cannot be loaded:"
    dense, bias = f"'dense' float32[16, 24] stored as F32 in {file}", f"'bias' float32[24] stored as F32 in {file}"
    scales = "its values are to be multiplied by 'fp8_scale_inv', which a cast would ignore"
    assert lines == [
        "  extra: read from 'bias', but the model has no such parameter",
        "  missing: expected float32[16, 24] from tensor 'dents', which the checkpoint does not have",
        f"  shape: expected float32[16, 25], found {dense}",
        f"  turned: expected float32[16, 24], found {dense} (transposed: [24, 16])",
        f"  rank: expected float32[24] with dimensions (1, 0) of {bias}, which has 1 dimensions",
        f"  kind: expected float32[8], found 'ids' int64[8] stored as I64 in {file}; int64 is not cast to float32",
        f"  scaled: expected float32[8, 8], found 'fp8' float8_e4m3fn[8, 8] stored as F8_E4M3 in {file}; {scales}",
        "  unmapped: no place in the checkpoint is known for it",
    ]
    assert watched.reads == []


def test_casts_that_lose_values_are_refused(reader: Reader) -> None:
    with pytest.raises(CheckpointError, match=r"'large' has values up to 1e\+06, which overflow float16"):
        load_onto(reader, {"a": Source("large")}, {"a": jax.ShapeDtypeStruct((2,), jnp.float16)})
    with pytest.raises(CheckpointError, match=r"'large' has values up to .* overflow float8_e4m3fn"):
        load_onto(reader, {"a": Source("large")}, {"a": jax.ShapeDtypeStruct((2,), jnp.float8_e4m3fn)})
    with pytest.raises(CheckpointError, match="'far' has values from 1099511627776 to 1099511627776, which overflow"):
        load_onto(reader, {"a": Source("far")}, {"a": jax.ShapeDtypeStruct((1,), jnp.int32)})
    narrow = load_onto(reader, {"a": Source("ids")}, {"a": jax.ShapeDtypeStruct((8,), jnp.int32)})["a"]
    np.testing.assert_array_equal(narrow, np.arange(8))


def test_float8_without_scales_is_cast_and_kept(reader: Reader) -> None:
    kept = load_onto(reader, {"a": Source("fp8")}, {"a": jax.ShapeDtypeStruct((8, 8), jnp.float8_e4m3fn)})["a"]
    assert kept.dtype == jnp.float8_e4m3fn
    np.testing.assert_array_equal(np.asarray(kept), TENSORS["fp8"])


def test_a_transform_of_the_wrong_shape_is_named(reader: Reader) -> None:
    source = Source("dense", transform=lambda t: t[:3])
    with pytest.raises(CheckpointError, match=r"w: expected shape \[16, 24\] from 'dense'.*transform made \[3, 24\]"):
        load_onto(reader, {"w": source}, {"w": jax.ShapeDtypeStruct((16, 24), jnp.float32)})


def test_progress_ends_at_the_total_in_the_calling_thread(reader: Reader) -> None:
    mesh = mesh_of("data=2,model=4")
    seen: list[tuple[int, int]] = []
    threads = set()

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        threads.add(threading.get_ident())

    abstract = {
        "rows": wanted(mesh, (16, 24), jnp.bfloat16, "model"),
        "whole": wanted(mesh, (24,), jnp.float32),
    }
    load_onto(reader, {"rows": Source("dense"), "whole": Source("bias")}, abstract, on_progress=progress)
    total = 16 * 24 * 2 + 24 * 4
    assert [t for _, t in seen] == [total, total]
    assert sorted(d for d, _ in seen) == [d for d, _ in seen]
    assert seen[-1][0] == total
    assert threads == {threading.get_ident()}


def test_a_small_budget_loads_one_weight_at_a_time(reader: Reader) -> None:
    table = {f"w{i}": Source("dense") for i in range(20)}
    abstract = {path: jax.ShapeDtypeStruct((16, 24), jnp.float32) for path in table}
    watched = Watched(reader)
    load_onto(watched, table, abstract, budget_bytes=1)
    assert watched.most_under_way == 1
    assert len(watched.reads) == 20


def test_a_read_that_fails_ends_the_loading(reader: Reader) -> None:
    def fail(array: np.ndarray) -> np.ndarray:
        raise CheckpointError("disk gone")

    table = {f"w{i}": Source("dense") for i in range(20)}
    abstract = {path: jax.ShapeDtypeStruct((16, 24), jnp.float32) for path in table}
    watched = Watched(reader, fail)
    with pytest.raises(CheckpointError, match="disk gone"):
        load_onto(watched, table, abstract)
    assert len(watched.reads) < 20
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


def test_unused_tensors_are_told_but_not_buffers(reader: Reader, caplog: pytest.LogCaptureFixture) -> None:
    table = {name: Source(name) for name in TENSORS if name not in ("bias", "position_ids", "far")}
    assert sorted(unused_tensors(reader, table)) == ["bias", "far"]
    with caplog.at_level(logging.INFO, "spmd_infer.checkpoints"):
        load_onto(reader, {"d": Source("dense")}, {"d": jax.ShapeDtypeStruct((16, 24), jnp.float32)})
    assert "tensors are not used" in caplog.text


class OneVector:
    """A reader that hands out memory that it does not give up: a memory map, or a buffer that it uses again."""

    stored = "test"
    path = folder = Path("memory")
    architecture = None

    def __init__(self, memory: np.ndarray) -> None:
        self.memory = memory
        self.config: dict[str, Any] = {}
        self.metadata: dict[str, Any] = {}
        self.tensors = {"v": TensorInfo("v", memory.shape, memory.dtype, memory.nbytes, self.path)}

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        return self.memory[index or ()]


def test_memory_that_a_reader_keeps_is_never_taken_over(tmp_path: Path) -> None:
    size = 1 << 16
    abstract = {"v": jax.ShapeDtypeStruct((size,), jnp.float32)}
    reused = aligned_empty((size,), np.float32)  # aligned: the device could take it over
    reused[:] = 1
    array = load_onto(OneVector(reused), {"v": Source("v")}, abstract)["v"]
    reused[:] = 2
    assert np.asarray(array).max() == 1

    file = tmp_path / "map"
    np.ones(size, np.float32).tofile(file)
    mapped = np.memmap(file, np.float32, "r+")
    array = load_onto(OneVector(mapped), {"v": Source("v")}, abstract)["v"]
    mapped[:] = 2
    mapped.flush()
    assert np.asarray(array).max() == 1


def test_memory_that_replicas_share_survives_the_donation_of_one(tmp_path: Path) -> None:
    # On a host, equal slices on several simulated devices share the buffer that the file was read into.
    values = np.arange(1 << 16, dtype=np.float32)
    save_file({"v": values}, tmp_path / "model.safetensors")
    opened = open_checkpoint(tmp_path)
    mesh = mesh_of("data=2,model=4")
    abstract = {"v": wanted(mesh, values.shape, jnp.float32)}
    first = load_onto(opened, {"v": Source("v")}, abstract)["v"]
    second = load_onto(opened, {"v": Source("v")}, abstract)["v"]
    parts = [jnp.asarray(shard.data) for shard in second.addressable_shards]
    changed = jax.jit(lambda v: v.at[3].set(-1), donate_argnums=0)(first)
    for shard in changed.addressable_shards:
        assert np.asarray(shard.data)[3] == -1
    single = jax.jit(lambda v: v * 0, donate_argnums=0)(parts[0])
    assert not np.asarray(single).any()
    for part in parts[1:]:
        np.testing.assert_array_equal(np.asarray(part), values)
    np.testing.assert_array_equal(opened.read("v"), values)
