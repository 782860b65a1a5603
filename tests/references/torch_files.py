"""Writes tests/fixtures/torch_files/: small state dicts saved by PyTorch in both of its formats, and their values.

    python tests/references/torch_files.py

Needs torch (extra `parity`). The values lie in values.npz, in dtypes that numpy has (bfloat16 and float8 as float32).
"""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

FOLDER = Path(__file__).parents[1] / "fixtures" / "torch_files"


def tensors() -> "OrderedDict[str, torch.Tensor]":
    """Tensors of many dtypes and of every layout that a state dict may hold."""
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    line = torch.arange(40, dtype=torch.int64)
    return OrderedDict(
        matrix=base,
        transposed=base.t(),  # shares its storage with matrix
        row=base[2],
        column=base[:, 3],
        block=base[1:4, 2:7],
        every_second=line[1::2],
        scalar=torch.tensor(3.5),
        scalar_view=line[7],
        empty=torch.zeros(0, 5),
        expanded=torch.arange(3.0).expand(4, 3),
        channels_last=torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        hwio=torch.randn(3, 3, 2, 4).permute(3, 2, 0, 1),
        ones=torch.randn(1, 4, 1).permute(2, 1, 0),
        half=torch.randn(5).half(),
        bfloat16=torch.randn(3, 4).bfloat16(),
        double=torch.randn(4, dtype=torch.float64),
        int32=torch.arange(-3, 3, dtype=torch.int32),
        int16=torch.arange(-3, 3, dtype=torch.int16),
        int8=torch.arange(-3, 3, dtype=torch.int8),
        uint8=torch.arange(250, 256, dtype=torch.uint8),
        bool=torch.tensor([True, False, True]),
        complex64=torch.complex(torch.randn(3), torch.randn(3)),
        parameter=torch.nn.Parameter(torch.randn(2, 2)),
    )


def as_numpy(tensor: torch.Tensor) -> "np.ndarray[Any, Any]":
    """The values; the dtypes that numpy lacks widened to float32."""
    tensor = tensor.detach()
    if tensor.dtype in (torch.bfloat16, torch.float8_e4m3fn):
        tensor = tensor.float()
    return tensor.numpy()


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    state = tensors()
    torch.save(state, folder / "zip.pth")
    torch.save(state, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    torch.save(
        {"epoch": 3, "lr": 0.1, "names": ["a", "b"], "done": True, "state_dict": dict(state)}, folder / "wrapped.pt"
    )
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3), torch.nn.Linear(3, 2))
    torch.save(model.state_dict(), folder / "module.pth")
    torch.save(model.state_dict(), folder / "module_legacy.pth", _use_new_zipfile_serialization=False)
    torch.save(model.state_dict(), folder / "module_protocol4.pth", pickle_protocol=4)
    float8 = {"float8": torch.randn(4, 4).to(torch.float8_e4m3fn), "plain": torch.ones(2)}
    torch.save(float8, folder / "float8.pth")
    torch.save(model, folder / "whole_module.pth")  # a pickled program, which must be refused
    torch.save(torch.ones(3), folder / "lone_tensor.pth")
    everything = {**state, **{f"module.{k}": v for k, v in model.state_dict().items()}, **float8}
    np.savez_compressed(folder / "values.npz", **{name: as_numpy(tensor) for name, tensor in everything.items()})


if __name__ == "__main__":
    main(FOLDER)
