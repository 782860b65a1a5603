"""Boxes of arrays in a file: the right bytes, only those, in memory that a device can take over."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spmd_infer.checkpoints.file_bytes import FileBytes, aligned_empty
from spmd_infer.errors import CheckpointError

OFFSET = 13


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> FileBytes:
    file = tmp_path_factory.mktemp("bytes") / "data"
    rng = np.random.default_rng(0)
    file.write_bytes(rng.integers(0, 256, 9 << 20, dtype=np.uint8).tobytes())
    return FileBytes(file)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(0, 9), max_size=4),
    st.sampled_from([1, 700, 6000]),
    st.sampled_from([np.uint8, np.float16, np.int32, np.complex64]),
    st.data(),
)
def test_box_equals_slice_of_the_whole(
    source: FileBytes, dims: list[int], inner: int, dtype: type, data: st.DataObject
) -> None:
    shape = [*dims[:3], inner]
    itemsize = np.dtype(dtype).itemsize
    count = int(np.prod(shape))
    if count * itemsize + OFFSET > source.size:
        return
    whole = np.frombuffer(source.head(count * itemsize, OFFSET), dtype).reshape(shape)
    wanted = []
    for size in shape:
        start = data.draw(st.integers(0, size))
        wanted.append((start, data.draw(st.integers(start, size))))
    box = source.read(OFFSET, shape, dtype, wanted)
    expected = whole[tuple(slice(*w) for w in wanted)]
    assert box.shape == expected.shape
    assert box.tobytes() == expected.tobytes()  # bytes: random floats hold not-a-numbers
    assert box.flags.c_contiguous
    assert box.flags.writeable
    assert box.size == 0 or box.ctypes.data % 64 == 0


def test_only_the_rows_of_the_box_are_read(source: FileBytes, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, int]] = []
    genuine = os.preadv

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        read.append((offset, len(buffers[0])))
        return genuine(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    source.read(0, (1000, 1024), np.float32, ((10, 20), (0, 1024)))
    assert read == [(10 * 4096, 10 * 4096)]
    read.clear()
    # A few columns of long rows: row by row. Of short rows: through from the first to the last wanted byte.
    source.read(0, (100, 16384), np.float32, ((10, 20), (5, 6)))
    assert read == [(row * 65536 + 20, 4) for row in range(10, 20)]
    read.clear()
    source.read(0, (1000, 64), np.float32, ((10, 20), (5, 6)))
    assert read == [(10 * 256 + 20, 9 * 256 + 4)]


def test_a_file_that_shrinks_gives_an_error(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(bytes(1000))
    source = FileBytes(file)
    os.truncate(file, 600)
    with pytest.raises(CheckpointError, match=r"data: ends at byte 600.*had 1000 bytes when it was opened"):
        source.read(500, (200,), np.uint8, ((0, 200),))


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        FileBytes(tmp_path / "none")
    folder = FileBytes(tmp_path)
    with pytest.raises(CheckpointError, match="reading at byte 0 failed"):
        folder.fill(np.empty(4, np.uint8), 0)


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (1 << 20,)])
def test_aligned_memory(shape: tuple[int, ...]) -> None:
    array = aligned_empty(shape, np.float32)
    assert array.shape == shape
    assert array.dtype == np.float32
    assert array.ctypes.data % 64 == 0 or array.size == 0
