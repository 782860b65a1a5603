"""GGUF files: float tensors as they are, quantised ones dequantised to float32 slice by slice by the gguf package."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from spmd_infer.checkpoints.boxes import Box
from spmd_infer.checkpoints.file_bytes import FileBytes, aligned_empty
from spmd_infer.checkpoints.gguf_config import config_from_fields
from spmd_infer.checkpoints.gguf_header import StoredTensor, read_header
from spmd_infer.checkpoints.kept_quantised import KINDS, QuantisedSlice, unpack
from spmd_infer.checkpoints.reader import Index, TensorInfo, bounds, check_shape, find_tensor
from spmd_infer.errors import CheckpointError

SUFFIX = ".gguf"
_CHUNK = 1 << 16  # elements dequantised at a time: the package's temporaries then stay in the core's cache

_PLAIN: dict[GGMLQuantizationType, npt.DTypeLike] = {
    GGMLQuantizationType.F64: np.float64,
    GGMLQuantizationType.F32: np.float32,
    GGMLQuantizationType.F16: np.float16,
    GGMLQuantizationType.BF16: ml_dtypes.bfloat16,
    GGMLQuantizationType.I8: np.int8,
    GGMLQuantizationType.I16: np.int16,
    GGMLQuantizationType.I32: np.int32,
    GGMLQuantizationType.I64: np.int64,
}


class GgufReader:
    """Reader of one GGUF file; its metadata hold the file's fields, tokenizer and chat template among them."""

    stored = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path.parent
        self._bytes = FileBytes(path)
        header = read_header(self._bytes)
        parts = header.fields.get("split.count", 1)
        if parts not in (0, 1):
            number = header.fields.get("split.no", 0)
            raise CheckpointError(
                f"{path}: is part {number} (counted from 0) of {parts!s:.20}; "
                f"join the parts first (llama-gguf-split --merge)"
            )
        self.metadata: dict[str, Any] = header.fields
        self._stored = {tensor.name: tensor for tensor in header.tensors}
        self.tensors = {tensor.name: _describe(tensor, path) for tensor in header.tensors}
        name = header.fields.get("general.architecture")
        self.architecture: str | None = name if isinstance(name, str) else None
        self.config: dict[str, Any] = config_from_fields(header.fields, self.tensors, self.read)

    def read(self, name: str, index: Index | None = None) -> npt.NDArray[Any]:
        """One slice of a tensor, in memory of its own; see ``Reader.read``.

        Of a quantised tensor only the blocks that the slice touches are read.
        """
        info = find_tensor(self.tensors, name, self.path)
        tensor = self._stored[name]
        wanted = bounds(index, info)
        if tensor.kind in _PLAIN:
            return self._bytes.read(tensor.offset, info.shape, info.dtype, wanted)
        return self._read_blocks(tensor, wanted)

    def read_quantised(self, name: str, index: Index | None = None) -> QuantisedSlice | None:
        """One slice of a quantised tensor as it is stored.

        Args:
            name: the tensor.
            index: as for ``read``; the last dimension is cut between groups only.

        Returns:
            Numbers and scales; None where the tensor's type is not one of those that map exactly.

        Raises:
            CheckpointError: as for ``read``, and where a slice begins or ends within a group.
        """
        info = find_tensor(self.tensors, name, self.path)
        tensor, wanted = self._stored[name], bounds(index, info)
        if tensor.kind not in KINDS:
            return None
        (start, stop), width = wanted[-1], GGML_QUANT_SIZES[tensor.kind][0]
        if start % width or stop % width:
            raise CheckpointError(f"{info}: columns {start} to {stop} do not lie between groups of {width}")
        return unpack(tensor.kind, self._packed(tensor, wanted, start // width, stop // width))

    def _packed(self, tensor: StoredTensor, wanted: Box, first: int, last: int) -> npt.NDArray[np.uint8]:
        """Blocks ``[..., blocks, bytes]``: in the wanted rows, those from ``first`` to ``last``."""
        block, block_bytes = GGML_QUANT_SIZES[tensor.kind]
        shape = (*tensor.shape[:-1], tensor.shape[-1] // block, block_bytes)
        return self._bytes.read(tensor.offset, shape, np.uint8, (*wanted[:-1], (first, last), (0, block_bytes)))

    def _read_blocks(self, tensor: StoredTensor, wanted: Box) -> npt.NDArray[Any]:
        out = aligned_empty([stop - start for start, stop in wanted], np.float32)
        if out.size == 0:
            return out
        block, block_bytes = GGML_QUANT_SIZES[tensor.kind]
        start, stop = wanted[-1]
        first, last = start // block, -(-stop // block)  # the blocks of a row that hold its wanted columns
        packed = self._packed(tensor, wanted, first, last).reshape(-1, (last - first) * block_bytes)
        rows = out.reshape(-1, stop - start)
        many = max(1, _CHUNK // ((last - first) * block))
        skip = start - first * block
        for row in range(0, len(rows), many):
            # One long row at a time: the package works row group by row group, which is slow for short rows.
            part = _dequantize(packed[row : row + many].reshape(1, -1), tensor, self.path)
            part = part.reshape(-1, (last - first) * block)
            np.copyto(rows[row : row + many], part[:, skip : skip + stop - start])
        return out


def _dequantize(packed: npt.NDArray[np.uint8], tensor: StoredTensor, path: Path) -> npt.NDArray[Any]:
    try:
        # Scales of infinity or not-a-number give the same in the result, without a warning on the way.
        with np.errstate(all="ignore"):
            return dequantize(packed, tensor.kind)
    except NotImplementedError as error:
        raise CheckpointError(
            f"{path}: tensor {tensor.name!r} is stored as {tensor.kind.name}, which the gguf package cannot dequantise"
        ) from error


def _describe(tensor: StoredTensor, path: Path) -> TensorInfo:
    dtype: np.dtype[Any] = np.dtype(_PLAIN.get(tensor.kind, np.float32))
    check_shape(tensor.shape, dtype, tensor.name, path)
    assert tensor.kind not in _PLAIN or tensor.nbytes == math.prod(tensor.shape) * dtype.itemsize
    return TensorInfo(tensor.name, tensor.shape, dtype, tensor.nbytes, path, tensor.kind.name)
