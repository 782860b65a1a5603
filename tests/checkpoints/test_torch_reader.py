"""PyTorch files against the values that PyTorch itself saved (tests/references/torch_files.py)."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spmd_infer.checkpoints import open_checkpoint
from spmd_infer.errors import CheckpointError

FILES = Path(__file__).parents[1] / "fixtures" / "torch_files"


@pytest.fixture(scope="module")
def values() -> dict[str, np.ndarray]:
    with np.load(FILES / "values.npz") as stored:
        return dict(stored)


@pytest.mark.parametrize("file", ["zip.pth", "legacy.pth", "wrapped.pt"])
def test_every_layout_and_dtype(file: str, values: dict[str, np.ndarray]) -> None:
    reader = open_checkpoint(FILES / file)
    assert reader.stored == "pth"
    assert reader.config == {}
    assert reader.architecture is None
    assert len(reader.tensors) == 23
    for name, info in reader.tensors.items():
        expected = values[name]
        found = reader.read(name)
        assert info.shape == found.shape == expected.shape, name
        assert info.dtype == found.dtype == (ml_dtypes.bfloat16 if name == "bfloat16" else expected.dtype), name
        assert found.flags.c_contiguous
        np.testing.assert_array_equal(found.astype(expected.dtype), expected, err_msg=name)


@pytest.mark.parametrize("file", ["module.pth", "module_legacy.pth", "module_protocol4.pth"])
def test_state_dict_of_a_module(file: str, values: dict[str, np.ndarray]) -> None:
    reader = open_checkpoint(FILES / file)
    assert "1.num_batches_tracked" in reader.tensors
    for name in reader.tensors:
        np.testing.assert_array_equal(reader.read(name), values[f"module.{name}"])


def test_float8(values: dict[str, np.ndarray]) -> None:
    reader = open_checkpoint(FILES / "float8.pth")
    assert reader.tensors["float8"].dtype == ml_dtypes.float8_e4m3fn
    np.testing.assert_array_equal(reader.read("float8").astype(np.float32), values["float8"])


def test_whole_modules_and_lone_tensors_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"whole_module\.pth.*torch\.nn\.modules\.container\.Sequential"):
        open_checkpoint(FILES / "whole_module.pth")
    with pytest.raises(CheckpointError, match=r"lone_tensor\.pth: holds a lone tensor, expected a state dict"):
        open_checkpoint(FILES / "lone_tensor.pth")


READERS = {file: open_checkpoint(FILES / file) for file in ("zip.pth", "legacy.pth")}


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_slices_equal_slices_of_the_whole(data: st.DataObject) -> None:
    reader = READERS[data.draw(st.sampled_from(sorted(READERS)))]
    name = data.draw(st.sampled_from(sorted(reader.tensors)))
    index = []
    for size in reader.tensors[name].shape:
        start = data.draw(st.integers(0, size))
        index.append(slice(start, data.draw(st.integers(start, size))))
    np.testing.assert_array_equal(reader.read(name, tuple(index)), reader.read(name)[tuple(index)])


def test_reading_gives_memory_of_its_own() -> None:
    reader = READERS["zip.pth"]
    first = reader.read("matrix")
    kept = first.copy()
    first[:] = 0
    np.testing.assert_array_equal(reader.read("matrix"), kept)
    np.testing.assert_array_equal(reader.read("transposed"), kept.T)
