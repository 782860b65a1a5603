"""PyTorch files read without PyTorch against ``torch.load(weights_only=True)``, on files made on the spot."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from spmd_infer.checkpoints import open_checkpoint

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity


def same(path: Path, expected: Any = None) -> int:
    """Compare every tensor bit by bit with what PyTorch reads, or with what was saved; returns how many there were."""
    if expected is None:
        expected = torch.load(path, map_location="cpu", weights_only=True)
    expected = expected.get("state_dict", expected)
    reader = open_checkpoint(path)
    tensors = {name: value for name, value in expected.items() if isinstance(value, torch.Tensor)}
    assert set(reader.tensors) == set(tensors)
    for name, tensor in tensors.items():
        found = reader.read(name)
        assert found.shape == tuple(tensor.shape)
        dense = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach()).reshape(-1)
        assert found.tobytes() == dense.view(torch.uint8).numpy().tobytes(), name
    return len(tensors)


DTYPES = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.int16: np.int16,
    torch.int8: np.int8,
    torch.uint8: np.uint8,
    torch.bool: np.bool_,
    torch.complex64: np.complex64,
    torch.complex128: np.complex128,
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("seed", range(20))
def test_random_views(zipped: bool, seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    state = {}
    for number in range(20):
        dtype = list(DTYPES)[rng.integers(len(DTYPES))]
        shape = tuple(int(n) for n in rng.integers(1, 6, rng.integers(0, 5)))
        tensor = torch.from_numpy(np.asarray(rng.normal(size=shape) * 50)).to(dtype)
        state[f"whole{number}"] = tensor
        view = tensor.permute(*rng.permutation(len(shape)).tolist()) if shape else tensor
        for dimension in range(view.ndim):
            start = int(rng.integers(0, view.shape[dimension]))
            step = int(rng.integers(1, 3))
            view = view[(slice(None),) * dimension + (slice(start, None, step),)]
        state[f"view{number}"] = view
    path = tmp_path / "views.pth"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    assert same(path) == 40
    torch.save({"state_dict": state, "epoch": 3}, path, _use_new_zipfile_serialization=zipped)
    assert same(path) == 40
    reader = open_checkpoint(path)
    for name, tensor in state.items():
        assert reader.tensors[name].dtype == DTYPES[tensor.dtype]


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"])
def test_float8(dtype: str, tmp_path: Path) -> None:
    tensor = torch.randn(6, 4).to(getattr(torch, dtype))
    torch.save({"a": tensor, "b": tensor.t()}, tmp_path / "f8.pth")
    assert same(tmp_path / "f8.pth") == 2


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_and_a_real_module(protocol: int, tmp_path: Path) -> None:
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = torch.nn.Sequential(layer, torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    for state in (model.state_dict(), dict(model.named_parameters())):
        torch.save(state, tmp_path / "m.pt", pickle_protocol=protocol)
        # PyTorch's own weights_only reader knows protocol 2 only, and warns of or refuses the others.
        assert same(tmp_path / "m.pt", None if protocol == 2 else state) == len(state)


@pytest.mark.demo
def test_efficientnet(efficientnet: Path) -> None:
    assert same(efficientnet) == 296
