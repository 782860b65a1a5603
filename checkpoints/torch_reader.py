"""PyTorch state dicts (``.pth``, ``.pt``, ``.bin``) without PyTorch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spmd_infer.checkpoints.file_bytes import FileBytes, aligned_empty
from spmd_infer.checkpoints.folder_files import architecture_of, read_config
from spmd_infer.checkpoints.reader import (
    Index,
    TensorInfo,
    bounds,
    check_shape,
    find_tensor,
)
from spmd_infer.checkpoints.torch_containers import LEGACY_MAGIC, ZIP_MAGIC, Run, open_legacy, open_zip
from spmd_infer.checkpoints.torch_pickle import entries
from spmd_infer.checkpoints.torch_records import TensorRecord
from spmd_infer.errors import CheckpointError

HUGGING_FACE_STEM = "pytorch_model"
SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")

# Where training scripts put the state dict when they save more than it.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "weights", "params")


class TorchReader:
    """Reader of one PyTorch file; its tensors are those of the state dict, or of the one dict of tensors in it."""

    stored = "pth"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path.parent
        self._bytes = FileBytes(path)
        if self._bytes.head(len(ZIP_MAGIC)) == ZIP_MAGIC:
            value, runs = open_zip(self._bytes)
        elif self._bytes.head(len(LEGACY_MAGIC)) == LEGACY_MAGIC:
            value, runs = open_legacy(self._bytes)
        else:
            raise CheckpointError(
                f"{path}: begins with {self._bytes.head(8)!r}; expected a PyTorch zip archive or an older PyTorch file"
            )
        self._records = _state_dict(value, path)
        self._starts = {name: _place(name, record, runs, self._bytes) for name, record in self._records.items()}
        self.tensors: dict[str, TensorInfo] = {
            name: TensorInfo(
                name,
                record.shape,
                record.dtype,
                math.prod(record.shape) * record.dtype.itemsize,
                path,
                record.storage.kind,
            )
            for name, record in self._records.items()
        }
        # Beside any other name a config.json may be anyone's.
        is_hugging_face = path.name.startswith(HUGGING_FACE_STEM)
        self.config: dict[str, Any] = read_config(self.folder) if is_hugging_face else {}
        self.architecture = architecture_of(self.config)
        self.metadata: dict[str, Any] = {}

    def read(self, name: str, index: Index | None = None) -> npt.NDArray[Any]:
        """One slice of a tensor, in memory of its own and in C order; see ``Reader.read``."""
        info = find_tensor(self.tensors, name, self.path)
        record, start, wanted = self._records[name], self._starts[name], bounds(index, info)
        out = aligned_empty([b - a for a, b in wanted], record.dtype)
        if out.size == 0:
            return out
        order = _dense_order(record)
        if order is not None:
            shape = [record.shape[d] for d in order]
            box = self._bytes.read(start, shape, record.dtype, [wanted[d] for d in order])
            if order == tuple(range(len(order))):
                return box
            np.copyto(out, box.transpose(np.argsort(order)))
            return out
        # Neither dense nor a permutation: read what lies between the box's first and last element.
        first = sum(a * stride for (a, _), stride in zip(wanted, record.strides, strict=True))
        last = sum((b - 1) * stride for (_, b), stride in zip(wanted, record.strides, strict=True))
        itemsize = record.dtype.itemsize
        span = self._bytes.read(start + first * itemsize, (last - first + 1,), record.dtype, ((0, last - first + 1),))
        view = np.lib.stride_tricks.as_strided(span, out.shape, [stride * itemsize for stride in record.strides])
        np.copyto(out, view)
        return out


def is_torch(path: Path, head: bytes) -> bool:
    """Whether a file is a PyTorch one, by its suffix or its first bytes."""
    return path.is_file() and (path.suffix in SUFFIXES or head.startswith(LEGACY_MAGIC))


def _dense_order(record: TensorRecord) -> tuple[int, ...] | None:
    """The dimensions from outermost to innermost, where the tensor fills its memory; None where it has gaps."""
    order = sorted(range(len(record.shape)), key=lambda d: (-record.strides[d], d))
    # Dimensions of size 1 may have any stride: they are put first, where their stride does not count.
    order.sort(key=lambda d: record.shape[d] != 1)
    expected = 1
    for d in reversed(order):
        if record.shape[d] != 1 and record.strides[d] != expected:
            return None
        expected *= record.shape[d]
    natural = tuple(range(len(order)))
    in_order = [d for d in order if record.shape[d] != 1]
    return natural if in_order == sorted(in_order) else tuple(order)


def _state_dict(value: Any, path: Path) -> dict[str, TensorRecord]:
    top = entries(value)
    if top is None:
        kind = "a lone tensor" if isinstance(value, TensorRecord) else f"a {type(value).__name__}"
        raise CheckpointError(f"{path}: holds {kind}, expected a state dict of tensors by name")
    candidates = {key: _tensors_of(inner) for key, inner in top.items() if isinstance(key, str) and _tensors_of(inner)}
    for key in _WRAPPERS:
        if key in candidates:
            return candidates[key]
    direct = _tensors_of(value)
    if direct:
        return direct
    if len(candidates) == 1:
        return next(iter(candidates.values()))
    found = ", ".join(f"{key!r}" for key in list(candidates or top)[:8])
    raise CheckpointError(
        f"{path}: expected a state dict of tensors, or one of {', '.join(_WRAPPERS)} that holds it; "
        f"found {len(candidates)} dicts of tensors among {found or 'nothing'}"
    )


def _tensors_of(value: Any) -> dict[str, TensorRecord]:
    return {
        key: item
        for key, item in (entries(value) or {}).items()
        if isinstance(key, str) and isinstance(item, TensorRecord)
    }


def _place(name: str, record: TensorRecord, runs: Mapping[str, Run], source: FileBytes) -> int:
    """Where in the file a tensor's first element lies, after checking that all of it lies in its storage."""
    storage, itemsize = record.storage, record.dtype.itemsize
    run = runs.get(storage.key)
    if run is None:
        raise CheckpointError(
            f"{source.path}: tensor {name!r} lies in storage {storage.key!r}, which is not in the file"
        )
    check_shape(record.shape, record.dtype, name, source.path)
    if math.prod(record.shape) * itemsize > source.size:
        raise CheckpointError(
            f"{source.path}: tensor {name!r} of shape {list(record.shape)} takes more bytes than the file's "
            f"{source.size}"
        )
    unit = 1 if storage.dtype is None else storage.dtype.itemsize
    start, size = storage.view_of or (0, storage.size)
    if storage.dtype is not None and storage.dtype != record.dtype:
        raise CheckpointError(f"{source.path}: tensor {name!r} is {record.dtype}, but its storage {storage.dtype}")
    if (start + size) * unit > run.nbytes:
        raise CheckpointError(
            f"{source.path}: storage {storage.key!r} of tensor {name!r} should have {(start + size) * unit} bytes, "
            f"but has {run.nbytes}"
        )
    empty = 0 in record.shape
    reach = 0 if empty else 1 + sum((n - 1) * stride for n, stride in zip(record.shape, record.strides, strict=True))
    if (record.offset + reach) * itemsize > size * unit:
        raise CheckpointError(
            f"{source.path}: tensor {name!r} of shape {list(record.shape)} and strides {list(record.strides)} "
            f"from element {record.offset} on leaves its storage of {size * unit} bytes"
        )
    return run.offset + start * unit + record.offset * itemsize
